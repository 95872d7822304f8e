"""MiniGPT-4 (Zhu et al. 2023, arXiv 2304.10592) as its project stores it: four parts, read as one BLIP-2.

The encoder and the Q-Former of BLIP-2 stay frozen; one linear layer, all that is trained, leads into Vicuna.

A directory::

    minigpt4.json                                 {} or names of parts, sizes and prompt, see `Parts`
    minigpt4.safetensors | .pth                   llama_proj
    blip2_pretrained_flant5xxl.safetensors | .pth Q-Former, query tokens, ln_vision, in LAVIS' names
    eva_vit_g.safetensors | .pth                  the vision encoder
    vicuna/                                       Vicuna as transformers writes it, tokenizer included
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from pydantic import Field

from ..errors import CheckpointError, UnsupportedError
from .contract import Record
from .foreign import (
    CONFIG,
    ForeignCheckpoint,
    language_model_config,
    language_model_directory,
    part_file,
    read_parts,
)
from .lavis import (
    ConvertedWeights,
    Source,
    check_names,
    has_part,
    language_sources,
    to_transformers,
    transformers_from_lavis,
    vision_sources,
    without_text_branch,
)
from .weights import Weights, open_weight_file, open_weights

if TYPE_CHECKING:
    from torch import Tensor

LISTING = "minigpt4.json"
IMAGE = "<ImageHere>"
# The prompt of the project's demo (conversation.py), with Vicuna v0's separator.
PROMPT = (
    "Give the following image: <Img>ImageContent</Img>. You will be able to see the image once I provide it to you. "
    f"Please answer my questions.###Human: <Img>{IMAGE}</Img> {{prompt}}###Assistant:"
)
_ENCODER = "vision_model.encoder.layers."
_QFORMER = "qformer.encoder.layer."
_EMBEDDINGS = ("language_model.model.embed_tokens.weight", "language_model.lm_head.weight")


class Parts(Record):
    """`minigpt4.json`: where the parts lie (relative to it or absolute), and what no tensor's shape tells.

    `vision_layers`: how many blocks run; the published file has 40 and BLIP-2 runs 39. `image_size`: None is the one
    that the position embeddings were trained for. `prompt` holds `<ImageHere>` and `{prompt}`; `stop`: an answer ends
    before any of these texts.
    """

    projection: str | None = None
    qformer: str | None = None
    vision: str | None = None
    language_model: str | None = None
    vision_layers: int = Field(default=39, ge=1)
    vision_heads: int = Field(default=16, ge=1)
    qformer_heads: int = Field(default=12, ge=1)
    image_size: int | None = Field(default=None, ge=1)
    prompt: str = PROMPT
    stop: tuple[str, ...] = ("###",)


def load_parts(directory: Path) -> Parts:
    """`minigpt4.json` of `directory`. Raises CheckpointError for a bad key, value or prompt."""
    parts = read_parts(directory / LISTING, Parts)
    for mark in (IMAGE, "{prompt}"):
        if parts.prompt.count(mark) != 1:
            raise CheckpointError(
                f"{directory / LISTING}: prompt has {mark} {parts.prompt.count(mark)} times; it must stand there once"
            )
    if parts.prompt.index(IMAGE) > parts.prompt.index("{prompt}"):
        raise CheckpointError(f"{directory / LISTING}: prompt has {IMAGE} after {{prompt}}; put the picture first")
    if not all(parts.stop):
        raise CheckpointError(f"{directory / LISTING}: stop has an empty text; leave it out")
    return parts


def language_model_path(directory: Path) -> Path:
    """Where Vicuna lies, its tokenizer beside it. Raises CheckpointError when it does not."""
    return language_model_directory(directory, load_parts(directory).language_model, "vicuna", listing=LISTING)


def read(directory: Path, *, allow_pickle: bool = False) -> ForeignCheckpoint:
    """Open a MiniGPT-4 directory (see the module's text); no weight is read.

    Later parts override earlier ones, as in the project. Raises CheckpointError that names the part that is missing,
    cut off or of another model, UnsupportedError for the variant without Q-Former and for a language model other than
    Llama.
    """
    parts = load_parts(directory)
    opened = _open(directory, parts, allow_pickle)
    path = language_model_path(directory)
    text = language_model_config(path)
    if text.get("model_type") != "llama":
        raise UnsupportedError(
            f"{path / CONFIG}: model_type is {text.get('model_type')!r}; MiniGPT-4 is read with a 'llama' (Vicuna)"
        )
    trained = _trained(opened["projection"])
    frozen = _frozen(opened["qformer"])
    if "vision" in opened:
        frozen |= vision_sources(opened["vision"], (parts.vision_layers, _grid(opened["vision"], parts)))
    blip2 = frozen | trained
    config = _config(directory, parts, blip2, text)
    _check_projection(trained, config, directory)
    language = _with_image_row(language_sources(open_weights(path, allow_pickle=allow_pickle)))
    weights = ConvertedWeights(blip2 | language)
    return ForeignCheckpoint("minigpt4", config, weights, (directory / LISTING, path / CONFIG))


def _open(directory: Path, parts: Parts, allow_pickle: bool) -> dict[str, Weights]:
    """The three files of weights, listed; "vision" is left out where the Q-Former's file has it."""
    opened: dict[str, Weights] = {}
    stems = {"projection": "minigpt4", "qformer": "blip2_pretrained_flant5xxl", "vision": "eva_vit_g"}
    words = {"projection": "projection (llama_proj)", "qformer": "Q-Former of BLIP-2", "vision": "vision encoder"}
    for name, stem in stems.items():
        if name == "vision" and any(key.startswith("visual_encoder.") for key in opened["qformer"].entries):
            continue
        file = part_file(directory, getattr(parts, name), stem, what=words[name], listing=LISTING)
        opened[name] = open_weight_file(file, allow_pickle=allow_pickle)
        if name == "qformer":
            check_names(opened[name], file)
    return opened


def _trained(weights: Weights) -> dict[str, Source]:
    """`llama_proj`, and whatever of the frozen parts was trained and saved with it, which then counts."""
    for name in weights.entries:
        if to_transformers(name) is None or name.startswith("llama_model."):
            raise CheckpointError(
                f"{weights.entries[name].file}: tensor {name} is not read; accepted is MiniGPT-4's projection "
                "checkpoint, which holds llama_proj.weight and llama_proj.bias (merge adapters first)"
            )
    for part in ("weight", "bias"):
        if f"llama_proj.{part}" not in weights.entries:
            raise CheckpointError(
                f"{weights.files[-1]}: tensor llama_proj.{part} is missing; give MiniGPT-4's projection checkpoint, "
                "which holds llama_proj.weight and llama_proj.bias"
            )
    return without_text_branch(transformers_from_lavis(weights))


def _frozen(weights: Weights) -> dict[str, Source]:
    """BLIP-2's Q-Former (and encoder, where it is there) without its own projection and text branch."""
    sources = without_text_branch(transformers_from_lavis(weights))
    return {name: s for name, s in sources.items() if not name.startswith(("language_projection.", "language_model."))}


def _with_image_row(sources: dict[str, Source]) -> dict[str, Source]:
    """One more token, for pictures, behind the vocabulary: row 0 again, in the embedding and in the head.

    The embedding at its places gives way to the picture's features. As for the head: a tie goes to the lower id, so
    greedy choice never takes the new token.
    """
    import torch

    def repeat_first(tensors: list[Tensor]) -> Tensor:
        return torch.cat((tensors[0], tensors[0][:1]))

    for name in _EMBEDDINGS:
        if name in sources:
            source = sources[name]
            shape = (source.shape[0] + 1, *source.shape[1:])
            sources[name] = Source(source.weights, source.names, shape, repeat_first)
    return sources


def _config(directory: Path, parts: Parts, sources: Mapping[str, Source], text: Mapping[str, Any]) -> dict[str, Any]:
    """The `config.json` of transformers' BLIP-2, from the shapes of `sources`."""
    where = str(directory)
    patch = _shape(sources, "vision_model.embeddings.patch_embedding.weight", 4, where)
    positions = _shape(sources, "vision_model.embeddings.position_embedding", 3, where)
    grid = round((positions[1] - 1) ** 0.5)
    queries = _shape(sources, "query_tokens", 3, where)
    layers = _count(sources, _QFORMER)
    vocabulary = text.get("vocab_size", 32000)
    config = {
        "model_type": "blip-2",
        "architectures": ["Blip2ForConditionalGeneration"],
        "vision_config": {
            "hidden_size": patch[0],
            "patch_size": patch[-1],
            "image_size": grid * patch[-1],
            "num_hidden_layers": parts.vision_layers,
            "num_attention_heads": parts.vision_heads,
            "intermediate_size": _shape(sources, f"{_ENCODER}0.mlp.fc1.weight", 2, where)[0],
        },
        "qformer_config": {
            "hidden_size": queries[2],
            "num_hidden_layers": layers,
            "num_attention_heads": parts.qformer_heads,
            "intermediate_size": _shape(sources, f"{_QFORMER}0.intermediate_query.dense.weight", 2, where)[0],
            "cross_attention_frequency": _cross_attention_frequency(sources, layers, where),
        },
        "text_config": {**text, "vocab_size": vocabulary + 1},
        "num_query_tokens": queries[1],
        "image_token_index": vocabulary,
    }
    for name, width, heads in (("vision", patch[0], parts.vision_heads), ("qformer", queries[2], parts.qformer_heads)):
        if width % heads:
            raise CheckpointError(
                f"{directory / LISTING}: {name}_heads is {heads}, which does not divide the width {width}; correct it"
            )
    return config


def _shape(sources: Mapping[str, Source], name: str, rank: int, where: str) -> tuple[int, ...]:
    if name not in sources:
        raise CheckpointError(f"{where}: tensor {name} is missing; vision encoder or Q-Former are not whole")
    source = sources[name]
    if len(source.shape) != rank:
        raise CheckpointError(
            f"{source.entry.file}: tensor {source.names[0]} has shape {list(source.shape)}; {rank} axes are accepted"
        )
    return source.shape


def _count(sources: Mapping[str, Source], prefix: str) -> int:
    """Layers below `prefix`."""
    return len({name.removeprefix(prefix).split(".")[0] for name in sources if name.startswith(prefix)})


def _cross_attention_frequency(sources: Mapping[str, Source], layers: int, where: str) -> int:
    """Every how manieth layer reads the picture."""
    reading = [i for i in range(layers) if has_part(sources, f"{_QFORMER}{i}.crossattention.")]
    frequency = reading[1] if len(reading) > 1 else layers
    if reading != list(range(0, layers, frequency)):
        raise CheckpointError(
            f"{where}: the Q-Former's layers {reading} of {layers} have cross-attention; accepted is the first and "
            "every n-th after it"
        )
    return frequency


def _grid(weights: Weights, parts: Parts) -> int | None:
    """Side of the grid of patches; None where it is the stored one."""
    name = next((key for key in weights.entries if key.endswith("patch_embed.proj.weight")), None)
    if parts.image_size is None or name is None:
        return None
    return parts.image_size // weights.entries[name].shape[-1]


def _check_projection(projection: Mapping[str, Source], config: Mapping[str, Any], directory: Path) -> None:
    source = projection["language_projection.weight"]
    width, hidden = config["qformer_config"]["hidden_size"], config["text_config"].get("hidden_size")
    if len(source.shape) == 2 and source.shape[1] == 4 * config["vision_config"]["hidden_size"]:
        raise UnsupportedError(
            f"{source.entry.file}: llama_proj takes {source.shape[1]} numbers, four tokens of the encoder at once: "
            "this is the variant without Q-Former (Llama 2), which is not built; give the one for Vicuna"
        )
    if source.shape != (hidden, width):
        raise CheckpointError(
            f"{source.entry.file}: tensor llama_proj.weight has shape {list(source.shape)}, but the Q-Former and the "
            f"language model of {directory} ask for {[hidden, width]}; they are of different models"
        )
