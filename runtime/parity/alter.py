"""Bring transformers' model to what a bundle was exported with and transformers does not know: fewer tokens, or a
connector from outside.

A reduction is stated here once more, in numpy and plain loops: nothing is shared with `models.reduction`, whose graph
it is held against. A custom connector exists once only; here it runs in PyTorch, between transformers' vision tower and
transformers' language model.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from itertools import groupby
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

from ...errors import UnsupportedError
from ...models.reduction_contract import Reduction

if TYPE_CHECKING:
    from ...models.checkpoint import VisionLanguageModel
    from ...models.stages import Layout
    from .taps import Taps

Features = NDArray[np.float32]
# Image tokens in a row, and the processor's output that they are in -> how many there have to be.
Counts = Callable[[int, Any], int]

# What transformers' processors give for every token of a prompt.
_PER_TOKEN = ("input_ids", "attention_mask", "token_type_ids", "mm_token_type_ids")

# Model types whose processor and model count features from the patch size.
_ANYRES = ("llava_next", "llava_next_video", "llava_onevision")
# Model kinds whose features are pooled in the grid of the picture, behind the whole vision tower.
_PICTURE_GRIDS = ("qwen2-vl", "qwen2.5-vl")
# Model kind -> the learned queries of transformers' model.
_QUERIES = {
    "blip-2": "query_tokens",
    "instructblip": "query_tokens",
    "instructblip-video": "query_tokens",
    "qwen-vl": "connector.attn_pool.query",
    "idefics2": "model.connector.perceiver_resampler.latents",
    "flamingo": "model.perceiver_resampler.latents",
}
# Connector of this package that no class of transformers has -> the learned queries of its module.
_OWN_QUERIES = {"simplified-qformer": "qformer.query_tokens"}


def describe(checkpoint: VisionLanguageModel) -> tuple[str, ...]:
    """What was done to transformers' model, a sentence each; `checkpoint` as the bundle has it."""
    notes = []
    if checkpoint.layout.custom_connector is not None:
        notes.append(
            f"transformers has no connector {checkpoint.layout.custom_connector!r}: its module, filled by its own name "
            "map, runs in PyTorch between transformers' vision tower and language model"
        )
    if checkpoint.layout.reduction is not None:
        notes.append(f"transformers knows no {checkpoint.layout.reduction}: {_how_reduced(checkpoint.layout)}")
    return tuple(notes)


def _how_reduced(layout: Layout) -> str:
    custom = layout.custom_connector
    if custom is None:
        return "parity's own statement of it is applied to transformers' connector"
    if layout.reduction is not None and layout.reduction.method == "queries" and custom not in _OWN_QUERIES:
        return f"{custom!r} leaves the queries out by its own keep_queries, as in the export"
    return f"parity's own statement of it is applied to {custom!r}"


def use_custom_connector(model: Any, checkpoint: VisionLanguageModel, taps: Taps) -> None:
    """Put the module that `checkpoint` names in the place of transformers' connector."""
    if checkpoint.layout.custom_connector is None:
        return
    if checkpoint.kind == "blip-2":
        model.qformer = _pass_on()
    parent, _, name = taps.image_features.module.rpartition(".")
    setattr(model.get_submodule(parent), name, checkpoint.connector)


def use_reduction(
    model: Any, processor: Any, original: VisionLanguageModel, altered: VisionLanguageModel, taps: Taps
) -> None:
    """Apply the reduction of `altered` to the connector in `model`, for good; nothing where there is none.

    `original`: the checkpoint before it. Raises UnsupportedError for queries in an unknown place.
    """
    reduction = altered.layout.reduction
    if reduction is None:
        return
    if original.kind == "instructblip-video":
        # There transformers counts the features of a frame from its config.
        model.config.num_query_tokens = _tokens(altered)
    if reduction.method == "queries":
        _cut_queries(model, reduction, original, taps)
        return
    if original.kind in _PICTURE_GRIDS:
        _pool_pictures(model, reduction.amount)
        return
    model.get_submodule(taps.image_features.module).register_forward_hook(
        lambda _module, _inputs, features: _reduced(features, reduction)
    )
    if model.config.model_type in _ANYRES:
        # To what transformers puts together, each window is a patch now.
        model.config.vision_config.patch_size *= reduction.amount
        _count_windows(processor, reduction.amount)


def _count_windows(processor: Any, stride: int) -> None:
    """LLaVA-NeXT's processor counts patches of a size, LLaVA-OneVision's those of a tile (and a class token)."""
    if hasattr(processor, "num_image_tokens"):
        class_token = processor.vision_feature_select_strategy == "default"
        processor.num_image_tokens = (processor.num_image_tokens - class_token) // stride**2 + class_token
    else:
        processor.patch_size *= stride


def _pool_pictures(model: Any, stride: int) -> None:
    """Pool what Qwen2-VL's vision tower gives of each picture, and let transformers place tokens in that grid.

    Not in the merger: that of 2.5 has the tokens in window order.
    """
    import torch

    inner, merged = model.model, model.config.vision_config.spatial_merge_size
    features, rope_index = inner.get_image_features, inner.get_rope_index

    def pooled_features(pixel_values: Any, image_grid_thw: Any, **options: Any) -> Any:
        found = features(pixel_values, image_grid_thw, **options)
        pictures = zip(found.pooler_output, image_grid_thw.tolist(), strict=True)
        found.pooler_output = tuple(
            torch.from_numpy(pool(one.detach().numpy(), stride, rows // merged)) for one, (_, rows, _) in pictures
        )
        return found

    def pooled_index(*args: Any, image_grid_thw: Any, **options: Any) -> Any:
        grids = [[time, *_windows(rows, columns, stride, merged)] for time, rows, columns in image_grid_thw.tolist()]
        return rope_index(*args, image_grid_thw=torch.tensor(grids) * torch.tensor([1, merged, merged]), **options)

    inner.get_image_features, inner.get_rope_index = pooled_features, pooled_index


def _windows(rows: int, columns: int, stride: int, merged: int) -> tuple[int, int]:
    """Rows and columns of windows over a picture of `rows` x `columns` patches; what is left at an edge is one too."""
    return len(range(0, rows // merged, stride)), len(range(0, columns // merged, stride))


def _cut_queries(model: Any, reduction: Reduction, original: VisionLanguageModel, taps: Taps) -> None:
    from torch import nn

    custom, kind = original.layout.custom_connector, original.kind
    if custom is not None and custom not in _OWN_QUERIES:
        for part in model.get_submodule(taps.image_features.module).modules():
            if hasattr(part, "keep_queries"):
                part.keep_queries(reduction.amount)
        return
    if custom is None and kind not in _QUERIES:
        raise UnsupportedError(f"parity of {reduction} knows {', '.join(_QUERIES)}; a {kind} is none of them")
    place = _QUERIES[kind] if custom is None else f"{taps.image_features.module}.{_OWN_QUERIES[custom]}"
    parent, _, name = place.rpartition(".")
    queries = model.get_parameter(place).detach()
    # [1, Q, D] or [Q, D].
    setattr(model.get_submodule(parent), name, nn.Parameter(queries[..., : reduction.amount, :]))


def placeholder_counts(original: VisionLanguageModel, altered: VisionLanguageModel) -> Counts | None:
    """How many image tokens in a row the altered model takes where the processor writes so many; None: as many.

    `original`: before the reduction, with the custom connector if there is one.
    """
    if altered.layout.custom_connector is not None:
        wanted = _tokens(altered)
        return lambda _, __: wanted
    if altered.layout.reduction is None or altered.config.model_type in _ANYRES or altered.kind == "flamingo":
        return None
    if original.kind in _PICTURE_GRIDS:
        return _count_picture(altered.layout.reduction.amount, altered.config.vision_config.spatial_merge_size)
    before, after = _tokens(original), _tokens(altered)
    return lambda count, _: count * after // before


def _count_picture(stride: int, merged: int) -> Counts:
    """Of a prompt's one picture, by the grid that the processor gives with it."""

    def count(_: int, inputs: Any) -> int:
        ((_, rows, columns),) = inputs["image_grid_thw"].tolist()
        return math.prod(_windows(rows, columns, stride, merged))

    return count


def fit_placeholders(inputs: Any, image_token: int, counts: Counts) -> Any:
    """A processor's output for one prompt, every run of image tokens as long as `counts` makes it."""
    import torch

    kept: list[int] = []
    start = 0
    for token, run in groupby(inputs["input_ids"][0].tolist()):
        length = len(list(run))
        kept += [start] * counts(length, inputs) if token == image_token else range(start, start + length)
        start += length
    for name in _PER_TOKEN:
        if name in inputs:
            inputs[name] = inputs[name][:, torch.tensor(kept)]
    return inputs


def _tokens(model: VisionLanguageModel) -> int:
    return int(model.contracts["connector"].outputs[0].shape[1])


def _reduced(features: Any, reduction: Reduction) -> Any:
    import torch

    apply: Callable[[Features, int], Features] = pool if reduction.method == "pool" else merge
    # Some give a map, [tiles, rows, columns, D].
    tiles = [apply(tile, reduction.amount) for tile in features.detach().flatten(1, -2).numpy()]
    return torch.from_numpy(np.stack(tiles))


def pool(tokens: Features, stride: int, rows: int | None = None) -> Features:
    """`[rows * columns, D]` (a square if `rows` is None) to the means of windows of `stride` x `stride`, row by row.

    A window that an edge cuts off is the mean of what is left of it.
    """
    rows = round(len(tokens) ** 0.5) if rows is None else rows
    grid = tokens.reshape(rows, len(tokens) // rows, -1)
    windows = [
        grid[top : top + stride, left : left + stride].mean(axis=(0, 1))
        for top in range(0, rows, stride)
        for left in range(0, grid.shape[1], stride)
    ]
    return np.stack(windows)


def merge(tokens: Features, count: int) -> Features:
    """`[N, D]` to `[N - count, D]`: bipartite soft matching (arXiv 2210.09461), one token after the other."""
    unit = [token / max(float(np.linalg.norm(token)), 1e-6) for token in tokens]
    pairs = []
    for even in range(0, len(tokens), 2):
        scores = [float(unit[even] @ unit[odd]) for odd in range(1, len(tokens), 2)]
        best = max(range(len(scores)), key=lambda i: (scores[i], -i))
        pairs.append((-scores[best], even, 2 * best + 1))
    groups = {place: [place] for place in range(len(tokens))}
    for _, even, odd in sorted(pairs)[:count]:
        groups[odd] += groups.pop(even)
    return np.stack([tokens[group].mean(axis=0) for group in groups.values()])


def _pass_on() -> Any:
    from torch import nn
    from transformers.modeling_outputs import BaseModelOutput

    class PassOn(nn.Module):
        def forward(self, encoder_hidden_states: Any, **_: Any) -> Any:
            return BaseModelOutput(last_hidden_state=encoder_hidden_states)

    return PassOn()
