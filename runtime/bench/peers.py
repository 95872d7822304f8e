"""The peers of a benchmark: who computes the chain, stage by stage, for one picture and one prompt.

Each peer is a class with `run(job) -> Outputs`; `PEERS` has one record for each. They time the same five things on
the same pixels and prompt ids: encoder, connector, merging with the LLM's prefill, every further token, and the sum.
"""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from ...errors import DependencyError, InputError
from ..processor import PictureTensors

STAGES = ("encoder", "connector", "prefill", "decode")


@dataclass(frozen=True)
class Job:
    """What every peer computes: a prompt `input_ids` `[1, S]` with `picture` in it, then `new_tokens` greedy ones."""

    picture: PictureTensors
    input_ids: NDArray[np.int64]
    image_positions: NDArray[np.int64]
    new_tokens: int

    @property
    def pixel_values(self) -> NDArray[np.float32]:
        """`[tiles, 3, H, W]`."""
        return self.picture.tensors["pixel_values"]

    def save(self, file: Path) -> None:
        """Write an .npz that `load` reads."""
        picture: dict[str, Any] = {f"tensor.{name}": array for name, array in self.picture.tensors.items()}
        if self.picture.weights is not None:
            picture["weights"] = self.picture.weights
        np.savez(
            file, rows=self.picture.rows, input_ids=self.input_ids, image_positions=self.image_positions,
            new_tokens=self.new_tokens, **picture,
        )  # fmt: skip

    @classmethod
    def load(cls, file: str | Path) -> Job:
        """What `save` wrote."""
        with np.load(file) as data:
            tensors = {name.removeprefix("tensor."): data[name] for name in data.files if name.startswith("tensor.")}
            weights = data["weights"] if "weights" in data.files else None
            picture = PictureTensors(tensors, (len(data["rows"]),), data["rows"], weights)
            return cls(picture, data["input_ids"], data["image_positions"], int(data["new_tokens"]))


@dataclass
class Outputs:
    """Seconds per stage (`decode` is all further tokens together), and what was computed, so that it can be checked."""

    seconds: dict[str, float] = field(default_factory=dict)
    image_features: NDArray[np.float32] | None = None
    token_ids: list[int] = field(default_factory=list)


class Stopwatch:
    """Wall time of named stretches, one after the other."""

    def __init__(self) -> None:
        self.seconds: dict[str, float] = {}
        self._last = time.perf_counter()

    def lap(self, name: str) -> None:
        """Book the time since the last lap (or since the start) under `name`."""
        now = time.perf_counter()
        self.seconds[name] = now - self._last
        self._last = now


class BridgeportPeer:
    """A bundle through `Pipeline`'s engines."""

    def __init__(self, source: Path, threads: int, *, engine: str | None = None) -> None:
        from ..pipeline import Pipeline

        self._pipeline = Pipeline.load(source, threads=threads, engine=engine)

    def run(self, job: Job) -> Outputs:
        """One pass over the chain; the stop tokens are ignored, so that every pass is equally long."""
        from .bundle_chain import run_chain

        return run_chain(self._pipeline, job, Stopwatch())

    def device_latency(self, job: Job, rounds: int) -> dict[str, Any]:
        """Times on the GPU of a bundle of TensorRT engines."""
        from .bundle_chain import device_latency

        return device_latency(self._pipeline, job, rounds)


class TorchPeer:
    """The `transformers` model with its default (SDPA) attention, in a loop without `generate`'s overhead.

    With `compiled`, encoder, connector and language model go through `torch.compile`, the latter over a static cache.
    """

    def __init__(self, source: Path, threads: int, *, dtype: str = "float32", compiled: bool = False) -> None:
        import torch

        torch.set_num_threads(threads)
        self._dtype = getattr(torch, dtype)
        model = self._model = _load_torch(source, self._dtype)
        self._compiled = compiled
        wrap: Callable[[Any], Any] = (
            (lambda part: torch.compile(part, dynamic=False)) if compiled else lambda part: part
        )
        self._encoder, self._qformer = wrap(model.vision_model), wrap(model.qformer)
        self._language_model = wrap(model.language_model)

    def run(self, job: Job) -> Outputs:
        """One pass over the chain, greedy, exactly `job.new_tokens` tokens."""
        import torch

        with torch.inference_mode():
            pixels = torch.from_numpy(job.pixel_values).to(self._dtype)
            watch = Stopwatch()
            image_embeds = self._encoder(pixels).last_hidden_state
            watch.lap("encoder")
            queries = self._model.query_tokens.expand(len(pixels), -1, -1)
            hidden = self._qformer(query_embeds=queries, encoder_hidden_states=image_embeds).last_hidden_state
            features = self._model.language_projection(hidden.to(self._dtype))
            watch.lap("connector")
            token_ids = self._generate(job, features, watch)
        return Outputs(watch.seconds, features.float().numpy(), token_ids)

    def _generate(self, job: Job, features: Any, watch: Stopwatch) -> list[int]:
        import torch

        input_ids = torch.from_numpy(job.input_ids)
        embeds = self._model.get_input_embeddings()(input_ids)
        embeds[:, torch.from_numpy(job.image_positions)] = features
        length = input_ids.shape[1]
        cache = self._cache(length + job.new_tokens)
        output = self._language_model(
            inputs_embeds=embeds, position_ids=torch.arange(length)[None], past_key_values=cache, use_cache=True,
            logits_to_keep=1,
        )  # fmt: skip
        token = output.logits[:, -1:].argmax(-1)
        token_ids = [int(token)]
        watch.lap("prefill")
        for position in range(length, length + job.new_tokens - 1):
            output = self._language_model(
                input_ids=token,
                position_ids=torch.tensor([[position]]),
                past_key_values=cache,
                use_cache=True,
            )
            token = output.logits[:, -1:].argmax(-1)
            token_ids.append(int(token))
        watch.lap("decode")
        return token_ids

    def _cache(self, capacity: int) -> Any:
        from transformers import DynamicCache, StaticCache

        text_config = self._model.config.text_config
        if self._compiled:
            return StaticCache(config=text_config, max_cache_len=capacity)
        return DynamicCache(config=text_config)


def _load_torch(source: Path, dtype: Any) -> Any:
    """The model of a checkpoint directory, or one of its sizes with random weights where it holds only the config."""
    from transformers import Blip2Config, Blip2ForConditionalGeneration

    if any(source.glob("*.safetensors")):
        model: Any = Blip2ForConditionalGeneration.from_pretrained(source, dtype=dtype)
    else:
        model = Blip2ForConditionalGeneration(Blip2Config.from_pretrained(source)).to(dtype)
    return model.eval()


@dataclass(frozen=True)
class PeerRecord:
    """How to make a peer, what it reads and what its row is called."""

    title: str
    make: Callable[[Path, int], Any]
    reads: str  # "bundle" or "checkpoint"


PEERS: dict[str, PeerRecord] = {
    "bridgeport": PeerRecord("Bridgeport", BridgeportPeer, "bundle"),
    "openvino": PeerRecord(
        "Bridgeport, OpenVINO", lambda path, threads: BridgeportPeer(path, threads, engine="openvino"), "bundle"
    ),
    "torch": PeerRecord("PyTorch FP32", TorchPeer, "checkpoint"),
    "torch-bf16": PeerRecord(
        "PyTorch bf16", lambda path, threads: TorchPeer(path, threads, dtype="bfloat16"), "checkpoint"
    ),
    "torch-compile": PeerRecord(
        "torch.compile FP32", lambda path, threads: TorchPeer(path, threads, compiled=True), "checkpoint"
    ),
}


def peer_record(name: str) -> PeerRecord:
    """The record of the peer called `name`; InputError lists the known ones otherwise."""
    if name not in PEERS:
        raise InputError(f"--against {name!r} is not a peer; known are {', '.join(sorted(PEERS))}")
    return PEERS[name]


def require_compiler() -> None:
    """`torch.compile` builds C++ on a CPU; DependencyError when no compiler is there."""
    import shutil

    if not any(shutil.which(name) for name in ("g++", "c++", "clang++")):
        raise DependencyError("torch-compile needs a C++ compiler (g++ or clang++) and none is on the PATH")
