"""Hold the frozen processor against the checkpoint's own: same pixels, same token ids, same text."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image

from ..errors import ExportError
from ..manifest import ImageContract, PromptContract
from ..runtime.processor import decode, load_image, load_tokenizer, preprocess_image, tokenize_prompt
from .checkpoint_processor import load_processor
from .checkpoint_processor import load_tokenizer as load_checkpoint_tokenizer

# The frozen steps do the processor's own operations in its own order and types, so they agree bit for bit on
# one machine; values lie within +-3, where FP32 steps are 2.4e-7, and a numpy built for another machine may
# round one operation differently. A wrong resampling filter moves these noise pictures by more than 0.1.
IMAGE_TOLERANCE = 1e-6

# (width, height): one pixel, odd ones in both directions, thin ones, and one of a usual photograph.
SIZES = ((1, 1), (37, 53), (201, 7), (3, 90), (331, 240))
MODES = ("RGB", "L", "LA", "RGBA", "P", "CMYK", "1", "I;16")
PROMPTS = (
    "",
    " ",
    "a",
    "Question: what is this? Answer:",
    "  two  spaces, a tab\tand a\nnewline ",
    "Z\u00fcrich, \u6771\u4eac, \u0646, \U0001f642\U0001f3fd e\u0301",
    "braces {prompt} {0} % $x",
    "</s> <s> <pad> <|endoftext|>",
    "word " * 200,
)


def check_frozen_processor(
    checkpoint: str | Path, image: ImageContract, prompt: PromptContract, tokenizer: str | Path
) -> dict[str, Any]:
    """Run pictures of odd sizes and modes and several prompts through both processors.

    `tokenizer`: the frozen tokenizer.json. Returns what was compared, for the manifest: `pictures`,
    `prompts`, `image_max_abs`. Raises ExportError naming the first step (resize, rescale, normalize,
    tokenize, decode) that departs from transformers' own.
    """
    processor = load_processor(Path(checkpoint))
    worst = 0.0
    pictures = list(_pictures())
    for name, picture in pictures:
        worst = max(worst, _check_picture(processor, image, name, picture))
    frozen = load_tokenizer(tokenizer)
    original = load_checkpoint_tokenizer(Path(checkpoint))
    for text in PROMPTS:
        _check_prompt(processor, frozen, prompt, text)
    _check_decode(original, frozen, prompt)
    return {"pictures": len(pictures), "prompts": len(PROMPTS), "image_max_abs": worst}


def _pictures() -> Iterator[tuple[str, Image.Image]]:
    """Noise (seeded): every filter and every rounding shows on it."""
    random = np.random.default_rng(0)
    for width, height in SIZES:
        noise = Image.fromarray(random.integers(0, 256, (height, width, 4), dtype=np.uint8), mode="RGBA")
        for mode in MODES:
            if mode == "I;16":
                deep = random.integers(0, 65536, (height, width), dtype=np.uint16)
                yield f"{width}x{height} I;16", Image.fromarray(deep)
            else:
                yield f"{width}x{height} {mode}", _in_mode(noise, mode)


def _in_mode(noise: Image.Image, mode: str) -> Image.Image:
    if mode in ("P", "1", "CMYK", "L"):
        return noise.convert("RGB").convert(mode)
    return noise.convert(mode)


def _check_picture(processor: Any, contract: ImageContract, name: str, picture: Image.Image) -> float:
    """Max abs difference of the whole; on a difference, find the step."""
    upright = load_image(picture)
    worst = _difference(processor, contract, picture, upright)
    if worst <= IMAGE_TOLERANCE:
        return worst
    for count, step in enumerate(contract.steps, start=1):
        partial = ImageContract(steps=contract.steps[:count])
        departs = _difference(processor, partial, picture, upright, partial=True)
        if departs > IMAGE_TOLERANCE * _scale(partial):
            raise ExportError(
                f"image processor: step {step.op} of picture {name} departs from transformers' by "
                f"{departs:.3g} (accepted {IMAGE_TOLERANCE:.0e}); the frozen step is {step.model_dump()}"
            )
    raise ExportError(
        f"image processor: picture {name} departs from transformers' by {worst:.3g} (accepted "
        f"{IMAGE_TOLERANCE:.0e}) though each frozen step agrees: a step is missing from the contract"
    )


def _scale(contract: ImageContract) -> float:
    """Before the rescale step, values run to 255."""
    return 255.0 if all(step.op == "resize" for step in contract.steps) else 1.0


def _difference(
    processor: Any, contract: ImageContract, picture: Image.Image, upright: Image.Image, partial: bool = False
) -> float:
    done = {step.op for step in contract.steps}
    options = {f"do_{op}": op in done for op in ("resize", "rescale", "normalize")} if partial else {}
    # A processor that does not convert takes RGB pictures only; the run time always makes them RGB.
    source = picture if processor.image_processor.do_convert_rgb else upright
    theirs = processor.image_processor(source, return_tensors="np", **options)["pixel_values"][0]
    ours = preprocess_image(upright, contract)
    if theirs.shape != ours.shape:
        return float("inf")
    return float(np.abs(theirs.astype(np.float64) - ours).max())


def _check_prompt(processor: Any, frozen: Any, contract: PromptContract, text: str) -> None:
    blank = Image.new("RGB", (8, 8))
    theirs = [int(i) for i in processor(images=blank, text=text)["input_ids"][0]]
    ours = tokenize_prompt(frozen, contract, text)
    if ours.input_ids != theirs:
        raise ExportError(
            f"tokenize: prompt {text[:40]!r} gives {ours.input_ids[:24]}, transformers' processor gives "
            f"{theirs[:24]}; the frozen prompt contract does not describe this checkpoint"
        )
    places = [i for i, token in enumerate(theirs) if token == contract.image_token_id]
    if places != list(range(ours.image_positions.start, ours.image_positions.stop)):
        raise ExportError(
            f"tokenize: the placeholders of prompt {text[:40]!r} stand at {places[:8]}, the frozen contract "
            f"puts them at {ours.image_positions}"
        )


def _check_decode(original: Any, frozen: Any, contract: PromptContract) -> None:
    for ids in _id_runs(original, contract.image_token_id):
        theirs = original.decode(ids, skip_special_tokens=True)
        ours = decode(frozen, ids)
        if ours != theirs:
            raise ExportError(f"decode: ids {ids[:16]} give {ours!r}, transformers gives {theirs!r}")


def _id_runs(original: Any, image_token_id: int) -> Iterator[list[int]]:
    """Ids of the prompts, and random ones, with special tokens and the placeholder among them."""
    for text in PROMPTS:
        yield original(text)["input_ids"]
    random = np.random.default_rng(1)
    for _ in range(8):
        ids = [int(i) for i in random.integers(0, len(original), 24)]
        yield [*ids, image_token_id, *ids[:3]]
