"""PyTorch's side: the checkpoint as transformers itself loads, preprocesses and generates with it, in FP32.

Nothing of ours takes part, neither modules nor preprocessing: what the bundle is held against must not share
its mistakes. Pictures come in as Pillow images that were decoded once, for both sides.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

from ...errors import CheckpointError, UnsupportedError

if TYPE_CHECKING:
    from PIL import Image

    from ...models.checkpoint import VisionLanguageModel

_IMAGE_STEPS = ("resize", "rescale", "normalize")
ARCHITECTURE = "Blip2ForConditionalGeneration"


@dataclass(frozen=True)
class ReferenceValues:
    """What PyTorch computes for one picture with one prompt, batch axis dropped.

    `pixel_values` `[3, H, W]`, `input_ids` (placeholders included), `image_positions` (indices into
    `input_ids`), `image_embeds` `[N, Dv]`, `image_features` `[Q, D]`, `inputs_embeds` `[S, D]` (merged),
    `logits` `[V]` of the last prompt position, `token_ids` (greedy, without the prompt).
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

    @classmethod
    def load(cls, checkpoint: str | Path) -> Reference:
        """Load model and processor (its Pillow backend) from a checkpoint directory, never from the network.

        Raises CheckpointError for a directory that is no usable checkpoint, UnsupportedError for one that
        does not generate text.
        """
        from ...models import load_checkpoint

        # Reads headers only, and refuses with a sentence what transformers refuses with a traceback.
        found = load_checkpoint(checkpoint)
        if found.architecture != ARCHITECTURE:
            raise UnsupportedError(
                f"{checkpoint} is a {found.architecture}; parity needs a {ARCHITECTURE}, which generates text"
            )
        with _quiet_transformers():
            return cls(found, *_load(Path(checkpoint)))

    def run(self, image: Image.Image, prompt: str, max_new_tokens: int) -> ReferenceValues:
        """One picture with one prompt, batch 1, without padding."""
        with self._capture() as seen:
            inputs, outputs = self.forward(image, prompt)
        ids = inputs["input_ids"][0].tolist()
        image_token = self.model.config.image_token_id
        return ReferenceValues(
            pixel_values=array(inputs["pixel_values"][0]),
            input_ids=ids,
            image_positions=[i for i, token in enumerate(ids) if token == image_token],
            image_embeds=array(outputs.vision_outputs.last_hidden_state[0]),
            image_features=array(seen["image_features"][0]),
            inputs_embeds=array(seen["inputs_embeds"][0]),
            logits=array(outputs.logits[0, -1]),
            token_ids=self._generate(inputs, ids, max_new_tokens),
        )

    def forward(self, image: Image.Image, prompt: str) -> tuple[Any, Any]:
        """The processor's output for one picture and prompt, and the model's for that."""
        import torch

        inputs = self.processor(images=image, text=prompt, return_tensors="pt")
        with torch.no_grad():
            return inputs, self.model(**inputs)

    def preprocess(self, image: Image.Image, only: set[str]) -> NDArray[np.float32]:
        """`[3, H, W]` after those steps ("resize", "rescale", "normalize") alone that `only` names.

        A step that the checkpoint's processor leaves out stays left out.
        """
        processor = self.processor.image_processor
        steps = {f"do_{step}": step in only and getattr(processor, f"do_{step}") for step in _IMAGE_STEPS}
        return array(processor(image, return_tensors="pt", **steps)["pixel_values"][0])

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
            return array(self.model.language_model(inputs_embeds=torch.from_numpy(inputs_embeds)[None]).logits[0, -1])

    def use_weights_of(self, decoder: Path) -> None:
        """Give the language model the weights that the 4-bit graph `decoder` holds, for good."""
        from ...export.llm.dequantize import dequantize_into

        dequantize_into(self.model.language_model, decoder)

    @contextmanager
    def _capture(self) -> Iterator[dict[str, Any]]:
        """Collects `image_features` and the merged `inputs_embeds` on their way through the model's own
        `forward`.
        """
        seen: dict[str, Any] = {}
        handles = [
            self.model.language_projection.register_forward_hook(
                lambda _module, _args, output: seen.update(image_features=output)
            ),
            self.model.language_model.register_forward_pre_hook(
                lambda _module, _args, kwargs: seen.update(inputs_embeds=kwargs["inputs_embeds"]),
                with_kwargs=True,
            ),
        ]
        try:
            yield seen
        finally:
            for handle in handles:
                handle.remove()

    def _generate(self, inputs: Any, prompt_ids: list[int], max_new_tokens: int) -> list[int]:
        ids: list[int] = self.model.generate(**inputs, do_sample=False, num_beams=1, max_new_tokens=max_new_tokens)[
            0
        ].tolist()
        return ids[len(prompt_ids) :] if ids[: len(prompt_ids)] == prompt_ids else ids

    def decode(self, token_ids: list[int]) -> str:
        """Text of `token_ids`, special tokens left out."""
        text: str = self.processor.tokenizer.decode(token_ids, skip_special_tokens=True)
        return text.strip()


def array(tensor: Any) -> NDArray[np.float32]:
    """A torch tensor as a float32 array of its own."""
    return np.array(tensor.detach().to("cpu").float().numpy())


def _load(checkpoint: Path) -> tuple[Any, Any]:
    import torch
    from transformers import Blip2ForConditionalGeneration, Blip2Processor

    try:
        model: Any = Blip2ForConditionalGeneration.from_pretrained(
            checkpoint, dtype=torch.float32, local_files_only=True, use_safetensors=True
        )
        processor: Any = Blip2Processor.from_pretrained(checkpoint, backend="pil", local_files_only=True)
    except (OSError, ValueError, RuntimeError, KeyError, AttributeError) as error:
        raise CheckpointError(
            f"transformers cannot load {checkpoint} ({' '.join(str(error).split())[:200]}); give the directory that "
            "the bundle was exported from, with its processor and tokenizer files"
        ) from error
    return model.eval(), processor


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
