"""Weights of MatMulNBits nodes back into PyTorch modules, to hold a quantised graph against its own weights.

Layout (onnxruntime ContribOperators.md, MatMulNBits): `B` uint8 `[N, blocks, block_size / 2]`, two weights a byte, the
low half first; `scales` `[N, blocks]` (or flat); without zero points, 8 stands for 0.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import onnx_ir as ir
import torch
from torch import nn

from ...errors import ExportError
from ..passes.modules import module_stack

_QKV = ("q_proj", "k_proj", "v_proj")


def dequantize_into(llm: Any, decoder: Path) -> None:
    """Replace the weight of every Linear of `llm` that `decoder` holds quantised, in place.

    Raises ExportError when a quantised node belongs to no Linear of its size.
    """
    modules: dict[str, nn.Module] = dict(llm.named_modules())
    for node in ir.load(decoder).graph:
        if node.op_type != "MatMulNBits":
            continue
        weight = torch.from_numpy(dequantize(node))
        for linear, rows in _linears(modules, node, weight.shape[0]):
            linear.weight = nn.Parameter(weight[rows], requires_grad=False)


def dequantize(node: ir.Node) -> np.ndarray[tuple[int, ...], np.dtype[np.float32]]:
    """The weight `[N, K]` of a MatMulNBits node without zero points."""
    packed, scales = node.inputs[1], node.inputs[2]
    columns, width = node.attributes.get_int("K"), node.attributes.get_int("N")
    if packed is None or scales is None or packed.const_value is None or scales.const_value is None:
        raise ExportError(f"stage llm, check int4: {node.name} has no constant weight; please report this model")
    if node.attributes.get_int("bits") != 4 or any(value is not None for value in node.inputs[3:]):
        raise ExportError(f"stage llm, check int4: {node.name} is not symmetric 4-bit; please report this model")
    data = packed.const_value.numpy()
    nibbles = np.stack([data & 0x0F, data >> 4], axis=-1).reshape(*data.shape[:2], -1)
    values = (nibbles.astype(np.float32) - 8) * scales.const_value.numpy().reshape(*data.shape[:2], 1)
    whole: np.ndarray[tuple[int, ...], np.dtype[np.float32]] = values.reshape(width, -1)[:, :columns]
    return np.ascontiguousarray(whole)


def _linears(modules: dict[str, nn.Module], node: ir.Node, rows: int) -> list[tuple[nn.Linear, slice]]:
    names = linear_names(node)
    linears = [module for name in names if isinstance(module := modules.get(name), nn.Linear)]
    if len(linears) != len(names) or sum(linear.out_features for linear in linears) != rows:
        raise ExportError(
            f"stage llm, check int4: {node.name} holds {rows} rows, which are not those of {names}; please report it"
        )
    ends = np.cumsum([linear.out_features for linear in linears])
    return [
        (linear, slice(int(end) - linear.out_features, int(end))) for linear, end in zip(linears, ends, strict=True)
    ]


def linear_names(node: ir.Node) -> list[str]:
    """The Linears whose weights, one below the other, `node` holds.

    A traced node tells its module stack. The model builder names nodes after modules, `/model/layers.0/attn/o_proj/
    MatMul_Q4`, and packs query, key and value into `qkv_proj`.
    """
    stack = module_stack(node)
    if stack:
        return [stack[-1]]
    *path, _ = (node.name or "").strip("/").split("/")
    name = ".".join("self_attn" if part == "attn" else part for part in path)
    if path and path[-1] == "qkv_proj":
        return [f"{name.removesuffix('qkv_proj')}{part}" for part in _QKV]
    return [name]
