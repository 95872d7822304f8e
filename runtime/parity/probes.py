"""Which values of an ONNX graph PyTorch has too, and under which module.

Two kinds of graph. What `torch.onnx` exported carries, on every node, the names of the modules that it was traced in;
the values that leave such a scope are that module's output. The decoder that onnxruntime-genai builds carries none,
but names its values by a fixed scheme: `BUILDER_VALUES` is that scheme.
"""

from __future__ import annotations

import ast
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal

NAME_SCOPES = "pkg.torch.onnx.name_scopes"
Side = Literal["output", "input"]

# How the export names the operations of a fused query/key/value projection that it has split
# (export/passes/qkv.py).
SPLIT_MATMULS = ("query_matmul", "key_matmul", "value_matmul")
SPLIT_ADDS = ("query_add", "key_add", "value_add")

FLOATS = frozenset({1, 10, 11, 16})  # onnx.TensorProto FLOAT, FLOAT16, DOUBLE, BFLOAT16


@dataclass(frozen=True)
class Probe:
    """An ONNX value, and what it equals in PyTorch: output or input of `modules`, several joined along the last axis.

    `index` is the place of the node that computes the value in the graph's topological order. `third`: the
    value is this third, along the last axis, of a fused query/key/value projection.
    """

    value: str
    index: int
    node: str
    op_type: str
    modules: tuple[str, ...]
    side: Side = "output"
    third: int | None = None

    @property
    def label(self) -> str:
        """The module path as one string, with "input of" where that is meant."""
        name = self.modules[0]
        if len(self.modules) > 1:
            prefix = name.rpartition(".")[0]
            name = f"{prefix}.{{{','.join(module.rpartition('.')[2] for module in self.modules)}}}"
        if self.third is not None:
            name = f"{name} ({('query', 'key', 'value')[self.third]})"
        return name if self.side == "output" else f"input of {name}"


# Value of the builder's graph, `{i}` a layer -> modules of a decoder-only transformers model, and which side
# of them. The residual stream (output_3 of a fused add and norm) is what the norm takes in.
BUILDER_VALUES: tuple[tuple[str, tuple[str, ...], Side], ...] = (
    ("/model/layers.{i}/input_layernorm/output_3", ("model.layers.{i}.input_layernorm",), "input"),
    ("/model/layers.{i}/input_layernorm/output_0", ("model.layers.{i}.input_layernorm",), "output"),
    (
        "/model/layers.{i}/attn/qkv_proj/{matmul}/output_0",
        tuple(f"model.layers.{{i}}.self_attn.{part}_proj" for part in "qkv"),
        "output",
    ),
    ("/model/layers.{i}/attn/q_proj/{matmul}/output_0", ("model.layers.{i}.self_attn.q_proj",), "output"),
    ("/model/layers.{i}/attn/k_proj/{matmul}/output_0", ("model.layers.{i}.self_attn.k_proj",), "output"),
    ("/model/layers.{i}/attn/v_proj/{matmul}/output_0", ("model.layers.{i}.self_attn.v_proj",), "output"),
    ("/model/layers.{i}/attn/GroupQueryAttention/output_0", ("model.layers.{i}.self_attn.o_proj",), "input"),
    ("/model/layers.{i}/attn/o_proj/{matmul}/output_0", ("model.layers.{i}.self_attn.o_proj",), "output"),
    (
        "/model/layers.{i}/post_attention_layernorm/output_3",
        ("model.layers.{i}.post_attention_layernorm",),
        "input",
    ),
    (
        "/model/layers.{i}/post_attention_layernorm/output_0",
        ("model.layers.{i}.post_attention_layernorm",),
        "output",
    ),
    ("/model/layers.{i}/mlp/gate_proj/{matmul}/output_0", ("model.layers.{i}.mlp.gate_proj",), "output"),
    ("/model/layers.{i}/mlp/act_fn/Mul/output_0", ("model.layers.{i}.mlp.act_fn",), "output"),
    ("/model/layers.{i}/mlp/up_proj/{matmul}/output_0", ("model.layers.{i}.mlp.up_proj",), "output"),
    ("/model/layers.{i}/mlp/Mul/output_0", ("model.layers.{i}.mlp.down_proj",), "input"),
    ("/model/layers.{i}/mlp/down_proj/{matmul}/output_0", ("model.layers.{i}.mlp.down_proj",), "output"),
)
# A projection with a bias ends in an Add; MatMulNBits keeps the output name of the MatMul that it replaced.
_BUILDER_MATMULS = ("Add", "MatMul")


def builder_probes(graph: Any, num_layers: int, rename: Callable[[str], str] = str) -> list[Probe]:
    """Probes of a decoder that onnxruntime-genai built, by the names of its values.

    `graph`: an ONNX GraphProto; `rename`: a module of the causal language model to its name in PyTorch's model.
    Values that a variant of the builder names differently are simply not probed.
    """
    producers = {output: index for index, node in enumerate(graph.node) for output in node.output if output}
    named: dict[str, tuple[tuple[str, ...], Side]] = {}
    for i in range(num_layers):
        for template, modules, side in BUILDER_VALUES:
            filled = tuple(module.format(i=i) for module in modules)
            for matmul in reversed(_BUILDER_MATMULS) if "{matmul}" in template else ("",):
                value = template.format(i=i, matmul=matmul)
                if value in producers:
                    named[value] = (filled, side)
    named[f"/model/layers.{num_layers}/final_norm_layernorm/output_0"] = (("model.norm",), "output")
    named["logits"] = (("lm_head",), "output")
    probes = [
        _probe(graph, producers[value], value, tuple(rename(module) for module in modules), side)
        for value, (modules, side) in named.items()
        if value in producers
    ]
    return sorted(probes, key=lambda probe: probe.index)


def output_probe(graph: Any, module: str) -> Probe:
    """The graph's one output as the output of `module`."""
    value = graph.output[0].name
    index = next(index for index, node in enumerate(graph.node) if value in node.output)
    return _probe(graph, index, value, (module,), "output")


def scope_probes(graph: Any, names: Mapping[str, str]) -> list[Probe]:
    """Probes of a graph that `torch.onnx` exported, by the scopes on its nodes.

    `graph`: an ONNX GraphProto; `names`: traced module -> PyTorch's module. A module is probed where exactly
    one value leaves its scope, its input where exactly one computed value enters it. A value that ends
    several nested scopes is named for the innermost; one that is both output and input is named as the
    output.
    """
    stacks = [_scopes(node) for node in graph.node]
    shapes = _shapes(graph)
    producers = {
        output: index for index, node in enumerate(graph.node) for output in node.output if output not in {"", *shapes}
    }
    consumers = _consumers(graph)
    found: dict[str, tuple[tuple[bool, int], Probe]] = {}
    for scope, module in names.items():
        nodes = {index for index, stack in enumerate(stacks) if scope in stack[:-1]}
        sides: tuple[tuple[Side, list[str]], ...] = (
            ("output", _leaving(graph, nodes, producers, consumers)),
            ("input", _entering(graph, nodes, producers)),
        )
        for side, values in sides:
            rank = (side == "output", scope.count("."))
            if len(values) == 1 and (values[0] not in found or rank > found[values[0]][0]):
                found[values[0]] = (rank, _probe(graph, producers[values[0]], values[0], (module,), side))
    for probe in _split_probes(graph, stacks, names):
        found.setdefault(probe.value, ((True, 0), probe))
    return sorted((probe for _, probe in found.values()), key=lambda probe: probe.index)


def _split_probes(graph: Any, stacks: Sequence[list[str]], names: Mapping[str, str]) -> Iterator[Probe]:
    """Parts of a fused query/key/value projection, which the export splits in three and names by part."""
    biased = {
        name
        for node, stack in zip(graph.node, stacks, strict=True)
        if stack and stack[-1] in SPLIT_ADDS
        for name in node.input
    }
    for index, (node, stack) in enumerate(zip(graph.node, stacks, strict=True)):
        operation = stack[-1] if stack else ""
        if operation not in SPLIT_ADDS + SPLIT_MATMULS or f"{stack[-2]}.qkv" not in names:
            continue
        if node.output[0] not in biased:
            part = (SPLIT_ADDS + SPLIT_MATMULS).index(operation) % 3
            yield _probe(graph, index, node.output[0], (names[f"{stack[-2]}.qkv"],), "output", part)


def _probe(graph: Any, index: int, value: str, modules: tuple[str, ...], side: Side, third: int | None = None) -> Probe:
    node = graph.node[index]
    return Probe(value, index, str(node.name or node.output[0]), str(node.op_type), modules, side, third)


def _leaving(graph: Any, nodes: set[int], producers: Mapping[str, int], consumers: Mapping[str, set[int]]) -> list[str]:
    """Values computed by `nodes` that others read."""
    values = (value for index in sorted(nodes) for value in graph.node[index].output if value in producers)
    return [value for value in values if not consumers.get(value, set()) <= nodes]


def _entering(graph: Any, nodes: set[int], producers: Mapping[str, int]) -> list[str]:
    """Values read by `nodes` that other nodes compute."""
    values = {value for index in nodes for value in graph.node[index].input if value in producers}
    return [value for value in values if producers[value] not in nodes]


def _scopes(node: Any) -> list[str]:
    """Names of the modules that the node was traced in, outermost first; the last entry names the operation."""
    written = next((entry.value for entry in node.metadata_props if entry.key == NAME_SCOPES), "[]")
    return [str(scope) for scope in ast.literal_eval(written)]


def _consumers(graph: Any) -> dict[str, set[int]]:
    """Value -> indices of the nodes that read it; -1 stands for the caller, who reads the graph's outputs."""
    consumers: dict[str, set[int]] = {output.name: {-1} for output in graph.output}
    for index, node in enumerate(graph.node):
        for value in node.input:
            if value:
                consumers.setdefault(value, set()).add(index)
    return consumers


def _shapes(graph: Any) -> set[str]:
    """Values computed from shapes and integer constants alone, which are no input of a module."""
    integers = {tensor.name for tensor in graph.initializer if tensor.data_type not in FLOATS}
    shapes: set[str] = set()
    for node in graph.node:
        inputs = [name for name in node.input if name]
        if node.op_type in ("Shape", "Size", "Constant") or (
            inputs and all(name in shapes or name in integers for name in inputs)
        ):
            shapes.update(node.output)
    return shapes


def region(graph: Any, value: str, known: Iterable[str]) -> list[int]:
    """Indices of the nodes that compute `value` from the values `known`, in topological order."""
    producers = {output: index for index, node in enumerate(graph.node) for output in node.output if output}
    stop = set(known)
    found: set[int] = set()
    queue = [value]
    while queue:
        name = queue.pop()
        if name not in producers or (name in stop and name != value) or producers[name] in found:
            continue
        found.add(producers[name])
        queue.extend(graph.node[producers[name]].input)
    return sorted(found)
