"""All that the adapter uses of `tensorrt` is in the listings of the genuine modules, for each version served."""

from __future__ import annotations

import ast
from pathlib import Path

import pytest
from tests.tensorrt.conformance import Checker
from tests.tensorrt.listing import VERSIONS, covered_by_10_3, load_listing, parse_signature

import bridgeport
from bridgeport.export import tensorrt as tensorrt_builds
from bridgeport.runtime import tensorrt
from bridgeport.runtime.tensorrt.versions import BUILDER_FLAGS, ENUMS, FEATURES, Version, has

FOLDER = Path(tensorrt.__file__).parent
FILES = {path.name: path.read_text() for path in sorted(FOLDER.glob("api*.py"))}
# Runs on boards that cannot install us, so it has calls of its own.
BOARD = Path(tensorrt_builds.__file__).parent / "board.py"
# What the adapter uses on 10.3 and the 10.3 listing does not speak of: taken to be there as it is in 10.16, and not
# checked against 10.3 itself.
TAKEN_FROM_10_16 = {
    "Dims",
    "ErrorCode",
    "ILogger",
    "IOutputAllocator",
    "IProfiler",
    "IProgressMonitor",
    "ITensor",
    "LayerInformationFormat",
    "NetworkDefinitionCreationFlag",
    "ParserError",
    "RuntimePlatform",
    "TensorIOMode",
    "TensorLocation",
}


def test_the_adapter_conforms() -> None:
    assert {"api.py", "api_base.py", "api_build.py", "api_run.py"} == set(FILES)
    assert Checker().check(FILES) == []


def test_what_runs_on_a_bare_board_conforms() -> None:
    assert Checker().check({BOARD.name: BOARD.read_text()}) == []


def test_what_10_3_is_known_to_have() -> None:
    checker = Checker()
    checker.check(FILES)
    covered = covered_by_10_3()
    owners = {owner for owner, _ in checker.used_on_10_3}
    assert owners - covered.keys() <= TAKEN_FROM_10_16
    unknown = {(owner, name) for owner, name in checker.used_on_10_3 if owner in covered and name != "__init__"}
    assert {(owner, name) for owner, name in unknown if name and name not in covered[owner]} == set()
    assert len(checker.used_on_10_3) > 90  # it did look


@pytest.mark.parametrize("version", VERSIONS)
def test_the_table_of_features_tells_what_the_listings_have(version: str) -> None:
    listing = load_listing(version)
    for feature in FEATURES:
        for name in FEATURES[feature].names:
            owner, _, member = name.partition(".")
            there = member in listing.enums.get(owner, {}) or member in listing.classes.get(owner, {})
            assert there == has(Version.parse(version), feature), f"{name} on {version}"
    for enum, members in ENUMS.items():
        for member, needs in members.items():
            available = needs is None or has(Version.parse(version), needs)
            assert (member in listing.enums[enum]) == available, f"{enum}.{member} on {version}"


def test_every_feature_has_a_source() -> None:
    assert [name for name, feature in FEATURES.items() if not feature.source] == []


def test_flags_that_exist_and_are_not_taken() -> None:
    """Only precision, which is the graph's, and what 11 ignores or has under a second name."""
    everywhere = {flag for version in VERSIONS for flag in load_listing(version).enums["BuilderFlag"]}
    precision = {
        "FP16",
        "BF16",
        "INT8",
        "FP8",
        "INT4",
        "FP4",
        "OBEY_PRECISION_CONSTRAINTS",
        "PREFER_PRECISION_CONSTRAINTS",
    }
    assert everywhere - BUILDER_FLAGS.keys() == {*precision, "REJECT_EMPTY_ALGORITHMS", "WEIGHTLESS", "SAFETY_SCOPE"}


def test_nothing_else_touches_the_module() -> None:
    """Nobody imports `tensorrt` but `load_api` and the board's script; nobody but these reads `api.trt`."""
    root = Path(bridgeport.__file__).parent
    # rglob does not follow the links that the four folders are.
    paths = [
        *root.glob("*.py"),
        *(path for folder in root.iterdir() if folder.is_dir() for path in folder.rglob("*.py")),
    ]
    assert len(paths) > 100
    outside = [path for path in sorted(paths) if path not in (BOARD, *(FOLDER / name for name in FILES))]
    assert len(paths) - len(outside) == len(FILES) + 1
    assert {str(path): found for path in outside if (found := touches(path.read_text(encoding="utf-8")))} == {}


def touches(text: str) -> list[str]:
    """Imports of the module and uses of the adapter's copy of it."""
    found = []
    for node in ast.walk(ast.parse(text)):
        names = [alias.name for alias in node.names] if isinstance(node, ast.Import) else []
        names += [node.module or ""] if isinstance(node, ast.ImportFrom) and node.level == 0 else []
        found += [name for name in names if name.split(".")[0] == "tensorrt"]
        found += [".trt"] if isinstance(node, ast.Attribute) and node.attr == "trt" else []
    return found


def test_uses_outside_of_the_adapter_are_found() -> None:
    assert touches("import tensorrt as trt") == ["tensorrt"]
    assert touches("from tensorrt.plugin import x") == ["tensorrt.plugin"]
    assert touches("api.trt.Builder(api.logger)") == [".trt"]
    assert touches("from ..tensorrt import api\nimport tensorrt_lean") == []


# The checker: each planted fault is found

HEAD = "class Api:\n    def call(self, config: trt.IBuilderConfig, engine: trt.ICudaEngine) -> None:\n        "
PLANTED = {
    "a class": ("self.trt.Buildr(self)", "10.3 has no Buildr"),
    "a method": ("config.set_flagg(self.trt.BuilderFlag.TF32)", "11.4 has no IBuilderConfig.set_flagg"),
    "a member": ("config.set_flag(self.trt.BuilderFlag.TF23)", "10.16 has no BuilderFlag.TF23"),
    "a keyword": ("config.set_flag(flags=self.trt.BuilderFlag.TF32)", r"set_flag takes \['flag'\]"),
    "too few arguments": ("config.set_timing_cache(config)", "set_timing_cache takes"),
    "too many arguments": ("config.reset(1)", "reset takes"),
    "computed arguments": ("config.reset(*())", "are computed"),
    "a property": ("config.max_workspace_size = 1", "10.3 has no IBuilderConfig.max_workspace_size"),
    "a property that is read": ("x = engine.num_bindings", "11.4 has no ICudaEngine.num_bindings"),
    "a property that cannot be set": ("engine.num_io_tensors = 1", "num_io_tensors cannot be set"),
    "a removed member": ("config.set_flag(self.trt.BuilderFlag.FP16)", "11.4 has no BuilderFlag.FP16"),
    "a removed property": ("x = engine.device_memory_size", "11.4 has no ICudaEngine.device_memory_size"),
    "a removed class": ("self.trt.IInt8Calibrator", "11.4 has no IInt8Calibrator"),
    "a later method": ("engine.get_engine_stat()", "10.3 has no ICudaEngine.get_engine_stat"),
    "a later class": (
        "x: trt.IRuntimeConfig = engine.create_runtime_config()",
        "10.3 has no ICudaEngine.create_runtime",
    ),
    "a removed member on the wrong side": (
        "if self.has('weak_typing'):\n            pass\n        else:\n"
        "            config.set_flag(self.trt.BuilderFlag.FP16)",
        "11.4 has no BuilderFlag.FP16",
    ),
    "a later method after a way out": (
        "if self.has('engine_stat'):\n            return\n        engine.get_engine_stat()",
        "10.3 has no ICudaEngine.get_engine_stat",
    ),
    "a name on what a call returns": ("config.get_timing_cache().save()", "has no ITimingCache.save"),
    "a property's value that is not annotated": ("x = config.progress_monitor\n        x.step()", "is not annotated"),
    "a wrong annotation": ("cache: trt.IHostMemory = config.get_timing_cache()", "annotated as IHostMemory"),
    "a computed name": ("getattr(self.trt.Builder, 'x')", "a name is computed"),
    "a member of a member": ("x = self.trt.DataType.FLOAT.size", "has no size"),
    "a name in a comprehension": (
        "x = [cache.saved for cache in [config.get_timing_cache() for i in (1, 2)]]",
        "has no ITimingCache.saved",
    ),
    "an annotation": ("x: trt.IHostMemry = config", "annotated as IHostMemry"),
    "an override": (
        "class Monitor(self.trt.IProgressMonitor):\n            def phase_begin(self, phase_name: str) -> None: ...",
        "no IProgressMonitor.phase_begin to override",
    ),
    "an override's arguments": (
        "class Monitor(self.trt.IProgressMonitor):\n            def phase_finish(self) -> None: ...",
        "phase_finish is called with",
    ),
    "an argument without a class": ("def inner(x) -> None: ...", "has no class that could be followed"),
}


@pytest.mark.parametrize("what", PLANTED)
def test_planted_names_are_found(what: str) -> None:
    line, why = PLANTED[what]
    findings = Checker().check({"planted.py": HEAD + line + "\n"})
    assert findings, f"{line} went through"
    with pytest.raises(AssertionError, match=why):
        raise AssertionError("\n".join(findings))


@pytest.mark.slow
def test_no_name_of_the_adapter_goes_unlooked_at() -> None:
    """Each name after `trt.` or on one of its objects, misspelt in turn, is found in the real files."""
    known: set[str] = set()
    for version in VERSIONS:
        listing = load_listing(version)
        known |= {*listing.classes, *listing.enums}
        known |= {name for members in listing.classes.values() for name in members}
        known |= {name for members in listing.enums.values() for name in members}
    missed, tried = [], 0
    for name, text in FILES.items():
        lines = text.split("\n")
        for node in ast.walk(ast.parse(text)):
            if isinstance(node, ast.Attribute) and node.attr in known and not _is_ours(ast.unparse(node)):
                row, column = (node.end_lineno or 0) - 1, node.end_col_offset
                misspelt = [*lines[:row], f"{lines[row][:column]}_x{lines[row][column:]}", *lines[row + 1 :]]
                tried += 1
                if not Checker().check({**FILES, name: "\n".join(misspelt)}):
                    missed.append(f"{name}:{row + 1}: {ast.unparse(node)}")
    assert missed == []
    assert tried > 200


def _is_ours(expression: str) -> bool:
    """Names of the adapter's own objects that TensorRT happens to have too."""
    owner = expression.rpartition(".")[0]
    ours = ("log", "self.log", "self.errors", "stream", "Version", "failures", "indices", "path", "progress", "owner")
    own = ("self.logger", "self.log", "self.log.errors.clear", "self.node", "self.operator", "self.code")
    return owner in ours or expression in own


@pytest.mark.parametrize(
    "line",
    [
        "config.set_flag(flag=self.trt.BuilderFlag.TF32)",
        "if self.has('weak_typing'):\n            config.set_flag(self.trt.BuilderFlag.FP16)",
        "if not self.has('engine_stat'):\n            return\n        engine.get_engine_stat()",
        "x = engine.get_engine_stat() if self.has('engine_stat') else None",
        "if config is not None and self.has('engine_stat'):\n            engine.get_engine_stat()",
        "cache: trt.ITimingCache = config.get_timing_cache()\n        cache.combine(cache, ignore_mismatch=False)",
    ],
)
def test_what_is_right_goes_through(line: str) -> None:
    assert Checker().check({"right.py": HEAD + line + "\n"}) == []


def test_signatures_are_read() -> None:
    text = (
        "2. f(self: tensorrt_bindings.tensorrt.X, a: collections.abc.Sequence[typing.SupportsInt], "
        "b: tensorrt_bindings.tensorrt.E = <E.STATIC: 0>) -> list[tensorrt_bindings.tensorrt.Dims]"
    )
    signature = parse_signature(text)
    assert signature.names == ["a", "b"]
    assert [parameter.required for parameter in signature.parameters] == [True, False]
    assert signature.parameters[1].type == "E"
    assert signature.returns == "list[Dims]"
