"""The file and its external data: what a parser cannot even open."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import onnx_ir as ir

from .findings import Finding
from .subject import Subject

# A protobuf message cannot be longer; its lengths are signed 32-bit numbers.
PROTOBUF_LIMIT = 2**31 - 1


def check_size(path: Path, stage: str) -> Finding | None:
    """An error for a file over 2 GB, which neither a parser nor this package can read."""
    size = path.stat().st_size
    if size <= PROTOBUF_LIMIT:
        return None
    why = f"the file has {size / 1e9:.2f} GB, and a protobuf message ends at 2.15 GB: no parser reads it"
    fix = "store the weights beside the graph (onnx.save with save_as_external_data=True)"
    return Finding("size", "error", stage, path.name, why, fix)


def check_external_data(subject: Subject) -> Iterator[Finding]:
    """Every external tensor lies in the graph's folder, in a file that is long enough."""
    folder = subject.path.parent.resolve()
    total = 0
    for tensor in external_tensors(subject.model):
        total += tensor.nbytes
        where = Path(tensor.location)
        target = (folder / where).resolve()
        name = tensor.name or str(where)
        if where.is_absolute() or not target.is_relative_to(folder):
            why = f"its external data {str(where)!r} lies outside of the graph's folder, where parsers refuse it"
            yield subject.finding("external-data", "error", name, why, "move the file beside the graph and save again")
        elif not target.is_file():
            why = f"its external data {str(where)!r} is missing"
            yield subject.finding("external-data", "error", name, why, "put the file beside the graph, or export again")
        elif target.stat().st_size < (tensor.offset or 0) + tensor.nbytes:
            why = f"its external data {str(where)!r} is shorter than the graph says"
            yield subject.finding("external-data", "error", name, why, "copy the file again, or export again")
    if total > PROTOBUF_LIMIT:
        why = f"{total / 1e9:.2f} GB of weights lie in external data: a parser that is given bytes does not find them"
        yield subject.finding("external-data", "note", subject.path.name, why, "parse from the file's path")


def external_tensors(model: ir.Model) -> Iterator[ir.ExternalTensor]:
    """Every tensor that is stored in another file."""
    for graph in model.graphs():
        for value in graph.initializers.values():
            if isinstance(value.const_value, ir.ExternalTensor):
                yield value.const_value
        for node in graph:
            for attribute in node.attributes.values():
                if attribute.type == ir.AttributeType.TENSOR and isinstance(attribute.value, ir.ExternalTensor):
                    yield attribute.value
