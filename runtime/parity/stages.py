"""The bundle's side: every stage on its own, with the engines and the code that `Pipeline` runs it with.

`run_isolated` feeds each stage what PyTorch fed its own, `run_chained` what the stage before it gave.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

from ...errors import BridgeportError
from ..decoder import StepInputs
from ..pipeline import Pipeline, Prepared
from ..processor import EncodedPrompt, PictureTensors, tokenize_prompt
from .metrics import Difference, compare, compare_ids, unreached

if TYPE_CHECKING:
    from .reference import ReferenceValues

Rows = list[NDArray[Any]]
# Stage name -> one difference per case, in the order of the cases.
Differences = dict[str, list[Difference]]


@dataclass(frozen=True)
class Case:
    """One picture, upright but in its own mode, or a video, with one prompt; `picture` describes it.

    A video is a list of frames for a model that takes nothing else, and a `Video` for others.
    """

    label: str
    picture: str
    image: Any  # Image.Image, a list of them, or a Video of such a list
    prompt: str


class BundleStages:
    """The stages of a loaded pipeline, one row per case; each method raises EngineError as the run time does."""

    def __init__(self, pipeline: Pipeline) -> None:
        self._pipeline = pipeline
        self._engines = pipeline.engines
        # Of the prompts that were merged last: positions follow from prompts, and embeddings do not tell them.
        self._more: StepInputs | None = None

    @property
    def names(self) -> tuple[str, ...]:
        """The bundle's stages."""
        return tuple(self._engines)

    def prepare(self, cases: Sequence[Case]) -> list[PictureTensors]:
        """Each picture as the encoder takes it, with what the connector reads of its prompt."""
        return [self._pipeline.instruct(self._pipeline.prepare_picture(case.image), case.prompt) for case in cases]

    def prompts(self, prompts: Sequence[str], pictures: Sequence[PictureTensors]) -> list[EncodedPrompt]:
        """Token ids and image positions of each prompt with its picture."""
        tokenizer, contract = self._pipeline.tokenizer, self._pipeline.prompt
        return [
            tokenize_prompt(tokenizer, contract, prompt, [picture.pieces], videos=[0] if picture.video else ())
            for prompt, picture in zip(prompts, pictures, strict=True)
        ]

    def encode(self, pictures: Sequence[PictureTensors]) -> Rows:
        """`image_embeds` `[tiles, N, Dv]` of each picture, all tiles in one batch."""
        return self._pipeline.vision.encode(pictures)

    def connect(self, pictures: Sequence[PictureTensors], image_embeds: Rows) -> Rows:
        """`image_features` `[tiles, Q, D]` of each picture, all tiles in one batch."""
        return self._pipeline.vision.connect(pictures, image_embeds)

    def merge(
        self,
        ids: Sequence[Sequence[int]],
        positions: Sequence[Sequence[int]],
        pictures: Sequence[PictureTensors],
        features: Rows,
    ) -> Rows:
        """Token ids, image positions and image features to `inputs_embeds` `[S, D]` of each row."""
        rows = [tuple(np.asarray(row, np.int64) for row in column) for column in (ids, positions)]
        prepared = Prepared(tuple((picture,) for picture in pictures), *rows)
        arranged = [self._pipeline.vision.arrange(*one) for one in zip(pictures, features, strict=True)]
        inputs_embeds, lengths = self._pipeline.merge(prepared, arranged)
        self._more = self._pipeline.step_inputs(prepared, lengths, arranged)
        return [row[:length] for row, length in zip(inputs_embeds, lengths, strict=True)]

    def first_logits(self, inputs_embeds: Rows) -> Rows:
        """Logits `[V]` after each prompt `[S, D]`, the prompts in one right-padded batch."""
        return list(self._pipeline.prefill_logits(*_pad(inputs_embeds), self._more))

    def forced_tokens(self, inputs_embeds: Rows, token_ids: Sequence[Sequence[int]]) -> list[list[int]]:
        """The token it would choose at each position of `token_ids`, given all of them before that position."""
        steps = max(len(row) for row in token_ids)
        decoding = self._pipeline.decoder.start(*_pad(inputs_embeds), max_new_tokens=steps, more=self._more)
        chosen: list[list[int]] = [[] for _ in token_ids]
        try:
            for step in range(steps):
                if step:
                    given = [row[step - 1] if step < len(row) else 0 for row in token_ids]
                    decoding.step(given, [step < len(row) for row in token_ids])
                for row, choice in zip(chosen, decoding.logits.argmax(axis=-1), strict=True):
                    row.append(int(choice))
        finally:
            decoding.close()
        return [row[: len(given)] for row, given in zip(chosen, token_ids, strict=True)]

    def generate(self, images: Sequence[Any], prompts: Sequence[str], max_new_tokens: int) -> list[list[int]]:
        """Greedy token ids of the whole chain, exactly as a user runs it, in one batch."""
        rows = self._pipeline.generate(list(images), list(prompts), max_new_tokens=max_new_tokens, temperature=0.0)
        return [list(row.token_ids) for row in rows]


def _pad(rows: Rows) -> tuple[NDArray[Any], NDArray[np.int64]]:
    """Rows `[S, D]` to `[B, S, D]`, right-padded with zeros, and their lengths."""
    lengths = np.array([len(row) for row in rows], np.int64)
    padded = np.zeros((len(rows), int(lengths.max()), rows[0].shape[-1]), rows[0].dtype)
    for target, row in zip(padded, rows, strict=True):
        target[: len(row)] = row
    return padded, lengths


def run_isolated(stages: BundleStages, cases: Sequence[Case], references: Sequence[ReferenceValues]) -> Differences:
    """Every stage fed PyTorch's input. A stage that raises counts as infinitely wrong; the others still run."""
    pictures = stages.prepare(cases)
    given = [_given(picture, one) for picture, one in zip(pictures, references, strict=True)]
    runs: Mapping[str, Callable[[], list[Difference]]] = {
        "pixels": lambda: _values(references, "pixel_values", _pixels(pictures)),
        "placeholder_ids": lambda: _prompts(references, stages.prompts([case.prompt for case in cases], pictures)),
        "encoder": lambda: _values(references, "image_embeds", stages.encode(given)),
        "connector": lambda: _values(
            references, "image_features", stages.connect(given, [one.image_embeds for one in references])
        ),
        "merged_embeddings": lambda: _values(
            references,
            "inputs_embeds",
            stages.merge(
                [one.input_ids for one in references],
                [one.image_positions for one in references],
                given,
                [one.image_features for one in references],
            ),
        ),
        "first_logits": lambda: _values(
            references, "logits", stages.first_logits([one.inputs_embeds for one in references])
        ),
        "tokens": lambda: _tokens(
            references,
            stages.forced_tokens([one.inputs_embeds for one in references], [one.token_ids for one in references]),
        ),
    }
    found: Differences = {}
    for name, run in runs.items():
        try:
            found[name] = run()
        except BridgeportError as error:
            found[name] = [unreached(str(error))] * len(cases)
    return found


def run_chained(
    stages: BundleStages, cases: Sequence[Case], references: Sequence[ReferenceValues], max_new_tokens: int
) -> tuple[Differences, list[list[int]]]:
    """Every stage fed what the bundle computed before; also the token ids of the whole chain (empty if it
    stopped).

    When a stage raises, it and all after it count as infinitely wrong.
    """
    found: Differences = {}
    tokens: list[list[int]] = [[] for _ in cases]
    images, prompts = [case.image for case in cases], [case.prompt for case in cases]
    try:
        pictures = stages.prepare(cases)
        found["pixels"] = _values(references, "pixel_values", _pixels(pictures))
        encoded = stages.prompts(prompts, pictures)
        found["placeholder_ids"] = _prompts(references, encoded)
        image_embeds = stages.encode(pictures)
        found["encoder"] = _values(references, "image_embeds", image_embeds)
        features = stages.connect(pictures, image_embeds)
        found["connector"] = _values(references, "image_features", features)
        positions = [one.image_positions for one in encoded]
        merged = stages.merge([one.input_ids for one in encoded], positions, pictures, features)
        found["merged_embeddings"] = _values(references, "inputs_embeds", merged)
        found["first_logits"] = _values(references, "logits", stages.first_logits(merged))
        tokens = stages.generate(images, prompts, max_new_tokens)
        found["tokens"] = _tokens(references, tokens)
    except BridgeportError as error:
        stopped = [unreached(f"the chain stopped: {error}")] * len(cases)
        order = (
            "pixels",
            "placeholder_ids",
            "encoder",
            "connector",
            "merged_embeddings",
            "first_logits",
            "tokens",
        )
        found |= {name: stopped for name in order if name not in found}
    return found, tokens


def _values(references: Sequence[ReferenceValues], name: str, values: Rows) -> list[Difference]:
    return [compare(getattr(one, name), value) for one, value in zip(references, values, strict=True)]


def _tokens(references: Sequence[ReferenceValues], tokens: Sequence[Sequence[int]]) -> list[Difference]:
    return [compare_ids(one.token_ids, row) for one, row in zip(references, tokens, strict=True)]


def _prompts(references: Sequence[ReferenceValues], prompts: Sequence[EncodedPrompt]) -> list[Difference]:
    """Ids first; where they are equal, the positions, which a prompt contract could still put elsewhere."""
    found = []
    for one, prompt in zip(references, prompts, strict=True):
        ids = compare_ids(one.input_ids, prompt.input_ids)
        found.append(ids if ids.max_abs else compare_ids(one.image_positions, prompt.image_positions))
    return found


def _pixels(pictures: Sequence[PictureTensors]) -> Rows:
    return [picture.tensors["pixel_values"] for picture in pictures]


def _given(picture: PictureTensors, reference: ReferenceValues) -> PictureTensors:
    """The picture with PyTorch's pixels, and which features the placeholders get: as the bundle lays them out, unless
    it has another number of them than PyTorch, which is a fault of the placeholders and not of the merge.
    """
    given = replace(picture, tensors={**picture.tensors, "pixel_values": reference.pixel_values})
    features = reference.image_features.size // reference.image_features.shape[-1]
    if len(picture.rows) != len(reference.image_positions) == features:
        return replace(given, rows=np.arange(features), weights=None)
    return given
