"""Planted problems of types, control flow, sizes, constants and attention."""

from __future__ import annotations

from tests.export.preflight.plants import Plant, attention, unary


def written_out(mask: str = "s", *, head: int = 64, after: str = "p = Identity(f)") -> str:
    """Matmul, softmax in FP32, matmul; `mask` gives the masked scores, `after` the probabilities."""
    return attention(
        f"t = Transpose<perm=[0, 1, 3, 2]>(k) s = MatMul(q, t) m = Identity({mask}) c = Cast<to=1>(m) "
        f"w = Softmax(c) f = Cast<to=10>(w) {after} y = MatMul(p, v)",
        head=head,
    )


_LOOP_BODY = (
    "body = b (int64 i, bool c, float[2] s) => (bool c2, float[2] s2, float[2] z) "
    "{{ c2 = {condition} s2 = Add(s, s) z = Identity(s2) }}"
)


def scan_loop(
    *, trips: str = "n", condition: str = "Identity(c)", count: str = "int64 n = {4}", extra: str = ""
) -> str:
    """A Loop with one carried value and one scan output."""
    body = _LOOP_BODY.format(condition=condition)
    return (
        f"g (float[2] x{extra}) => (float[2] y, float[M, 2] z) <{count}, bool t = {{1}}> "
        f"{{ y, z = Loop<{body}>({trips}, t, x) }}"
    )


VALUE_PLANTS: dict[str, Plant] = {
    "double": Plant(unary("Relu(x)", kind="double"), "dtype", "warning", "DOUBLE", fixable=True),
    "string": Plant(unary("Identity(x)", kind="string"), "dtype", "error", "STRING"),
    "unsigned": Plant(unary("Identity(x)", kind="uint16"), "dtype", "error", "UINT16"),
    "computing in uint8": Plant(unary("Add(x, x)", kind="uint8"), "dtype", "error", "inputs and outputs only"),
    "sum of integers": Plant(
        unary("CumSum(x, a)", kind="int64", more="int64 a = {1}"), "operator-dtype", "warning", "CumSum of INT64"
    ),
    "mixed types": Plant(
        "g (float[N] x, float16[N] h) => (float[N] y) { y = Add(x, h) }", "mixed-types", "error", "FLOAT and FLOAT16"
    ),
    "loop without trip count": Plant(
        "g (float[2] x) => (float[2] y) <bool t = {1}> { y = Loop<body = b (int64 i, bool c, float[2] s)"
        " => (bool d, float[2] r) { r = Add(s, s) m = ReduceMax<keepdims=0>(r) k = CastLike(m, m) d = Cast<to=9>(k) }>"
        "( , t, x) }",
        "loop",
        "warning",
        "without trip count",
    ),
    "loop with trip count and condition": Plant(
        "g (float[2] x) => (float[2] y) <int64 n = {4}, bool t = {1}> { y = Loop<body = b (int64 i, bool c, float[2] s)"
        " => (bool d, float[2] r) { r = Add(s, s) m = ReduceMax<keepdims=0>(r) d = Cast<to=9>(m) }>(n, t, x) }",
        "loop",
        "warning",
        "takes both",
    ),
    "scan outputs without trip count": Plant(
        scan_loop(trips="", condition="Identity(c)"), "loop", "error", "no trip count"
    ),
    "scan outputs of dynamic length": Plant(
        scan_loop(trips="n", count="float u = {1.0}", extra=", int64 n"), "loop", "error", "no constant"
    ),
    "growing carried value": Plant(
        "g (float[1] x) => (float[M] y) <int64 n = {4}, bool t = {1}> { y = Loop<body = b (int64 i, bool c, float[1] s)"
        " => (bool d, float[2] r) { d = Identity(c) r = Concat<axis=0>(s, s) }>(n, t, x) }",
        "loop",
        "error",
        "shape must stay",
    ),
    "branches of two ranks": Plant(
        "g (bool c, float[2, 2] x) => (float y) { y = If<then_branch = a () => (float[2] p)"
        " { k = Constant<value_ints=[0]>() p = ReduceSum<keepdims=0>(x, k) }, else_branch = b () => (float[2, 2] q)"
        " { q = Identity(x) }>(c) }",
        "if",
        "error",
        "rank 1",
    ),
    "data-dependent size": Plant(
        "g (float[N, 8] x) => (int64[2, M] y) { y = NonZero(x) }", "data-dependent", "warning", "output allocator"
    ),
    "size from numbers": Plant(
        "g (int64 n) => (int64[M] y) <int64 a = {0}, int64 b = {1}> { y = Range(a, n, b) }",
        "shape-tensor",
        "warning",
        "input n",
    ),
    "constant beyond fp16": Plant(unary("Mul(x, w)", more="float w = {70000.0}"), "constant", "warning", "70000"),
    "constant beyond fp16, in fp16": Plant(
        "g (float16[N] x) => (float16[N] y) <float w = {70000.0}> { h = Cast<to=10>(w) y = Mul(x, h) }",
        "constant",
        "error",
        "70000",
    ),
    "nan": Plant(unary("Mul(x, w)", more="float w = {nan}"), "constant", "error", "NaN"),
    "smallest float as mask": Plant(
        "g (float[N, 8] x, bool[N, 8] b) => (float[N, 8] y) <float m = {-3.4028235e38}>"
        " { s = Where(b, x, m) y = Softmax(s) }",
        "mask",
        "warning",
        "-3.40282e+38",
        fixable=True,
    ),
    "infinite mask": Plant(
        "g (float[N, 8] x, bool[N, 8] b) => (float[N, 8] y) <float m = {-inf}> { s = Where(b, x, m) y = Softmax(s) }",
        "mask",
        "warning",
        "-inf",
        fixable=True,
    ),
    "mask that a cast makes infinite": Plant(
        "g (float16[N, 8] x, bool[N, 8] b) => (float16[N, 8] y) <float m = {-3.4028235e38}, float o = {0.0}>"
        " { s = Where(b, o, m) h = Cast<to=10>(s) a = Add(x, h) f = Cast<to=1>(a) p = Softmax(f) y = Cast<to=10>(p) }",
        "mask",
        "error",
        "-inf in FP16",
        fixable=True,
    ),
    "smallest half as mask": Plant(
        "g (float16[N, 8] x, bool[N, 8] b) => (float16[N, 8] y) <float16 m = {64511}, float16 o = {0}>"
        " { s = Where(b, o, m) a = Add(x, s) f = Cast<to=1>(a) p = Softmax(f) y = Cast<to=10>(p) }",
        "mask",
        "warning",
        "-65504",
        fixable=True,
    ),
    "norm in fp16": Plant(
        "g (float16[N, 4] x) => (float16[N, 4] y) <float16[4] w = {15360, 15360, 15360, 15360}>"
        " { y = LayerNormalization(x, w) }",
        "fp16-norm",
        "error",
        "FP16",
    ),
    "softmax in fp16": Plant(unary("Softmax(x)", kind="float16"), "fp16-softmax", "warning", "FP16"),
    "guarded attention": Plant(
        written_out(after="i = IsNaN(f) o = Constant<value=float16 {0}>() p = Where(i, o, f)"),
        "fused-attention",
        "warning",
        "Where",
    ),
    "probabilities read twice": Plant(
        attention(
            "t = Transpose<perm=[0, 1, 3, 2]>(k) s = MatMul(q, t) c = Cast<to=1>(s) w = Softmax(c) p = Cast<to=10>(w)"
            " y = MatMul(p, v) r = Relu(w)",
            out="float16[N, 2, 8, 64] y, float[N, 2, 8, 8] r",
        ),
        "fused-attention",
        "warning",
        "read by something else",
    ),
    "odd head size": Plant(written_out(head=36), "fused-attention", "warning", "head size 36"),
    "fused attention": Plant(written_out(), "fused-attention", "note", "conditions of fused attention are met"),
    "zero point": Plant(
        "g (float[N, 8] x) => (float[N, 8] y) <float s = {0.5}, int8 z = {3}>"
        " { q = QuantizeLinear(x, s, z) y = DequantizeLinear(q, s, z) }",
        "qdq-zero-point",
        "error",
        "3",
        also=frozenset({"qdq-needless-pair"}),
    ),
}
