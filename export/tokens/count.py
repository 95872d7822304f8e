"""Visual tokens, what is left of the context, and what encoder and connector cost: plain data for table and JSON."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from ...models.contract import StageContract
from .measure import ROUNDS, Timing, measure_stage, stage_inputs
from .pictures import PreparedPicture, Size, count_marks, lay_out, packs_features
from .subjects import Subject

Progress = Callable[[str], None]
Shapes = dict[str, tuple[int, ...]]


@dataclass(frozen=True)
class PictureReport:
    """One picture size.

    `encoder_tokens`: of all tiles together; None where only a module can tell and there is no torch. `features`: rows
    of the connector's output. `tokens`: what stands in the prompt for the picture; AnyRes leaves borders out and adds
    newlines, pooled patches are blended, Flamingo reads the features beside the prompt. `marks`: tokens of the texts
    around them, None where there is no tokenizer. `left`: of the context, 0 where the picture alone does not fit;
    `fits` tells. `unpadded_from`: `features` and what they would leave, where borders are left out of them. `flops`,
    `latency`: by stage.
    """

    size: str
    tiles: int
    encoder_tokens: int | None
    features: int
    tokens: int
    marks: int | None
    left: int | None
    fits: bool | None
    unpadded_from: dict[str, int] | None
    flops: dict[str, int] = field(default_factory=dict)
    latency: dict[str, Timing | None] = field(default_factory=dict)

    @property
    def compression(self) -> float | None:
        """Encoder tokens for one feature."""
        return None if self.encoder_tokens is None else self.encoder_tokens / self.features


@dataclass(frozen=True)
class ModelReport:
    """One model: `connector` is its module's class, `parameters` by part; both absent without torch."""

    name: str
    architecture: str
    source: str
    context: int | None
    connector: str | None
    parameters: dict[str, int]
    pictures: tuple[PictureReport, ...]


def count_tokens(
    subject: Subject,
    sizes: Sequence[Size],
    *,
    context: int | None = None,
    measure: bool = False,
    rounds: int = ROUNDS,
    progress: Progress | None = None,
) -> ModelReport:
    """Everything about `subject` for pictures of `sizes`.

    `context`: instead of the language model's own. `measure`: also time encoder and connector here.
    Raises InputError for a shape that the model's tiling does not take, and what `measure_stage` raises.
    """
    say = progress or (lambda _: None)
    window = context if context is not None else subject.context
    if subject.context is None:
        window = None  # a model that scores has no prompt
    meter = _Meter(subject, rounds if measure else 0, say)
    parameters, connector = meter.describe()
    return ModelReport(
        name=subject.name,
        architecture=subject.architecture,
        source=subject.source,
        context=window,
        connector=connector,
        parameters=parameters,
        pictures=tuple(_count_picture(subject, size, window, meter) for size in sizes),
    )


def _count_picture(subject: Subject, size: Size, context: int | None, meter: _Meter) -> PictureReport:
    meter.say(f"{subject.name}: {size}")
    picture = lay_out(size, subject.image)
    shapes = {name: array.shape for name, array in picture.tensors.items()}
    features = _rows(subject.contracts, "connector", shapes) or _features_of_tiling(subject, picture)
    marks = count_marks(picture.marks, subject.tokenizer) if subject.tokenizer and picture.marks else None
    if not picture.marks:
        marks = 0
    spent = picture.tokens + (marks or 0)
    packed = packs_features(subject.image) and context is not None
    cost = meter.cost(picture, shapes)
    return PictureReport(
        size=str(size),
        tiles=picture.tiles,
        encoder_tokens=cost.encoder_tokens or _rows(subject.contracts, "encoder", shapes),
        features=features,
        tokens=picture.tokens,
        marks=marks,
        left=None if context is None else max(0, context - spent),
        fits=None if context is None else spent <= context,
        unpadded_from={"tokens": features, "left": max(0, (context or 0) - features)} if packed else None,
        flops=cost.flops,
        latency=cost.latency,
    )


def _rows(contracts: Mapping[str, StageContract], stage: str, shapes: Shapes) -> int | None:
    """Rows of the output of `stage`, its dynamic axes read off the encoder's inputs; None where they do not tell."""
    if stage not in contracts:
        return None
    sizes: dict[str, int] = {}
    for spec in contracts["encoder"].inputs:
        for dim, size in zip(spec.shape, shapes[spec.name], strict=True):
            if isinstance(dim, str):
                sizes[dim] = size
    if {"height", "width"} <= sizes.keys():
        # Padded pictures: the least edge of the contract is a patch.
        patch = contracts["encoder"].axis("height").min
        sizes["tokens"] = (sizes["height"] // patch) * (sizes["width"] // patch)
    dims = [sizes.get(dim) if isinstance(dim, str) else dim for dim in contracts[stage].outputs[0].shape[:-1]]
    known = [dim for dim in dims if dim is not None]
    return math.prod(known) if len(known) == len(dims) else None


def _features_of_tiling(subject: Subject, picture: PreparedPicture) -> int:
    """The connector's rows as the image contract has them."""
    tiling: Any = subject.image.tiling
    if tiling.kind == "anyres":
        return int(tiling.side**2 * picture.tiles)
    return int(tiling.tokens * picture.tiles) if hasattr(tiling, "tokens") else picture.tokens


@dataclass(frozen=True)
class _Cost:
    encoder_tokens: int | None = None
    flops: dict[str, int] = field(default_factory=dict)
    latency: dict[str, Timing | None] = field(default_factory=dict)


class _Meter:
    """What needs the model's modules, as far as they can be built; modules are built once."""

    def __init__(self, subject: Subject, rounds: int, say: Progress) -> None:
        self.subject, self.rounds, self.say = subject, rounds, say
        self._modules: dict[str, Any] = {}

    def describe(self) -> tuple[dict[str, int], str | None]:
        """Parameters by part, and the connector's class."""
        if self.subject.layout is None:
            return {}, None
        from .modules import connector_name, count_parameters

        self.say(f"{self.subject.name}: counting parameters")
        return count_parameters(self.subject.layout), connector_name(self.subject.layout)

    def cost(self, picture: PreparedPicture, shapes: Shapes) -> _Cost:
        """FLOPs and, if asked for, latency of both stages."""
        if self.subject.layout is None:
            embeds = self._embeds(shapes)
            return _Cost(latency=self._latency(picture, embeds)) if self.rounds else _Cost()
        from .modules import module_on_meta, run_on_meta

        passes = {}
        for stage in ("encoder", "connector"):
            if stage not in self._modules:
                self._modules[stage] = module_on_meta(self.subject.layout.stages[stage])
            passes[stage] = run_on_meta(self._modules[stage], self.subject.layout.contracts[stage], shapes)
            shapes = {**shapes, "image_embeds": passes["encoder"].shape}
        embeds = passes["encoder"].shape
        return _Cost(
            encoder_tokens=math.prod(embeds[:-1]),
            flops={stage: one.flops for stage, one in passes.items()},
            latency=self._latency(picture, embeds) if self.rounds else {},
        )

    def _embeds(self, shapes: Shapes) -> tuple[int, ...] | None:
        """Shape of the encoder's output, as far as its contract tells."""
        rows = _rows(self.subject.contracts, "encoder", shapes)
        leading = next(iter(shapes["pixel_values"]))
        width = self.subject.contracts["encoder"].outputs[0].shape[-1] if rows else None
        return (leading, rows // leading, width) if rows and isinstance(width, int) else None

    def _latency(self, picture: PreparedPicture, embeds: tuple[int, ...] | None) -> dict[str, Timing | None]:
        found: dict[str, Timing | None] = {}
        for stage in ("encoder", "connector"):
            contract = self.subject.contracts[stage]
            names = {spec.name for spec in contract.inputs}
            given = {name: array for name, array in picture.tensors.items() if name in names}
            self.say(f"{self.subject.name}: timing the {stage}")
            found[stage] = measure_stage(self.subject, stage, stage_inputs(contract, given, embeds), self.rounds)
        return found
