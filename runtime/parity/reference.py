"""PyTorch's side: the checkpoint as transformers itself loads, preprocesses and generates with it, in FP32.

Nothing of ours takes part, neither modules nor preprocessing: what the bundle is held against must not share
its mistakes. Pictures come in as Pillow images that were decoded once, for both sides.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

from ...errors import CheckpointError, InputError, UnsupportedError
from ..sources import Video
from .alter import Counts, fit_placeholders, placeholder_counts, use_custom_connector, use_reduction
from .patches import group_patches
from .taps import TAPS, VIDEO_TAPS, Taps, tapped

if TYPE_CHECKING:
    from PIL import Image

    from ...models.checkpoint import VisionLanguageModel
    from ...models.reduction_contract import Reduction

_IMAGE_STEPS = ("resize", "rescale", "normalize")


@dataclass(frozen=True)
class ReferenceValues:
    """What PyTorch computes for one picture with one prompt.

    `pixel_values` `[tiles, 3, H, W]`, `input_ids` (placeholders included), `image_positions` (indices into
    `input_ids`), `image_embeds` `[tiles, N, Dv]`, `image_features` `[tiles, Q, D]`, `inputs_embeds` `[S, D]`
    (merged), `logits` `[V]` of the last prompt position, `token_ids` (greedy, without the prompt).
    """

    pixel_values: NDArray[np.float32]
    input_ids: list[int]
    image_positions: list[int]
    image_embeds: NDArray[np.float32]
    image_features: NDArray[np.float32]
    inputs_embeds: NDArray[np.float32]
    logits: NDArray[np.float32]
    token_ids: list[int]


class Reference:
    """A checkpoint in transformers. Make one with `Reference.load`."""

    def __init__(self, checkpoint: VisionLanguageModel, model: Any, processor: Any) -> None:
        self.checkpoint = checkpoint
        self.model = model
        self.processor = processor
        self._counts: Counts | None = None

    @classmethod
    def load(
        cls, checkpoint: str | Path, reduction: Reduction | None = None, custom_connector: str | None = None
    ) -> Reference:
        """Load model and processor (its Pillow backend) from a checkpoint directory, never from the network.

        `reduction`, `custom_connector`: those of the bundle.

        Raises CheckpointError for a directory that is no usable checkpoint, UnsupportedError for one that
        does not generate text, InputError for one with another connector.
        """
        from ...export.foreign import load_reference
        from ...models import load_checkpoint

        # Reads headers only, and refuses with a sentence what transformers refuses with a traceback.
        found = load_checkpoint(checkpoint)
        if found.kind not in TAPS:
            raise UnsupportedError(
                f"{checkpoint} is a {found.architecture}; parity of a chain to text knows {', '.join(TAPS)}"
            )
        if (own := found.layout.custom_connector) != custom_connector:
            raise InputError(
                f"{checkpoint} has {_connector(own)}, the bundle {_connector(custom_connector)}; give the checkpoint "
                "that the bundle was made from"
            )
        with _quiet_transformers():
            reference = cls(found, *(load_reference(found) or _load(Path(checkpoint), found.architecture)))
        if getattr(found.config, "mm_projector_type", None) == "linear":
            _use_linear_projector(reference.model, found)
        reference._alter(reduction)
        return reference

    def _alter(self, reduction: Reduction | None) -> None:
        """Give the model the checkpoint's custom connector and the bundle's reduction: see `alter`."""
        original = self.checkpoint
        use_custom_connector(self.model, original, self.taps)
        if reduction is not None:
            from ...models.reduction import reduce_tokens

            self.checkpoint = reduce_tokens(original, reduction)
            use_reduction(self.model, self.processor, original, self.checkpoint, self.taps)
        self._counts = placeholder_counts(original, self.checkpoint)

    @property
    def taps(self) -> Taps:
        """Where the model's values are."""
        return TAPS[self.checkpoint.kind]

    def run(self, image: Image.Image | list[Image.Image] | Video, prompt: str, max_new_tokens: int) -> ReferenceValues:
        """One picture (or video) with one prompt, batch 1, without padding."""
        video = isinstance(image, Video)
        with tapped(self.model, VIDEO_TAPS.get(self.checkpoint.kind, self.taps) if video else self.taps) as seen:
            inputs, outputs = self.forward(image, prompt)
        if "image_grid_thw" in inputs:
            seen = group_patches(seen, inputs["image_grid_thw"], self.model.config.vision_config)
        ids = inputs["input_ids"][0].tolist()
        image_token = int(self.model.config.video_token_id) if video else self._image_token()
        return ReferenceValues(
            pixel_values=array(seen["pixel_values"]),
            input_ids=ids,
            image_positions=[i for i, token in enumerate(ids) if token == image_token],
            image_embeds=array(seen["image_embeds"]),
            image_features=_by_tile(array(seen["image_features"]), len(seen["image_embeds"])),
            inputs_embeds=array(seen["inputs_embeds"][0]),
            logits=array(outputs.logits[0, -1]),
            token_ids=self._generate(inputs, ids, max_new_tokens),
        )

    def forward(self, image: Image.Image | list[Image.Image] | Video, prompt: str) -> tuple[Any, Any]:
        """The processor's output for one picture (or video) and prompt, and the model's for that."""
        import torch

        if self.checkpoint.kind in ("blip-2", "instructblip", "instructblip-video", "qwen-vl"):
            inputs = self.processor(images=image, text=prompt, return_tensors="pt")
        elif self.checkpoint.kind == "flamingo":
            inputs = self.processor(text=[[image, prompt]], return_tensors="pt")
        elif isinstance(image, Video):
            text, options = self._turn(prompt, "video")
            inputs = self._video_processor(videos=[image.source], text=[text], return_tensors="pt", **options)
        else:
            text, options = self._turn(prompt, "image")
            inputs = self.processor(images=[image], text=[text], return_tensors="pt", **options)
        if self._counts is not None:
            inputs = fit_placeholders(inputs, self._image_token(), self._counts)
        with torch.no_grad():
            return inputs, self.model(**inputs, **self._start())

    def _image_token(self) -> int:
        """The token that stands for pictures (or videos) in a prompt."""
        config = self.model.config
        if self.checkpoint.kind == "flamingo":  # its config does not say
            return int(self.processor.image_token_id)
        return int(config.image_token_id if hasattr(config, "image_token_id") else config.video_token_id)

    @cached_property
    def _video_processor(self) -> Any:
        """The processor for videos as lists of frames, which run through transformers' Pillow processor."""
        from ...export.video import load_video_processor

        return load_video_processor(self.checkpoint.path, self.checkpoint.config)

    def _turn(self, prompt: str, kind: str) -> tuple[str, dict[str, Any]]:
        """One user turn with a picture ("image") or video ("video") as transformers renders it, and the tokenizer's
        options that go with it.
        """
        if not getattr(self.processor, "chat_template", None):
            return f"{getattr(self.processor, f'{kind}_token')}\n{prompt}", {}
        content = [{"type": kind}, {"type": "text", "text": prompt}]
        turn = [{"role": "user", "content": content}]
        text: str = self.processor.apply_chat_template(turn, tokenize=False, add_generation_prompt=True)
        bos = self.processor.tokenizer.bos_token
        return text, {"add_special_tokens": False} if bos is not None and text.startswith(bos) else {}

    def preprocess(self, image: Image.Image, only: set[str]) -> NDArray[np.float32]:
        """`[3, H, W]` after those steps ("resize", "rescale", "normalize") alone that `only` names.

        A step that the checkpoint's processor leaves out stays left out.
        """
        processor = self.processor.image_processor
        steps = {f"do_{step}": step in only and getattr(processor, f"do_{step}") for step in _IMAGE_STEPS}
        made = processor(image, return_tensors="pt", **steps)
        return array((made if self.checkpoint.kind == "flamingo" else made["pixel_values"])[0])

    def embed(self, token_ids: list[int]) -> NDArray[np.float32]:
        """Embeddings `[T, D]` of `token_ids`."""
        import torch

        with torch.no_grad():
            return array(self.model.get_input_embeddings()(torch.tensor(token_ids, dtype=torch.long)))

    def embedding_name(self) -> str:
        """Name of the token embedding in the model."""
        embedding = self.model.get_input_embeddings()
        names = (name for name, module in self.model.named_modules() if module is embedding)
        return str(next(names))

    def first_logits(self, inputs_embeds: NDArray[np.float32]) -> NDArray[np.float32]:
        """Logits `[V]` after `inputs_embeds` `[S, D]`, from the language model alone."""
        import torch

        with torch.no_grad():
            model = self.model.get_submodule(self.taps.text_model)
            embeds = torch.from_numpy(inputs_embeds)[None]
            return array(model(inputs_embeds=embeds, **self._start()).logits[0, -1])

    @property
    def start_token(self) -> int | None:
        """What a decoder that reads the prompt through an encoder starts with; None where there is no encoder."""
        from ...models.t5 import t5_seq2seq

        text = self.checkpoint.text_config
        return t5_seq2seq(text).decoder_start_token_id if text.is_encoder_decoder else None

    def _start(self) -> dict[str, Any]:
        """The decoder's own input where there is an encoder: its first token."""
        import torch

        return {} if self.start_token is None else {"decoder_input_ids": torch.tensor([[self.start_token]])}

    def use_weights_of(self, decoder: Path) -> None:
        """Give the language model the weights that the 4-bit graph `decoder` holds, for good."""
        from ...export.llm.dequantize import dequantize_into

        dequantize_into(self.decoder(), decoder)

    def decoder(self) -> Any:
        """The language model with its head, its modules named as in transformers' causal language model."""
        from torch import nn

        if self.taps.text_model:
            return self.model.get_submodule(self.taps.text_model)
        decoder: Any = nn.Module()
        decoder.model = self.model.get_submodule(self.taps.language)
        decoder.lm_head = self.model.get_output_embeddings()
        return decoder

    def _generate(self, inputs: Any, prompt_ids: list[int], max_new_tokens: int) -> list[int]:
        text = self.checkpoint.text_config
        # transformers 5.23 runs out of cache layers where a decoder is deeper than its encoder.
        deeper = self.start_token is not None and text.num_decoder_layers > text.num_layers
        options: dict[str, Any] = {"use_cache": False} if deeper else {}
        greedy = {"do_sample": False, "num_beams": 1, "repetition_penalty": 1.0, "max_new_tokens": max_new_tokens}
        ids: list[int] = self.model.generate(**inputs, **options, **greedy)[0].tolist()
        if self.start_token is not None:
            return ids[1:]
        return ids[len(prompt_ids) :] if ids[: len(prompt_ids)] == prompt_ids else ids

    def decode(self, token_ids: list[int]) -> str:
        """Text of `token_ids`, special tokens left out."""
        text: str = self.processor.tokenizer.decode(token_ids, skip_special_tokens=True)
        return text.strip()


def _connector(custom: str | None) -> str:
    return "its class's own connector" if custom is None else f"the connector {custom!r}"


def _by_tile(features: NDArray[np.float32], tiles: int) -> NDArray[np.float32]:
    """`[tiles, Q, D]`, also of features that are still a map."""
    return features if features.ndim == 3 else features.reshape(tiles, -1, features.shape[-1])


def array(tensor: Any) -> NDArray[np.float32]:
    """A torch tensor as a float32 array of its own, C-contiguous."""
    return np.array(tensor.detach().to("cpu").float().numpy(), order="C")


def _load(checkpoint: Path, architecture: str) -> tuple[Any, Any]:
    import torch
    import transformers

    from ...export.checkpoint_processor import load_processor
    from ...export.processor_of_frames import takes_frames
    from ...export.processor_without_video import takes_videos
    from ...models.remote_code import loader_options

    make: Any = getattr(transformers, architecture)
    make_processor: Any = transformers.AutoProcessor
    try:
        model = make.from_pretrained(checkpoint, dtype=torch.float32, local_files_only=True, use_safetensors=True)
        if takes_videos(checkpoint) or takes_frames(checkpoint):
            processor = load_processor(checkpoint)
        else:
            processor = make_processor.from_pretrained(checkpoint, backend="pil", **loader_options())
    except (OSError, ValueError, RuntimeError, KeyError, AttributeError) as error:
        raise CheckpointError(
            f"transformers cannot load {checkpoint} ({' '.join(str(error).split())[:200]}); give the directory that "
            "the bundle was exported from, with its processor and tokenizer files"
        ) from error
    return model.eval(), processor


def _use_linear_projector(model: Any, checkpoint: VisionLanguageModel) -> None:
    """LLaVA 1.0's one layer, which transformers' class does not have, in place of its two."""
    from torch import nn

    names = {part: f"model.multi_modal_projector.linear_1.{part}" for part in ("weight", "bias")}
    state = checkpoint.weights.read(names.values())
    out_width, in_width = state[names["weight"]].shape
    projector = nn.Linear(in_width, out_width)
    projector.load_state_dict({part: state[name] for part, name in names.items()})
    model.model.multi_modal_projector = projector


@contextmanager
def _quiet_transformers() -> Iterator[None]:
    """No progress bars and no notes on standard error while weights load."""
    from transformers.utils import logging as transformers_logging

    logging: Any = transformers_logging  # not typed
    level = logging.get_verbosity()
    bars = logging.is_progress_bar_enabled()
    logging.set_verbosity_error()
    logging.disable_progress_bar()
    try:
        yield
    finally:
        logging.set_verbosity(level)
        if bars:
            logging.enable_progress_bar()
