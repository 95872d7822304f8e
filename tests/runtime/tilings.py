"""What the tests of all tilings share: noise pictures, a small tokenizer, processors without their video part."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
from PIL import Image
from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from transformers import PreTrainedTokenizerFast, ProcessorMixin

from bridgeport.image_contract import ImageContract, Normalize, Rescale
from bridgeport.runtime.processor.picture import PictureTensors

# The same operations in the same order and types: equal bit for bit here. The tolerance leaves a unit in the last
# place of values near 3 (2.4e-7) to a numpy built for another machine; a pixel off by one of 255 shows as 0.008.
TOLERANCE = 1e-6

MEAN, STD = (0.48145466, 0.4578275, 0.40821073), (0.26862954, 0.26130258, 0.27577711)
STEPS = (Rescale(factor=1 / 255), Normalize(mean=MEAN, std=STD))
# (width, height): one pixel, under a patch, thin ones of 200:1, odd ones, squares, grids of several tiles.
SIZES = ((1, 1), (2, 3), (13, 11), (1, 200), (200, 1), (37, 53), (64, 64), (65, 64), (97, 41), (331, 240), (120, 500))


def noise(width: int, height: int) -> Image.Image:
    random = np.random.default_rng(width * 1000 + height)
    return Image.fromarray(random.integers(0, 256, (height, width, 3), dtype=np.uint8))


def contract_of(tiling: Any) -> ImageContract:
    return ImageContract(steps=STEPS, tiling=tiling)


def byte_tokenizer(*specials: str, **named: str) -> PreTrainedTokenizerFast:
    """One token per byte, and the special ones; `named` ones are attributes of the tokenizer too."""
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    tokenizer = Tokenizer(models.BPE(vocab={letter: i for i, letter in enumerate(alphabet)}, merges=[]))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    make: Any = PreTrainedTokenizerFast  # its constructor is not typed
    fast: PreTrainedTokenizerFast = make(tokenizer_object=tokenizer, pad_token="<pad>", extra_special_tokens=named)
    fast.add_special_tokens({"additional_special_tokens": [*specials, *named.values()]})
    return fast


def without_video(patch: pytest.MonkeyPatch, kind: Any, **parts: Any) -> Any:
    """A processor whose video part, which needs torchvision, is None."""
    patch.setattr(ProcessorMixin, "check_argument_for_proper_class", lambda *_: None)
    return kind(**parts, video_processor=None)


def expand(text: str, image_token: str, pictures: list[PictureTensors]) -> str:
    """`text` with the pieces of the pictures at its image tokens."""
    parts = text.split(image_token)
    assert len(parts) == len(pictures) + 1
    done = parts[0]
    for picture, after in zip(pictures, parts[1:], strict=True):
        done += "".join(p if isinstance(p, str) else image_token * p for p in picture.pieces) + after
    return done


def assert_close(ours: Any, theirs: Any, what: str) -> None:
    assert ours.shape == theirs.shape, f"{what}: {ours.shape}, transformers has {theirs.shape}"
    assert ours.dtype == theirs.dtype, f"{what}: {ours.dtype}, transformers has {theirs.dtype}"
    worst = np.abs(ours.astype(np.float64) - theirs).max()
    assert worst <= TOLERANCE, f"{what}: max abs {worst:.3g}"


def differs(ours: Any, theirs: Any) -> bool:
    """Whether a planted fault shows: another shape, or values far above the tolerance."""
    return ours.shape != theirs.shape or bool(np.abs(ours.astype(np.float64) - theirs).max() > 1e-2)
