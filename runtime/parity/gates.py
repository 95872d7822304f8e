"""The stages of a parity check, and how far each may be from PyTorch.

`docs/parity.md` has the error floors and the planted faults that these numbers stand between.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
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
# What rounding costs depends on the model and on the picture. These stand three to eight times above what right bundles
# showed: they tell a model from a ruin. A small fault is found in the FP32 bundle; docs/parity.md has the figures.
FP16 = Gate(max_abs=0.03, mean_abs=5e-3, min_token_cosine=1 - 1e-5)
FP16_LOGITS = Gate(max_abs=0.06, mean_abs=0.02, min_token_cosine=1 - 1e-4)
INT8 = Gate(max_abs=3.0, mean_abs=0.2, min_token_cosine=0.9)
FP8 = Gate(max_abs=3.0, mean_abs=0.4, min_token_cosine=0.9)
# Of a language model whose weights alone are rounded; 4 bits cost most on random weights. That a 4-bit graph for the
# CPU is right is judged against PyTorch with the same weights, by the gate of FP32.
INT8_LOGITS = Gate(max_abs=0.5, mean_abs=0.12, min_token_cosine=0.997)
INT4_LOGITS = Gate(max_abs=4.0, mean_abs=1.0, min_token_cosine=0.6)
# Of a chain in which encoder and connector round their activations.
INT8_CHAIN = Gate(max_abs=1.0, mean_abs=0.5, min_token_cosine=0.95)
FP8_CHAIN = Gate(max_abs=3.0, mean_abs=0.8, min_token_cosine=0.85)
_FEATURES = {"fp32": FP32, "fp16": FP16, "int8": INT8, "fp8": FP8}
_CHAIN = {"fp32": FP32_LOGITS, "fp16": FP16_LOGITS, "int8": INT8_CHAIN, "fp8": FP8_CHAIN, "int4": INT4_LOGITS}


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


_TOKENS: Mapping[str, Gate | None] = {"fp32": EXACT, "fp16": None, "int8": None, "fp8": None, "int4": None}
STAGES = (
    _same("pixels", None, fp32=PIXELS),
    _same("placeholder_ids", None, fp32=EXACT),
    _same("encoder", "encoder", **_FEATURES),
    _same("connector", "connector", **_FEATURES),
    _same("merged_embeddings", "embed_tokens", **_FEATURES),
    StageGates(
        "first_logits",
        "llm",
        isolated={"fp32": FP32_LOGITS, "fp16": FP16_LOGITS, "int8": INT8_LOGITS, "int4": INT4_LOGITS},
        chained=_CHAIN,
    ),
    StageGates(
        "tokens",
        "llm",
        # Rounded weights choose other tokens, the more so the less sure the model is: told, not judged.
        isolated=_TOKENS,
        chained=_TOKENS,
    ),
)
# From the finest to the coarsest, by the worst token of a stage with rounded activations.
PRECISIONS = ("fp32", "fp16", "int8", "fp8", "int4")


@dataclass(frozen=True)
class ChosenGates:
    """The gates of one stage of one bundle, with the precision of the stage that computes it."""

    stage: StageGates
    precision: str
    isolated: Gate | None
    chained: Gate | None


def coarsest(precisions: Sequence[str]) -> str:
    """The last of them in `PRECISIONS`; "fp32" of none."""
    return max(("fp32", *precisions), key=PRECISIONS.index)


def score_gate(precision: str, *, logits: bool) -> Gate:
    """Of a stage of a bundle that scores; `logits`: of what is made of the embeddings."""
    if precision not in _FEATURES:
        known = ", ".join(_FEATURES)
        raise UnsupportedError(f"parity has no gates for a bundle that scores at {precision}, only for {known}")
    return _CHAIN[precision] if logits else _FEATURES[precision]


def choose_gates(manifest: Manifest) -> tuple[ChosenGates, ...]:
    """The gates for a bundle's precisions, in the chain's order; UnsupportedError for one that has none."""
    chosen = []
    so_far = "fp32"
    for stage in STAGES:
        precision = "fp32" if stage.computed_by is None else manifest.stage(stage.computed_by).precision
        so_far = coarsest((so_far, precision))
        for kind, gates, wanted in (("", stage.isolated, precision), ("chained ", stage.chained, so_far)):
            if wanted not in gates:
                raise UnsupportedError(
                    f"parity has no {kind}gates for {stage.name} at {wanted}, only for {', '.join(gates)}; export the "
                    "bundle with --precision fp32, or quantise the stage to one of these"
                )
        chosen.append(ChosenGates(stage, precision, stage.isolated[precision], stage.chained[so_far]))
    return tuple(chosen)
