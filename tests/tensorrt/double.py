"""A recording double of the module `tensorrt`, generated from the listings of the genuine one.

It is a double: it proves that our code calls what is there, with arguments that fit, in the documented order, and it
lets the chain compute real numbers. It says nothing about what TensorRT builds, how fast, or how exactly.

::

    def test_build(monkeypatch, tmp_path):
        double = install_double(monkeypatch, version="10.3")        # or "10.16", "11.4"
        api = load_api()                                            # sys.modules["tensorrt"] is the double now
        ...                                                         # build, deserialise, run
        assert double.names()[:2] == ["ILogger.__init__", "Builder.__init__"]
        double.check_order()                                        # profile -> shapes -> addresses -> enqueue

What is not in that version's listing raises AttributeError; a wrong count, keyword or kind of argument raises
TypeError; what is listed and not modelled raises NotImplementedError. Plans are bytes that hold the ONNX model.
Addresses are host pointers: `execute_async_v3` computes the model with ONNX Runtime on them.

Knobs, attributes of what `install_double` returns (and keyword arguments of it):
  no_device       True: Builder and Runtime raise what the genuine ones raise without a driver
  sm              compute capability, "8.7"; a plan of another one is refused
  fail_build      an error text: the next builds log it and return None
  on_step         called with (phase, step) before each build step is reported (to raise, to send a signal)
  build_steps     steps of the phase that the double reports
  on_enqueue      called with (stream, work) instead of running `work()`: a CUDA double keeps or captures it
  check_memory    called with (address, bytes, name) before a tensor's memory is touched; raise for a foreign address
For code that runs in a child process: `write_module(folder, version=...)`, and put `folder` on its PYTHONPATH.
"""

from __future__ import annotations

import enum
import json
import sys
from collections.abc import Callable
from dataclasses import dataclass, field
from importlib.machinery import ModuleSpec
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
from tests.tensorrt.double_build import BUILD_BEHAVIOURS
from tests.tensorrt.double_run import RUN_BEHAVIOURS
from tests.tensorrt.listing import Listing, Member, Signature, load_listing

BEHAVIOURS: dict[str, type] = {**BUILD_BEHAVIOURS, **RUN_BEHAVIOURS}
FULL_VERSIONS = {"10.3": "10.3.0.30", "10.16": "10.16.1.11", "11.4": "11.4.0.106"}


@dataclass
class Call:
    """One call, or the setting of a property ("IBuilderConfig.max_aux_streams="). `owner` tells objects apart."""

    name: str
    arguments: dict[str, Any]
    owner: int


@dataclass
class TensorRtDouble:
    """The module and what was called on it."""

    version: str
    listing: Listing
    module: ModuleType
    calls: list[Call] = field(default_factory=list)
    no_device: bool = False
    sm: str = "8.7"
    fail_build: str | None = None
    on_step: Callable[[str, int], None] | None = None
    build_steps: int = 4
    on_enqueue: Callable[[int, Callable[[], None]], None] | None = None
    check_memory: Callable[[int, int, str], None] | None = None
    calls_file: Path | None = None

    def names(self) -> list[str]:
        """The calls' names in their order."""
        return [call.name for call in self.calls]

    def of(self, name: str) -> list[Call]:
        """The calls of one name, "Builder.create_network"."""
        return [call for call in self.calls if call.name == name]

    def record(self, name: str, arguments: dict[str, Any], owner: object) -> None:
        """Keep a call, and write its name and plain arguments to `calls_file`."""
        self.calls.append(Call(name, arguments, id(owner)))
        if self.calls_file is not None:
            plain = {key: value for key, value in arguments.items() if isinstance(value, (int, str, bool))}
            plain |= {key: value.name for key, value in arguments.items() if isinstance(value, enum.Enum)}
            with self.calls_file.open("a", encoding="utf-8") as stream:
                stream.write(json.dumps({"name": name, "arguments": plain}) + "\n")

    def check_order(self) -> None:
        """AssertionError unless each context was first used in NVIDIA's order: profile, shapes, addresses, enqueue."""
        steps = {"set_optimization_profile_async": 0, "set_input_shape": 1, "set_tensor_address": 2}
        steps |= {"set_output_allocator": 2, "execute_async_v3": 3}
        seen: dict[int, list[str]] = {}
        for call in self.calls:
            owner, _, method = call.name.partition(".")
            if owner == "IExecutionContext" and method in steps:
                seen.setdefault(call.owner, []).append(method)
        for methods in seen.values():
            first = methods[: methods.index("execute_async_v3") + 1] if "execute_async_v3" in methods else methods
            order = [steps[method] for method in first]
            if order != sorted(order):
                raise AssertionError(f"not in the order profile, shapes, addresses, enqueue: {' '.join(first)}")


def create_double(version: str = "11.4", **knobs: Any) -> TensorRtDouble:
    """A double of its own; `.module` is the module."""
    listing = load_listing(version)
    module = ModuleType("tensorrt")
    module.__spec__ = ModuleSpec("tensorrt", None)  # importlib.util.find_spec asks for it
    double = TensorRtDouble(listing.version, listing, module, **knobs)
    module.__dict__["__version__"] = FULL_VERSIONS[listing.version]
    for name, members in listing.enums.items():
        module.__dict__[name] = _make_enum(name, members)
    severity = _make_enum("Severity", {"INTERNAL_ERROR": 0, "ERROR": 1, "WARNING": 2, "INFO": 3, "VERBOSE": 4})
    for name in sorted(listing.classes, key=lambda key: len(listing.bases[key])):  # bases before what inherits
        module.__dict__[name] = _make_class(name, double)
        if "Severity" in listing.classes[name]:
            type.__setattr__(module.__dict__[name], "Severity", severity)
            for member in severity:
                type.__setattr__(module.__dict__[name], member.name, member)
    for alias, member in listing.dtype_aliases.items():
        module.__dict__[alias] = module.__dict__["DataType"][member]
    module.__dict__["get_nv_onnx_parser_version"] = lambda: int(listing.version.split(".")[0]) * 10000
    return double


def install_double(monkeypatch: pytest.MonkeyPatch, version: str = "11.4", **knobs: Any) -> TensorRtDouble:
    """Put a double into `sys.modules["tensorrt"]` for the length of a test."""
    double = create_double(version, **knobs)
    monkeypatch.setitem(sys.modules, "tensorrt", double.module)
    return double


def write_module(folder: Path, version: str = "11.4", **knobs: Any) -> Path:
    """Write an importable `tensorrt.py` that is the double, for child processes: PYTHONPATH=folder. Plain knobs only.

    With `calls_file=PATH` each call of the child is appended there as a JSON line.
    """
    folder.mkdir(parents=True, exist_ok=True)
    settings = {key: str(value) if isinstance(value, Path) else value for key, value in knobs.items()}
    (folder / "tensorrt.py").write_text(
        "import sys\nfrom pathlib import Path\n"
        f"sys.path.append({str(Path(__file__).parents[2])!r})\n"
        "from tests.tensorrt.double import create_double\n"
        f"knobs = {settings!r}\n"
        "if 'calls_file' in knobs:\n    knobs['calls_file'] = Path(knobs['calls_file'])\n"
        f"sys.modules[__name__] = create_double({version!r}, **knobs).module\n"
    )
    return folder


class _TensorRtEnum(enum.Enum):
    """As pybind11's: a value of its own kind that `int()` turns into a number, not a number itself."""

    def __int__(self) -> int:
        return int(self.value)

    __index__ = __int__


def _make_enum(name: str, members: dict[str, int]) -> Any:
    names = sorted(members, key=lambda key: key == "WEIGHTLESS")  # a second name of STRIP_PLAN, it must come later
    make: Any = _TensorRtEnum  # the functional API, which a checker takes for a constructor
    return make(name, {key: members[key] for key in names})


def _make_class(name: str, double: TensorRtDouble) -> type:
    listing, behaviour = double.listing, BEHAVIOURS.get(name)
    bases = tuple(double.module.__dict__[base] for base in listing.bases[name] if base in listing.classes)
    space: dict[str, Any] = {"_double": double, "_name": name, "__setattr__": _guard}
    for key, member in listing.classes[name].items():
        if member.kind == "property":
            space[key] = _make_property(name, key, member, behaviour)
        elif key == "__init__" or (member.kind == "method" and not key.startswith("_") and key != "Severity"):
            space[key] = _make_method(name, key, member, behaviour)
        elif behaviour is not None and key in behaviour.__dict__:
            space[key] = behaviour.__dict__[key]  # __len__ and the like
    own = dict(behaviour.__dict__) if behaviour is not None else {}
    helpers = {key: value for key, value in own.items() if key.startswith("_") and not key.startswith("__")}
    return type(name, (*bases, *getattr(behaviour, "extends", ())), {**helpers, **space})


def _guard(self: Any, key: str, value: Any) -> None:
    """Names that the genuine class has not cannot be set on it; a subclass in Python may have its own."""
    owner = type(self)
    if owner.__dict__.get("_name") == owner.__name__ and not key.startswith("_"):
        member = self._double.listing.classes[owner.__name__].get(key)
        if member is None or member.kind != "property":
            raise AttributeError(f"'tensorrt.{owner.__name__}' object has no attribute {key!r}")
    object.__setattr__(self, key, value)


def _make_property(owner: str, key: str, member: Member, behaviour: type | None) -> property:
    compute = getattr(behaviour, f"read_{key}", None)
    store = getattr(behaviour, f"write_{key}", None)
    defaults: dict[str, Any] = getattr(behaviour, "defaults", {})

    def get(self: Any) -> Any:
        if compute is not None:
            return compute(self)
        if key not in self.__dict__.get("_values", {}) and key not in defaults:
            raise NotImplementedError(f"the double does not model tensorrt.{owner}.{key}")
        return self.__dict__.get("_values", {}).get(key, defaults.get(key))

    def put(self: Any, value: Any) -> None:
        self._double.record(f"{owner}.{key}=", {"value": value}, self)
        if store is not None:
            store(self, value)
        self.__dict__.setdefault("_values", {})[key] = value

    return property(get, put if member.writable else None)


def _make_method(owner: str, key: str, member: Member, behaviour: type | None) -> Callable[..., Any]:
    work = behaviour.__dict__.get(key) if behaviour is not None else None

    def method(self: Any, *args: Any, **kwargs: Any) -> Any:
        if key == "__init__" and not member.signatures:
            raise TypeError(f"tensorrt.{owner}: No constructor defined!")
        arguments = bind_arguments(self._double, f"{owner}.{key}", member.signatures, args, kwargs)
        self._double.record(f"{owner}.{key}", arguments, self)
        if key == "__init__":
            self.__dict__["_ready"] = True
            return work(self, **arguments) if work is not None else None
        if work is None:
            raise NotImplementedError(f"the double does not model tensorrt.{owner}.{key}")
        return work(self, **arguments)

    method.__name__ = key
    return method


def bind_arguments(
    double: TensorRtDouble, name: str, signatures: tuple[Signature, ...], args: Any, kwargs: Any
) -> dict[str, Any]:
    """The arguments by name, after the first overload that takes them; TypeError as pybind11 raises it."""
    for signature in signatures:
        by_name = dict(zip(signature.names, args, strict=False))
        parameters = {parameter.name: parameter for parameter in signature.parameters}
        if len(args) > len(parameters) or by_name.keys() & kwargs.keys() or kwargs.keys() - parameters.keys():
            continue
        by_name |= kwargs
        if any(parameter.required and parameter.name not in by_name for parameter in signature.parameters):
            continue
        if all(_fits(double, parameters[key].type, value, parameters[key].required) for key, value in by_name.items()):
            return by_name
    raise TypeError(f"tensorrt.{name}(): incompatible function arguments: {args!r} {kwargs!r}")


def _fits(double: TensorRtDouble, kind: str, value: Any, required: bool) -> bool:
    if value is None:
        return not required or kind in double.listing.classes
    if kind == "typing.SupportsInt":
        return hasattr(value, "__index__")
    plain: dict[str, Any] = {
        "str": str,
        "bool": bool,
        "tuple": tuple,
        "list": list,
        "typing.SupportsFloat": (int, float),
    }
    if kind in plain:
        return isinstance(value, plain[kind])
    if kind == "typing_extensions.Buffer":
        return isinstance(value, (bytes, bytearray, memoryview))
    if kind == "Dims":  # pybind11 makes Dims of any sequence
        return isinstance(value, (tuple, list)) or type(value).__name__.startswith("Dims")
    kind = "Severity" if kind == "ILogger.Severity" else kind
    if kind in double.listing.classes:
        if isinstance(value, double.module.__dict__[kind]) and "_ready" not in value.__dict__:
            raise TypeError(f"tensorrt.{kind}.__init__() must be called when overriding __init__")
        return isinstance(value, double.module.__dict__[kind])
    return kind not in double.listing.enums or type(value) is double.module.__dict__[kind]
