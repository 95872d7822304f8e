"""Small random checkpoints of InstructBLIP and InstructBLIP-Video, as transformers writes them."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any, Literal

from tokenizers import Tokenizer, models, normalizers, pre_tokenizers, processors, trainers
from transformers.models.blip.image_processing_pil_blip import BlipImageProcessorPil

from tests.checkpoints import SENTENCES, randomize, write_tokenizer
from tests.checkpoints_t5 import T5Spec, write_t5_tokenizer

FRAMES = 4

VISION: dict[str, Any] = {
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_attention_heads": 2,
    "num_hidden_layers": 2,
    "image_size": 28,
    "patch_size": 14,
}
QFORMER: dict[str, Any] = {
    "hidden_size": 24,
    "intermediate_size": 40,
    "num_attention_heads": 2,
    "num_hidden_layers": 3,
    "cross_attention_frequency": 2,
    "max_position_embeddings": 220,
}
TEXT: dict[str, Any] = {
    "hidden_size": 64,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "max_position_embeddings": 400,
}


def write_instructblip_checkpoint(
    directory: Path,
    *,
    video: bool = False,
    text: Literal["llama", "opt", "t5"] = "llama",
    text_config: dict[str, Any] | None = None,
    vision: dict[str, Any] | None = None,
    qformer: dict[str, Any] | None = None,
    num_query_tokens: int = 5,
    max_length: int | None = None,
    instruction_side: str = "left",
    seed: int = 0,
) -> Path:
    """`InstructBlipForConditionalGeneration`, or with `video` that of videos; returns `directory`.

    `max_length`: the language model's tokenizer is saved with a longest length, as one that was trained with it is;
    `instruction_side`: where the Q-Former's tokenizer cuts texts.
    """
    import transformers as t

    directory = Path(directory)
    directory.mkdir(parents=True, exist_ok=True)
    token = "<video>" if video else "<image>"
    tokenizer = write_t5_tokenizer(directory) if text == "t5" else write_tokenizer(directory, text=text)
    # With and without videos one vocabulary, so that one seed gives one set of weights.
    tokenizer.add_special_tokens({"additional_special_tokens": ["<video>"]})
    instruction = bert_tokenizer(instruction_side)
    family = "InstructBlipVideo" if video else "InstructBlip"
    make: Any = getattr(t, f"{family}Config")
    config = make(
        vision_config={**VISION, **(vision or {})},
        qformer_config={**QFORMER, **(qformer or {}), "vocab_size": len(instruction)},
        text_config=_text_config(tokenizer, text, text_config or {}),
        num_query_tokens=num_query_tokens,
        **{f"{token[1:-1]}_token_index": tokenizer.convert_tokens_to_ids(token)},
    )
    model = getattr(t, f"{family}ForConditionalGeneration")(config)
    randomize(model, seed)
    model.save_pretrained(directory)
    _write_processor(directory, tokenizer, instruction, config, video=video)
    if max_length is not None:
        file = directory / "tokenizer.json"
        cut = {"direction": "Right", "max_length": max_length, "strategy": "LongestFirst", "stride": 0}
        file.write_text(json.dumps(json.loads(file.read_text()) | {"truncation": cut}))
    return directory


def bert_tokenizer(truncation_side: str = "left") -> Any:
    """WordPiece over lower-cased words between [CLS] and [SEP], with the [DEC] that InstructBLIP's has added."""
    import transformers as t

    tokenizer = Tokenizer(models.WordPiece(unk_token="[UNK]"))
    tokenizer.normalizer = normalizers.BertNormalizer(lowercase=True)
    tokenizer.pre_tokenizer = pre_tokenizers.BertPreTokenizer()
    specials = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]"]
    trainer = trainers.WordPieceTrainer(vocab_size=140, special_tokens=specials, show_progress=False)
    tokenizer.train_from_iterator(SENTENCES, trainer)
    ends = [(name, tokenizer.token_to_id(name)) for name in ("[CLS]", "[SEP]")]
    tokenizer.post_processor = processors.TemplateProcessing(single="[CLS] $A [SEP]", special_tokens=ends)
    make: Any = t.PreTrainedTokenizerFast
    fast = make(
        tokenizer_object=tokenizer, pad_token="[PAD]", unk_token="[UNK]", cls_token="[CLS]", sep_token="[SEP]",
        mask_token="[MASK]", truncation_side=truncation_side,
    )  # fmt: skip
    fast.add_special_tokens({"bos_token": "[DEC]"})
    return fast


def _text_config(tokenizer: Any, text: str, options: dict[str, Any]) -> dict[str, Any]:
    if text == "t5":
        return T5Spec(**options).text_config(tokenizer).to_dict()
    special = {f"{name}_token_id": getattr(tokenizer, f"{name}_token_id") for name in ("bos", "eos", "pad")}
    inner = {"ffn_dim": 72, "word_embed_proj_dim": 64} if text == "opt" else {"intermediate_size": 72}
    return {"model_type": text, **TEXT, **inner, **options, **special, "vocab_size": len(tokenizer) + 3}


def _write_processor(directory: Path, tokenizer: Any, instruction: Any, config: Any, *, video: bool) -> None:
    """The files that `save_pretrained` writes; the video processor cannot be made without torchvision."""
    import transformers as t

    size = config.vision_config.image_size
    images = BlipImageProcessorPil(size={"height": size, "width": size})
    make: Any = t.InstructBlipProcessor
    processor = make(images, tokenizer, instruction, num_query_tokens=config.num_query_tokens)
    processor.save_pretrained(directory)
    if not video:
        return
    file = directory / "processor_config.json"
    settings: dict[str, Any] = json.loads(file.read_text())
    frames = settings.pop("image_processor") | {"video_processor_type": "InstructBlipVideoVideoProcessor"}
    frames.pop("image_processor_type", None)
    settings |= {"processor_class": "InstructBlipVideoProcessor", "video_processor": frames}
    file.write_text(json.dumps(settings))
    for file in (directory / "tokenizer_config.json", directory / "qformer_tokenizer" / "tokenizer_config.json"):
        file.write_text(json.dumps(json.loads(file.read_text()) | {"processor_class": "InstructBlipVideoProcessor"}))
