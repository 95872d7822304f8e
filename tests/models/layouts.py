"""A checkpoint's stages against transformers' whole model on the same pixels."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from safetensors import safe_open
from torch import Tensor, nn

from bridgeport.export.checks import check_equality, check_structure, make_references
from bridgeport.export.graph import OPSET, trace_and_save
from bridgeport.models import VisionLanguageModel

# FP32 through a few layers, as a part of the largest value. Observed: at most 2e-6.
TOLERANCE = 2e-5
CAUGHT = 1e-3


def load_reference(kind: Any, directory: Path) -> Any:
    """transformers' model of that class, eager attention, FP32, eval mode."""
    return kind.from_pretrained(directory, attn_implementation="eager", dtype=torch.float32).eval()


@contextmanager
def tap(module: nn.Module) -> Iterator[list[Tensor]]:
    """What `module` read (its first argument) and what it gave, once it has run."""
    seen: list[Tensor] = []
    hook = module.register_forward_hook(
        lambda _, args, kwargs, output: seen.extend([args[0] if args else next(iter(kwargs.values())), output]),
        with_kwargs=True,
    )
    try:
        yield seen
    finally:
        hook.remove()


def difference(got: Tensor, want: Tensor) -> float:
    """The largest difference as a part of the largest value."""
    assert got.shape == want.shape, f"{list(got.shape)}, transformers has {list(want.shape)}"
    return float((got - want).abs().max() / want.abs().max())


def assert_equal(got: Tensor, want: Tensor, what: str) -> None:
    """Within `TOLERANCE`."""
    worst = difference(got, want)
    assert worst <= TOLERANCE, f"{what}: {worst:.3g} of the largest value, mean {(got - want).abs().mean():.3g}"


def assert_language_model_equals(model: VisionLanguageModel, reference: Any) -> None:
    """embed_tokens and llm give the reference's logits for some tokens."""
    ids = torch.arange(3, 12)[None]
    with torch.inference_mode():
        want = reference(input_ids=ids).logits
        got = model.language_model(inputs_embeds=model.embed_tokens(ids)).logits
    assert_equal(got, want, "logits")


def unused_weights(model: VisionLanguageModel) -> list[str]:
    """Stored tensors that no stage reads."""
    with safe_open(model.path / "model.safetensors", "pt") as file:
        stored = set(file.keys())
    entries = model.layout.canonical(model.weights).entries
    used = {
        stage.checkpoint_name(name) for stage in model.layout.stages.values() for name in stage.on_meta().state_dict()
    }
    assert len(entries) == len(stored)
    return sorted(set(entries) - used)


def export(model: VisionLanguageModel, stage: str, directory: Path) -> dict[str, Any]:
    """Trace the stage and pass every check of an exported one; returns its operators."""
    module, contract = model.load_stage(stage), model.contracts[stage]
    options: dict[str, Any] = {"examples": model.layout.stages[stage].examples}
    references, layer_norms = make_references(module, contract, **options)
    path = directory / f"{stage}.onnx"
    trace_and_save(module, contract, path, **options)
    shapes = {spec.name: spec.shape for spec in (*contract.inputs, *contract.outputs)}
    found = check_structure(path, shapes, stage=stage, opset=OPSET, layer_norms=layer_norms, standard=True)
    check_equality(path, references, stage=stage, output=contract.outputs[0].name)
    operators: dict[str, Any] = found["operators"]
    return operators
