"""The decoder's graph against transformers' model: prompts of different lengths in one batch, then single tokens.

Every row of a batch is compared with its own run through PyTorch without cache and without padding, so a mistake in
row lengths, positions, the cache's buffer or the masking of padding shows.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import onnx_ir as ir
import torch

from ...models.contract import KvCacheContract
from ..checks import BATCH_SIZES, FloatArray, Reference, compare, open_session
from .attention import position_axes
from .dequantize import dequantize_into

IntArray = np.ndarray[tuple[int, ...], np.dtype[np.int64]]

# Tokens after the prompt, one decoder step each.
STEPS = 2
_LONGEST_PROMPT = 9
_LEFT_OVER = 1e3
# MatMulNBits at accuracy_level 4 rounds activations to INT8, a block at a time. Measured over the tests' random models,
# which have nothing to average over: up to 4 % of the largest logit. A weight read wrongly is off by 50 % and more.
INT8_ACTIVATIONS_OF_LARGEST = 0.1


@dataclass(frozen=True)
class RaggedBatch:
    """Token rows of different lengths, their embeddings and PyTorch's logits.

    ``embeds[r]``: ``[length + STEPS, D]``; ``logits``: ``[B, 1 + STEPS, V]``, after the prompt and after each step.
    ``positions[r]``: int64 ``[3, length + STEPS]`` for a decoder whose positions come in (M-RoPE), else no rows.
    """

    lengths: tuple[int, ...]
    embeds: tuple[FloatArray, ...]
    logits: FloatArray
    positions: tuple[IntArray, ...] = ()


def make_ragged_batches(llm: Any, context_length: int, *, decoder: Path | None = None) -> list[RaggedBatch]:
    """Batches of 1, 3 and 5 rows and PyTorch's logits for them.

    ``decoder``: a quantised graph whose weights, dequantised, replace those of `llm` first, so that the graph is
    held against the numbers that it was given.
    """
    if decoder is not None:
        dequantize_into(llm, decoder)
    longest = min(_LONGEST_PROMPT, context_length - STEPS)
    random = np.random.default_rng(0)
    batches = []
    for size in BATCH_SIZES:
        lengths = tuple(int(n) for n in random.integers(1, longest + 1, size))
        ids = [random.integers(0, llm.config.vocab_size, n + STEPS) for n in lengths]
        positions = _random_positions(llm, lengths, random)
        rows = [_run_row(llm, *row) for row in zip(ids, lengths, positions or (None,) * size, strict=True)]
        embeds, logits = zip(*rows, strict=True)
        batches.append(RaggedBatch(lengths, embeds, np.stack(logits), positions))
    return batches


def _random_positions(llm: Any, lengths: tuple[int, ...], random: np.random.Generator) -> tuple[IntArray, ...]:
    """Any three numbers for each token: nothing in the graph may rely on what they are of pictures and texts."""
    axes = position_axes(llm.config)
    if axes == 1:
        return ()
    return tuple(random.integers(0, 2 * _LONGEST_PROMPT, (axes, n + STEPS)) for n in lengths)


def _run_row(llm: Any, ids: IntArray, length: int, positions: IntArray | None) -> tuple[FloatArray, FloatArray]:
    options = {} if positions is None else {"position_ids": torch.from_numpy(positions[:, None])}
    with torch.inference_mode():
        embeds = llm.get_input_embeddings()(torch.from_numpy(ids)[None])
        logits = llm(inputs_embeds=embeds, use_cache=False, **options).logits[0, length - 1 :]
    return embeds[0].numpy(), logits.float().numpy()


def check_decoder(
    path: Path, batches: Sequence[RaggedBatch], cache: KvCacheContract, *, precision: str
) -> dict[str, Any]:
    """Prefill and STEPS single tokens with one shared cache buffer; raises ExportError where logits differ.

    A quantised graph is run as it is, within what INT8 activations cost, and once more with FP32 activations, where
    it must equal PyTorch on the same weights as an FP32 graph must.
    """

    def worst(graph: Path, of_largest: float | None) -> float:
        return _compare(open_session(graph, prepack=precision == "int4"), batches, cache, of_largest)

    sizes = [len(batch.lengths) for batch in batches]
    return {"batch_sizes": sizes, "decode_steps": STEPS, **check_both_activations(path, precision, worst)}


def check_both_activations(
    path: Path,
    precision: str,
    worst: Callable[[Path, float | None], float],
    *,
    int8_activations_of_largest: float = INT8_ACTIVATIONS_OF_LARGEST,
) -> dict[str, float]:
    """`worst(graph, of_largest)` of the graph at `path`; of a quantised one as it is, within what INT8 activations
    cost, and once more with FP32 activations.
    """
    if precision != "int4":
        return {"max_abs": worst(path, None)}
    found = {"max_abs_int8_activations": worst(path, int8_activations_of_largest)}
    exact = path.with_name(f".{path.name}")
    try:
        write_with_fp32_activations(path, exact)
        found["max_abs"] = worst(exact, None)
    finally:
        exact.unlink(missing_ok=True)
    return found


def write_with_fp32_activations(path: Path, out: Path) -> None:
    model = ir.load(path)
    for node in model.graph:
        if node.op_type == "MatMulNBits":
            node.attributes.add(ir.AttrInt64("accuracy_level", 1))
    ir.save(model, out)


def _compare(session: Any, batches: Sequence[RaggedBatch], cache: KvCacheContract, of_largest: float | None) -> float:
    worst = 0.0
    for batch in batches:
        capacity = max(batch.lengths) + STEPS
        found = run_steps(session, cache, len(batch.lengths), capacity, partial(step_inputs, batch))
        worst = max(worst, compare_steps(found, list(batch.logits), "the prompt", of_largest))
    return worst


def run_steps(
    session: Any, cache: KvCacheContract, rows: int, capacity: int, inputs_of: Callable[[int], Mapping[str, Any]]
) -> list[FloatArray]:
    """Logits of prompts (step 0) and STEPS single tokens, over one cache of `capacity` tokens that past and present
    share. `inputs_of(step)`: the other inputs.
    """
    import onnxruntime

    shape = (rows, cache.num_heads, capacity, cache.head_size)
    # What is left over in a buffer may be anything but must not be read.
    buffers = {
        (layer, kind): onnxruntime.OrtValue.ortvalue_from_numpy(np.full(shape, _LEFT_OVER, np.float32))
        for layer in range(cache.num_layers)
        for kind in ("key", "value")
    }
    results = []
    for step in range(1 + STEPS):
        binding = session.io_binding()
        for name, array in inputs_of(step).items():
            binding.bind_cpu_input(name, np.ascontiguousarray(array))
        for (layer, kind), buffer in buffers.items():
            binding.bind_ortvalue_input(cache.past.format(layer=layer, kind=kind), buffer)
            binding.bind_ortvalue_output(cache.present.format(layer=layer, kind=kind), buffer)
        binding.bind_output("logits", "cpu")
        session.run_with_iobinding(binding)
        results.append(binding.get_outputs()[-1].numpy())
    return results


def compare_steps(
    found: Sequence[FloatArray], expected: Sequence[FloatArray], start: str, of_largest: float | None
) -> float:
    """The largest difference of logits; `expected[row]` `[1 + STEPS, V]`, `start`: what step 0 read.

    Raises ExportError where they differ by more than rounding.
    """
    worst = 0.0
    for step, logits in enumerate(found):
        reference = Reference({"row": np.zeros(len(expected))}, np.stack([row[step] for row in expected]))
        label = f"logits of {start}" if step == 0 else f"logits of token {step}"
        worst = max(worst, compare(logits, reference, stage="llm", output=label, of_largest=of_largest))
    return worst


def compare_cross(
    results: Sequence[FloatArray],
    names: Sequence[str],
    expected: Sequence[Sequence[FloatArray]],
    stage: str,
    of_largest: float | None = None,
) -> float:
    """The largest difference of padded cross-attention states; `expected[row][i]` are those of `results[i]`.

    Raises ExportError where they differ by more than rounding.
    """
    worst = 0.0
    for i, (name, result) in enumerate(zip(names, results, strict=True)):
        for states, row in zip(result, expected, strict=True):
            reference = Reference({"row": np.zeros(len(expected))}, row[i])
            valid = states[:, : row[i].shape[1]]
            worst = max(worst, compare(valid, reference, stage=stage, output=name, of_largest=of_largest))
    return worst


def step_inputs(batch: RaggedBatch, step: int) -> dict[str, Any]:
    """Inputs of the prompts (`step` 0), right-padded, or of the `step`-th token after each."""
    lengths, longest = np.array(batch.lengths, np.int64), max(batch.lengths)
    inputs: dict[str, Any] = {
        "attention_mask": (np.arange(longest + step)[None] < lengths[:, None] + step).astype(np.int64)
    }
    if step == 0:
        inputs["logits_position"] = lengths - 1
        pad = [((0, longest - n), (0, 0)) for n in batch.lengths]
        inputs["inputs_embeds"] = np.stack([np.pad(row[:n], p) for (n, row), p in zip(_rows(batch), pad, strict=True)])
    else:
        inputs["logits_position"] = np.zeros_like(lengths)
        inputs["inputs_embeds"] = np.stack([row[n + step - 1 : n + step] for n, row in _rows(batch)])
    if batch.positions:
        inputs["position_ids"] = np.stack(
            [_slice_positions(row, n, longest, step) for n, row in zip(batch.lengths, batch.positions, strict=True)],
            axis=1,
        )
    return inputs


def _slice_positions(positions: IntArray, length: int, longest: int, step: int) -> IntArray:
    if step == 0:
        return np.pad(positions[:, :length], ((0, 0), (0, longest - length)))
    return positions[:, length + step - 1 : length + step]


def _rows(batch: RaggedBatch) -> list[tuple[int, FloatArray]]:
    return list(zip(batch.lengths, batch.embeds, strict=True))
