"""What transformers generates, and bundles that are made for generation alone."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image
from transformers import Blip2ForConditionalGeneration, Blip2Processor

from bridgeport.bundle import Bundle
from bridgeport.export.llm import export_llm
from bridgeport.export.processor import (
    freeze_generation,
    freeze_image_processor,
    freeze_prompt,
    freeze_tokenizer,
)
from bridgeport.manifest import CheckpointRecord, FileRecord, Manifest, StageRecord
from bridgeport.models import load_checkpoint
from bridgeport.runtime.backends import EngineOptions
from bridgeport.runtime.onnxruntime import Device, OnnxRuntimeEngine, load_session
from bridgeport.runtime.pipeline import Pipeline
from bridgeport.runtime.torch import load_engines

# Of different lengths, the empty one a caption.
PROMPTS = ("a photo of", "Question: what colour is the triangle? Answer:", "")
NEW_TOKENS = 12


def pictures(count: int = 3) -> list[Image.Image]:
    """Noise of odd sizes."""
    generator = np.random.default_rng(11)
    sizes = [(30, 41), (28, 28), (77, 19)]
    return [
        Image.fromarray(generator.integers(0, 256, (*sizes[i % len(sizes)], 3), dtype=np.uint8)) for i in range(count)
    ]


class Transformers:
    """The checkpoint as transformers runs it."""

    def __init__(self, checkpoint: Path) -> None:
        load_model: Any = Blip2ForConditionalGeneration.from_pretrained
        load_processor: Any = Blip2Processor.from_pretrained
        self.model = load_model(checkpoint).eval()
        self.processor = load_processor(checkpoint, backend="pil")
        self.processor.tokenizer.padding_side = "left"  # what `generate` asks for

    def generate(self, images: Sequence[Image.Image], prompts: Sequence[str], **options: Any) -> list[list[int]]:
        """Greedy tokens per row, prompt and padding cut off, as one batch."""
        inputs = self.processor(images=list(images), text=list(prompts), padding=True, return_tensors="pt")
        options = {"max_new_tokens": NEW_TOKENS, "do_sample": False} | options
        with torch.inference_mode():
            output = self.model.generate(**inputs, **options)
        rows = output[:, inputs["input_ids"].shape[1] :].tolist()
        return [_until_stop(row, self.model.generation_config.eos_token_id) for row in rows]

    def logits(self, image: Image.Image, prompt: str) -> Any:
        """Logits `[V]` after the prompt."""
        inputs = self.processor(images=image, text=prompt, return_tensors="pt")
        with torch.inference_mode():
            return self.model(**inputs).logits[0, -1].numpy()


def _until_stop(row: list[int], eos: int | list[int]) -> list[int]:
    stops = {eos} if isinstance(eos, int) else set(eos)
    end = next((i + 1 for i, token in enumerate(row) if token in stops), len(row))
    return row[:end]


def language_model_pipeline(checkpoint: Path, directory: Path) -> Pipeline:
    """The exported language model in ONNX Runtime, all other stages in PyTorch: a fraction of a whole export."""
    model = load_checkpoint(checkpoint)
    cache = model.kv_cache
    if cache is None:
        raise ValueError(f"{checkpoint} has no language model")
    export_llm(model, model.contracts["llm"], directory / "decoder.onnx", precision="fp32")
    prompt = freeze_prompt(model)
    tokenizer = freeze_tokenizer(checkpoint, directory, prompt.image_token_id).name
    manifest = Manifest(
        bridgeport_version="0",
        model_kind=model.kind,
        target="cpu",
        checkpoint=CheckpointRecord(
            architecture=model.architecture,
            model_type="blip-2",
            text_model_type=model.text_config.model_type,
            sha256={},
        ),
        stages=tuple(
            StageRecord(contract=contract, file="decoder.onnx", precision="fp32", opset=20)
            for contract in model.contracts.values()
        ),
        kv_cache=cache,
        image=freeze_image_processor(checkpoint, model.config),
        prompt=prompt,
        generation=freeze_generation(model),
        tokenizer=tokenizer,
        files=tuple(FileRecord(path=name, size=0, sha256="0" * 64) for name in ("decoder.onnx", tokenizer)),
    )
    bundle = Bundle(directory, manifest)
    options = EngineOptions(threads=1, checkpoint=checkpoint)
    engines = load_engines(bundle, options)
    device = Device.parse("cpu")
    session = load_session(bundle.graph("llm"), device, threads=1)
    engines["llm"] = OnnxRuntimeEngine(model.contracts["llm"], session, device, cache)
    return Pipeline(bundle, engines, options)
