"""Polygraphy's linter over exported graphs.

The linter holds a model in memory several times over and serialises it, which stops at 2 GB. It looks at structure
(names, unused parts, shapes, operators, one run), so it gets a stand-in: the same graph in which all weights of one
shape are one weight. A model of forty layers is linted in the memory of one.
"""

from __future__ import annotations

import json
import subprocess
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import onnx_ir as ir

from ..errors import ExportError

# One process for all graphs, as most of a run is starting up. Arguments: a model and a report for each graph.
# Polygraphy has no `python -m`; `main` is what its script calls.
_LINT_ALL = """
import sys
from polygraphy.tools import main
pairs = sys.argv[1:]
for model, report in zip(pairs[::2], pairs[1::2]):
    sys.argv = ["polygraphy", "check", "lint", model, "-o", report]
    try:
        main()
    except SystemExit:
        pass
"""
_TIMEOUT_SECONDS = 900
_SHARE_FROM_ELEMENTS = 4096


def lint_graphs(
    graphs: Mapping[str, Path], scratch: Path, sizes: Mapping[str, Mapping[str, int]] | None = None
) -> dict[str, str]:
    """Lint every graph (stage -> file) in a process of its own; stage -> "clean".

    `scratch`: an empty directory for stand-ins and reports. `sizes`: stage -> axis -> size, for axes that cannot be 1,
    with which the linter runs every other one. Raises ExportError with the first finding.
    """
    arguments: list[str] = []
    for stage, path in graphs.items():
        stand_in = scratch / f"{stage}.onnx"
        write_stand_in(path, stand_in, (sizes or {}).get(stage, {}))
        arguments += [str(stand_in), str(scratch / f"{stage}.json")]
    try:
        done = subprocess.run(
            [sys.executable, "-c", _LINT_ALL, *arguments], capture_output=True, text=True, timeout=_TIMEOUT_SECONDS
        )
    except subprocess.TimeoutExpired:
        raise ExportError(
            f"check polygraphy_lint: no result after {_TIMEOUT_SECONDS} s; try again on an idle machine"
        ) from None
    return {stage: _read_report(stage, scratch / f"{stage}.json", done.stderr) for stage in graphs}


def write_stand_in(path: Path, out: Path, sizes: Mapping[str, int] | None = None) -> None:
    """The graph of `path` with one weight for each shape and type, written to `out` without external data.

    `sizes`: axes of its inputs that are fixed.
    """
    model = ir.load(path)
    firsts: dict[tuple[Any, ...], ir.Value] = {}
    for name, value in list(model.graph.initializers.items()):
        tensor = value.const_value
        if tensor is None or tensor.size < _SHARE_FROM_ELEMENTS:
            continue
        first = firsts.setdefault((tensor.dtype, tuple(tensor.shape.numpy())), value)
        if first is not value:
            ir.convenience.replace_all_uses_with(value, first)
            del model.graph.initializers[name]
    for value in model.graph.initializers.values():
        if isinstance(value.const_value, ir.ExternalTensor):
            value.const_value = ir.Tensor(value.const_value.numpy().copy(), name=value.name)
    for value in model.graph.inputs:
        if sizes and value.shape is not None:
            value.shape = ir.Shape(
                [dim if isinstance(dim, int) else sizes.get(dim.value or "", dim) for dim in value.shape]
            )
    ir.save(model, out)


def _read_report(stage: str, report: Path, errors: str) -> str:
    if not report.is_file():
        last = (errors.strip().splitlines() or ["no message"])[-1]
        raise ExportError(f"stage {stage}, check polygraphy_lint: it did not run ({last}); install polygraphy again")
    found = json.loads(report.read_text(encoding="utf-8"))
    entries = found.get("lint_entries", [])
    failing = found.get("summary", {}).get("failing", [])
    if entries or failing:
        first = f"nodes {failing[:3]} do not run"
        if entries:
            first = f"{entries[0].get('message')} (nodes {entries[0].get('nodes', [])[:3]})"
        raise ExportError(
            f"stage {stage}, check polygraphy_lint: {len(entries)} findings, the first: {first}; report this model"
        )
    return "clean"
