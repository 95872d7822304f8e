"""External data of an ONNX file, found without an ONNX parser: held against files that onnx wrote."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import onnx
import pytest
from onnx import AttributeProto, GraphProto, ModelProto, NodeProto, SparseTensorProto, TensorProto, helper

from bridgeport._wire import external_data_locations


def external(location: str) -> TensorProto:
    tensor = TensorProto(name=location, data_type=TensorProto.FLOAT, dims=[1], data_location=TensorProto.EXTERNAL)
    for key, value in (("offset", "0"), ("location", location), ("length", "4")):
        tensor.external_data.add(key=key, value=value)
    return tensor


def node_with(**attribute: Any) -> NodeProto:
    node = NodeProto(op_type="Constant", output=["c"])
    node.attribute.append(AttributeProto(name="value", **attribute))
    return node


def graph(*nodes: NodeProto, initializers: tuple[TensorProto, ...] = ()) -> GraphProto:
    made = GraphProto(name="g")
    made.node.extend(nodes)
    made.initializer.extend(initializers)
    return made


def save(model: ModelProto, folder: Path) -> Path:
    file = folder / "model.onnx"
    file.write_bytes(model.SerializeToString())
    return file


def nested(depth: int, innermost: GraphProto) -> GraphProto:
    for _ in range(depth):
        innermost = graph(node_with(type=AttributeProto.GRAPH, g=innermost))
    return innermost


def sparse(values: str, indices: str) -> SparseTensorProto:
    return SparseTensorProto(values=external(values), indices=external(indices), dims=[1])


CASES: dict[str, tuple[ModelProto, set[str]]] = {
    "none": (helper.make_model(graph()), set()),
    "initializers": (helper.make_model(graph(initializers=(external("a"), external("b/c")))), {"a", "b/c"}),
    "attribute": (helper.make_model(graph(node_with(type=AttributeProto.TENSOR, t=external("t")))), {"t"}),
    "attribute list": (
        helper.make_model(graph(node_with(type=AttributeProto.TENSORS, tensors=[external("s"), external("t")]))),
        {"s", "t"},
    ),
    "subgraph": (helper.make_model(nested(3, graph(initializers=(external("deep"),)))), {"deep"}),
    "subgraph list": (
        helper.make_model(
            graph(node_with(type=AttributeProto.GRAPHS, graphs=[graph(), graph(initializers=(external("g"),))]))
        ),
        {"g"},
    ),
    "sparse attribute": (
        helper.make_model(graph(node_with(type=AttributeProto.SPARSE_TENSOR, sparse_tensor=sparse("v", "i")))),
        {"v", "i"},
    ),
    "function": (
        helper.make_model(
            graph(),
            functions=[
                helper.make_function(
                    "domain", "f", [], ["c"], [node_with(type=AttributeProto.TENSOR, t=external("f"))], []
                )
            ],
        ),
        {"f"},
    ),
    "not ascii": (helper.make_model(graph(initializers=(external("gewichte-ä"),))), {"gewichte-ä"}),
}


@pytest.mark.parametrize("name", CASES)
def test_locations(name: str, tmp_path: Path) -> None:
    model, expected = CASES[name]
    assert external_data_locations(save(model, tmp_path)) == expected


def test_sparse_initializers(tmp_path: Path) -> None:
    made = graph()
    made.sparse_initializer.append(sparse("values", "indices"))
    assert external_data_locations(save(helper.make_model(made), tmp_path)) == {"values", "indices"}


def test_every_entry_counts_when_a_tensor_names_two(tmp_path: Path) -> None:
    """Parsers differ in which of two they take, so both must be inside."""
    tensor = external("first")
    tensor.external_data.add(key="location", value="second")
    found = external_data_locations(save(helper.make_model(graph(initializers=(tensor,))), tmp_path))
    assert found == {"first", "second"}


def test_repeated_graph_fields_all_count(tmp_path: Path) -> None:
    """Protobuf merges a message field that stands twice; the second copy must not be a hiding place."""
    one = helper.make_model(graph(initializers=(external("a"),))).SerializeToString()
    two = helper.make_model(graph(initializers=(external("b"),))).SerializeToString()
    file = tmp_path / "model.onnx"
    file.write_bytes(one + two)
    merged = onnx.load_model_from_string(one + two)
    assert {each.name for each in merged.graph.initializer} == {"a", "b"}
    assert external_data_locations(file) == {"a", "b"}


def test_large_raw_data_is_passed_over(tmp_path: Path) -> None:
    """Raw data that spells a location is data."""
    inner = helper.make_model(graph(initializers=(external("trap"),))).graph.SerializeToString()
    tensor = TensorProto(name="w", data_type=TensorProto.UINT8, dims=[len(inner)], raw_data=inner)
    assert external_data_locations(save(helper.make_model(graph(initializers=(tensor,))), tmp_path)) == set()


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b"", "empty"),
        (b"\x80", "cut off"),
        (b"\x3a\x05ab", "longer than the message"),
        (b"\x0b", "wire type 3"),
        (b"\x09abc", "last field is cut off"),
        (b"\xff" * 11, "too long"),
        (b"PK\x03\x04 a zip archive", "cut off|longer|wire type"),
    ],
)
def test_what_is_no_protobuf(content: bytes, message: str, tmp_path: Path) -> None:
    file = tmp_path / "model.onnx"
    file.write_bytes(content)
    with pytest.raises(ValueError, match=message):
        external_data_locations(file)


def test_every_cut_of_a_file_is_refused_or_has_no_new_location(tmp_path: Path) -> None:
    whole = save(CASES["subgraph"][0], tmp_path).read_bytes()
    file = tmp_path / "cut.onnx"
    for end in range(1, len(whole)):
        file.write_bytes(whole[:end])
        try:
            assert external_data_locations(file) <= {"deep"}
        except ValueError:
            continue


def test_training_info(tmp_path: Path) -> None:
    model = helper.make_model(graph())
    training = model.training_info.add()
    training.initialization.CopyFrom(graph(initializers=(external("i"),)))
    training.algorithm.CopyFrom(graph(initializers=(external("a"),)))
    assert external_data_locations(save(model, tmp_path)) == {"i", "a"}


def test_graphs_nested_without_end_are_refused(tmp_path: Path) -> None:
    """Bytes by hand, for onnx refuses to nest so deep; ours must not run into Python's recursion limit."""

    def field(number: int, content: bytes) -> bytes:
        length, prefix = len(content), bytearray([number << 3 | 2])
        while length > 0x7F:
            prefix.append(length & 0x7F | 0x80)
            length >>= 7
        return bytes([*prefix, length]) + content

    content = graph(initializers=(external("deep"),)).SerializeToString()
    for _ in range(2000):
        content = field(1, field(5, field(6, content)))  # GraphProto.node, NodeProto.attribute, AttributeProto.g
    file = tmp_path / "model.onnx"
    file.write_bytes(field(7, content))
    with pytest.raises(ValueError, match="nested too deeply"):
        external_data_locations(file)
