"""The same build as a shell script, for machines where this package cannot be installed.

One script serves TensorRT 10.3 to 11.4: no precision flag stands in it (trtexec 11 has none any more), precision is in
the graphs and every network strongly typed (`--stronglyTyped` does nothing on 11, where all networks are).
"""

from __future__ import annotations

import re
import shlex
from collections.abc import Sequence
from typing import Literal

from ...bundle import Bundle
from ...engine_record import BuildOptions, EngineProfile, ShapeRange
from ...errors import InputError
from ...manifest import StageRecord
from .build import check_buildable
from .devices import check_precisions, describe_device, find_device, with_device_limits
from .profiles import bundle_profiles, stage_inputs

ScriptKind = Literal["trtexec", "polygraphy"]
KINDS: tuple[ScriptKind, ...] = ("trtexec", "polygraphy")
_BOUNDS = ("min", "opt", "max")
_LEVELS = {
    "trtexec": {"AMPERE_PLUS": "ampere+", "SAME_COMPUTE_CAPABILITY": "sameComputeCapability"},
    "polygraphy": {"AMPERE_PLUS": "AMPERE_PLUS", "SAME_COMPUTE_CAPABILITY": "SAME_COMPUTE_CAPABILITY"},
}
_TOOLS = {
    "trtexec": (
        "# trtexec comes with JetPack (/usr/src/tensorrt/bin) and NVIDIA's packages, not with the pip wheel.",
        'TRTEXEC=${TRTEXEC:-$(command -v trtexec || echo /usr/src/tensorrt/bin/trtexec)}',
    ),
    "polygraphy": (
        "# pip install polygraphy; it needs TensorRT's Python module.",
        "POLYGRAPHY=${POLYGRAPHY:-polygraphy}",
    ),
}  # fmt: skip


def emit_script(
    bundle: Bundle,
    kind: ScriptKind,
    profiles: Sequence[str] = (),
    *,
    options: BuildOptions | None = None,
    device: str = "local",
    root: str | None = None,
) -> str:
    """A POSIX shell script that builds every stage of `bundle` with trtexec or Polygraphy.

    `profiles`: values of `--profile`. `device`: whose memory limits it takes. `root`: the bundle's directory as the
    script finds it, by default its absolute path; the script's first argument names another. Engines go to `engines`,
    or to what the variable ENGINES says.

    Raises InputError for an unknown kind or device and for profiles outside of the contract, UnsupportedError for
    graphs that TensorRT cannot read or the device not compute.
    """
    if kind not in KINDS:
        raise InputError(f"--emit {kind!r} is unknown; accepted are {', '.join(KINDS)}")
    find_device(device)
    check_buildable(bundle)
    check_precisions(bundle.manifest, device)
    chosen = with_device_limits(options or BuildOptions(), device)
    plans = bundle_profiles(bundle.manifest, profiles)
    command = _trtexec if kind == "trtexec" else _polygraphy
    lines = list(_header(bundle, kind, chosen, device, root))
    for stage in bundle.manifest.stages:
        words = command(stage, _dynamic(stage, bundle, plans[stage.contract.name]), chosen)
        lines += ["", f"echo 'building {stage.contract.name}'", " \\\n  ".join(words)]
    return "\n".join([*lines, "", 'echo "engines are in $ENGINES"', ""])


def _header(bundle: Bundle, kind: ScriptKind, options: BuildOptions, device: str, root: str | None) -> Sequence[str]:
    place = shlex.quote(str(bundle.path.resolve()) if root is None else root)
    lines = [
        "#!/bin/sh",
        f"# Builds the TensorRT engines of {bundle.manifest.checkpoint.architecture} for {describe_device(device)}.",
        "# For TensorRT 10.3 to 11.4: networks are strongly typed, the graphs hold the precision.",
        f"# TF32 is {'on' if options.tf32 else 'off'}. An engine runs on the GPU and TensorRT of its build alone.",
        "# Usage: sh SCRIPT [BUNDLE]; ENGINES=DIR says where the engines go.",
        *_TOOLS[kind],
        "set -eu",
        'BUNDLE="${1:-}"',
        f'[ -n "$BUNDLE" ] || BUNDLE={place}',
        'ENGINES="${ENGINES:-engines}"',
        'mkdir -p "$ENGINES"',
    ]
    if kind == "trtexec" and options.tactic_dram_mib is not None:
        lines.append("# trtexec has no limit for the tactics' memory; Polygraphy and `bridgeport build` have one.")
    if options.hardware_compatibility == "SAME_COMPUTE_CAPABILITY":
        lines.append("# sameComputeCapability needs TensorRT 10.9 or newer.")
    return lines


def _trtexec(stage: StageRecord, profiles: list[dict[str, ShapeRange]], options: BuildOptions) -> list[str]:
    name = stage.contract.name
    words = [
        '"$TRTEXEC"',
        f'--onnx="$BUNDLE"/{stage.file}',
        f'--saveEngine="$ENGINES"/{name}.plan',
        "--stronglyTyped",
        "--skipInference",
        f"--builderOptimizationLevel={options.optimization_level}",
        "--profilingVerbosity=detailed",
        '--timingCacheFile="$ENGINES"/timing.cache',
    ]
    if options.workspace_mib is not None:
        words.append(f"--memPoolSize=workspace:{options.workspace_mib}")  # in MiB
    if options.hardware_compatibility != "NONE":
        words.append(f"--hardwareCompatibilityLevel={_LEVELS['trtexec'][options.hardware_compatibility]}")
    switches = {
        "--noTF32": not options.tf32,
        "--versionCompatible": options.version_compatible,
        "--stripWeights": options.strip,
        "--allowWeightStreaming": options.weight_streaming,
    }
    words += [switch for switch, wanted in switches.items() if wanted]
    for number, shapes in enumerate(profiles if profiles != [{}] else []):
        words += [f"--profile={number}"] if len(profiles) > 1 else []
        for at, bound in enumerate(_BOUNDS):
            sizes = ",".join(f"{_name(key)}:{'x'.join(map(str, shape[at]))}" for key, shape in shapes.items())
            words.append(f"--{bound}Shapes={sizes}")
    return words


def _polygraphy(stage: StageRecord, profiles: list[dict[str, ShapeRange]], options: BuildOptions) -> list[str]:
    name = stage.contract.name
    words = [
        f'"$POLYGRAPHY" convert "$BUNDLE"/{stage.file}',
        f'--convert-to trt -o "$ENGINES"/{name}.plan',
        "--strongly-typed",
        f"--builder-optimization-level {options.optimization_level}",
        "--profiling-verbosity detailed",
        '--load-timing-cache "$ENGINES"/timing.cache --save-timing-cache "$ENGINES"/timing.cache',
    ]
    pools = {"workspace": options.workspace_mib, "tactic_dram": options.tactic_dram_mib}
    if any(pools.values()):
        words.append("--pool-limit " + " ".join(f"{pool}:{size}M" for pool, size in pools.items() if size is not None))
    if options.hardware_compatibility != "NONE":
        words.append(f"--hardware-compatibility-level {_LEVELS['polygraphy'][options.hardware_compatibility]}")
    switches = {
        "--tf32": options.tf32,
        "--version-compatible": options.version_compatible,
        "--strip-plan": options.strip,
        "--weight-streaming": options.weight_streaming,
    }
    words += [switch for switch, wanted in switches.items() if wanted]
    for shapes in profiles if profiles != [{}] else []:
        for at, bound in enumerate(_BOUNDS):
            sizes = " ".join(f"'{_name(key)}:[{','.join(map(str, shape[at]))}]'" for key, shape in shapes.items())
            words.append(f"--trt-{bound}-shapes {sizes}")
    return words


def _dynamic(stage: StageRecord, bundle: Bundle, profiles: Sequence[EngineProfile]) -> list[dict[str, ShapeRange]]:
    """The shapes of inputs that have an axis; a graph without any needs no profile."""
    named = {
        spec.name for spec in stage_inputs(stage, bundle.manifest) if any(isinstance(dim, str) for dim in spec.shape)
    }
    return [{name: shape for name, shape in one.shapes.items() if name in named} for one in profiles]


def _name(name: str) -> str:
    """An input's name as both tools take it unquoted."""
    if re.fullmatch(r"[A-Za-z0-9_.]+", name) is None:
        raise InputError(f"input {name!r} cannot be written on a command line of trtexec; rename it in the graph")
    return name
