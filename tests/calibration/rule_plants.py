"""For each rule of explicit quantisation, a graph that breaks it."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
import onnx_ir as ir
from onnx_ir.passes.common import RemoveUnusedNodesPass
from tests.calibration.blocks import block_model, node_of, quantized
from tests.export.graphs import float_value, make_model, weight

from bridgeport.export.passes.weights import constant

Plant = Callable[[], tuple[ir.Model, str, str]]
PLANTS: dict[str, Plant] = {}


def plant(rule: str) -> Callable[[Plant], Plant]:
    """Register a graph that breaks `rule`; it returns the model, its precision and the node that is to blame."""

    def register(make: Plant) -> Plant:
        PLANTS[rule] = make
        return make

    return register


def rewire(model: ir.Model, node: str, index: int, array: Any) -> None:
    """Give a node another constant."""
    target = node_of(model, node)
    target.replace_input_with(index, constant(model, f"{node}.planted{index}", np.asarray(array)))


def cast(model: ir.Model, value: ir.Value, node: ir.Node, index: int, to: ir.DataType) -> ir.Value:
    """A Cast of `value` in front of an input of `node`."""
    new = ir.node("Cast", [value], {"to": int(to)}, name=f"{node.name}/Cast{index}")
    new.outputs[0].name, new.outputs[0].type = f"{node.name}.cast{index}", ir.TensorType(to)
    model.graph.insert_before(node, [new])
    node.replace_input_with(index, new.outputs[0])
    return new.outputs[0]


def pair_in_front(model: ir.Model, node: str, index: int = 0) -> None:
    """An INT8 pair on an input of a node."""
    target = node_of(model, node)
    value = target.inputs[index]
    assert value is not None
    step, zero = (
        constant(model, "planted.scale", np.array(0.1, np.float32)),
        constant(model, "zero_point.int8", np.array(0, np.int8)),
    )
    q = ir.node("QuantizeLinear", [value, step, zero], name="planted.q")
    dq = ir.node("DequantizeLinear", [q.outputs[0], step, zero], name="planted.dq")
    q.outputs[0].name, dq.outputs[0].name = "planted.q.out", "planted.dq.out"
    model.graph.insert_before(target, [q, dq])
    target.replace_input_with(index, dq.outputs[0])


def blocked_linear(
    block: int = 8, *, axis: int = 0, opset: int = 21, dtype: ir.DataType = ir.DataType.INT4
) -> ir.Model:
    """`y = x @ dequantise(w)`, `w` `[16, 4]` in blocks along `axis`."""
    x = float_value("x", "batch", 16)
    codes = ir.Tensor(np.ones((16, 4), dtype.numpy()), dtype=dtype, name="w")
    stored = ir.Value(name="w", type=ir.TensorType(dtype), shape=ir.Shape([16, 4]), const_value=codes)
    shape = (16 // block, 4) if axis == 0 else (16, -(-4 // block))
    scales = weight("w.scale", np.full(shape, 0.1, np.float32))
    zeros = ir.Tensor(np.zeros(shape, dtype.numpy()), dtype=dtype, name="w.zero")
    zero = ir.Value(name="w.zero", type=ir.TensorType(dtype), shape=ir.Shape(shape), const_value=zeros)
    dq = ir.node("DequantizeLinear", [stored, scales, zero], {"axis": axis, "block_size": block}, name="w.dq")
    dq.outputs[0].name = "w.dq.out"
    product = ir.node("MatMul", [x, dq.outputs[0]], name="linear")
    y = product.outputs[0]
    y.name, y.type, y.shape = "y", ir.TensorType(ir.DataType.FLOAT), ir.Shape(["batch", 4])
    return make_model([x], [y], [dq, product], opset)


def to_float16(model: ir.Model, *op_types: str) -> ir.Model:
    """Casts to FP16 in front of the first input of these operators, and back behind."""
    for node in list(model.graph):
        if node.op_type in op_types:
            value = node.inputs[0]
            assert value is not None
            cast(model, value, node, 0, ir.DataType.FLOAT16)
            for index in range(1, len(node.inputs)):
                other = node.inputs[index]
                if other is not None:
                    cast(model, other, node, index, ir.DataType.FLOAT16)
            output = node.outputs[0]
            output.type = ir.TensorType(ir.DataType.FLOAT16)
            back = ir.node("Cast", [output], {"to": int(ir.DataType.FLOAT)}, name=f"{node.name}/Back")
            back.outputs[0].name = f"{node.name}.back"
            ir.convenience.replace_all_uses_with(output, back.outputs[0])
            back.replace_input_with(0, output)
            model.graph.insert_after(node, [back])
    return model


@plant("contributed-operator")
def contributed() -> tuple[ir.Model, str, str]:
    model = block_model()
    node = node_of(model, "gelu")
    node.domain = "com.microsoft"
    model.graph.opset_imports["com.microsoft"] = 1
    return model, "int8", "gelu"


@plant("opset")
def old_opset() -> tuple[ir.Model, str, str]:
    return blocked_linear(opset=20), "int4", "w.dq"


@plant("quantized-type")
def unsigned() -> tuple[ir.Model, str, str]:
    model = quantized(block_model())
    for half in ("QuantizeLinear", "DequantizeLinear"):
        rewire(model, f"gelu.out/{half}", 2, np.uint8(0))
    return model, "int8", "gelu.out/QuantizeLinear"


@plant("other-precision")
def other_precision() -> tuple[ir.Model, str, str]:
    return quantized(block_model(), "fp8"), "int8", "x/QuantizeLinear"


@plant("zero-point-missing")
def zero_point_missing() -> tuple[ir.Model, str, str]:
    model = quantized(block_model())
    node_of(model, "gelu.out/DequantizeLinear").resize_inputs(2)
    return model, "int8", "gelu.out/DequantizeLinear"


@plant("zero-point-constant")
def zero_point_computed() -> tuple[ir.Model, str, str]:
    model = quantized(block_model())
    given = ir.Value(name="zero", type=ir.TensorType(ir.DataType.INT8), shape=ir.Shape([]))
    model.graph.inputs.append(given)
    node_of(model, "gelu.out/QuantizeLinear").replace_input_with(2, given)
    return model, "int8", "gelu.out/QuantizeLinear"


@plant("zero-point")
def zero_point() -> tuple[ir.Model, str, str]:
    model = quantized(block_model())
    rewire(model, "gelu.out/QuantizeLinear", 2, np.int8(-3))
    return model, "int8", "gelu.out/QuantizeLinear"


@plant("scale-constant")
def scale_computed() -> tuple[ir.Model, str, str]:
    model = quantized(block_model())
    given = float_value("step")
    model.graph.inputs.append(given)
    node_of(model, "gelu.out/QuantizeLinear").replace_input_with(1, given)
    return model, "int8", "gelu.out/QuantizeLinear"


@plant("scale-positive")
def scale_zero() -> tuple[ir.Model, str, str]:
    model = quantized(block_model())
    for half in ("QuantizeLinear", "DequantizeLinear"):
        rewire(model, f"gelu.out/{half}", 1, np.float32(0))
    return model, "int8", "gelu.out/QuantizeLinear"


@plant("scale-type")
def scale_half() -> tuple[ir.Model, str, str]:
    model = quantized(block_model())
    number = node_of(model, "gelu.out/QuantizeLinear").inputs[1].const_value.numpy()  # type: ignore[union-attr]
    rewire(model, "gelu.out/QuantizeLinear", 1, number.astype(np.float16))
    return model, "int8", "gelu.out/QuantizeLinear"


@plant("activation-per-tensor")
def activation_per_channel() -> tuple[ir.Model, str, str]:
    model = quantized(block_model())
    for half in ("QuantizeLinear", "DequantizeLinear"):
        rewire(model, f"gelu.out/{half}", 1, np.full(64, 0.1, np.float32))
        rewire(model, f"gelu.out/{half}", 2, np.zeros(64, np.int8))
        node_of(model, f"gelu.out/{half}").attributes.add(ir.AttrInt64("axis", -1))
    return model, "int8", "gelu.out/QuantizeLinear"


@plant("weight-axis")
def weight_axis() -> tuple[ir.Model, str, str]:
    model = quantized(block_model())
    dq = node_of(model, "query").inputs[1].producer()  # type: ignore[union-attr]
    assert dq is not None
    dq.attributes.add(ir.AttrInt64("axis", 0))  # 32 x 32: the number of scales fits either axis
    return model, "int8", dq.name or ""


@plant("weight-per-channel")
def weight_per_tensor() -> tuple[ir.Model, str, str]:
    model = quantized(block_model())
    dq = node_of(model, "query").inputs[1].producer()  # type: ignore[union-attr]
    assert dq is not None
    rewire(model, dq.name or "", 1, np.float32(0.01))
    rewire(model, dq.name or "", 2, np.int8(0))
    return model, "int8", dq.name or ""


@plant("weight-stored-float")
def weight_stored_float() -> tuple[ir.Model, str, str]:
    model = quantized(block_model())
    dq = node_of(model, "query").inputs[1].producer()  # type: ignore[union-attr]
    assert dq is not None
    matrix = constant(model, "query.float", np.ones((32, 32), np.float32))
    q = ir.node("QuantizeLinear", [matrix, *dq.inputs[1:]], {"axis": 1}, name="query.q")
    q.outputs[0].name = "query.q.out"
    model.graph.insert_before(dq, [q])
    dq.replace_input_with(0, q.outputs[0])
    return model, "int8", "query.q"


@plant("bias-int32")
def bias_int32() -> tuple[ir.Model, str, str]:
    model = quantized(block_model())
    codes = constant(model, "bias.codes", np.ones(32, np.int32))
    step, zero = (
        constant(model, "bias.scale", np.array(0.1, np.float32)),
        constant(model, "bias.zero", np.array(0, np.int32)),
    )
    dq = ir.node("DequantizeLinear", [codes, step, zero], name="bias.dq")
    dq.outputs[0].name = "bias.dq.out"
    add = node_of(model, "query.add")
    model.graph.insert_before(add, [dq])
    add.replace_input_with(1, dq.outputs[0])
    return model, "int8", "bias.dq"


@plant("activation-int4")
def activation_int4() -> tuple[ir.Model, str, str]:
    model = blocked_linear()
    pair_in_front(model, "linear")
    zero = ir.Tensor(np.zeros((), ir.DataType.INT4.numpy()), dtype=ir.DataType.INT4, name="zero.int4")
    value = ir.Value(name="zero.int4", type=ir.TensorType(ir.DataType.INT4), shape=ir.Shape([]), const_value=zero)
    model.graph.register_initializer(value)
    node_of(model, "planted.q").replace_input_with(2, value)
    node_of(model, "planted.dq").replace_input_with(2, value)
    return model, "int4", "planted.q"


@plant("block")
def block_of_int8() -> tuple[ir.Model, str, str]:
    return blocked_linear(dtype=ir.DataType.INT8), "int8", "w.dq"


@plant("scalar")
def scalar() -> tuple[ir.Model, str, str]:
    model = quantized(block_model())
    pair_in_front(model, "scale", 1)
    return model, "int8", "planted.q"


@plant("fp8-saturate")
def fp8_wraps() -> tuple[ir.Model, str, str]:
    model = quantized(block_model(), "fp8")
    node_of(model, "gelu.out/QuantizeLinear").attributes.add(ir.AttrInt64("saturate", 0))
    return model, "fp8", "gelu.out/QuantizeLinear"


@plant("unpaired")
def unpaired() -> tuple[ir.Model, str, str]:
    model = quantized(block_model())
    given = ir.Value(name="codes", type=ir.TensorType(ir.DataType.INT8), shape=ir.Shape(["batch", 10, 64]))
    model.graph.inputs.append(given)
    node_of(model, "gelu.out/DequantizeLinear").replace_input_with(0, given)
    return model, "int8", "gelu.out/QuantizeLinear"


@plant("pair-scale")
def pair_scale() -> tuple[ir.Model, str, str]:
    model = quantized(block_model())
    rewire(model, "gelu.out/DequantizeLinear", 1, np.float32(1))
    return model, "int8", "gelu.out/QuantizeLinear"


@plant("quantized-norm")
def quantized_norm() -> tuple[ir.Model, str, str]:
    model = quantized(block_model())
    pair_in_front(model, "norm2")
    return model, "int8", "norm2"


@plant("quantized-softmax")
def quantized_softmax() -> tuple[ir.Model, str, str]:
    model = quantized(block_model())
    pair_in_front(model, "softmax")
    return model, "int8", "softmax"


@plant("quantized-mask-add")
def quantized_mask_add() -> tuple[ir.Model, str, str]:
    model = quantized(block_model(mask=True))
    pair_in_front(model, "mask")
    return model, "int8", "mask"


@plant("quantized-activation")
def quantized_activation() -> tuple[ir.Model, str, str]:
    model = quantized(block_model())
    pair_in_front(model, "gelu")
    return model, "int8", "gelu"


@plant("needless-pair")
def needless_pair() -> tuple[ir.Model, str, str]:
    model = quantized(block_model())
    pair_in_front(model, "fc1.add")
    return model, "int8", "planted.dq"


@plant("half-quantized")
def half_quantized() -> tuple[ir.Model, str, str]:
    model = quantized(block_model())
    rewire(model, "fc1", 1, np.ones((32, 64), np.float32))
    RemoveUnusedNodesPass()(model)
    return model, "int8", "fc1"


@plant("attention-half")
def attention_half() -> tuple[ir.Model, str, str]:
    model = quantized(block_model(), attention=False)
    pair_in_front(model, "scores")
    return model, "int8", "scores"


@plant("attention-size")
def attention_size() -> tuple[ir.Model, str, str]:
    wide = quantized(block_model(head_size=24), attention=False)
    for number, (name, index) in enumerate((("scores", 0), ("scores", 1), ("mix", 0), ("mix", 1), ("join", 0))):
        pair_in_front(wide, name, index)
        for half in ("q", "dq"):
            node = node_of(wide, f"planted.{half}")
            node.name, node.outputs[0].name = f"{half}{number}", f"{half}{number}.out"
    return wide, "int8", "scores"


@plant("attention-fp8-order")
def attention_fp8_order() -> tuple[ir.Model, str, str]:
    model = quantized(block_model(), "fp8")
    scores, softmax = node_of(model, "scores"), node_of(model, "softmax")
    late = ir.node("Mul", [scores.outputs[0], constant(model, "late", np.array(0.25, np.float32))], name="late")
    late.outputs[0].name = "late.out"
    model.graph.insert_before(softmax, [late])
    softmax.replace_input_with(0, late.outputs[0])
    return model, "fp8", "late"


@plant("float16-norm")
def float16_norm() -> tuple[ir.Model, str, str]:
    return to_float16(block_model(), "LayerNormalization"), "fp16", "norm1"


@plant("float16-softmax")
def float16_softmax() -> tuple[ir.Model, str, str]:
    return to_float16(block_model(), "Softmax"), "fp16", "softmax"
