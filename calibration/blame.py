"""Which layer of a stage that missed its limit is to blame."""

from __future__ import annotations

import itertools
import tempfile
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

from ..bundle import Bundle
from ..errors import BridgeportError
from ..export.passes.standard_decoder import write_standard_decoder
from .compare import blame, compare_graphs
from .data_types import CalibrationData
from .feed import stage_inputs, with_empty_cache
from .gate import GateReport
from .outputs import find_nonfinite

# Calls of the stage that the layers are compared on.
_CALLS = 2


def blame_layers(
    report: GateReport, source: Bundle, candidate: Bundle, held_out: CalibrationData, say: Callable[[str], None]
) -> GateReport:
    """The report with a layer to blame for every stage whose cosine is too small.

    Where only the task was missed, it is that of the stage with the largest mean error. A layer that cannot be found is
    a note: the bundle is refused either way.
    """
    notes, verdicts = list(report.notes), []
    wanted = _stages_to_blame(report)
    for verdict in report.stages:
        if verdict.stage in wanted:
            say(f"judging: looking for the layer of {verdict.stage} that is to blame")
            try:
                layer, note = find_layer(verdict.stage, source, candidate, held_out)
            except BridgeportError as error:
                layer, note = None, f"its layers were not compared ({error})"
            verdict = replace(verdict, blame=layer)
            if note is not None:
                notes.append(f"{verdict.stage}: {note}")
        verdicts.append(verdict)
    return replace(report, stages=tuple(verdicts), notes=tuple(notes))


def find_layer(stage: str, source: Bundle, candidate: Bundle, data: CalibrationData) -> tuple[str | None, str | None]:
    """The layer of `candidate` that adds the largest error to what `source` computes in FP32, and what it computes
    where that is no number: the first NaN or infinity is to blame then. (None, None) without inputs.

    A decoder that was rewritten to standard operators is held against FP32 in the same operators. Raises what
    `compare_graphs` and `feed_stages` do.
    """
    # The reference has the form of the candidate, so its cache too.
    cache = candidate.manifest.kv_cache if stage == "llm" else None
    calls = itertools.islice(stage_inputs(source, data, stage), _CALLS)
    feeds = [with_empty_cache(cache, inputs) for inputs in calls]
    if not feeds:
        return None, None
    bad = find_nonfinite(candidate.graph(stage), feeds)
    if bad is not None:
        return bad.layer, bad.as_text()
    with tempfile.TemporaryDirectory(prefix="bridgeport-blame-") as folder:
        reference = source.graph(stage)
        if stage == "llm" and _shares_cache(source) != _shares_cache(candidate):
            reference = Path(folder) / "standard.onnx"
            write_standard_decoder(source.graph(stage), reference)
        worst = blame(compare_graphs(reference, candidate.graph(stage), feeds))
    return None if worst is None else worst.layer, None


def _stages_to_blame(report: GateReport) -> set[str]:
    # Written so that NaN is to blame.
    missed = {one.stage for one in report.stages if not one.min_token_cosine >= one.min_cosine}
    if missed or report.task is None or report.task.passed or not report.stages:
        return missed
    return {max(report.stages, key=lambda one: one.mean_rel).stage}


def _shares_cache(bundle: Bundle) -> bool | None:
    cache = bundle.manifest.kv_cache
    return None if cache is None else cache.shared_buffer
