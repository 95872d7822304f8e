"""`bridgeport doctor`: what this machine has and what it can run."""

from __future__ import annotations

import json
import os
import platform
from importlib import metadata, util
from pathlib import Path
from typing import Annotated, Any

import typer

from ...errors import BridgeportError

# What each ability needs, by distribution name.
_ABILITIES = {
    "run bundles (CPU)": ("numpy", "pillow", "tokenizers", "onnxruntime"),
    "run bundles (CUDA)": ("numpy", "pillow", "tokenizers", "onnxruntime-gpu"),
    "export checkpoints": (
        "torch", "transformers", "onnx", "onnx-ir", "onnxscript", "onnxruntime", "onnxruntime-genai", "polygraphy",
        "onnx-graphsurgeon", "safetensors",
    ),
    "check parity": ("torch", "transformers", "onnx", "onnxruntime"),
    "build and run TensorRT engines": ("numpy", "pillow", "tokenizers", "tensorrt", "cuda-python"),
}  # fmt: skip
_EXTRA = {
    "run bundles (CPU)": "cpu",
    "run bundles (CUDA)": "gpu",
    "export checkpoints": "export,cpu",
    "build and run TensorRT engines": "gpu",
}
_NEED_GPU = ("run bundles (CUDA)", "build and run TensorRT engines")
_SHOWN = (
    "onnxruntime",
    "onnxruntime-gpu",
    "onnxruntime-genai",
    "torch",
    "transformers",
    "onnx",
    "tensorrt",
    "cuda-python",
    "numpy",
)


def doctor(
    as_json: Annotated[bool, typer.Option("--json", help="Print one JSON document.")] = False,
) -> None:
    """Show this machine's processor, memory and libraries, and which verbs can work here."""
    report = examine()
    if as_json:
        typer.echo(json.dumps(report, indent=2))
        return
    _print(report)


def examine() -> dict[str, Any]:
    """The facts as plain data: `machine`, `gpu`, `libraries` (None when absent), `providers`, `abilities`."""
    libraries = {name: _version(name) for names in (*_ABILITIES.values(), _SHOWN) for name in names}
    libraries["cuda-python"] = libraries["cuda-python"] or _version("cuda-bindings")  # the part of it that is used
    device, abilities = gpu(libraries["tensorrt"]), {}
    for ability, needs in _ABILITIES.items():
        missing = [name for name in needs if libraries[name] is None]
        if ability == "run bundles (CPU)" and libraries["onnxruntime-gpu"]:
            missing = [name for name in missing if name != "onnxruntime"]
        why = device.get("why", "") if ability in _NEED_GPU else ""
        abilities[ability] = {"works": not missing and not why, "missing": missing} | ({"why": why} if why else {})
    return {
        "machine": machine(),
        "gpu": device,
        "libraries": libraries,
        "providers": _providers(),
        "abilities": abilities,
    }


def machine() -> dict[str, Any]:
    """Processor, instruction sets that matter for INT8 and bf16, cores, memory, Python; never the host's name."""
    info = _proc_fields(Path("/proc/cpuinfo"))
    flags = set(info.get("flags", info.get("Features", "")).split())
    wanted = (
        "avx2",
        "avx512f",
        "avx512_vnni",
        "avx_vnni",
        "avx512_bf16",
        "amx_int8",
        "amx_bf16",
        "asimddp",
        "i8mm",
    )
    memory = _proc_fields(Path("/proc/meminfo")).get("MemTotal", "")
    return {
        "system": platform.system(),
        "architecture": platform.machine(),
        "processor": info.get("model name") or platform.processor() or "unknown",
        "instruction_sets": [flag for flag in wanted if flag in flags],
        "cores": len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count(),
        "memory_gib": round(int(memory.split()[0]) / 2**20, 1) if memory else None,
        "python": platform.python_version(),
    }


def gpu(tensorrt: str | None) -> dict[str, Any]:
    """The first GPU as its driver tells it, or `why` none can be used. `tensorrt`: the version that it is for."""
    from ..tensorrt.machine import cuda_of_wheel, find_machine
    from ..tensorrt.versions import OLDEST

    try:
        found = find_machine(tensorrt or OLDEST, cuda_major=cuda_of_wheel())
    except BridgeportError as error:
        return {"why": str(error).removesuffix("; see `bridgeport doctor`")}
    facts = found.model_dump(include={"gpu", "compute_capability", "cuda", "driver", "jetpack"})
    return {**facts, "memory_gib": round(found.memory / 2**30, 1)}


def _proc_fields(path: Path) -> dict[str, str]:
    """`name: value` lines, the first of each name; empty where there is no such file (not Linux)."""
    if not path.is_file():
        return {}
    fields: dict[str, str] = {}
    for line in path.read_text(encoding="utf-8", errors="replace").splitlines():
        name, _, value = line.partition(":")
        fields.setdefault(name.strip(), value.strip())
    return fields


def _version(name: str) -> str | None:
    try:
        return metadata.version(name)
    except metadata.PackageNotFoundError:
        return None


def _providers() -> list[str]:
    if util.find_spec("onnxruntime") is None:
        return []
    import onnxruntime

    return [str(name) for name in onnxruntime.get_available_providers()]


def _print(report: dict[str, Any]) -> None:
    from rich.console import Console
    from rich.table import Table

    console = Console()
    facts = report["machine"]
    console.print(f"{facts['processor']}, {facts['cores']} cores, {facts['memory_gib']} GiB, {facts['architecture']}")
    console.print(f"instruction sets: {', '.join(facts['instruction_sets']) or 'none of interest'}")
    console.print(f"Python {facts['python']}; ONNX Runtime providers: {', '.join(report['providers']) or 'none'}")
    console.print(_gpu_text(report["gpu"]))
    libraries = Table("library", "version")
    for name in _SHOWN:
        libraries.add_row(name, report["libraries"][name] or "[dim]not installed[/]")
    console.print(libraries)
    abilities = Table("this machine can", "", "what to do")
    for ability, state in report["abilities"].items():
        extra, advice = _EXTRA.get(ability, "export,cpu"), state.get("why", "")
        if state["missing"]:
            advice = rf"pip install 'bridgeport\[{extra}]' (missing: {', '.join(state['missing'])})"
        abilities.add_row(ability, "[green]yes[/]" if state["works"] else "[red]no[/]", advice)
    console.print(abilities)


def _gpu_text(facts: dict[str, Any]) -> str:
    if "why" in facts:
        return f"GPU: none that can be used; {facts['why']}"
    driver, jetpack = facts["driver"] or "unknown", f", JetPack {facts['jetpack']}" if facts["jetpack"] else ""
    return (
        f"GPU: {facts['gpu']}, SM {facts['compute_capability']}, {facts['memory_gib']} GiB, driver {driver}, "
        f"CUDA {facts['cuda']}{jetpack}"
    )
