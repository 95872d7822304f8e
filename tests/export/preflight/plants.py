"""Small ONNX graphs with one planted problem each, and what preflight must say of them; here: of operators."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import onnx
from onnx import parser

VERSIONS = ("10.3", "10.13", "10.16", "11.4")


@dataclass(frozen=True)
class Plant:
    """`graph`: its signature and body. `severity`: of the finding `check`, for every version or by version.

    None: not found for that version. `also`: other checks that may say something of the same problem. `word`: stands in
    the reason.
    """

    graph: str
    check: str
    severity: str | Mapping[str, str | None] | None
    word: str
    opset: int = 17
    also: frozenset[str] = frozenset()
    domains: str = ""
    functions: str = ""
    fixable: bool = False

    def expected(self, version: str) -> str | None:
        """Severity for a version; None when nothing is to be found."""
        return self.severity if self.severity is None or isinstance(self.severity, str) else self.severity[version]

    def model(self) -> onnx.ModelProto:
        """The graph as a model."""
        text = f'<ir_version: 10, opset_import: ["" : {self.opset}{self.domains}]>\n{self.graph}\n{self.functions}'
        return parser.parse_model(text)


def by_version(*severities: str | None) -> Mapping[str, str | None]:
    """One severity for each of `VERSIONS`."""
    return dict(zip(VERSIONS, severities, strict=True))


def unary(call: str, *, kind: str = "float", shape: str = "N, 8, 8", out: str | None = None, more: str = "") -> str:
    """A graph with one input and one output."""
    result = out or f"{kind}[{shape}]"
    return (
        f"g ({kind}[{shape}] x) => ({result} y) <{more}> {{ y = {call} }}"
        if more
        else (f"g ({kind}[{shape}] x) => ({result} y) {{ y = {call} }}")
    )


_ATTENTION = (
    "g (float16[N, 2, 8, {head}] q, float16[N, 2, 8, {head}] k, float16[N, 2, 8, {head}] v) => ({out}) {{ {body} }}"
)


def attention(body: str, *, head: int = 64, out: str = "float16[N, 2, 8, H] y") -> str:
    """A graph over Q, K and V in FP16."""
    return _ATTENTION.format(head=head, body=body, out=out)


OPERATOR_PLANTS: dict[str, Plant] = {
    "opset 21": Plant(unary("Relu(x)"), "opset", by_version("error", None, None, None), "opset 21", 21),
    "opset 22": Plant(unary("Relu(x)"), "opset", by_version("error", None, None, None), "9 to 20", 22),
    "opset 24": Plant(unary("Relu(x)"), "opset", by_version("error", None, None, None), "opset 24", 24),
    "opset 25": Plant(unary("Relu(x)"), "opset", by_version("error", "error", "error", "warning"), "opset 25", 25),
    "opset 8": Plant(unary("Relu(x)"), "opset", "error", "opset 8", 8),
    "too few inputs": Plant(unary("MatMul(x)"), "invalid", "error", "ONNX wants 2"),
    "loop without body": Plant(
        "g (float[2] x) => (float[2] y) <int64 n = {4}, bool t = {1}> { y = Loop(n, t, x) }",
        "invalid",
        "error",
        "without body",
    ),
    "contributed operator": Plant(
        unary("com.microsoft.FastGelu(x)"),
        "contrib",
        "error",
        "com.microsoft.FastGelu",
        domains=', "com.microsoft" : 1',
    ),
    "other domain": Plant(unary("my.own.Swirl(x)"), "contrib", "error", "my.own.Swirl", domains=', "my.own" : 1'),
    "local function": Plant(
        unary("my.own.Twice(x)"),
        "function",
        "note",
        "Twice",
        domains=', "my.own" : 1',
        functions='<domain: "my.own", opset_import: ["" : 17]> Twice (a) => (b) { b = Add(a, a) }',
        fixable=True,
    ),
    "function called without an input": Plant(
        unary("my.own.Both(x)"),
        "function",
        "error",
        "leaves inputs out",
        domains=', "my.own" : 1',
        functions='<domain: "my.own", opset_import: ["" : 17]> Both (a, c) => (b) { b = Identity(a) }',
        fixable=True,
    ),
    "operator inside a function": Plant(
        unary("my.own.Odd(x)"),
        "operator",
        "error",
        "Det",
        domains=', "my.own" : 1',
        functions='<domain: "my.own", opset_import: ["" : 17]> Odd (a) => (b) { c = Det(a) b = Mul(a, c) }',
    ),
    "custom operator": Plant(
        unary("trt.TRT_KVCacheUpdate(x, x)"),
        "operator",
        by_version("error", "error", "error", None),
        "11.0",
        domains=', "trt" : 1',
    ),
    "unknown operator": Plant(unary("CumProd(x, a)", more="int64 a = {1}"), "operator", "error", "CumProd", 20),
    "unsupported operator": Plant(
        "g (int64[N] x) => (int64[M] y) { y = Unique<sorted=1>(x) }", "operator", "error", "Unique"
    ),
    "sequence": Plant(
        "g (float[2] x) => (float[2] y) <int64 i = {0}> { q = SequenceConstruct(x, x) y = SequenceAt(q, i) }",
        "operator",
        "error",
        "Sequence",
    ),
    "dynamic quantisation": Plant(
        "g (float[4, 8] x) => (uint8[4, 8] y, float s, uint8 z) { y, s, z = DynamicQuantizeLinear(x) }",
        "operator",
        "error",
        "DynamicQuantizeLinear",
    ),
    "integer matmul": Plant(
        "g (int8[4, 8] x) => (int32[4, 4] y) <int8[8, 4] w = {"
        + ", ".join(["1"] * 32)
        + "}> { y = MatMulInteger(x, w) }",
        "operator",
        "error",
        "MatMulInteger",
    ),
    "quantised matmul": Plant(
        "g (int8[4, 4] x) => (int8[4, 4] y) <float s = {1}, int8 z = {0}>"
        " { y = QLinearMatMul(x, s, z, x, s, z, s, z) }",
        "operator",
        "error",
        "QLinearMatMul",
    ),
    "optional": Plant(
        "g (float[2] x) => (bool y) { o = Optional(x) y = OptionalHasElement(o) }", "operator", "error", "Optional"
    ),
    "window": Plant(
        "g (float[N] x) => (float[8] y) <int64 n = {8}> { y = HannWindow(n) }",
        "operator",
        by_version("error", None, None, None),
        "10.4",
    ),
    "attention operator": Plant(
        attention("y = Attention(q, k, v)"),
        "operator",
        by_version("error", "error", None, None),
        "10.14",
        23,
        also=frozenset({"opset"}),
    ),
    "rms norm": Plant(
        unary("RMSNormalization(x, w)", more="float[8] w = {1, 1, 1, 1, 1, 1, 1, 1}"),
        "operator",
        by_version("error", "error", None, None),
        "10.15",
        23,
        also=frozenset({"opset"}),
    ),
    "cache update": Plant(
        "g (float[N, 2, 8, 4] p, float[N, 2, 1, 4] u) => (float[N, 2, 8, 4] y) { y = TensorScatter(p, u) }",
        "operator",
        by_version("error", "error", None, None),
        "10.15",
        24,
        also=frozenset({"opset"}),
    ),
    "swish": Plant(
        unary("Swish(x)"),
        "operator",
        by_version("error", "error", "error", None),
        "11.0",
        24,
        also=frozenset({"opset"}),
    ),
    "group norm of opset 21": Plant(
        unary("GroupNormalization<num_groups=2>(x, w, w)", more="float[8] w = {1, 1, 1, 1, 1, 1, 1, 1}"),
        "operator",
        by_version("error", None, None, None),
        "opset 21",
        21,
        also=frozenset({"opset"}),
    ),
    "antialias": Plant(
        unary(
            'Resize<mode="linear", antialias=1>(x, , s)',
            shape="1, 3, 8, 8",
            out="float[1, 3, 4, 4]",
            more="float[4] s = {1.0, 1.0, 0.5, 0.5}",
        ),
        "attribute",
        "error",
        "antialias=1",
        18,
    ),
    "cubic resize": Plant(
        unary(
            'Resize<mode="cubic">(x, , s)',
            shape="1, 3, 8, 8",
            out="float[1, 3, 4, 4]",
            more="float[4] s = {1.0, 1.0, 0.5, 0.5}",
        ),
        "attribute",
        "warning",
        "unverified",
        18,
    ),
    "resize with a crop": Plant(
        unary(
            'Resize<mode="linear", coordinate_transformation_mode="tf_crop_and_resize">(x, r, s)',
            shape="1, 3, 8, 8",
            out="float[1, 3, 4, 4]",
            more="float[8] r = {0.0, 0.0, 0.0, 0.0, 1.0, 1.0, 1.0, 1.0}, float[4] s = {1.0, 1.0, 0.5, 0.5}",
        ),
        "attribute",
        "error",
        "tf_crop_and_resize",
        18,
    ),
    "dilated pooling": Plant(
        unary("MaxPool<kernel_shape=[2, 2], dilations=[2, 2]>(x)", shape="1, 3, 8, 8", out="float[1, 3, 6, 6]"),
        "attribute",
        "error",
        "dilations",
    ),
    "unsorted top-k": Plant(
        "g (float[N, 8] x) => (float[N, 2] y, int64[N, 2] i) <int64[1] k = {2}> { y, i = TopK<sorted=0>(x, k) }",
        "attribute",
        "error",
        "sorted=0",
    ),
    "large top-k": Plant(
        "g (float[N, 5000] x) => (float[N, 3840] y, int64[N, 3840] i) <int64[1] k = {3840}> { y, i = TopK(x, k) }",
        "topk",
        "error",
        "K=3840",
    ),
    "dynamic top-k": Plant(
        "g (float[N, 8] x, int64[1] k) => (float[N, M] y, int64[N, M] i) { y, i = TopK(x, k) }",
        "topk",
        "warning",
        "run time",
    ),
    "scatter with a sum": Plant(
        'g (float[8] x, int64[2, 1] i, float[2] u) => (float[8] y) { y = ScatterND<reduction="add">(x, i, u) }',
        "attribute",
        "error",
        "reduction=add",
        16,
    ),
    "one-hot depth": Plant(
        "g (int64[N] x, int64 d) => (float[N, M] y) <float[2] v = {0.0, 1.0}> { y = OneHot(x, d, v) }",
        "input",
        "error",
        "depth",
    ),
    "reduce axes": Plant(
        "g (float[N, 8] x, int64[1] a) => (float[N, 1] y) { y = ReduceSum(x, a) }", "input", "error", "axes"
    ),
    "second output of a norm": Plant(
        "g (float[N, 4] x) => (float[N, 4] y) <float[4] w = {1, 1, 1, 1}> { y, m = LayerNormalization(x, w) }",
        "output",
        "error",
        "2 outputs",
    ),
    "used output of a norm": Plant(
        "g (float[N, 4] x) => (float[N, 4] y, float[N, 1] m) <float[4] w = {1, 1, 1, 1}>"
        " { y, m = LayerNormalization(x, w) }",
        "output",
        "error",
        "2 outputs",
    ),
    "grid of rank 5": Plant(
        "g (float[1, 1, 4, 4, 4] x, float[1, 2, 2, 2, 3] q) => (float[1, 1, 2, 2, 2] y) { y = GridSample(x, q) }",
        "rank",
        by_version("error", "error", "error", None),
        "rank 5",
        20,
    ),
    "attention with a cache": Plant(
        "g (float16[N, 2, 8, 64] q, float16[N, 2, P, 64] p)"
        " => (float16[N, 2, 8, 64] y, float16[N, 2, T, 64] a, float16[N, 2, T, 64] b)"
        " { y, a, b = Attention(q, q, q, , p, p) }",
        "input",
        "error",
        "past_key",
        23,
        also=frozenset({"opset", "operator", "output"}),
    ),
    "attention with present": Plant(
        attention("y, a = Attention(q, k, v)", out="float16[N, 2, 8, 64] y, float16[N, 2, 8, 64] a"),
        "output",
        "error",
        "2 outputs",
        23,
        also=frozenset({"opset", "operator"}),
    ),
    "attention with softcap": Plant(
        attention("y = Attention<softcap=30.0>(q, k, v)"),
        "attribute",
        "error",
        "softcap",
        23,
        also=frozenset({"opset", "operator"}),
    ),
    "attention in fp32": Plant(
        "g (float[N, 2, 8, 64] q) => (float[N, 2, 8, 64] y) { y = Attention(q, q, q) }",
        "fused-attention",
        by_version(None, None, "warning", "warning"),
        "FP32",
        23,
        also=frozenset({"opset", "operator"}),
    ),
    "attention with one mask row": Plant(
        "g (float16[N, 2, 8, 64] q, float16[N, 1, 1, 8] m) => (float16[N, 2, 8, 64] y) { y = Attention(q, q, q, m) }",
        "attention-mask",
        by_version(None, None, "warning", "warning"),
        "unverified",
        23,
        also=frozenset({"opset", "operator"}),
    ),
}
