"""The scripts for trtexec and Polygraphy: every flag is one that the tool has, and a shell runs them."""

from __future__ import annotations

import argparse
import shlex
import subprocess
from importlib import import_module
from pathlib import Path
from typing import Any, get_args

import pytest
from tests.export.tensorrt.bundles import write_bundle

from bridgeport.bundle import Bundle
from bridgeport.engine_record import BuildOptions
from bridgeport.errors import InputError
from bridgeport.export.tensorrt.emit import KINDS, ScriptKind, emit_script

# trtexec's flags that the script may use, and the first release that has each; 11 has removed none of these.
# From `trtexec --help` of 10.4 (samples/common/sampleOptions.cpp), the 10.9 release for sameComputeCapability, and
# NVIDIA's skill trt-strong-typing-migration for what 11 removed.
TRTEXEC = {
    "--onnx": "10.0",
    "--saveEngine": "10.0",
    "--stronglyTyped": "10.0",
    "--skipInference": "10.0",
    "--builderOptimizationLevel": "10.0",
    "--profilingVerbosity": "10.0",
    "--timingCacheFile": "10.0",
    "--memPoolSize": "10.0",
    "--hardwareCompatibilityLevel": "10.0",
    "--noTF32": "10.0",
    "--versionCompatible": "10.0",
    "--stripWeights": "10.0",
    "--allowWeightStreaming": "10.0",
    "--profile": "10.0",
    "--minShapes": "10.0",
    "--optShapes": "10.0",
    "--maxShapes": "10.0",
}
REMOVED_IN_11 = {
    "--fp16", "--bf16", "--int8", "--fp8", "--int4", "--best", "--calib",
    "--precisionConstraints", "--layerPrecisions", "--layerOutputTypes",
}  # fmt: skip
EVERYTHING = BuildOptions(
    optimization_level=4,
    workspace_mib=512,
    tactic_dram_mib=1024,
    hardware_compatibility="AMPERE_PLUS",
    version_compatible=True,
    strip=True,
    weight_streaming=True,
)
PROFILES = ["batch=1", "batch=2,4,8"]


@pytest.fixture(scope="module")
def bundle(tmp_path_factory: pytest.TempPathFactory) -> Bundle:
    return write_bundle(tmp_path_factory.mktemp("emit") / "a bundle")  # with a space, as people have


def record_calls(script: str, kind: str, folder: Path, *arguments: str) -> list[list[str]]:
    """Run the script with a tool that writes down its arguments; the words of each call."""
    calls, tool, file = folder / "calls", folder / kind, folder / "build.sh"
    tool.write_text(
        f'#!/bin/sh\nprintf "%s\\n" "$@" >> {shlex.quote(str(calls))}\necho -- >> {shlex.quote(str(calls))}\n'
    )
    tool.chmod(0o755)
    file.write_text(script)
    subprocess.run(["sh", "-n", str(file)], check=True)
    environment = {"PATH": "/usr/bin:/bin", kind.upper(): str(tool), "ENGINES": str(folder / "engines")}
    subprocess.run(["sh", str(file), *arguments], check=True, env=environment, capture_output=True)
    assert (folder / "engines").is_dir()
    return [block.split("\n") for block in calls.read_text().strip().removesuffix("--").strip().split("\n--\n")]


@pytest.mark.parametrize("options", [BuildOptions(), EVERYTHING])
def test_trtexec(options: BuildOptions, bundle: Bundle, tmp_path: Path) -> None:
    calls = record_calls(emit_script(bundle, "trtexec", PROFILES, options=options), "trtexec", tmp_path)
    assert len(calls) == 4
    for call in calls:
        flags = {word.split("=")[0] for word in call}
        assert flags <= set(TRTEXEC)
        assert not flags & REMOVED_IN_11
        assert {"--stronglyTyped", "--noTF32"} <= flags
        assert Path(call[0].removeprefix("--onnx=")).is_file()
    assert "--maxShapes=pixel_values:8x3x4x4" in calls[0]
    assert [word for word in calls[0] if word.startswith("--profile=")] == ["--profile=0", "--profile=1"]
    assert sum(word.startswith("--profile=") for word in calls[3]) == 4  # prefill and decode of each
    assert any("past_key_values.0.key:1x1x0x8" in word for word in calls[3])
    if options is EVERYTHING:
        words = {"--memPoolSize=workspace:512", "--hardwareCompatibilityLevel=ampere+", "--stripWeights"}
        assert words | {"--versionCompatible", "--allowWeightStreaming"} <= set(calls[0])


@pytest.mark.parametrize("options", [BuildOptions(), EVERYTHING])
def test_polygraphy_parses_every_command(options: BuildOptions, bundle: Bundle, tmp_path: Path) -> None:
    """Polygraphy's own parser reads the words; it loads TensorRT at the build only."""
    tool = import_module("polygraphy.tools.convert").Convert()
    calls = record_calls(emit_script(bundle, "polygraphy", PROFILES, options=options), "polygraphy", tmp_path)
    for call in calls:
        assert call[0] == "convert"
        parser = _polygraphy_parser(tool)
        chosen, unknown = parser.parse_known_args(call)
        assert unknown == []
        assert chosen.strongly_typed is True
        assert bool(chosen.version_compatible) is options.version_compatible
    assert "pixel_values:[8,3,4,4]" in calls[0]
    assert calls[3].count("--trt-min-shapes") == 4
    assert ("--pool-limit" in calls[0]) is (options is EVERYTHING)
    assert "--tf32" not in calls[0]


def _polygraphy_parser(tool: Any) -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser()
    tool.setup_parser(parser.add_subparsers())
    return parser


def test_another_place_of_the_bundle_and_a_static_graph(bundle: Bundle, tmp_path: Path) -> None:
    script = emit_script(bundle, "trtexec", root="bundle")
    calls = record_calls(script, "trtexec", tmp_path, str(tmp_path / "elsewhere"))
    assert calls[0][0] == f"--onnx={tmp_path}/elsewhere/encoder/model.onnx"


def test_limits_of_a_device_and_what_trtexec_lacks(bundle: Bundle) -> None:
    script = emit_script(bundle, "trtexec", device="orin-nano")
    assert "--memPoolSize=workspace:1024" in script
    assert "# trtexec has no limit for the tactics' memory" in script
    assert "workspace:1024M tactic_dram:2048M" in emit_script(bundle, "polygraphy", device="orin-nano")


def test_unknown_tools_and_devices_are_refused(bundle: Bundle) -> None:
    assert get_args(ScriptKind) == KINDS
    with pytest.raises(InputError, match="--emit 'make' is unknown; accepted are trtexec, polygraphy"):
        emit_script(bundle, "make")  # type: ignore[arg-type]
    with pytest.raises(InputError, match="--device 'nano' is unknown"):
        emit_script(bundle, "trtexec", device="nano")
