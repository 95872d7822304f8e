"""Pictures to the features that stand for them in a prompt: encoder, connector, and the order of the rows."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from ..bundle import Bundle
from .engine import DeviceMemory, Engine
from .processor import PictureTensors

Array = NDArray[Any]


class VisionChain:
    """The stages encoder and connector of a bundle, with the learned vectors that belong to their features.

    Tiles of all pictures run in one batch, as far as the contracts' batch allows. An encoder whose leading axis is no
    batch (the patches of Qwen2-VL) gets one picture at a time.
    """

    def __init__(self, bundle: Bundle, engines: Mapping[str, Engine]) -> None:
        self.encoder, self.connector = engines["encoder"], engines["connector"]
        # LLaVA-NeXT-Video has another for the frames of videos.
        self.video_connector = engines.get("video_connector", self.connector)
        record = bundle.manifest.stage("connector")
        self._vectors = {name: _load_vector(bundle.file(path)) for name, path in record.vectors.items()}

    def encode(self, pictures: Sequence[PictureTensors], *, resident: bool = False) -> list[Array]:
        """The encoder's output `[tiles, N, Dv]` of each picture; pictures that share their tensors share it.

        `resident`: leave it in the engine's memory, for a connector with the same one.
        """
        unique = {id(picture.tensors["pixel_values"]): picture for picture in pictures}
        outputs = _run(self.encoder, [picture.tensors for picture in unique.values()], resident=resident)
        self._wait(resident)
        found = dict(zip(unique, outputs, strict=True))
        return [found[id(picture.tensors["pixel_values"])] for picture in pictures]

    def connect(
        self, pictures: Sequence[PictureTensors], image_embeds: Sequence[Array], *, resident: bool = False
    ) -> list[Array]:
        """The connector's output `[tiles, Q, D]` of each picture; `resident` as in `encode`."""
        inputs = [
            {**picture.tensors, "image_embeds": embeds} for picture, embeds in zip(pictures, image_embeds, strict=True)
        ]
        engines = [self.video_connector if picture.video else self.connector for picture in pictures]
        connected: dict[int, Array] = {}
        for engine in dict.fromkeys(engines):
            chosen = [place for place, other in enumerate(engines) if other is engine]
            outputs = _run(engine, [inputs[place] for place in chosen], resident=resident)
            connected.update(zip(chosen, outputs, strict=True))
        self._wait(resident)
        return [connected[place] for place in range(len(pictures))]

    def arrange(self, picture: PictureTensors, features: Array) -> Array:
        """`[T, D]`: the picture's features `[tiles, Q, D]` in the order of its image tokens."""
        memory = self.memory_of([features])
        if memory is not None and picture.weights is None and not self._vectors:
            rows: Array = memory.take(features.reshape(-1, features.shape[-1]), picture.rows)
            return rows
        features = np.asarray(features)
        table = features.reshape(-1, features.shape[-1])
        if "image_newline" in self._vectors:
            table = np.concatenate([table, self._vectors["image_newline"][None]])
        rows = table[picture.rows]
        if picture.weights is None:
            return rows
        blended: Array = np.einsum("tkd,tk->td", rows, picture.weights)
        return blended

    def _wait(self, resident: bool) -> None:
        """What stays on the device is not waited for by its engine; a stage's time must be its own."""
        if resident and self.encoder.memory is not None:
            self.encoder.memory.synchronize()

    def memory_of(self, features: Iterable[Array]) -> DeviceMemory | None:
        """Where features were left, None when all of them are on the host."""
        return None if all(isinstance(one, np.ndarray) for one in features) else self.connector.memory

    def join(self, features: Sequence[Array]) -> Array:
        """The features `[T, D]` of all pictures of a prompt as one array, where they are all in one memory."""
        memory = self.memory_of(features)
        if memory is not None and not any(isinstance(one, np.ndarray) for one in features):
            return memory.concatenate(features)  # type: ignore[no-any-return]
        width = int(self.connector.contract.outputs[0].shape[-1])
        return np.concatenate([np.zeros((0, width), np.float32), *(np.asarray(one) for one in features)])


def _run(engine: Engine, pictures: Sequence[Mapping[str, Array]], *, resident: bool) -> list[Array]:
    """The engine's one output for each picture.

    Pictures whose tensors have one shape run together. Those of different shapes do not: padded to the largest, a
    picture would give other features than alone.
    """
    names = [spec.name for spec in engine.contract.inputs]
    output = engine.contract.outputs[0].name
    if engine.contract.inputs[0].shape[0] != "batch":
        return [engine.run({name: picture[name] for name in names}, resident=resident)[output] for picture in pictures]
    groups: dict[tuple[Any, ...], list[int]] = {}
    for index, picture in enumerate(pictures):
        groups.setdefault(_shape_of(picture, names), []).append(index)
    found: dict[int, Array] = {}
    for members in groups.values():
        outputs = _run_batch(engine, [pictures[i] for i in members], resident=resident)
        found.update(zip(members, outputs, strict=True))
    return [found[index] for index in range(len(pictures))]


def _shape_of(picture: Mapping[str, Array], names: Sequence[str]) -> tuple[Any, ...]:
    """The shapes of one tile's tensors; lengths of texts, which have masks, may differ."""
    return tuple(picture[name].shape[1:] for name in names if picture[name].ndim > 2)


def _run_batch(engine: Engine, pictures: Sequence[Mapping[str, Array]], *, resident: bool) -> list[Array]:
    """All tiles of all pictures in one batch, or in as many as the contract's batch needs."""
    inputs = {spec.name: _join(engine, [picture[spec.name] for picture in pictures]) for spec in engine.contract.inputs}
    output = engine.contract.outputs[0].name
    counts = [len(picture[engine.contract.inputs[0].name]) for picture in pictures]
    most, total = engine.contract.axis("batch").max, sum(counts)
    parts = [
        engine.run({name: array[start : start + most] for name, array in inputs.items()}, resident=resident)[output]
        for start in range(0, total, most)
    ]
    whole = _join(engine, parts)
    ends = np.cumsum(counts)
    return [whole[end - count : end] for end, count in zip(ends, counts, strict=True)]


def _join(engine: Engine, arrays: Sequence[Array]) -> Array:
    """As `_stack`, in the engine's memory where all of them are there: their shapes are one then."""
    if engine.memory is not None and not any(isinstance(array, np.ndarray) for array in arrays):
        return engine.memory.concatenate(arrays)  # type: ignore[no-any-return]
    return _stack(arrays)


def _stack(arrays: Sequence[Array]) -> Array:
    """Along the first axis; the other axes are padded with zeros at their end to the longest."""
    if len(arrays) == 1:
        return arrays[0]
    shape = np.max([array.shape[1:] for array in arrays], axis=0) if arrays[0].ndim > 1 else ()
    padded = [
        np.pad(array, [(0, 0), *((0, int(most) - size) for size, most in zip(array.shape[1:], shape, strict=True))])
        if array.shape[1:] != tuple(shape)
        else array
        for array in arrays
    ]
    return np.concatenate(padded)


def _load_vector(file: Path) -> NDArray[np.float32]:
    vector: NDArray[np.float32] = np.load(file, allow_pickle=False)
    return vector
