"""The stages of a parity check, and how far each may be from PyTorch.

`docs/parity.md` has the error floors and the planted faults that these numbers stand between.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

from ...errors import UnsupportedError
from ...manifest import Manifest
from .metrics import Gate

EXACT = Gate(max_abs=0.0, mean_abs=0.0, min_token_cosine=1.0)
# Decoded, resized and normalised the same way a picture is equal to the bit; one grey level is 0.015 of its
# scale.
PIXELS = Gate(max_abs=1e-5, mean_abs=1e-6, min_token_cosine=1 - 1e-9)
# Seven times what FP32 rounding leaves after 24 encoder layers and after a 12-layer Q-Former.
FP32 = Gate(max_abs=1e-4, mean_abs=2e-5, min_token_cosine=1 - 1e-9)
# An LLM's logits sum more terms behind more layers, and in a chain they carry every error before them.
FP32_LOGITS = Gate(max_abs=3e-4, mean_abs=5e-5, min_token_cosine=1 - 1e-8)
# Weight-only 4 bit against the checkpoint's own weights: what rounding costs depends on the model, and on random
# weights it costs most; so this gate only tells a model from a ruin. That the graph is right is judged against
# PyTorch with the same 4-bit weights, by the gate of FP32.
INT4_LOGITS = Gate(max_abs=4.0, mean_abs=0.6, min_token_cosine=0.8)


@dataclass(frozen=True)
class StageGates:
    """One stage of the check.

    `computed_by`: the bundle's stage that does, None for preprocessing. `isolated` and `chained`: precision
    -> gate; a gate of None measures without judging. A chained run is judged by the coarsest precision up to
    here.
    """

    name: str
    computed_by: str | None
    isolated: Mapping[str, Gate | None]
    chained: Mapping[str, Gate | None]


def _same(name: str, computed_by: str | None, **gates: Gate) -> StageGates:
    return StageGates(name, computed_by, gates, gates)


STAGES = (
    _same("pixels", None, fp32=PIXELS),
    _same("placeholder_ids", None, fp32=EXACT),
    _same("encoder", "encoder", fp32=FP32),
    _same("connector", "connector", fp32=FP32),
    _same("merged_embeddings", "embed_tokens", fp32=FP32),
    _same("first_logits", "llm", fp32=FP32_LOGITS, int4=INT4_LOGITS),
    StageGates(
        "tokens",
        "llm",
        # Rounded weights choose other tokens, the more so the less sure the model is: told, not judged.
        isolated={"fp32": EXACT, "int4": None},
        chained={"fp32": EXACT, "int4": None},
    ),
)
# From the finest to the coarsest.
_PRECISIONS = ("fp32", "fp16", "int8", "int4")


@dataclass(frozen=True)
class ChosenGates:
    """The gates of one stage of one bundle, with the precision of the stage that computes it."""

    stage: StageGates
    precision: str
    isolated: Gate | None
    chained: Gate | None


def choose_gates(manifest: Manifest) -> tuple[ChosenGates, ...]:
    """The gates for a bundle's precisions, in the chain's order; UnsupportedError for one that has none yet."""
    chosen = []
    coarsest = "fp32"
    for stage in STAGES:
        precision = "fp32" if stage.computed_by is None else manifest.stage(stage.computed_by).precision
        coarsest = max(coarsest, precision, key=_PRECISIONS.index)
        for kind, gates, wanted in (("", stage.isolated, precision), ("chained ", stage.chained, coarsest)):
            if wanted not in gates:
                raise UnsupportedError(
                    f"parity has no {kind}gates for {stage.name} at {wanted} yet, only for {', '.join(gates)}; "
                    "export the bundle with --precision fp32 or int4"
                )
        chosen.append(ChosenGates(stage, precision, stage.isolated[precision], stage.chained[coarsest]))
    return tuple(chosen)
