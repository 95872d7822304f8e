"""The genuine bindings, imported over stub libraries: they are what the listings say, and the adapter loads on them.

The wheels hold the Python module alone; the three libraries that it links to are stood in for by stubs of nine
functions that return nothing. So names, signatures, enums and subclasses are genuine here, and nothing can be built.

With a folder of wheels: BRIDGEPORT_TENSORRT_WHEELS=DIR pytest tests/tensorrt/test_live_bindings.py
Without one, the slow test fetches them from the package index: pytest -m slow tests/tensorrt/test_live_bindings.py
"""

from __future__ import annotations

import json
import os
import re
import shutil
import subprocess
import sys
import zipfile
from pathlib import Path
from typing import Any

import pytest
from tests.tensorrt.listing import load_listing, parse_signature

WHEELS = {"10.16": "tensorrt_cu12_bindings", "11.4": "tensorrt_cu13_bindings"}
PINS = {"10.16": "==10.16.1.11", "11.4": "==11.4.0.106"}
VARIABLE = "BRIDGEPORT_TENSORRT_WHEELS"
LIBRARIES = ("nvinfer", "nvinfer_plugin", "nvonnxparser")
FUNCTIONS = (
    "createInferBuilder_INTERNAL",
    "createInferRefitter_INTERNAL",
    "createInferRuntime_INTERNAL",
    "createNvOnnxParser_INTERNAL",
    "createNvOnnxParserRefitter_INTERNAL",
    "getBuilderPluginRegistry",
    "getPluginRegistry",
    "getNvOnnxParserVersion",
    "initLibNvInferPlugins",
)

# Runs in a process of its own: two versions of the module cannot live in one, and a fault in it ends the process.
START = """
import ctypes, json, os, sys
folder, *stubs = sys.argv[1:]
for stub in stubs:
    ctypes.CDLL(stub, ctypes.RTLD_GLOBAL)
sys.path.insert(0, folder)
import tensorrt_bindings as trt
sys.modules["tensorrt"] = trt
"""
DUMP = """
def told(member):
    if isinstance(member, property):
        return {"writable": member.fset is not None}
    return {"doc": (getattr(member, "__doc__", None) or "") if callable(member) else ""}
enums, classes = {}, {}
for name, value in vars(trt).items():
    if isinstance(value, type) and hasattr(value, "__members__"):
        enums[name] = {key: int(member) for key, member in value.__members__.items()}
    elif isinstance(value, type):
        classes[name] = {key: told(getattr(value, key)) for key in dir(value) if not key.startswith("_")}
        classes[name]["__init__"] = told(value.__init__)
print(json.dumps({"version": trt.__version__, "enums": enums, "classes": classes}))
"""
ADAPTER = """
from bridgeport.errors import EngineError
from bridgeport.runtime.tensorrt import api_base, versions
from bridgeport.runtime.tensorrt.api import BuildProgress, MessageLog, load_api
messages = []
api = load_api(MessageLog(lambda severity, text: messages.append([severity, text])))
api.logger.log(trt.ILogger.INFO, "said")
class Stops(BuildProgress):
    def step_complete(self, phase, step):
        raise KeyboardInterrupt
progress = Stops()
monitor = api._create_monitor(progress)
monitor.phase_start("phase", "", 2)
stops = monitor.step_complete("phase", 0)
class Memory: pass
made = [api._create_allocator(Memory()), api._create_profiler(print)]
genuine = [isinstance(made[0], trt.IOutputAllocator), isinstance(made[1], trt.IProfiler)]
refused = []
for call in (api.create_builder, api.create_runtime):
    try:
        call()
    except EngineError as error:
        refused.append(str(error))
flags = {
    name: int(api._builder_flag(name))
    for name, needs in versions.BUILDER_FLAGS.items() if needs is None or api.has(needs)
}
dtypes = [api_base.dtype_name(member) for member in trt.DataType.__members__.values()]
modes = [member.name for member in trt.TensorIOMode.__members__.values()]
print(json.dumps({
    "version": str(api.version), "messages": messages, "genuine": genuine, "stops": stops,
    "error": type(progress.error).__name__, "refused": refused, "flags": flags, "dtypes": dtypes, "modes": modes,
}))
"""


def find_wheel(folder: Path, version: str) -> Path:
    """The wheel for this interpreter; skips where there is none."""
    tag = f"cp{sys.version_info.major}{sys.version_info.minor}"
    found = sorted(folder.glob(f"{WHEELS[version]}-{version}.*-{tag}-*.whl"))
    if not found:
        pytest.skip(f"no {WHEELS[version]}-{version}.* wheel for {tag} in {folder}")
    return found[-1]


def download(folder: Path, version: str) -> Path:
    """Fetch the wheel; skips where the index does not give it."""
    package = WHEELS[version] + PINS[version]
    command = [sys.executable, "-m", "pip", "download", "--no-deps", "--quiet", "--dest", str(folder), package]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    if done.returncode:
        reason = (done.stderr.strip().splitlines() or ["pip gave no reason"])[-1]
        pytest.skip(f"{package} cannot be fetched: {reason}")
    return find_wheel(folder, version)


def build_stubs(folder: Path, major: str) -> list[Path]:
    """The three libraries, each with all functions; skips where there is no C compiler."""
    compiler = next((found for name in ("cc", "gcc", "clang") if (found := shutil.which(name))), None)
    if compiler is None:
        pytest.skip("no C compiler (cc, gcc, clang) to build stub libraries with")
    source = folder / "stub.c"
    source.write_text("".join(f"void *{name}(void) {{ return 0; }}\n" for name in FUNCTIONS))
    built = []
    for library in LIBRARIES:
        target = folder / f"lib{library}.so.{major}"
        command = [compiler, "-shared", "-fPIC", f"-Wl,-soname,{target.name}", "-o", str(target), str(source)]
        subprocess.run(command, check=True, capture_output=True)
        built.append(target)
    return built


def child(folder: Path, stubs: list[Path], code: str) -> Any:
    """The JSON that `code` prints in a process that has the genuine module as `trt`."""
    command = [sys.executable, "-c", START + code, str(folder), *map(str, stubs)]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    return json.loads(done.stdout)


def signature_texts(name: str, doc: str) -> list[str]:
    """What pybind11 puts at the top of a docstring: one line, or a numbered line per overload."""
    lines = re.findall(rf"^(?:\d+\. )?{name}\(.*\) -> .*$", doc, flags=re.MULTILINE)
    return [line.strip() for line in lines]


def compare(version: str, live: dict[str, Any]) -> list[str]:
    """Where the live module and the listing differ."""
    listing, found = load_listing(version), []
    if live["enums"] != listing.enums:
        found.append("enums differ")
    if live["classes"].keys() != listing.classes.keys():
        found.append(f"classes differ: {sorted(live['classes'].keys() ^ listing.classes.keys())}")
    for owner in live["classes"].keys() & listing.classes.keys():
        members = {key: member for key, member in listing.classes[owner].items() if key == "__init__" or key[0] != "_"}
        there = live["classes"][owner]
        found += [f"{owner}.{key} is in one of them" for key in sorted(members.keys() ^ there.keys())]
        for key in members.keys() & there.keys():
            texts = signature_texts(key, there[key].get("doc", ""))
            if tuple(parse_signature(text) for text in texts) != members[key].signatures:
                found.append(f"{owner}.{key}: {texts}")
            if there[key].get("writable", False) != members[key].writable:
                found.append(f"{owner}.{key}: writable differs")
    return found


def check_version(version: str, wheel: Path, tmp_path: Path) -> None:
    """Listing and adapter against one genuine module."""
    folder = tmp_path / "wheel"
    with zipfile.ZipFile(wheel) as archive:
        archive.extractall(folder)
    stubs = build_stubs(tmp_path, version.split(".")[0])
    live = child(folder, stubs, DUMP)
    assert live["version"].startswith(version)
    assert compare(version, live) == []
    live["enums"]["BuilderFlag"].pop("TF32")  # the comparison would see it
    live["classes"]["IBuilderConfig"].pop("set_flag")
    live["classes"]["Builder"]["create_network"]["doc"] = "create_network(self: Builder) -> None"
    assert len(compare(version, live)) == 3

    adapter = child(folder, stubs, ADAPTER)
    assert adapter["messages"] == [["info", "said"]]
    assert adapter["genuine"] == [True, True]
    assert (adapter["stops"], adapter["error"]) == (False, "KeyboardInterrupt")
    assert [text.split(":")[0] for text in adapter["refused"]] == [
        "TensorRT made no builder",
        "TensorRT made no runtime",
    ]
    listed = load_listing(version).enums
    assert adapter["flags"] == {name: listed["BuilderFlag"][name] for name in adapter["flags"]}
    assert len(adapter["dtypes"]) == len(listed["DataType"])
    assert adapter["modes"] == list(listed["TensorIOMode"])


@pytest.mark.parametrize("version", WHEELS)
def test_wheels_at_hand(version: str, tmp_path: Path) -> None:
    folder = os.environ.get(VARIABLE)
    if folder is None:
        pytest.skip(f"set {VARIABLE} to a folder with the tensorrt bindings' wheels, or run the slow test")
    check_version(version, find_wheel(Path(folder), version), tmp_path)


@pytest.mark.slow
@pytest.mark.parametrize("version", WHEELS)
def test_wheels_of_the_index(version: str, tmp_path: Path) -> None:
    check_version(version, download(tmp_path, version), tmp_path)
