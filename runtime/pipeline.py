"""The whole chain: pictures and prompts through processor, encoder, connector and language model to text."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from types import TracebackType
from typing import TYPE_CHECKING, Any, overload

import numpy as np
from numpy.typing import NDArray

from ..bundle import Bundle
from ..errors import InputError
from ..image_contract import Patches
from ..manifest import GenerationContract, PromptContract
from .backends import EngineOptions, load_engines
from .decoder import Decoder, StepInputs
from .engine import Engine, share_memory
from .flamingo import read_images
from .generation import Generation, Row, Stopwatch, token_limits
from .merge import merge_image_features
from .mrope import positions_of, takes_positions
from .processor import PictureTensors, decode, load_tokenizer, tokenize_prompt
from .processor.instruction import InstructionTokenizer
from .sampling import Sampler, SamplingOptions, SamplingParams
from .seq2seq import Seq2SeqDecoder, seq2seq_token_limits
from .sources import as_list, as_texts, group_sources, is_one, order_group, prepare_groups, prepare_source, some_of
from .stream import RunningBatch, TextStream
from .vision import VisionChain

if TYPE_CHECKING:
    from PIL import Image
    from typing_extensions import Unpack

    from .sources import Video

    # A video too, where the bundle takes videos.
    Picture = str | Path | Image.Image | Video
    # One for each prompt: a picture, or all pictures of that prompt; None: no pictures at all.
    Pictures = Picture | Sequence[Picture] | Sequence[Sequence[Picture]] | None


@dataclass(frozen=True)
class Prepared:
    """Pictures and prompts as tensors.

    `pictures`: per prompt, its pictures; one that stands in several prompts is one object. `input_ids`: int64 token
    ids per prompt, placeholders included. `image_positions`: per prompt, where in it the features go.
    """

    pictures: tuple[tuple[PictureTensors, ...], ...]
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
        self.prompt, self.generation = _generating(bundle)
        self.tokenizer = load_tokenizer(bundle.file(self.manifest.tokenizer))
        self.instruction = _instruction_tokenizer(bundle, self.prompt)
        self.vision = VisionChain(bundle, engines)
        self.decoder = self._make_decoder()
        self.resident = not (self.manifest.flamingo or self.manifest.seq2seq) and share_memory(engines.values())

    @classmethod
    def load(
        cls,
        bundle: str | Path | Bundle,
        *,
        device: str = "cpu",
        threads: int | None = None,
        engine: str | None = None,
        checkpoint: str | Path | None = None,
        cuda_graphs: bool = False,
    ) -> Pipeline:
        """Verify the bundle and load its stages.

        `device`: "cpu", "cuda" or "cuda:N". `threads`: per stage, None for all cores. `engine`: a name of `BACKENDS`,
        None for the bundle's own; "torch" runs the stages of `checkpoint` in PyTorch instead (a reference; it needs
        torch and transformers). `cuda_graphs`: see `EngineOptions`.

        Raises BundleError (BundleIntegrityError, BundleSchemaError) before anything is parsed, DependencyError for a
        missing library or provider, EngineError for a graph that does not load, InputError for a bad option.
        """
        options = EngineOptions(device, threads, None if checkpoint is None else Path(checkpoint), cuda_graphs)
        verified = bundle if isinstance(bundle, Bundle) else Bundle.load(bundle)
        _generating(verified)  # before a stage is loaded
        return cls(verified, load_engines(engine, verified, options), options)

    def encode(self, images: Picture | Sequence[Picture], prompt: str = "") -> NDArray[np.float32]:
        """Image features `[B, T, D]`, as they are merged into the prompt; one picture gives `B` = 1.

        `prompt`: what a connector reads that takes instructions (InstructBLIP); to others it makes no difference.
        Raises InputError for pictures that give different numbers `T` of tokens: pass those one by one.
        """
        features = self._features(self._instructed(images, prompt))
        if len({len(rows) for rows in features}) > 1:
            raise InputError(
                f"the pictures give {[len(rows) for rows in features]} tokens, which are no one array; "
                "encode pictures of different shapes one by one"
            )
        return np.stack(features)

    @overload  # a str is a sequence of str to the type checker, and one picture here
    def generate(  # type: ignore[overload-overlap]
        self, images: Picture | None, prompt: str = "", *, interleave: bool = False, **options: Unpack[SamplingOptions]
    ) -> Generation: ...

    @overload
    def generate(
        self,
        images: Sequence[Picture] | Sequence[Sequence[Picture]],
        prompt: str | Sequence[str] = "",
        *,
        interleave: bool = False,
        **options: Unpack[SamplingOptions],
    ) -> list[Generation]: ...

    @overload
    def generate(
        self,
        images: Picture | None,
        prompt: list[str] | tuple[str, ...],
        *,
        interleave: bool = False,
        **options: Unpack[SamplingOptions],
    ) -> list[Generation]: ...

    def generate(
        self,
        images: Pictures,
        prompt: str | Sequence[str] = "",
        *,
        interleave: bool = False,
        **options: Unpack[SamplingOptions],
    ) -> Generation | list[Generation]:
        """Answer `prompt` about a picture; an empty prompt captions it.

        One picture or `Video` (or None, for a model that takes text alone) and one prompt give one `Generation`. Lists
        run as one batch and give a list: pictures and prompts pairwise, one prompt for all pictures, or one picture for
        all prompts; every row is as if it ran alone. A list in the list holds all pictures of one prompt, which stand
        in front of it, or with `interleave` where its `{image}` marks are. `options`: the fields of `SamplingParams`;
        greedy by default.

        Raises InputError for a picture, prompt or option that cannot be used, EngineError when a stage fails.
        """
        batch = self._start(images, prompt, _params(options), interleave=interleave)
        try:
            for _ in batch.steps():
                pass
        finally:
            batch.close()
        results = [batch.result(row, decode(self.tokenizer, row.text_ids)) for row in batch.rows]
        return results[0] if is_one(images) and isinstance(prompt, str) else results

    def stream(
        self,
        images: Picture | Sequence[Picture] | None,
        prompt: str = "",
        *,
        interleave: bool = False,
        **options: Unpack[SamplingOptions],
    ) -> TextStream:
        """As `generate` for one prompt with its pictures, piece by piece; `generation` is there after the last one."""
        if not isinstance(prompt, str):
            raise InputError("stream takes one prompt with its pictures; use generate for several")
        together = None if images is None else [as_list(images)]
        return TextStream(self._start(together, prompt, _params(options), interleave=interleave), self.tokenizer)

    def prepare(self, images: Pictures, prompts: str | Sequence[str], *, interleave: bool = False) -> Prepared:
        """Pictures and prompts as the manifest's contracts lay them out, not yet encoded.

        Raises InputError for what is no picture or prompt, and for lists that do not pair up.
        """
        texts = as_texts(prompts)
        groups = [
            order_group(group, self.prompt, interleave=interleave) for group in group_sources(images, self.manifest)
        ]
        texts = texts * len(groups) if len(texts) == 1 else texts
        groups = groups * len(texts) if len(groups) == 1 else groups
        if len(groups) != len(texts):
            raise InputError(
                f"{len(groups)} pictures and {len(texts)} prompts came; accepted are as many of each, or one of either"
            )
        self._check_batch(len(texts))
        pictures = prepare_groups(groups, self.prepare_picture)
        encoded = [
            tokenize_prompt(
                self.tokenizer,
                self.prompt,
                text,
                [picture.pieces for picture in row],
                videos=[place for place, picture in enumerate(row) if picture.video],
                interleave=interleave,
            )
            for text, row in zip(texts, pictures, strict=True)
        ]
        return Prepared(
            self._instruct_rows(pictures, texts),
            tuple(np.array(one.input_ids, np.int64) for one in encoded),
            tuple(np.array(one.image_positions, np.int64) for one in encoded),
        )

    def merge(
        self, prepared: Prepared, image_features: Sequence[NDArray[np.float32]] | NDArray[np.float32]
    ) -> tuple[NDArray[np.float32], NDArray[np.int64]]:
        """Prompt embeddings with the features in place `[B, S, D]`, right-padded, and lengths `[B]`.

        `image_features`: `[T, D]` of all pictures of each row.
        """
        memory = self.vision.memory_of(image_features)
        inputs_embeds, lengths = self.decoder.embed(prepared.input_ids, resident=memory is not None)
        if self.manifest.flamingo is None:
            merge_image_features(inputs_embeds, list(image_features), prepared.image_positions, memory)
        return inputs_embeds, lengths

    def step_inputs(
        self, prepared: Prepared, lengths: NDArray[np.int64], image_features: Sequence[NDArray[np.float32]]
    ) -> StepInputs | None:
        """What the language model asks for beyond the embeddings of rows of `lengths` `[B]`.

        M-RoPE's positions, or what Flamingo's cross-attention reads of `image_features` (see `merge`).
        """
        flamingo = self.manifest.flamingo
        if flamingo is not None:
            token = self.prompt.image_token_id
            return read_images(self.engines["cross_kv"], flamingo, prepared.input_ids, token, image_features)
        tiling = self.manifest.image.tiling
        if not takes_positions(self.engines["llm"].contract) or not isinstance(tiling, Patches):
            return None
        return positions_of(lengths, prepared.image_positions, prepared.pictures, tiling.merge_size, tiling.pool_stride)

    def prefill_logits(
        self,
        inputs_embeds: NDArray[np.float32],
        lengths: NDArray[np.int64] | None = None,
        more: StepInputs | None = None,
    ) -> NDArray[np.float32]:
        """Logits `[B, V]` after the last of each row's `lengths` `[B]` embeddings (all of `S` by default).

        `more`: see `step_inputs`.
        """
        full = np.full(len(inputs_embeds), inputs_embeds.shape[1])
        decoding = self.decoder.start(inputs_embeds, full if lengths is None else lengths, 0, more)
        decoding.close()
        return decoding.logits

    def cross_attention(self, images: Picture | Sequence[Picture], prompt: str = "") -> NDArray[np.float32]:
        """Where each query looks: `[B, layers with cross-attention, heads, Q, N]`, `N` tokens of the encoder.

        `prompt`: what a connector reads that takes instructions; for videos, `B` counts frames. Loads the bundle's
        attention graph for this call. UnsupportedError when the bundle has none.
        """
        from .attention_map import load_attention_engine

        pictures = self._instructed(images, prompt)
        self._check_batch(len(pictures))
        inputs = {"image_embeds": np.concatenate(self.vision.encode(pictures))}
        with load_attention_engine(self.bundle, self.options) as engine:
            for name in (spec.name for spec in engine.contract.inputs if spec.name not in inputs):
                inputs[name] = np.concatenate([picture.tensors[name] for picture in pictures])
            return engine.run(inputs)["cross_attention"]

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
        self, images: Pictures, prompt: str | Sequence[str], params: SamplingParams, *, interleave: bool
    ) -> RunningBatch:
        """Everything up to the first logits."""
        watch = Stopwatch()
        prepared = self.prepare(images, prompt, interleave=interleave)
        rows = list(self._rows(prepared, params))
        watch.lap("preprocess")
        features = self._row_features(prepared, watch)
        inputs_embeds, lengths = self.merge(prepared, features)
        more = self.step_inputs(prepared, lengths, features)
        decoding = self.decoder.start(inputs_embeds, lengths, max(row.limit for row in rows), more)
        watch.lap("prefill")
        return RunningBatch(decoding, rows, watch)

    def _row_features(self, prepared: Prepared, watch: Stopwatch) -> list[NDArray[np.float32]]:
        """The features `[T, D]` of all pictures of each row; a picture of several rows is computed once."""
        unique = {id(picture): picture for row in prepared.pictures for picture in row}
        features = dict(zip(unique, self._features(list(unique.values()), watch, self.resident), strict=True))
        return [self.vision.join([features[id(picture)] for picture in row]) for row in prepared.pictures]

    def _features(
        self, pictures: Sequence[PictureTensors], watch: Stopwatch | None = None, resident: bool = False
    ) -> list[NDArray[np.float32]]:
        watch = watch or Stopwatch()
        image_embeds = self.vision.encode(pictures, resident=resident)
        watch.lap("encoder")
        connected = self.vision.connect(pictures, image_embeds, resident=resident)
        features = [self.vision.arrange(*one) for one in zip(pictures, connected, strict=True)]
        watch.lap("connector")
        return features

    def _rows(self, prepared: Prepared, params: SamplingParams) -> Iterator[Row]:
        contract, seq2seq = self.generation, self.manifest.seq2seq
        lengths = [len(ids) for ids in prepared.input_ids]
        if seq2seq is None:
            limits = token_limits(lengths, params.max_new_tokens, contract)
        else:
            limits = seq2seq_token_limits(lengths, params.max_new_tokens, contract, seq2seq)
        stop = frozenset(params.stop_token_ids) | (frozenset() if params.ignore_eos else set(contract.eos_token_ids))
        for row, (ids, limit) in enumerate(zip(prepared.input_ids, limits, strict=True)):
            generator = params.generator(row, len(lengths))
            runs = () if params.ignore_eos else contract.stop_sequences
            # What counts as said already: the prompt, or in a decoder of its own the token that it starts with.
            said = ids.tolist() if seq2seq is None else [seq2seq.decoder_start_token_id]
            yield Row(len(ids), Sampler(params, said, contract.vocab_size, generator), limit, stop, runs)

    def _make_decoder(self) -> Decoder:
        engines, seq2seq = self.engines, self.manifest.seq2seq
        if seq2seq is None:
            return Decoder(engines["embed_tokens"], engines["llm"], self.generation.context_length)
        return Seq2SeqDecoder(engines["embed_tokens"], engines["llm_encoder"], engines["llm"], seq2seq)

    def prepare_picture(self, source: Any, pictures: int = 1) -> PictureTensors:
        """One picture (or video) as the encoder takes it; `pictures`: how many its prompt holds, videos not counted."""
        return prepare_source(source, self.manifest, pictures)

    def instruct(self, picture: PictureTensors, prompt: str) -> PictureTensors:
        """`picture` with `prompt` as the connector reads it; the picture itself where the connector reads none.

        Raises InputError for a prompt that the connector cannot read.
        """
        if self.instruction is None:
            return picture
        tiles = len(picture.tensors["pixel_values"])
        return replace(picture, tensors={**picture.tensors, **self.instruction.tensors(prompt, tiles)})

    def _instructed(self, images: Picture | Sequence[Picture], prompt: str) -> list[PictureTensors]:
        return [self.instruct(self.prepare_picture(source), prompt) for source in some_of(images)]

    def _instruct_rows(
        self, rows: Sequence[Sequence[PictureTensors]], prompts: Sequence[str]
    ) -> tuple[tuple[PictureTensors, ...], ...]:
        """A picture with the same prompt in several rows stays one object."""
        made: dict[tuple[int, str], PictureTensors] = {}
        for row, prompt in zip(rows, prompts, strict=True):
            for picture in row:
                if (id(picture), prompt) not in made:
                    made[id(picture), prompt] = self.instruct(picture, prompt)
        return tuple(
            tuple(made[id(picture), prompt] for picture in row) for row, prompt in zip(rows, prompts, strict=True)
        )

    def _check_batch(self, count: int) -> None:
        most = self.engines["llm"].contract.axis("batch").max
        if count > most:
            raise InputError(f"{count} rows came, the bundle takes at most {most} at once; pass them in parts")


def _generating(bundle: Bundle) -> tuple[PromptContract, GenerationContract]:
    """The contracts of a bundle that generates text; InputError for another."""
    manifest = bundle.manifest
    if manifest.prompt is None or manifest.generation is None:
        raise InputError(
            f"{bundle.path} scores pictures against texts ({manifest.model_kind}) and generates none; use "
            "`bridgeport score`"
        )
    return manifest.prompt, manifest.generation


def _instruction_tokenizer(bundle: Bundle, prompt: PromptContract) -> InstructionTokenizer | None:
    """None where the connector reads pictures alone."""
    contract = prompt.instruction
    return None if contract is None else InstructionTokenizer(bundle.file(contract.tokenizer), contract)


def _params(options: Any) -> SamplingParams:
    try:
        return SamplingParams(**options)
    except TypeError as error:
        known = ", ".join(SamplingParams.__dataclass_fields__)
        raise InputError(f"{str(error).split('() ', 1)[-1]}; generation options are {known}") from error
