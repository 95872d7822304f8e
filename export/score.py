"""A checkpoint that scores pictures against texts (BLIP-2 retrieval, CLIP, SigLIP) to the files of a bundle."""

from __future__ import annotations

import math
import shutil
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from .._version import __version__
from ..bundle import sha256, write_manifest
from ..errors import CheckpointError, UnsupportedError
from ..manifest import CONFIG_FILE, CheckpointRecord, Manifest
from ..score_contract import Method, ScoreContract
from .checkpoint_processor import load_processor
from .image_processors import freeze_image_contract
from .picture_check import check_frozen_pictures
from .score_text import check_frozen_text, freeze_score_tokenizer, freeze_text
from .shared_weights import share_weights
from .stages import ExportedStage, Progress, export_traced, lint_stages

if TYPE_CHECKING:
    from ..models.checkpoint import VisionLanguageModel

# Of each kind of model: what is made of the cosine, and the padding that it was trained with.
_METHODS: dict[str, tuple[Method, ...]] = {"blip-2-retrieval": ("match",), "clip": ("softmax",), "siglip": ("sigmoid",)}
_PADDING_TO_FULL_LENGTH = ("siglip",)
# exp(logit_scale) multiplies cosines; beyond this nothing is left in FP32.
_LARGEST_EXPONENT = 80.0
# BLIP-2's stages behind the encoder are one Q-Former: their graphs lie together over one file of weights.
_SHARED = {"blip-2-retrieval": ("connector", "text_encoder", "matcher")}


def write_score_manifest(model: VisionLanguageModel, staging: Path, precision: str, say: Progress) -> Manifest:
    """Write graphs, tokenizer and manifest of `model` into `staging`.

    Raises UnsupportedError for another precision than "fp32", CheckpointError for a processor that does not fit the
    model, ExportError for what misses a check.
    """
    if precision != "fp32":
        raise UnsupportedError(
            f"precision {precision}: {model.architecture} has no language model to quantise; export it with fp32"
        )
    say("freezing processor and tokenizer")
    processor = load_processor(model.path)
    image = freeze_image_contract(model.path, processor.image_processor, model.config, tokens=_features(model))
    score = _freeze_score(model, processor)
    tokenizer = freeze_score_tokenizer(model.path, processor, score.text.vocab_size, staging / "tokenizer")
    checks = check_frozen_text(processor, score.text, tokenizer)
    checks |= check_frozen_pictures(processor.image_processor, image)
    (staging / CONFIG_FILE).parent.mkdir()
    shutil.copyfile(model.path / Path(CONFIG_FILE).name, staging / CONFIG_FILE)
    stages = [export_traced(model, name, staging, say, max_id=score.text.vocab_size) for name in model.contracts]
    say("linting the graphs")
    lint_stages(stages, staging)
    stages = _share(stages, _SHARED.get(model.kind, ()), staging)
    say("hashing the bundle")
    manifest = Manifest(
        bridgeport_version=__version__,
        model_kind=model.kind,
        target="cpu",
        checkpoint=_describe_checkpoint(model),
        stages=tuple(stage.record for stage in stages),
        image=image,
        score=score,
        tokenizer=tokenizer.relative_to(staging).as_posix(),
        checks={
            "export": {"stages": {stage.record.contract.name: stage.checks for stage in stages}, "processor": checks}
        },
    )
    return write_manifest(staging, manifest)


def _features(model: VisionLanguageModel) -> int:
    """Vectors that stand for one picture: BLIP-2 has one per query."""
    shape = model.contracts["connector"].outputs[0].shape
    return int(shape[1]) if len(shape) == 3 else 1


def _freeze_score(model: VisionLanguageModel, processor: Any) -> ScoreContract:
    config = model.config
    text = config.qformer_config if model.kind == "blip-2-retrieval" else config.text_config
    if model.kind == "blip-2-retrieval":
        _check_placeholders(model.path, config, processor)
    contract = freeze_text(
        model.path,
        processor,
        positions=model.contracts["text_encoder"].axis("sequence").max,
        vocab_size=text.vocab_size,
        padding="max_length" if model.kind in _PADDING_TO_FULL_LENGTH else "longest",
    )
    if model.kind == "clip" and text.eos_token_id not in (2, *contract.trailing_ids):
        raise CheckpointError(
            f"{model.path}: config.json says text_config.eos_token_id {text.eos_token_id}, which the tokenizer puts "
            f"behind no text (it puts {list(contract.trailing_ids)}); make them one"
        )
    scale, bias = _scale(model)
    return ScoreContract(methods=_METHODS[model.kind], scale=scale, bias=bias, text=contract)


def _scale(model: VisionLanguageModel) -> tuple[float, float]:
    """Factor and offset of the cosine, learned by CLIP and SigLIP; 1 and 0 for BLIP-2."""
    connector: Any = model.load_stage("connector")
    if not hasattr(connector, "logit_scale"):
        return 1.0, 0.0
    exponent = float(connector.logit_scale)
    if not abs(exponent) < _LARGEST_EXPONENT:
        raise CheckpointError(f"{model.path}: logit_scale is {exponent:.6g}; trained models have one of 1 to 5")
    return math.exp(exponent), float(connector.logit_bias) if hasattr(connector, "logit_bias") else 0.0


def _check_placeholders(path: Path, config: Any, processor: Any) -> None:
    """transformers' model cuts as many tokens off a text as config.json says, whatever the processor put there."""
    cut = 0 if config.image_token_index is None else config.num_query_tokens
    put = processor.num_query_tokens or 0
    if cut != put:
        raise CheckpointError(
            f"{path}: the processor puts {put} image tokens before a text and the model cuts {cut} off "
            "(num_query_tokens of processor_config.json; image_token_index and num_query_tokens of config.json); make "
            "them one"
        )


def _share(stages: Sequence[ExportedStage], names: tuple[str, ...], staging: Path) -> list[ExportedStage]:
    """Put the graphs of the stages `names` into the folder of the first of them, over one file of weights."""
    if not names:
        return list(stages)
    chosen = [stage for stage in stages if stage.record.contract.name in names]
    folder = Path(chosen[0].record.file).parent
    files = {stage.record.file: (folder / _shared_name(stage, names[0])).as_posix() for stage in chosen}
    share_weights({staging / old: staging / new for old, new in files.items()})
    return [
        replace(stage, record=stage.record.model_copy(update={"file": files.get(stage.record.file, stage.record.file)}))
        for stage in stages
    ]


def _shared_name(stage: ExportedStage, first: str) -> str:
    name = stage.record.contract.name
    return "model.onnx" if name == first else f"{name}.onnx"


def _describe_checkpoint(model: VisionLanguageModel) -> CheckpointRecord:
    text = model.config.qformer_config if model.kind == "blip-2-retrieval" else model.config.text_config
    return CheckpointRecord(
        architecture=model.architecture,
        model_type=model.config.model_type,
        text_model_type=text.model_type,
        sha256={file.name: sha256(file) for file in model.files},
    )
