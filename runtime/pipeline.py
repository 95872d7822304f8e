"""The whole chain: pictures and prompts through processor, encoder, connector and language model to text."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from types import TracebackType
from typing import TYPE_CHECKING, Any, overload

import numpy as np
from numpy.typing import NDArray
from PIL import Image

from ..bundle import Bundle
from ..errors import InputError
from .backends import EngineOptions, load_engines
from .decoder import Decoder
from .engine import Engine
from .generation import Generation, Row, Stopwatch, token_limits
from .merge import merge_image_features
from .processor import decode, load_image, load_tokenizer, preprocess_image, tokenize_prompt
from .sampling import Sampler, SamplingOptions, SamplingParams
from .stream import RunningBatch, TextStream

if TYPE_CHECKING:
    from typing_extensions import Unpack

    Picture = str | Path | Image.Image


@dataclass(frozen=True)
class Prepared:
    """Pictures and prompts as tensors.

    `pixel_values`: `[B, 3, H, W]` float32, or `[1, 3, H, W]` for one picture with `B` prompts. `input_ids`:
    int64 token ids per prompt, placeholders included. `image_positions`: per prompt, where in it the features
    go.
    """

    pixel_values: NDArray[np.float32]
    input_ids: tuple[NDArray[np.int64], ...]
    image_positions: tuple[NDArray[np.int64], ...]


class Pipeline:
    """A loaded bundle. `engines` holds the stages by name: encoder, connector, embed_tokens, llm.

    Calls do not share state: a stream may be read on while another call runs.
    """

    def __init__(self, bundle: Bundle, engines: dict[str, Engine], options: EngineOptions) -> None:
        self.bundle = bundle
        self.manifest = bundle.manifest
        self.engines = engines
        self.options = options
        self.tokenizer = load_tokenizer(bundle.file(self.manifest.tokenizer))
        context = self.manifest.generation.context_length
        self.decoder = Decoder(engines["embed_tokens"], engines["llm"], context)

    @classmethod
    def load(
        cls,
        bundle: str | Path | Bundle,
        *,
        device: str = "cpu",
        threads: int | None = None,
        engine: str = "onnxruntime",
        checkpoint: str | Path | None = None,
    ) -> Pipeline:
        """Verify the bundle and load its stages.

        `device`: "cpu", "cuda" or "cuda:N". `threads`: per stage, None for all cores. `engine`:
        "onnxruntime", or "torch" to run the stages of `checkpoint` in PyTorch instead (a reference; it needs
        torch and transformers).

        Raises BundleError (BundleIntegrityError, BundleSchemaError) before anything is parsed,
        DependencyError for a missing library or provider, EngineError for a graph that does not load,
        InputError for a bad option.
        """
        options = EngineOptions(device, threads, None if checkpoint is None else Path(checkpoint))
        verified = bundle if isinstance(bundle, Bundle) else Bundle.load(bundle)
        return cls(verified, load_engines(engine, verified, options), options)

    def encode(self, images: Picture | Sequence[Picture]) -> NDArray[np.float32]:
        """Image features `[B, Q, D]`, as they are merged into the prompt; one picture gives `B` = 1."""
        return self.encode_pixels(self._pixel_values(_as_list(images)))

    @overload  # a str is a sequence of str to the type checker, and one picture here
    def generate(  # type: ignore[overload-overlap]
        self, images: Picture, prompt: str = "", **options: Unpack[SamplingOptions]
    ) -> Generation: ...

    @overload
    def generate(
        self, images: Sequence[Picture], prompt: str | Sequence[str] = "", **options: Unpack[SamplingOptions]
    ) -> list[Generation]: ...

    @overload
    def generate(
        self, images: Picture, prompt: list[str] | tuple[str, ...], **options: Unpack[SamplingOptions]
    ) -> list[Generation]: ...

    def generate(
        self,
        images: Picture | Sequence[Picture],
        prompt: str | Sequence[str] = "",
        **options: Unpack[SamplingOptions],
    ) -> Generation | list[Generation]:
        """Answer `prompt` about a picture; an empty prompt captions it.

        One picture and one prompt give one `Generation`. Lists run as one batch and give a list: pictures and
        prompts pairwise, one prompt for all pictures, or one picture for all prompts; every row is as if it
        ran alone. `options`: the fields of `SamplingParams`; greedy by default.

        Raises InputError for a picture, prompt or option that cannot be used, EngineError when a stage fails.
        """
        batch = self._start(images, prompt, _params(options))
        try:
            for _ in batch.steps():
                pass
        finally:
            batch.close()
        results = [batch.result(row, decode(self.tokenizer, row.token_ids)) for row in batch.rows]
        return results[0] if _is_one(images) and isinstance(prompt, str) else results

    def stream(self, image: Picture, prompt: str = "", **options: Unpack[SamplingOptions]) -> TextStream:
        """As `generate` for one picture, piece by piece; `generation` is there after the last piece."""
        if not _is_one(image) or not isinstance(prompt, str):
            raise InputError("stream takes one picture and one prompt; use generate for several")
        return TextStream(self._start(image, prompt, _params(options)), self.tokenizer)

    def prepare(self, images: Picture | Sequence[Picture], prompts: str | Sequence[str]) -> Prepared:
        """Pictures and prompts as the manifest's contracts lay them out, not yet encoded.

        Raises InputError for what is no picture or prompt, and for lists that do not pair up.
        """
        pictures, texts = _as_list(images), [prompts] if isinstance(prompts, str) else list(prompts)
        if len(texts) == 1:
            texts *= len(pictures)
        if len(pictures) not in (1, len(texts)):
            raise InputError(
                f"{len(pictures)} pictures and {len(texts)} prompts came; "
                "accepted are as many of each, or one of either"
            )
        pixel_values = self._pixel_values(pictures)
        self._check_batch(len(texts))
        encoded = [tokenize_prompt(self.tokenizer, self.manifest.prompt, text) for text in texts]
        return Prepared(
            pixel_values,
            tuple(np.array(prompt.input_ids, np.int64) for prompt in encoded),
            tuple(np.arange(len(prompt.input_ids))[prompt.image_positions] for prompt in encoded),
        )

    def encode_pixels(self, pixel_values: NDArray[np.float32]) -> NDArray[np.float32]:
        """`pixel_values` `[B, 3, H, W]` to image features `[B, Q, D]`."""
        image_embeds = self.engines["encoder"].run({"pixel_values": pixel_values})["image_embeds"]
        return self.engines["connector"].run({"image_embeds": image_embeds})["image_features"]

    def merge(
        self, prepared: Prepared, image_features: NDArray[np.float32]
    ) -> tuple[NDArray[np.float32], NDArray[np.int64]]:
        """Prompt embeddings with the features in place `[B, S, D]`, right-padded, and lengths `[B]`."""
        inputs_embeds, lengths = self.decoder.embed(prepared.input_ids)
        if len(image_features) == 1:
            image_features = np.broadcast_to(image_features, (len(lengths), *image_features.shape[1:]))
        merge_image_features(inputs_embeds, image_features, prepared.image_positions)
        return inputs_embeds, lengths

    def prefill_logits(
        self, inputs_embeds: NDArray[np.float32], lengths: NDArray[np.int64] | None = None
    ) -> NDArray[np.float32]:
        """Logits `[B, V]` after the last of each row's `lengths` `[B]` embeddings (all of `S` by default)."""
        full = np.full(len(inputs_embeds), inputs_embeds.shape[1])
        decoding = self.decoder.start(inputs_embeds, full if lengths is None else lengths, 0)
        decoding.close()
        return decoding.logits

    def cross_attention(self, images: Picture | Sequence[Picture]) -> NDArray[np.float32]:
        """Where each query looks: `[B, layers with cross-attention, heads, Q, N]`, `N` tokens of the encoder.

        Loads the bundle's attention graph for this call. UnsupportedError when the bundle has none.
        """
        from .attention_map import load_attention_engine

        pixel_values = self._pixel_values(_as_list(images))
        image_embeds = self.engines["encoder"].run({"pixel_values": pixel_values})["image_embeds"]
        with load_attention_engine(self.bundle, self.options) as engine:
            return engine.run({"image_embeds": image_embeds})["cross_attention"]

    def close(self) -> None:
        """Free the engines and the cache."""
        self.decoder.close()
        for engine in self.engines.values():
            engine.close()

    def __enter__(self) -> Pipeline:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    def _start(
        self, images: Picture | Sequence[Picture], prompt: str | Sequence[str], params: SamplingParams
    ) -> RunningBatch:
        """Everything up to the first logits."""
        watch = Stopwatch()
        prepared = self.prepare(images, prompt)
        rows = list(self._rows(prepared, params))
        watch.lap("preprocess")
        image_embeds = self.engines["encoder"].run({"pixel_values": prepared.pixel_values})["image_embeds"]
        watch.lap("encoder")
        features = self.engines["connector"].run({"image_embeds": image_embeds})["image_features"]
        watch.lap("connector")
        inputs_embeds, lengths = self.merge(prepared, features)
        decoding = self.decoder.start(inputs_embeds, lengths, max(row.limit for row in rows))
        watch.lap("prefill")
        return RunningBatch(decoding, rows, watch)

    def _rows(self, prepared: Prepared, params: SamplingParams) -> Iterator[Row]:
        contract = self.manifest.generation
        lengths = [len(ids) for ids in prepared.input_ids]
        limits = token_limits(lengths, params.max_new_tokens, contract)
        stop = frozenset(params.stop_token_ids) | (frozenset() if params.ignore_eos else set(contract.eos_token_ids))
        for row, (ids, limit) in enumerate(zip(prepared.input_ids, limits, strict=True)):
            generator = params.generator(row, len(lengths))
            yield Row(len(ids), Sampler(params, ids.tolist(), contract.vocab_size, generator), limit, stop)

    def _pixel_values(self, pictures: Sequence[Picture]) -> NDArray[np.float32]:
        if not pictures:
            raise InputError("no picture came; give at least one")
        self._check_batch(len(pictures))
        for picture in pictures:
            if not isinstance(picture, str | Path | Image.Image):
                raise InputError(f"a picture is a {type(picture).__name__}; accepted is a path or a Pillow picture")
        return np.stack([preprocess_image(load_image(picture), self.manifest.image) for picture in pictures])

    def _check_batch(self, count: int) -> None:
        most = min(engine.contract.axis("batch").max for engine in self.engines.values())
        if count > most:
            raise InputError(f"{count} rows came, the bundle takes at most {most} at once; pass them in parts")


def _params(options: Any) -> SamplingParams:
    try:
        return SamplingParams(**options)
    except TypeError as error:
        known = ", ".join(SamplingParams.__dataclass_fields__)
        raise InputError(f"{str(error).split('() ', 1)[-1]}; generation options are {known}") from error


def _is_one(images: Any) -> bool:
    return not isinstance(images, Sequence) or isinstance(images, str)


def _as_list(images: Any) -> list[Any]:
    return [images] if _is_one(images) else list(images)
