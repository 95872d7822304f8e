"""`manifest.json`: all that a bundle says about itself, as frozen records that refuse unknown keys.

Paths are POSIX paths relative to the bundle. Whatever the run time does to a picture or a prompt is data here,
frozen at export and checked there against the checkpoint's own processor.
"""

from __future__ import annotations

from typing import Annotated, Any, Literal

from pydantic import Field

from .engine_record import EngineRecord
from .image_contract import (
    CenterCrop,
    ImageContract,
    ImageStep,
    Normalize,
    Rescale,
    Resize,
    ResizeShortest,
    Tiling,
    Whole,
)
from .models.contract import KvCacheContract, Record, StageContract
from .models.flamingo_contract import FlamingoContract
from .models.reduction_contract import Reduction
from .models.seq2seq_contract import Seq2SeqContract
from .score_contract import ScoreContract

__all__ = [
    "CONFIG_FILE",
    "SCHEMA_VERSION",
    "CalibrationRecord",
    "CenterCrop",
    "CheckpointRecord",
    "EngineRecord",
    "FileRecord",
    "GenerationContract",
    "ImageContract",
    "ImageSegment",
    "ImageStep",
    "InstructionContract",
    "Manifest",
    "Normalize",
    "Precision",
    "PromptContract",
    "PromptSegment",
    "QuantizationRecord",
    "Reduction",
    "Rescale",
    "Resize",
    "ResizeShortest",
    "ScoreContract",
    "StageRecord",
    "Target",
    "TextSegment",
    "Tiling",
    "VideoPlaceholder",
    "Whole",
]

SCHEMA_VERSION = 1
Precision = Literal["fp32", "fp16", "fp8", "int8", "int4"]
Target = Literal["cpu", "cuda", "tensorrt"]
# The checkpoint's config.json, kept in the bundle.
CONFIG_FILE = "checkpoint/config.json"


class FileRecord(Record):
    """One file of the bundle: size in bytes and SHA-256 in lower-case hex."""

    path: str
    size: int = Field(ge=0)
    sha256: str = Field(pattern=r"^[0-9a-f]{64}$")


class QuantizationRecord(Record):
    """How a stage came to its precision, enough to do it again.

    `scheme`: the form that it has in the graph ("dynamic-s8", "qdq-u8s8", "qdq-s8s8", "fp16", "nbits-4", ...).
    `observer`: what chose the ranges of activations, None where none are frozen. `observations`: SHA-256 over graph,
    data and settings, the key of the observed values. `smoothed`: group -> alpha of SmoothQuant. `kept`: layers that
    stay in a finer precision -> why.
    """

    scheme: str
    observer: str | None = None
    samples: int = 0
    observations: str | None = None
    smoothed: dict[str, float] = Field(default_factory=dict)
    kept: dict[str, str] = Field(default_factory=dict)
    details: dict[str, Any] = Field(default_factory=dict)


class CalibrationRecord(Record):
    """What a bundle was quantised with: the FP32 bundle's manifest and the pictures, by SHA-256, and the seed."""

    source: str
    data: str
    pictures: int
    held_out: int
    seed: int


class StageRecord(Record):
    """One stage: its contract, the graph file that computes it and how that was made."""

    contract: StageContract
    file: str
    format: Literal["onnx", "tensorrt"] = "onnx"
    precision: Precision
    opset: int
    toolchain: dict[str, str] = Field(default_factory=dict)
    # Graphs that share the stage's weights and give more outputs, by purpose ("attention").
    variants: dict[str, str] = Field(default_factory=dict)
    # Learned vectors that the run time places itself, by name, as .npy files ("image_newline").
    vectors: dict[str, str] = Field(default_factory=dict)
    # None for a stage in FP32, and for one that was exported in its precision.
    quantization: QuantizationRecord | None = None
    # The TensorRT engine that was built from `file`, where `format` says so.
    engine: EngineRecord | None = None


class ImageSegment(Record):
    """The pictures of the prompt, as token ids that no text stands for: BLIP-2 puts them before the prompt."""

    kind: Literal["image"] = "image"


class TextSegment(Record):
    """`template` with `{prompt}` and `{images}` filled in, tokenised as one string.

    `add_special_tokens` runs the tokenizer's post-processor, which adds BOS and the like.
    """

    kind: Literal["text"] = "text"
    template: str = "{prompt}"
    add_special_tokens: bool


PromptSegment = Annotated[ImageSegment | TextSegment, Field(discriminator="kind")]


class InstructionContract(Record):
    """The prompt as the connector itself reads it: BERT's tokens for the Q-Former of InstructBLIP.

    `tokenizer`: its own tokenizer.json, whose `truncation` is part of the contract; the run time pads rows of a batch
    with zeros on the right. `max_length`: positions of the Q-Former; a longer prompt is refused. `vocab_size`: its
    embeddings.
    """

    tokenizer: str
    max_length: int = Field(ge=1)
    vocab_size: int = Field(ge=1)


class VideoPlaceholder(Record):
    """What stands for a video in a prompt, as `PromptContract` has it for a picture.

    `text`: around the `{video}` that its tiling expands to. `mixed`: where pictures and videos of one prompt stand, all
    pictures in front or as they came; None where the chat template puts more than their texts there. `placeholder` is
    a secret, as the picture's is: `token`, the checkpoint's own spelling, is ordinary text in a bundle.
    """

    text: str = "{video}"
    mixed: Literal["pictures_first", "as_given"] | None = None
    token_id: int = Field(ge=0)
    token: str
    placeholder: str


class PromptContract(Record):
    """Prompt and pictures -> token ids, and where the image features go.

    `segments`: a prompt with pictures; `text_only`: one without, None where the model takes no such prompt.
    `image`: what stands in a text for one picture, around the `{image}` that its tiling expands to (`{number}`: the
    picture's, from 1); `{images}` is that for every picture, `between` in between. `boundary`: the text around pictures
    of which two in a row are one, and which a letter does not follow without `boundary_gap` (Idefics2: a space;
    Idefics: nothing). `strip`: characters that are taken off both ends of every text before, between and behind
    pictures.

    `placeholder`: the spelling of token `image_token_id` in the bundle's tokenizer. It is a secret: `image_token`, the
    checkpoint's own spelling, is ordinary text in a bundle, so what a user types is never taken for a picture.
    """

    segments: tuple[PromptSegment, ...]
    text_only: tuple[PromptSegment, ...] | None = None
    image: str = "{image}"
    between: str = ""
    boundary: str | None = None
    boundary_gap: str = " "
    strip: str = ""
    image_token_id: int = Field(ge=0)
    image_token: str
    placeholder: str
    images_per_prompt: int = Field(default=1, ge=1)
    # None where the connector reads pictures alone.
    instruction: InstructionContract | None = None
    # None where no video stands in a prompt beside pictures.
    video: VideoPlaceholder | None = None


class GenerationContract(Record):
    """The checkpoint's own stop tokens, padding and limits; greedy unless asked otherwise.

    `stop_sequences`: runs of ids that end an answer and are left out of its text.
    """

    eos_token_ids: tuple[int, ...]
    stop_sequences: tuple[tuple[int, ...], ...] = ()
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
    target: Target
    checkpoint: CheckpointRecord
    stages: tuple[StageRecord, ...]
    image: ImageContract
    # For a model that takes pictures and videos; `image` is about videos where it takes nothing else.
    video: ImageContract | None = None
    tokenizer: str
    # None in a bundle that scores pictures against texts and generates nothing.
    kv_cache: KvCacheContract | None = None
    # For a language model of encoder and decoder, which has the stage llm_encoder.
    seq2seq: Seq2SeqContract | None = None
    prompt: PromptContract | None = None
    generation: GenerationContract | None = None
    # None where features of pictures stand among the prompt's embeddings.
    flamingo: FlamingoContract | None = None
    # None in a bundle that generates.
    score: ScoreContract | None = None
    # Where the connector gives fewer tokens than the checkpoint's.
    reduction: Reduction | None = None
    # The name of a connector from outside this package, in the place of the architecture's own.
    custom_connector: str | None = None
    # None in a bundle that `export` wrote.
    calibration: CalibrationRecord | None = None
    files: tuple[FileRecord, ...] = ()
    # Results of checks, as they were printed when the bundle was made: {"export": {...}, "parity": {...}}.
    checks: dict[str, Any] = Field(default_factory=dict)

    def stage(self, name: str) -> StageRecord:
        """The stage called `name`; KeyError when there is none."""
        stages: dict[str, StageRecord] = {stage.contract.name: stage for stage in self.stages}
        return stages[name]
