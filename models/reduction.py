"""Token reduction: a connector that gives the language model fewer tokens than its checkpoint's does.

Average pooling of the grid that a projector keeps; token merging (Bolya et al. 2022, "Token Merging: Your ViT But
Faster", arXiv 2210.09461); the first of the learned queries. None of them is trained for: what it costs is measured
in docs/token-reduction.md.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import replace
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from ..errors import InputError, UnsupportedError
from .contract import Axis, StageContract
from .flamingo_contract import IMAGE_SEQUENCE
from .pooling import WindowPooling
from .projector import LinearProjector, MlpProjector
from .stages import Layout, Stage

if TYPE_CHECKING:
    from .checkpoint import VisionLanguageModel
    from .reduction_contract import Reduction

# Of a vector of zeros, whose cosine with any other is then 0.
_LEAST_NORM = 1e-6


class TokenMerging(nn.Module):
    """One round of bipartite soft matching: `count` tokens are merged into those that they resemble most.

    Tokens at even places each find their most similar token at an odd place (cosine of the tokens themselves; the
    paper has the keys of an attention layer, which a connector's output has not). The `count` most similar pairs are
    merged; a merged token is the mean of all that came together. What is left keeps its order. Of equal similarities
    the first place counts. Any `count` up to half of the tokens gives `N - count` tokens, whatever the picture.
    """

    def __init__(self, count: int) -> None:
        super().__init__()
        self.count = count

    def forward(self, tokens: Tensor) -> Tensor:
        """`[B, N, D]` to `[B, N - count, D]`, `N` static."""
        num_tokens = tokens.shape[1]
        even, odd = tokens[:, 0::2], tokens[:, 1::2]
        slots = self._slots(even, odd)
        places = torch.arange(num_tokens - self.count, device=tokens.device)
        # [B, N - count, N]: which tokens come together at which place.
        groups = (slots[:, None, :] == places[None, :, None]).to(tokens.dtype)
        sizes = groups.sum(dim=2, keepdim=True)
        return groups @ torch.cat([even, odd], dim=1) / sizes

    def _slots(self, even: Tensor, odd: Tensor) -> Tensor:
        """The place in the output of each token, the even ones first: int64 `[B, N]`."""
        similarity = _unit(even) @ _unit(odd).transpose(1, 2)
        best, partner = similarity.amax(dim=2), similarity.argmax(dim=2)
        merged = self._chosen(best)
        gone = merged.long().cumsum(dim=1)
        # Of the places before a token, those of merged tokens fall away.
        odd_slots = 2 * torch.arange(odd.shape[1], device=odd.device) + 1 - gone[:, : odd.shape[1]]
        own = 2 * torch.arange(even.shape[1], device=even.device) - gone
        even_slots = torch.where(merged, odd_slots.gather(1, partner), own)
        return torch.cat([even_slots, odd_slots], dim=1)

    def _chosen(self, best: Tensor) -> Tensor:
        """bool `[B, M]`: the `count` largest of `best`. By comparing pairs, because what TopK makes of equal values
        differs from one engine to the next."""
        index = torch.arange(best.shape[1], device=best.device)
        earlier = index[None, :] < index[:, None]
        ahead = (best[:, None, :] > best[:, :, None]) | ((best[:, None, :] == best[:, :, None]) & earlier)
        return ahead.long().sum(dim=2) < self.count


def _unit(tokens: Tensor) -> Tensor:
    lengths: Tensor = torch.linalg.vector_norm(tokens, dim=-1, keepdim=True)
    return tokens / lengths.clamp(min=_LEAST_NORM)


class _Reduced(nn.Module):
    """A connector and what reduces its output, in one graph. `vectors` (`Stage.vectors`) move up to this module."""

    def __init__(self, connector: nn.Module, reducer: nn.Module, vectors: tuple[str, ...] = ()) -> None:
        super().__init__()
        for name in vectors:
            setattr(self, name, connector.get_parameter(name))
            delattr(connector, name)
        self.connector, self.reducer = connector, reducer


class ReducedConnector(_Reduced):
    """Behind a connector that reads the picture alone."""

    def forward(self, image_embeds: Tensor) -> Tensor:
        """`image_embeds` `[B, N, Dv]` to `image_features` `[B, Q, D]`."""
        features: Tensor = self.reducer(self.connector(image_embeds))
        return features


class ReducedMasked(_Reduced):
    """Behind a connector that reads which pixels are picture (Idefics2)."""

    def forward(self, image_embeds: Tensor, pixel_attention_mask: Tensor) -> Tensor:
        """As the connector's own; `image_features` `[B, Q, D]`."""
        features: Tensor = self.reducer(self.connector(image_embeds, pixel_attention_mask))
        return features


class ReducedInstructed(_Reduced):
    """Behind a connector that reads the prompt too (InstructBLIP)."""

    def forward(self, image_embeds: Tensor, qformer_input_ids: Tensor, qformer_attention_mask: Tensor) -> Tensor:
        """As the connector's own; `image_features` `[B, Q, D]`."""
        features: Tensor = self.reducer(self.connector(image_embeds, qformer_input_ids, qformer_attention_mask))
        return features


# By the names of the connector's inputs behind `image_embeds`; torch.export wants each by name.
_REDUCED: dict[tuple[str, ...], type[_Reduced]] = {
    (): ReducedConnector,
    ("pixel_attention_mask",): ReducedMasked,
    ("qformer_input_ids", "qformer_attention_mask"): ReducedInstructed,
}


def reduce_tokens(model: VisionLanguageModel, reduction: Reduction) -> VisionLanguageModel:
    """`model` whose connector gives fewer tokens; no weight is read.

    Raises UnsupportedError for a connector that `reduction` does not fit, InputError for a number that does not.
    """
    try:
        return replace(model, layout=reduce_layout(model.layout, reduction))
    except (InputError, UnsupportedError) as error:
        raise type(error)(f"{model.path}: {error}") from error


def reduce_layout(layout: Layout, reduction: Reduction) -> Layout:
    """`layout` with the reduced connector and its contract. Raises as `reduce_tokens`."""
    contract = layout.contracts.get("connector")
    if contract is None or layout.kv_cache is None:
        raise UnsupportedError(
            f"reduce-tokens {reduction}: a {layout.kind} gives no image tokens to a language model; leave it out"
        )
    if contract.inputs[0].shape[0] != "batch":
        return _reduce_picture(layout, reduction)
    tokens = int(contract.outputs[0].shape[1])
    stage, left = _REDUCE[reduction.method](layout, layout.stages["connector"], tokens, reduction)
    contracts = {name: _with_rows(one, tokens, left) for name, one in layout.contracts.items()}
    return replace(
        layout,
        stages={**layout.stages, "connector": stage},
        contracts={**contracts, "connector": _with_tokens(contract, left)},
        reduction=reduction,
    )


def _reduce_picture(layout: Layout, reduction: Reduction) -> Layout:
    """`layout` of a model whose features are as many as its picture is large: no graph changes.

    The run time pools the picture's own grid behind the connector (`image_contract.Patches.pool_stride`).
    """
    if reduction.method == "pool":
        return replace(layout, reduction=reduction)
    why = {
        "tome": "its features are no fixed number, and the graph of a merging needs one",
        "queries": "its connector has no learned queries",
    }
    raise UnsupportedError(
        f"reduce-tokens {reduction} is not built for a {layout.kind}: {why[reduction.method]}; use pool:S"
    )


def _with_rows(contract: StageContract, tokens: int, left: int) -> StageContract:
    """Where a stage reads the features of several pictures in a row (Flamingo), `left` of `tokens` for each."""
    axes = tuple(
        Axis(name=axis.name, min=left, opt=axis.opt // tokens * left, max=axis.max // tokens * left)
        if axis.name == IMAGE_SEQUENCE
        else axis
        for axis in contract.axes
    )
    return contract.model_copy(update={"axes": axes})


def _with_tokens(contract: StageContract, tokens: int) -> StageContract:
    features = contract.outputs[0]
    shape = (features.shape[0], tokens, *features.shape[2:])
    return contract.model_copy(update={"outputs": (features.model_copy(update={"shape": shape}),)})


def _pool(layout: Layout, stage: Stage, tokens: int, reduction: Reduction) -> tuple[Stage, int]:
    rows, columns = _grid(stage.on_meta(), tokens, reduction)
    stride = reduction.amount
    if rows % stride or columns % stride:
        raise InputError(
            f"reduce-tokens {reduction}: the connector's tokens are a grid of {rows} x {columns}, which {stride} does "
            f"not divide; accepted are {_list(common_divisors(rows, columns))}"
        )
    reduced = _behind(layout, stage, lambda: WindowPooling((rows, columns), stride=stride))
    return reduced, tokens // stride**2


def _merge(layout: Layout, stage: Stage, tokens: int, reduction: Reduction) -> tuple[Stage, int]:
    if reduction.amount > tokens // 2:
        raise InputError(
            f"reduce-tokens {reduction}: the connector gives {tokens} tokens, of which one round of merging takes away "
            f"half at most; accepted are tome:1 to tome:{tokens // 2}"
        )
    if layout.stages["connector"].vectors:
        raise UnsupportedError(
            f"reduce-tokens {reduction}: a {layout.kind} puts its features back into the picture's grid, which merged "
            "tokens have left; use pool:S"
        )
    return _behind(layout, stage, lambda: TokenMerging(reduction.amount)), tokens - reduction.amount


def _keep_queries(layout: Layout, stage: Stage, tokens: int, reduction: Reduction) -> tuple[Stage, int]:
    if not _queried(stage.on_meta()):
        raise UnsupportedError(
            f"reduce-tokens {reduction}: the connector of this {layout.kind} has no learned queries; use pool:S or "
            "tome:R"
        )
    if reduction.amount > tokens:
        raise InputError(
            f"reduce-tokens {reduction}: the connector has {tokens} learned queries; accepted are queries:1 to "
            f"queries:{tokens}"
        )

    def finish(module: nn.Module) -> None:
        stage.finish(module)
        for part in _queried(module):
            part.keep_queries(reduction.amount)

    return replace(stage, finish=finish), reduction.amount


def _behind(layout: Layout, stage: Stage, reducer: Callable[[], nn.Module]) -> Stage:
    """The stage with a module behind it."""
    kind = _REDUCED[tuple(spec.name for spec in layout.contracts["connector"].inputs[1:])]

    def finish(module: nn.Module) -> None:
        stage.finish(module.get_submodule("connector"))

    return replace(
        stage,
        build=lambda: kind(stage.build(), reducer(), stage.vectors),
        checkpoint_name=lambda name: stage.checkpoint_name(name.removeprefix("connector.")),
        finish=finish,
    )


def _queried(module: nn.Module) -> list[Any]:
    """The parts of a connector that have learned queries, and a method `keep_queries(count)`."""
    return [part for part in module.modules() if hasattr(part, "keep_queries")]


def _grid(module: nn.Module, tokens: int, reduction: Reduction) -> tuple[int, int]:
    """Rows and columns of the connector's output: what its module says, or the square that a projector keeps."""
    for part in module.modules():
        named: Any = getattr(part, "output_grid", None)
        if named is not None and named[0] * named[1] == tokens:
            return int(named[0]), int(named[1])
    side = math.isqrt(tokens)
    projects = any(isinstance(part, LinearProjector | MlpProjector) for part in module.modules())
    if not projects or side * side != tokens:
        why = "a class token is among them" if projects else "learned queries have no places"
        raise UnsupportedError(
            f"reduce-tokens {reduction}: the connector's {tokens} tokens are no grid ({why}); use tome:R"
            f"{'' if projects else ' or queries:K'}"
        )
    return side, side


def common_divisors(rows: int, columns: int) -> list[int]:
    """From 2, all whole numbers that divide both."""
    return [size for size in range(2, math.gcd(rows, columns) + 1) if rows % size == columns % size == 0]


def _list(sizes: list[int]) -> str:
    return ", ".join(f"pool:{size}" for size in sizes) or "none; use tome:R"


_REDUCE: dict[str, Callable[[Layout, Stage, int, Reduction], tuple[Stage, int]]] = {
    "pool": _pool,
    "tome": _merge,
    "queries": _keep_queries,
}
