"""What a decoder's new tokens see of a concatenated cache, and where they stand, from the mask alone."""

from __future__ import annotations

import numpy as np
import onnx_ir as ir

from .standard_decoder_nodes import NodeWriter
from .weights import Array, constant

# Added to the score of what a token does not see. After softmax it is an exact 0, in FP16 too, and unlike -inf it
# leaves numbers where a row sees nothing.
HIDDEN = -1e4
# Names of its nodes and constants begin so.
PREFIX = "decoder_mask"


class DecoderMask:
    """Values that all layers share, computed once before `anchor`.

    B rows, S new tokens, T places: those of the cache and then S of the new tokens. Counts are int64: FP16 would count
    to 2048 and no further.
    """

    def __init__(self, model: ir.Model, anchor: ir.Node) -> None:
        inputs = {value.name: value for value in model.graph.inputs}
        self._model = model
        self._mask, self._embeds = inputs["attention_mask"], inputs["inputs_embeds"]
        self._write = NodeWriter(model, anchor, PREFIX)
        self._made: dict[str, ir.Value] = {}

    def positions(self) -> ir.Value:
        """int64 `[B, S]`: a token's number in its row, which is how many it sees, less itself."""
        if "positions" not in self._made:
            one = self._constant("one", np.array(1, np.int64))
            self._made["positions"] = self._write.add("Sub", "positions", [self._seen(), one])
        return self._made["positions"]

    def key_positions(self) -> ir.Value:
        """int64 `[B, 1, T]`: the number in its row of the token that a place holds; padding has its neighbour's."""
        if "key_positions" not in self._made:
            one = self._constant("one", np.array(1, np.int64))
            self._made["key_positions"] = self._write.add("Sub", "key_positions", [self._numbers(), one])
        return self._made["key_positions"]

    def bias(self, window: int) -> ir.Value:
        """`[B, 1, S, T]`: 0 where a token sees a place, HIDDEN elsewhere.

        ``window``: how many tokens it sees, itself among them; below 1 all up to itself.
        """
        label = "bias" if window < 1 else f"bias_{window}"
        if label not in self._made:
            visible = self._visible() if window < 1 else self._within(window)
            zero = self._constant("zero", np.array(0, np.float32))
            hidden = self._constant("hidden", np.array(HIDDEN, np.float32))
            chosen = self._write.add("Where", f"{label}/Where", [visible, zero, hidden], dtype=ir.DataType.FLOAT)
            self._made[label] = self._write.add("Unsqueeze", f"{label}/Unsqueeze", [chosen, self._axis(1)])
        return self._made[label]

    def _visible(self) -> ir.Value:
        """bool `[B, S, T]`: places of the row's tokens, up to the token itself."""
        if "visible" not in self._made:
            add = self._write.add
            zero, one = (self._constant(name, np.array(n, np.int64)) for name, n in (("first", 0), ("one", 1)))
            tokens, total = (
                add("Squeeze", f"{name}/Squeeze", [self._size(value, name), self._axis(0)])
                for name, value in (("tokens", self._embeds), ("total", self._mask))
            )
            places = add("Range", "places", [zero, total, one])
            own = add("Range", "own", [add("Sub", "past", [total, tokens]), total, one])
            column = add("Unsqueeze", "own/Unsqueeze", [own, self._axis(1)])
            # No inference finds the length of a Range, and without it none of what is masked.
            places.shape, own.shape = _length(self._mask), _length(self._embeds)
            causal = add("LessOrEqual", "causal", [places, column], dtype=ir.DataType.BOOL)
            attribute = {"to": ir.DataType.BOOL}
            held = add("Cast", "held", [self._mask], attribute, dtype=ir.DataType.BOOL)
            self._made["visible"] = add("And", "visible", [causal, add("Unsqueeze", "rows", [held, self._axis(1)])])
        return self._made["visible"]

    def _within(self, window: int) -> ir.Value:
        """`_visible`, less what stands `window` tokens or more before the token; padding does not count."""
        add = self._write.add
        seen = add("Unsqueeze", f"window_{window}/seen", [self._seen(), self._axis(2)])
        distance = add("Sub", f"window_{window}/distance", [seen, self._numbers()])
        width = self._constant(f"window_{window}/width", np.array(window, np.int64))
        near = add("Less", f"window_{window}/near", [distance, width], dtype=ir.DataType.BOOL)
        return add("And", f"window_{window}/visible", [self._visible(), near])

    def _numbers(self) -> ir.Value:
        """int64 `[B, 1, T]`: how many tokens the row has up to a place."""
        if "numbers" not in self._made:
            add = self._write.add
            # TensorRT sums along an axis in floating point alone; 32 bits count to 16 million.
            floats = add("Cast", "numbers/Float", [self._mask], {"to": ir.DataType.FLOAT}, dtype=ir.DataType.FLOAT)
            summed = add("CumSum", "numbers/CumSum", [floats, self._constant("axis", np.array(1, np.int64))])
            whole = add("Cast", "numbers/Cast", [summed], {"to": ir.DataType.INT64}, dtype=ir.DataType.INT64)
            self._made["numbers"] = add("Unsqueeze", "numbers", [whole, self._axis(1)])
        return self._made["numbers"]

    def _seen(self) -> ir.Value:
        """int64 `[B, S]`: how many tokens each token sees, itself among them."""
        if "seen" not in self._made:
            numbers = self._write.add(
                "Cast", "seen/Cast", [self._visible()], {"to": ir.DataType.INT64}, dtype=ir.DataType.INT64
            )
            self._made["seen"] = self._write.add("ReduceSum", "seen", [numbers, self._axis(2)], {"keepdims": 0})
        return self._made["seen"]

    def _size(self, value: ir.Value, name: str) -> ir.Value:
        return self._write.add("Shape", f"{name}/Shape", [value], {"start": 1, "end": 2}, dtype=ir.DataType.INT64)

    def _axis(self, axis: int) -> ir.Value:
        return self._constant(f"axis_{axis}", np.array([axis], np.int64))

    def _constant(self, name: str, values: Array) -> ir.Value:
        return constant(self._model, f"{PREFIX}/{name}", values)


def _length(value: ir.Value) -> ir.Shape | None:
    """The shape of one number for each place of axis 1."""
    return None if value.shape is None else ir.Shape([value.shape[1]])
