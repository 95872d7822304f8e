"""Pictures against texts, in a bundle that compares instead of generating: BLIP-2 retrieval, CLIP, SigLIP."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from types import TracebackType
from typing import TYPE_CHECKING, Any, Literal

import numpy as np
from numpy.typing import NDArray
from PIL import Image

from ..bundle import Bundle
from ..errors import InputError
from .backends import EngineOptions, load_engines
from .engine import Engine
from .generation import Stopwatch
from .processor import load_picture, load_tokenizer, prepare_picture
from .score_text import TextTensors, tokenize_texts

if TYPE_CHECKING:
    from ..score_contract import ScoreContract

    Picture = str | Path | Image.Image

Match = Literal["all", "paired", "none"] | int
# The matcher reads a picture once for each of its texts, so its batches hold that many copies of a picture's tokens.
_PAIRS_AT_ONCE = 16


@dataclass(frozen=True)
class Scores:
    """What came of `I` pictures and `T` texts; every array is float32 `[I, T]`.

    `cosine`: of the features; with several per picture, of its best. `logits`: the cosine scaled and shifted as the
    model has learned, None for BLIP-2. `probabilities`: CLIP's softmax over the texts, SigLIP's sigmoid of each pair,
    or what BLIP-2's matcher says, with NaN for pairs that it was not asked about; None where it was asked about none.
    `match_logits`: its logits `[I, T, 2]` (no, yes). `tokens`: of each text, special ones included; `truncated`:
    whether some were cut off because the model reads no more. `timings_ms`: per stage, of all pictures and texts.
    """

    cosine: NDArray[np.float32]
    logits: NDArray[np.float32] | None
    probabilities: NDArray[np.float32] | None
    match_logits: NDArray[np.float32] | None
    tokens: tuple[int, ...]
    truncated: tuple[bool, ...]
    timings_ms: dict[str, float]


class Scorer:
    """A loaded bundle; `engines` holds its stages by name: encoder, connector, text_encoder, and perhaps matcher."""

    def __init__(self, bundle: Bundle, engines: dict[str, Engine], contract: ScoreContract) -> None:
        self.bundle = bundle
        self.engines = engines
        self.contract = contract
        self.tokenizer = load_tokenizer(bundle.file(bundle.manifest.tokenizer))

    @classmethod
    def load(cls, bundle: str | Path | Bundle, *, device: str = "cpu", threads: int | None = None) -> Scorer:
        """Verify the bundle and load its stages.

        `device`: "cpu", "cuda" or "cuda:N". `threads`: per stage, None for all cores. Raises BundleError (and its kin)
        before anything is parsed, InputError for a bundle that generates or a bad option, DependencyError and
        EngineError as `Pipeline.load` does.
        """
        options = EngineOptions(device, threads)
        verified = bundle if isinstance(bundle, Bundle) else Bundle.load(bundle)
        contract = score_contract(verified)
        return cls(verified, load_engines(None, verified, options), contract)

    def score(
        self, images: Picture | Sequence[Picture], texts: str | Sequence[str], *, match: Match | None = None
    ) -> Scores:
        """Compare every picture with every text.

        `match`: which pairs the matcher of a BLIP-2 bundle reads: "all" (the default), "none", "paired" (the first
        picture with the first text and so on), or `k` for the `k` texts with the highest cosine of each picture.
        A text longer than the model reads is cut off and marked so in `truncated`.
        Raises InputError for a picture, text or option that cannot be used, EngineError when a stage fails.
        """
        watch = Stopwatch(("preprocess", *self.engines))
        pictures = _as_list(images)
        text = self.tokenize(texts)
        reads_pairs = self._check_match(match, len(pictures), len(text.lengths))
        watch.lap("preprocess")
        embeds, features = [], []
        for pixel_values in self._pixel_batches(pictures):
            watch.lap("preprocess")
            image_embeds = self.encode_pixels(pixel_values)
            watch.lap("encoder")
            features.append(self.connect(image_embeds))
            watch.lap("connector")
            if reads_pairs:
                embeds.append(image_embeds)
        text_features = self.encode_text(text)
        watch.lap("text_encoder")
        cosine = cosines(np.concatenate(features), text_features)
        match_logits = None
        if reads_pairs:
            match_logits = self._match(np.concatenate(embeds), text, cosine, match)
            watch.lap("matcher")
        limit = self.contract.text.max_length
        return Scores(
            cosine,
            self.logits(cosine),
            self._probabilities(cosine, match_logits),
            match_logits,
            text.lengths,
            tuple(length > limit for length in text.lengths),
            watch.timings_ms(),
        )

    def image_features(self, images: Picture | Sequence[Picture]) -> NDArray[np.float32]:
        """Vectors of length 1: `[I, P]`, or `[I, Q, P]` where a picture has one per query."""
        batches = self._pixel_batches(_as_list(images))
        return np.concatenate([self.connect(self.encode_pixels(batch)) for batch in batches])

    def text_features(self, texts: str | Sequence[str]) -> NDArray[np.float32]:
        """Vectors `[T, P]` of length 1."""
        return self.encode_text(self.tokenize(texts))

    def tokenize(self, texts: str | Sequence[str]) -> TextTensors:
        """Texts as the bundle's contract lays them out; InputError for what cannot be used."""
        return tokenize_texts(self.tokenizer, self.contract.text, [texts] if isinstance(texts, str) else texts)

    def encode_pixels(self, pixel_values: NDArray[np.float32]) -> NDArray[np.float32]:
        """`pixel_values` `[B, 3, H, W]` to `image_embeds` `[B, N, Dv]`."""
        return self.engines["encoder"].run({"pixel_values": pixel_values})["image_embeds"]

    def connect(self, image_embeds: NDArray[np.float32]) -> NDArray[np.float32]:
        """`image_embeds` `[B, N, Dv]` to `image_features` `[B, (Q,) P]`."""
        return self.engines["connector"].run({"image_embeds": image_embeds})["image_features"]

    def encode_text(self, text: TextTensors) -> NDArray[np.float32]:
        """Tokens `[T, L]` to `text_features` `[T, P]`, in as many batches as the stage needs."""
        engine = self.engines["text_encoder"]
        most = engine.contract.axis("batch").max
        batches = zip(_chunks(text.input_ids, most), _chunks(text.attention_mask, most), strict=True)
        return np.concatenate(
            [engine.run({"input_ids": ids, "attention_mask": mask})["text_features"] for ids, mask in batches]
        )

    def logits(self, cosine: NDArray[np.float32]) -> NDArray[np.float32] | None:
        """The cosine, scaled and shifted as the model has learned; None for BLIP-2."""
        if "match" in self.contract.methods:
            return None
        return cosine * np.float32(self.contract.scale) + np.float32(self.contract.bias)

    def match_pairs(
        self, image_embeds: NDArray[np.float32], text: TextTensors, pairs: NDArray[np.int64]
    ) -> NDArray[np.float32]:
        """Logits `[n, 2]` (no, yes) of the matcher for `pairs` `[n, 2]` of a picture's and a text's index."""
        results = [
            self.engines["matcher"].run(
                {
                    "image_embeds": image_embeds[chunk[:, 0]],
                    "input_ids": text.input_ids[chunk[:, 1]],
                    "attention_mask": text.attention_mask[chunk[:, 1]],
                }
            )["logits"]
            for chunk in _chunks(pairs, _PAIRS_AT_ONCE)
        ]
        return np.concatenate(results)

    def close(self) -> None:
        """Free the engines."""
        for engine in self.engines.values():
            engine.close()

    def __enter__(self) -> Scorer:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    def _pixel_batches(self, pictures: Sequence[Picture]) -> Iterator[NDArray[np.float32]]:
        """`pixel_values` in batches that the encoder takes."""
        if not pictures:
            raise InputError("no picture came; give at least one")
        contract = self.bundle.manifest.image
        most = self.engines["encoder"].contract.axis("batch").max
        for start in range(0, len(pictures), most):
            prepared = [
                prepare_picture(load_picture(one, contract), contract) for one in pictures[start : start + most]
            ]
            yield np.concatenate([picture.tensors["pixel_values"] for picture in prepared])

    def _probabilities(
        self, cosine: NDArray[np.float32], match_logits: NDArray[np.float32] | None
    ) -> NDArray[np.float32] | None:
        """As `Scores` has them."""
        logits = self.logits(cosine)
        if logits is None:
            return None if match_logits is None else softmax(match_logits)[..., 1]
        return softmax(logits) if "softmax" in self.contract.methods else sigmoid(logits)

    def _check_match(self, match: Match | None, images: int, texts: int) -> bool:
        """Whether the matcher is to read any pair; InputError for a choice that cannot be made."""
        if match is None:
            return "match" in self.contract.methods
        if "match" not in self.contract.methods:
            raise InputError(f"match is {match!r}, but this bundle has no matcher; leave it out")
        whole = isinstance(match, int) and not isinstance(match, bool) and match >= 1
        if not whole and match not in ("all", "paired", "none"):
            raise InputError(f"match is {match!r}; accepted are all, paired, none and a whole number from 1 up")
        if match == "paired" and images != texts:
            raise InputError(f"match is 'paired' for {images} pictures and {texts} texts; give as many of each")
        return match != "none"

    def _match(
        self,
        image_embeds: NDArray[np.float32],
        text: TextTensors,
        cosine: NDArray[np.float32],
        match: Match | None,
    ) -> NDArray[np.float32]:
        pairs = _choose_pairs(cosine, "all" if match is None else match)
        logits = np.full((*cosine.shape, 2), np.nan, np.float32)
        logits[pairs[:, 0], pairs[:, 1]] = self.match_pairs(image_embeds, text, pairs)
        return logits


def score_contract(bundle: Bundle) -> ScoreContract:
    """The contract of a bundle that scores; InputError for one that generates."""
    if bundle.manifest.score is None:
        raise InputError(
            f"{bundle.path} generates text and scores nothing (it was made from a "
            f"{bundle.manifest.checkpoint.architecture}); use `bridgeport run`, or Pipeline.load"
        )
    return bundle.manifest.score


def cosines(image_features: NDArray[np.float32], text_features: NDArray[np.float32]) -> NDArray[np.float32]:
    """`[I, P]` or `[I, Q, P]`, and `[T, P]`, all of length 1, to `[I, T]`: of the best query."""
    products: NDArray[np.float32] = image_features @ text_features.T
    return products if products.ndim == 2 else products.max(axis=1)


def softmax(logits: NDArray[np.float32]) -> NDArray[np.float32]:
    """Over the last axis."""
    powers = np.exp(logits - logits.max(axis=-1, keepdims=True))
    result: NDArray[np.float32] = powers / powers.sum(axis=-1, keepdims=True)
    return result


def sigmoid(logits: NDArray[np.float32]) -> NDArray[np.float32]:
    """Without overflow on either side."""
    small = np.exp(-np.abs(logits))
    return np.where(logits >= 0, np.float32(1) / (1 + small), small / (1 + small)).astype(np.float32)


def _choose_pairs(cosine: NDArray[np.float32], match: Match) -> NDArray[np.int64]:
    """Pairs `[n, 2]` of a picture's and a text's index."""
    images, texts = cosine.shape
    if match == "paired":
        chosen = np.eye(images, texts, dtype=bool)
    elif match == "all":
        chosen = np.ones((images, texts), bool)
    else:
        ranks = np.argsort(np.argsort(-cosine, axis=1, kind="stable"), axis=1, kind="stable")
        chosen = ranks < int(match)
    return np.argwhere(chosen)


def _chunks(array: NDArray[Any], size: int) -> Iterator[NDArray[Any]]:
    for start in range(0, len(array), size):
        yield np.ascontiguousarray(array[start : start + size])


def _as_list(images: Any) -> list[Any]:
    one = not isinstance(images, Sequence) or isinstance(images, str)
    return [images] if one else list(images)
