"""BLIP-2 as its first project, LAVIS (github.com/salesforce/LAVIS), stores it: names to and from transformers'.

A directory::

    config.json                  of transformers' kind, as Salesforce/blip2-* on the hub have it
    lavis.safetensors | .pth     LAVIS' state_dict: Q-Former, query tokens, ln_vision, projection
    eva_vit_g.safetensors | .pth the vision encoder, where it was frozen and the file above leaves it out
    llm/                         the language model (OPT, Flan-T5, Vicuna) as transformers writes it, likewise
    tokenizer and processor      of transformers' kind
    lavis.json                   only where files have other names: {"weights": .., "vision": .., "language_model": ..}
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ..errors import CheckpointError
from .contract import Record
from .foreign import (
    CONFIG,
    ForeignCheckpoint,
    language_model_config,
    language_model_directory,
    part_file,
    read_json,
    read_parts,
)
from .weights import FLOAT_DTYPES, TensorEntry, Weights, open_weight_file, open_weights

if TYPE_CHECKING:
    from torch import Tensor

LISTING = "lavis.json"
RETRIEVAL = "Blip2ForImageTextRetrieval"
# What LAVIS (and MiniGPT-4) call the language model that the projection feeds.
LANGUAGE_MODELS = ("opt", "t5", "llm", "llama")

# LAVIS' name and transformers', the first that fits counts, in both directions. {i}: a layer, {p}: what is left.
_NAMES: tuple[tuple[str, str], ...] = (
    ("visual_encoder.cls_token", "vision_model.embeddings.class_embedding"),
    ("visual_encoder.pos_embed", "vision_model.embeddings.position_embedding"),
    ("visual_encoder.patch_embed.proj.{p}", "vision_model.embeddings.patch_embedding.{p}"),
    ("visual_encoder.blocks.{i}.norm1.{p}", "vision_model.encoder.layers.{i}.layer_norm1.{p}"),
    ("visual_encoder.blocks.{i}.norm2.{p}", "vision_model.encoder.layers.{i}.layer_norm2.{p}"),
    ("visual_encoder.blocks.{i}.attn.qkv.{p}", "vision_model.encoder.layers.{i}.self_attn.qkv.{p}"),
    ("visual_encoder.blocks.{i}.attn.proj.{p}", "vision_model.encoder.layers.{i}.self_attn.projection.{p}"),
    ("visual_encoder.blocks.{i}.mlp.{p}", "vision_model.encoder.layers.{i}.mlp.{p}"),
    # A LayerNorm of its own in LAVIS (eps 1e-5; transformers computes it with the encoder's 1e-6).
    ("ln_vision.{p}", "vision_model.post_layernorm.{p}"),
    ("query_tokens", "query_tokens"),
    ("Qformer.bert.encoder.layer.{i}.attention.self.{p}", "qformer.encoder.layer.{i}.attention.attention.{p}"),
    (
        "Qformer.bert.encoder.layer.{i}.crossattention.self.{p}",
        "qformer.encoder.layer.{i}.crossattention.attention.{p}",
    ),
    ("Qformer.bert.encoder.layer.{i}.{p}", "qformer.encoder.layer.{i}.{p}"),
    ("Qformer.bert.embeddings.LayerNorm.{p}", "qformer.layernorm.{p}"),
    ("Qformer.bert.embeddings.word_embeddings.{p}", "embeddings.word_embeddings.{p}"),
    ("Qformer.bert.embeddings.position_embeddings.{p}", "embeddings.position_embeddings.{p}"),
    ("vision_proj.{p}", "vision_projection.{p}"),
    ("text_proj.{p}", "text_projection.{p}"),
    ("itm_head.{p}", "itm_head.{p}"),
    ("{llm}_proj.{p}", "language_projection.{p}"),
    ("{llm}_model.{p}", "language_model.{p}"),
)
# One bias in transformers, two in LAVIS: keys have none.
_Q_BIAS, _V_BIAS = "visual_encoder.blocks.{i}.attn.q_bias", "visual_encoder.blocks.{i}.attn.v_bias"
_QKV_BIAS = "vision_model.encoder.layers.{i}.self_attn.qkv.bias"

# What transformers has no place for: the captioning head of the first training stage, the temperature of its
# contrastive loss, a counter.
_UNUSED = re.compile(r"temp|Qformer\.cls\..+|Qformer\.bert\.embeddings\.position_ids")
# The text branch of the first training stage, which generation never runs.
_TEXT_BRANCH = re.compile(
    r"embeddings\..+|qformer\.encoder\.layer\.\d+\.(intermediate|output)\..+"
    r"|(vision_projection|text_projection|itm_head)\..+"
)
# What the published encoder has after its blocks, and BLIP-2 does not use.
_EVA_UNUSED = re.compile(r"(norm|fc_norm|head)\..+|mask_token")


def _pattern(template: str) -> re.Pattern[str]:
    fields = {r"\{i\}": r"(?P<i>\d+)", r"\{p\}": r"(?P<p>.+)", r"\{llm\}": f"(?P<llm>{'|'.join(LANGUAGE_MODELS)})"}
    pattern = re.escape(template)
    for name, field in fields.items():
        pattern = pattern.replace(name, field)
    return re.compile(pattern)


_TO = tuple((_pattern(lavis), theirs) for lavis, theirs in ((_Q_BIAS, _QKV_BIAS), (_V_BIAS, _QKV_BIAS), *_NAMES))
_FROM = tuple((_pattern(theirs), lavis) for lavis, theirs in _NAMES)
_QKV_PATTERN = _pattern(_QKV_BIAS)


def to_transformers(name: str) -> str | None:
    """transformers' name of LAVIS' tensor `name`; `q_bias` and `v_bias` have one. None: it has no place there."""
    for pattern, theirs in _TO:
        if match := pattern.fullmatch(name):
            return theirs.format(**match.groupdict())
    return None


def from_transformers(name: str, language_model: str = "opt") -> tuple[str, ...]:
    """LAVIS' names of transformers' tensor `name`: one, two for the bias of `qkv`, none for what is not BLIP-2's.

    `language_model`: one of `LANGUAGE_MODELS`.
    """
    if match := _QKV_PATTERN.fullmatch(name):
        return _Q_BIAS.format(**match.groupdict()), _V_BIAS.format(**match.groupdict())
    for pattern, lavis in _FROM:
        if match := pattern.fullmatch(name):
            return (lavis.format(llm=language_model, **match.groupdict()),)
    return ()


@dataclass(frozen=True)
class Source:
    """Where one tensor comes from: `names` in `weights`, taken through `operation` to `shape`."""

    weights: Weights
    names: tuple[str, ...]
    shape: tuple[int, ...]
    operation: Callable[[list[Tensor]], Tensor]

    @property
    def entry(self) -> TensorEntry:
        """As the file stores it, with the shape that comes out."""
        entries = [self.weights.entries[name] for name in self.names]
        odd = [entry for entry in entries if entry.dtype not in FLOAT_DTYPES]
        stored = (odd or entries)[0]
        return TensorEntry(stored.dtype, self.shape, stored.file)


def _only(tensors: list[Tensor]) -> Tensor:
    return tensors[0]


def as_stored(weights: Weights, name: str) -> Source:
    """The tensor `name` as it is."""
    return Source(weights, (name,), weights.entries[name].shape, _only)


class ConvertedWeights:
    """`Weights` made from others, one tensor at a time, when it is read."""

    def __init__(self, sources: Mapping[str, Source]) -> None:
        self._sources = dict(sources)
        files = [file for source in self._sources.values() for file in source.weights.files]
        self.files: tuple[Path, ...] = tuple(dict.fromkeys(files))
        self.entries: Mapping[str, TensorEntry] = {name: source.entry for name, source in self._sources.items()}

    def read(self, names: Iterable[str]) -> dict[str, Tensor]:
        """See `Weights.read`."""
        tensors: dict[str, Tensor] = {}
        for name in names:
            source = self._sources[name]
            stored = source.weights.read(source.names)
            tensors[name] = source.operation([stored[part] for part in source.names])
        return tensors


def transformers_from_lavis(weights: Weights) -> dict[str, Source]:
    """A source under transformers' name for every tensor of LAVIS' `weights` that transformers has a place for.

    Raises CheckpointError when a bias of query or value stands alone, or their shapes differ.
    """
    sources: dict[str, Source] = {}
    for name in weights.entries:
        theirs = to_transformers(name)
        if theirs is None:
            continue
        if (match := _QKV_PATTERN.fullmatch(theirs)) and name.endswith(("q_bias", "v_bias")):
            sources[theirs] = _qkv_bias(weights, **match.groupdict())
            continue
        sources[theirs] = as_stored(weights, name)
    return sources


def _qkv_bias(weights: Weights, i: str) -> Source:
    names = (_Q_BIAS.format(i=i), _V_BIAS.format(i=i))
    for name, other in (names, names[::-1]):
        if name not in weights.entries:
            raise CheckpointError(
                f"{weights.entries[other].file}: tensor {name} is missing, but {other} is there; copy it again"
            )
    first, second = (weights.entries[name] for name in names)
    if first.shape != second.shape or len(first.shape) != 1:
        raise CheckpointError(
            f"{first.file}: tensor {names[0]} has shape {list(first.shape)}, {names[1]} has {list(second.shape)}; "
            "both must be one vector of the encoder's width"
        )
    return Source(weights, names, (3 * first.shape[0],), _fuse_bias)


def _fuse_bias(tensors: list[Tensor]) -> Tensor:
    import torch

    query, value = tensors
    return torch.cat((query, torch.zeros_like(value), value))


def lavis_from_transformers(weights: Weights, language_model: str = "opt") -> dict[str, Source]:
    """A source under LAVIS' names for every tensor of transformers' BLIP-2 `weights`.

    `language_model`: one of `LANGUAGE_MODELS`. Raises CheckpointError for a tensor that is not BLIP-2's, and on
    reading when a key has a bias, for which LAVIS has no place.
    """
    sources: dict[str, Source] = {}
    for name, entry in weights.entries.items():
        ours = from_transformers(name, language_model)
        if not ours:
            raise CheckpointError(f"{entry.file}: tensor {name} is none of BLIP-2's, so it has no name in LAVIS")
        if len(ours) == 1:
            sources[ours[0]] = as_stored(weights, name)
            continue
        for third, lavis in zip((0, 2), ours, strict=True):
            sources[lavis] = Source(weights, (name,), (entry.shape[0] // 3,), _take_bias(name, third))
    return sources


def _take_bias(name: str, third: int) -> Callable[[list[Tensor]], Tensor]:
    def take(tensors: list[Tensor]) -> Tensor:
        thirds = tensors[0].chunk(3)
        if thirds[1].any():
            raise CheckpointError(f"tensor {name} has a bias of the keys, for which LAVIS has no place; set it to 0")
        return thirds[third].clone()

    return take


class _Parts(Record):
    """`lavis.json`: paths of the parts, relative to it or absolute."""

    weights: str | None = None
    vision: str | None = None
    language_model: str | None = None


def read(directory: Path, *, allow_pickle: bool = False) -> ForeignCheckpoint:
    """Open a LAVIS directory (see the module's text); no weight is read.

    Raises CheckpointError that names the part that is missing, cut off or of another model.
    """
    parts = read_parts(directory / LISTING, _Parts)
    if not (directory / CONFIG).is_file():
        raise CheckpointError(
            f"{directory} has no {CONFIG}; copy that of the same BLIP-2 in transformers' format (Salesforce/blip2-* on "
            "the hub) beside the LAVIS weights"
        )
    config = read_json(directory / CONFIG)
    file = part_file(directory, parts.weights, "lavis", what="LAVIS state_dict", listing=LISTING)
    stored = open_weight_file(file, allow_pickle=allow_pickle)
    check_names(stored, file)
    sources = transformers_from_lavis(stored)
    files = [directory / CONFIG]
    retrieval = config.get("architectures") == [RETRIEVAL]
    if not retrieval:
        sources = without_text_branch(sources)
    if not has_part(sources, "vision_model.encoder."):
        encoder = part_file(directory, parts.vision, "eva_vit_g", what="vision encoder", listing=LISTING)
        sources |= vision_sources(open_weight_file(encoder, allow_pickle=allow_pickle), _vision(config, directory))
    if not retrieval and not has_part(sources, "language_model."):
        path = language_model_directory(directory, parts.language_model, "llm", listing=LISTING)
        _check_vocabulary(directory, config, path)
        sources |= language_sources(open_weights(path, allow_pickle=allow_pickle))
        files.append(path / CONFIG)
    if (directory / LISTING).is_file():
        files.append(directory / LISTING)
    return ForeignCheckpoint("lavis", config, ConvertedWeights(sources), tuple(files))


def check_names(weights: Weights, file: Path) -> None:
    """Raise CheckpointError unless these are LAVIS' names, every one of them."""
    odd = [name for name in weights.entries if to_transformers(name) is None and not _UNUSED.fullmatch(name)]
    if "query_tokens" not in weights.entries or not any(name.startswith("Qformer.bert.") for name in weights.entries):
        some = next(iter(odd or weights.entries), "nothing")
        raise CheckpointError(
            f"{file} is no BLIP-2 state_dict of LAVIS: it has no query_tokens and Qformer.bert.*, but {some}; "
            "accepted is what LAVIS saves, a state_dict or {'model': state_dict}"
        )
    if odd:
        raise CheckpointError(
            f"{file}: tensor {odd[0]} of shape {list(weights.entries[odd[0]].shape)} is none of LAVIS' BLIP-2; it is "
            "of another model"
        )


def has_part(sources: Mapping[str, Source], prefix: str) -> bool:
    """Whether there is a tensor below `prefix`."""
    return any(name.startswith(prefix) for name in sources)


def without_text_branch(sources: Mapping[str, Source]) -> dict[str, Source]:
    """`sources` without what only the first training stage and retrieval use."""
    return {name: source for name, source in sources.items() if not _TEXT_BRANCH.fullmatch(name)}


def vision_sources(weights: Weights, vision: tuple[int, int | None]) -> dict[str, Source]:
    """The encoder from its own file, where names have no `visual_encoder.`.

    `vision`: layers and grid side of the model (None: as stored). The published EVA ViT-g has one block more than
    BLIP-2 runs (the paper takes the second last layer's features), and its position embeddings are resized to the
    grid, as LAVIS does.
    """
    from .stages import RenamedWeights

    layers, grid = vision
    weights = RenamedWeights(weights, ((r"^(?!visual_encoder\.)", "visual_encoder."),))
    sources = transformers_from_lavis(weights)
    for name in weights.entries:
        plain = name.removeprefix("visual_encoder.")
        if to_transformers(name) is None and not _EVA_UNUSED.fullmatch(plain):
            raise CheckpointError(
                f"{weights.entries[name].file}: tensor {plain} is none of EVA ViT-g's; give LAVIS' eva_vit_g file"
            )
    last = f"vision_model.encoder.layers.{layers}."
    sources = {name: source for name, source in sources.items() if not name.startswith(last)}
    position = "vision_model.embeddings.position_embedding"
    if position in sources and grid is not None:
        sources[position] = _resized(sources[position], grid)
    return sources


def _resized(source: Source, grid: int) -> Source:
    """Position embeddings `[1, 1 + g * g, D]` for another `g`; what is no such tensor is left for later checks."""
    shape = source.shape
    side = round((shape[1] - 1) ** 0.5) if len(shape) == 3 else 0
    if side == grid or side < 1 or side * side != shape[1] - 1:
        return source

    def resize(tensors: list[Tensor]) -> Tensor:
        import torch
        import torch.nn.functional as F

        first, patches = tensors[0][:, :1], tensors[0][:, 1:]
        square = patches.reshape(1, side, side, -1).permute(0, 3, 1, 2)
        square = F.interpolate(square, size=(grid, grid), mode="bicubic", align_corners=False)
        return torch.cat((first, square.permute(0, 2, 3, 1).flatten(1, 2)), dim=1)

    return Source(source.weights, source.names, (1, 1 + grid * grid, shape[2]), resize)


def language_sources(weights: Weights) -> dict[str, Source]:
    """The language model from its own directory, below `language_model.`."""
    # The oldest OPT files leave "model." out.
    old = any(name.startswith("decoder.layers.") for name in weights.entries)
    sources = {}
    for name in weights.entries:
        full = f"model.{name}" if old and name.startswith("decoder.") else name
        sources[f"language_model.{full}"] = as_stored(weights, name)
    return sources


def _vision(config: dict[str, Any], directory: Path) -> tuple[int, int]:
    """Layers and grid side that config.json asks for."""
    vision = config.get("vision_config") or {}
    try:
        # Defaults: BLIP-2's own, which transformers leaves out of config.json.
        layers = int(vision.get("num_hidden_layers", 39))
        return layers, int(vision.get("image_size", 224)) // int(vision.get("patch_size", 14))
    except (TypeError, ValueError, AttributeError, ZeroDivisionError) as error:
        raise CheckpointError(
            f"{directory / CONFIG}: vision_config needs num_hidden_layers, image_size and patch_size as whole numbers "
            f"({error}); correct it"
        ) from error


def _check_vocabulary(directory: Path, config: dict[str, Any], path: Path) -> None:
    """The hub's config.json counts rows that transformers added for the image token; a LAVIS model has none."""
    stored = language_model_config(path).get("vocab_size")
    asked = (config.get("text_config") or {}).get("vocab_size")
    if stored is not None and asked is not None and stored != asked:
        raise CheckpointError(
            f"{directory / CONFIG}: text_config.vocab_size is {asked}, but {path / CONFIG} has {stored}; set it to "
            f"{stored}"
        )
