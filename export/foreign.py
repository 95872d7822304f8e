"""What checkpoints of other projects do to pictures and prompts, where they have no processor of transformers' kind.

MiniGPT-4 keeps it in code: `blip2_image_eval` for the picture, `conversation.py` for the prompt. Qwen-VL too: see
`qwen_vl`.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import TYPE_CHECKING, Any

from PIL import Image

from ..errors import ExportError
from ..manifest import (
    GenerationContract,
    ImageContract,
    ImageSegment,
    Normalize,
    PromptContract,
    Rescale,
    Resize,
    TextSegment,
    Whole,
)
from ..models.foreign import project, transformers_model
from ..models.minigpt4 import IMAGE, Parts, language_model_path, load_parts
from ..runtime.processor import load_tokenizer as read_tokenizer
from ..runtime.processor import tokenize_prompt
from .checkpoint_processor import load_processor, load_tokenizer
from .frozen import FrozenProcessor
from .picture_check import check_frozen_pictures
from .processor_check import PROMPTS
from .qwen_vl import freeze_qwen_vl
from .tokenizer import placeholder_text

if TYPE_CHECKING:
    from ..models.checkpoint import VisionLanguageModel

# OpenAI's CLIP, as LAVIS' BlipImageBaseProcessor has them.
_MEAN = (0.48145466, 0.4578275, 0.40821073)
_STD = (0.26862954, 0.26130258, 0.27577711)
# What a separator can follow: a text's start, a line's end, a letter, a space, a full stop.
_BEFORE = ("", "\n", "a", "a ", ".")


def freeze_foreign(model: VisionLanguageModel, directory: str | Path) -> FrozenProcessor | None:
    """The contracts of `model`, and its tokenizer written into `directory`.

    None where the checkpoint has a processor of transformers' kind, as LAVIS directories do. Raises CheckpointError for
    a tokenizer that does not load, ExportError when what is frozen departs from the reference.
    """
    if project(model.path) == "qwen_vl":
        return freeze_qwen_vl(model, Path(directory), clip_image(model.config))
    if project(model.path) != "minigpt4":
        return None
    parts = load_parts(model.path)
    reference = ReferenceProcessor(model)
    document = json.loads(reference.tokenizer.backend_tokenizer.to_str())
    document["truncation"] = document["padding"] = None
    target = Path(directory) / "tokenizer.json"
    target.parent.mkdir(parents=True, exist_ok=True)
    target.write_text(json.dumps(document, ensure_ascii=False, indent=1) + "\n", encoding="utf-8")
    image = clip_image(model.config)
    prompt = _prompt(parts, model.config, placeholder_text(reference.tokenizer))
    sequences = stop_sequences(reference.tokenizer, parts.stop)
    return FrozenProcessor(
        image=image,
        prompt=prompt,
        generation=_generation(model.config, sequences),
        tokenizer=target,
        checks=_check(reference, image, prompt, target),
    )


def load_reference(model: VisionLanguageModel) -> tuple[Any, Any] | None:
    """transformers' model and processor, for parity; None for a checkpoint that transformers itself loads."""
    name = project(model.path)
    if name is None:
        return None
    if name == "qwen_vl":
        from .qwen_vl_reference import load_model
        from .qwen_vl_reference import load_processor as load_qwen_vl_processor

        return load_model(model), load_qwen_vl_processor(model)
    processor = ReferenceProcessor(model) if name == "minigpt4" else load_processor(model.path)
    return transformers_model(model), processor


def clip_image(config: Any) -> ImageContract:
    """MiniGPT-4's and Qwen-VL's pictures: squeezed to a square, with CLIP's mean and deviation."""
    size = config.vision_config.image_size
    return ImageContract(
        steps=(
            Resize(height=size, width=size, resample="bicubic"),
            Rescale(factor=1 / 255),
            Normalize(mean=_MEAN, std=_STD),
        ),
        tiling=Whole(tokens=config.num_query_tokens),
    )


def _prompt(parts: Parts, config: Any, placeholder: str) -> PromptContract:
    """The project tokenises what stands before and after the picture apart, BOS before the first."""
    before, after = parts.prompt.split(IMAGE)
    return PromptContract(
        segments=(
            TextSegment(template=before, add_special_tokens=True),
            ImageSegment(),
            TextSegment(template=after, add_special_tokens=False),
        ),
        text_only=(TextSegment(template=_without_picture(parts.prompt), add_special_tokens=True),),
        image_token_id=config.image_token_index,
        image_token=IMAGE,
        placeholder=placeholder,
    )


def _without_picture(prompt: str) -> str:
    """What the project's demo makes of a conversation to which no picture was added."""
    return prompt.replace(f"<Img>{IMAGE}</Img> ", "").replace(IMAGE, "")


def _generation(config: Any, sequences: tuple[tuple[int, ...], ...]) -> GenerationContract:
    """The language model's own stop tokens, and separators that are one token."""
    text = config.text_config
    eos = text.eos_token_id
    ids = [] if eos is None else list(eos) if isinstance(eos, list | tuple) else [eos]
    ids += [sequence[0] for sequence in sequences if len(sequence) == 1]
    return GenerationContract(
        eos_token_ids=tuple(dict.fromkeys(ids)),
        pad_token_id=text.pad_token_id,
        bos_token_id=text.bos_token_id,
        context_length=text.max_position_embeddings,
        vocab_size=text.vocab_size,
        stop_sequences=sequences,
    )


def stop_sequences(tokenizer: Any, stop: tuple[str, ...]) -> tuple[tuple[int, ...], ...]:
    """Every run of ids that one of the texts `stop` becomes, at the start of an answer and after other text.

    With Llama's tokenizer "###" is [835] at the start and [2277, 29937] after a line's end.
    """
    found: dict[tuple[int, ...], None] = {}
    for text in stop:
        for before in _BEFORE:
            encoded = tokenizer.backend_tokenizer.encode(before + text, add_special_tokens=False)
            # A token may take the space before the text along.
            start = len(before.rstrip(" "))
            ids = [i for i, (first, _) in zip(encoded.ids, encoded.offsets, strict=True) if first >= start]
            if tokenizer.decode(ids).strip() == text.strip():
                found[tuple(ids)] = None
    return tuple(found)


def _check(
    reference: ReferenceProcessor, image: ImageContract, prompt: PromptContract, tokenizer: Path
) -> dict[str, Any]:
    """Pictures and prompts through the run time's code and through transformers' image processor and tokenizer."""
    pictures = check_frozen_pictures(reference.image_processor, image)
    frozen, blank = read_tokenizer(tokenizer), Image.new("RGB", (8, 8))
    for text in PROMPTS:
        for count in (1, 0):
            theirs = [int(i) for i in reference(blank if count else None, text)["input_ids"][0]]
            ours = tokenize_prompt(frozen, prompt, text, [(reference.num_query_tokens,)] * count).input_ids
            if ours != theirs:
                raise ExportError(
                    f"tokenize: prompt {text[:40]!r} with {count} pictures gives {ours[:24]}, transformers' tokenizer "
                    f"gives {theirs[:24]}; the frozen prompt contract does not describe this checkpoint"
                )
    return {**pictures, "prompts": len(PROMPTS)}


class ReferenceProcessor:
    """A processor of transformers' kind for a MiniGPT-4 directory, for parity: made of its image processor and the
    language model's tokenizer, nothing of ours but the order of the parts.
    """

    def __init__(self, model: VisionLanguageModel) -> None:
        from transformers.models.blip.image_processing_pil_blip import BlipImageProcessorPil

        size = model.config.vision_config.image_size
        self.image_processor: Any = BlipImageProcessorPil(size={"height": size, "width": size})
        self.tokenizer: Any = load_tokenizer(language_model_path(model.path))
        self.image_token = IMAGE
        self.num_query_tokens: int = model.config.num_query_tokens
        self._image_token_id: int = model.config.image_token_index
        self._prompt = load_parts(model.path).prompt

    def __call__(self, images: Any, text: str, return_tensors: str | None = None, **options: Any) -> Any:
        """`pixel_values` `[1, 3, H, W]`, `input_ids` and `attention_mask` `[1, S]` for one prompt and one picture, or
        without `pixel_values` for none.
        """
        from transformers import BatchFeature

        data: dict[str, Any] = {}
        if images is None:
            ids = list(self.tokenizer(_without_picture(self._prompt).replace("{prompt}", text))["input_ids"])
        else:
            before, after = self._prompt.split(IMAGE)
            ids = list(self.tokenizer(before)["input_ids"])
            ids += [self._image_token_id] * self.num_query_tokens
            ids += list(self.tokenizer(after.replace("{prompt}", text), add_special_tokens=False)["input_ids"])
            data["pixel_values"] = self.image_processor(images, return_tensors="np", **options)["pixel_values"]
        return BatchFeature(data | {"input_ids": [ids], "attention_mask": [[1] * len(ids)]}, tensor_type=return_tensors)

    def decode(self, token_ids: Any, **options: Any) -> str:
        """Text of token ids."""
        text: str = self.tokenizer.decode(token_ids, **options)
        return text
