"""`manifest.json`: all that a bundle says about itself, as frozen records that refuse unknown keys.

Paths are POSIX paths relative to the bundle. Whatever the run time does to a picture or a prompt is data here,
frozen at export and checked there against the checkpoint's own processor.
"""

from __future__ import annotations

from typing import Annotated, Any, Literal

from pydantic import Field

from .models.contract import KvCacheContract, Record, StageContract

SCHEMA_VERSION = 1
# The checkpoint's config.json, kept in the bundle.
CONFIG_FILE = "checkpoint/config.json"


class FileRecord(Record):
    """One file of the bundle: size in bytes and SHA-256 in lower-case hex."""

    path: str
    size: int = Field(ge=0)
    sha256: str = Field(pattern=r"^[0-9a-f]{64}$")


class StageRecord(Record):
    """One stage: its contract, the graph file that computes it and how that was made."""

    contract: StageContract
    file: str
    format: Literal["onnx"] = "onnx"
    precision: Literal["fp32", "fp16", "int8", "int4"]
    opset: int
    toolchain: dict[str, str] = Field(default_factory=dict)
    # Graphs that share the stage's weights and give more outputs, by purpose ("attention").
    variants: dict[str, str] = Field(default_factory=dict)


class Resize(Record):
    """Resize to `height` x `width` pixels, the aspect ratio ignored, with Pillow's filter of that name."""

    op: Literal["resize"] = "resize"
    height: int = Field(ge=1)
    width: int = Field(ge=1)
    resample: Literal["nearest", "box", "bilinear", "hamming", "bicubic", "lanczos"]


class Rescale(Record):
    """Multiply the 0..255 values by `factor`."""

    op: Literal["rescale"] = "rescale"
    factor: float


class Normalize(Record):
    """Subtract `mean`, divide by `std`, per channel."""

    op: Literal["normalize"] = "normalize"
    mean: tuple[float, float, float]
    std: tuple[float, float, float]


ImageStep = Annotated[Resize | Rescale | Normalize, Field(discriminator="op")]


class ImageContract(Record):
    """Picture -> `pixel_values` `[3, height, width]` float32: RGB, then `steps` in order, channels first.

    `do_convert_rgb` false means that the checkpoint takes RGB pictures as they are.
    """

    steps: tuple[ImageStep, ...]


class ImageSegment(Record):
    """The image placeholder token, `tokens_per_image` times."""

    kind: Literal["image"] = "image"


class TextSegment(Record):
    """`template` with `{prompt}` filled in, tokenised; `add_special_tokens` runs the tokenizer's post-processor."""

    kind: Literal["text"] = "text"
    template: str = "{prompt}"
    add_special_tokens: bool


PromptSegment = Annotated[ImageSegment | TextSegment, Field(discriminator="kind")]


class PromptContract(Record):
    """Prompt -> token ids, and where the image embeddings go.

    Placeholder *positions* follow from `segments`; ids are never searched for, so a user who types the placeholder's
    text gets text.
    """

    segments: tuple[PromptSegment, ...]
    image_token_id: int = Field(ge=0)
    image_token: str
    tokens_per_image: int = Field(ge=1)
    images_per_prompt: int = Field(default=1, ge=1)


class GenerationContract(Record):
    """The checkpoint's own stop tokens, padding and limits; greedy unless asked otherwise."""

    eos_token_ids: tuple[int, ...]
    pad_token_id: int | None
    bos_token_id: int | None
    context_length: int = Field(ge=1)
    vocab_size: int = Field(ge=1)
    max_new_tokens: int = Field(default=64, ge=1)


class CheckpointRecord(Record):
    """What the bundle was made from: architecture and the SHA-256 of config and weights, to tell two apart."""

    architecture: str
    model_type: str
    text_model_type: str
    sha256: dict[str, str]


class Manifest(Record):
    """The whole of `manifest.json`."""

    schema_version: int = SCHEMA_VERSION
    bridgeport_version: str
    model_kind: str
    target: Literal["cpu", "cuda", "tensorrt"]
    checkpoint: CheckpointRecord
    stages: tuple[StageRecord, ...]
    kv_cache: KvCacheContract
    image: ImageContract
    prompt: PromptContract
    generation: GenerationContract
    tokenizer: str
    files: tuple[FileRecord, ...] = ()
    # Results of checks, as they were printed when the bundle was made: {"export": {...}, "parity": {...}}.
    checks: dict[str, Any] = Field(default_factory=dict)

    def stage(self, name: str) -> StageRecord:
        """The stage called `name`; KeyError when there is none."""
        stages: dict[str, StageRecord] = {stage.contract.name: stage for stage in self.stages}
        return stages[name]
