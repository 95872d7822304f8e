"""Faults planted in a copy of a bundle, as somebody would make them: the files stay a valid bundle, hashes included."""

from __future__ import annotations

import shutil
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import onnx
from onnx import numpy_helper

from bridgeport.bundle import read_manifest, write_manifest
from bridgeport.manifest import ImageSegment, Manifest, Normalize, Resize, TextSegment

Plant = Callable[[Path], None]


@dataclass(frozen=True)
class Fault:
    """`plant` changes a bundle directory; the rest is what parity must say of it.

    `node`, `module`: of the drill's departure, the module's full path; None where it is not a node's fault.
    `cause`: part of a cause that the drill gives.
    """

    plant: Plant
    stage: str
    module: str | None = None
    operator: str | None = None
    cause: str = ""
    also_own_fault: tuple[str, ...] = field(default=())


def plant_into(bundle: Path, out: Path, fault: Fault) -> Path:
    """Copy `bundle` to `out`, plant the fault there, and write the manifest's hashes again."""
    shutil.copytree(bundle, out)
    fault.plant(out)
    write_manifest(out, read_manifest(out))
    return out


def change_manifest(change: Callable[[Manifest], Manifest]) -> Plant:
    """A fault in what the manifest says."""

    def plant(bundle: Path) -> None:
        write_manifest(bundle, change(read_manifest(bundle)))

    return plant


def change_graph(stage: str, change: Callable[[onnx.ModelProto, Path], None]) -> Plant:
    """A fault in a stage's graph; its weights stay where they are. `change` also gets the graph's folder."""

    def plant(bundle: Path) -> None:
        path = bundle / read_manifest(bundle).stage(stage).file
        model = onnx.load(str(path), load_external_data=False)
        change(model, path.parent)
        path.write_bytes(model.SerializeToString())

    return plant


def change_weight(stage: str, name: str, change: Callable[[Any], None]) -> Plant:
    """A fault in the initializer `name`, written in place; `change` gets it as an array and changes that."""

    def edit(model: onnx.ModelProto, folder: Path) -> None:
        known = {tensor.name: tensor for tensor in model.graph.initializer}
        if name not in known:
            raise KeyError(f"{name} is not among {sorted(known)}")
        tensor = known[name]
        array = np.array(numpy_helper.to_array(tensor, base_dir=str(folder)))
        change(array)
        place = {entry.key: entry.value for entry in tensor.external_data}
        if not place:
            tensor.CopyFrom(numpy_helper.from_array(array, name))
            return
        with (folder / place["location"]).open("r+b") as file:
            file.seek(int(place.get("offset", 0)))
            file.write(array.tobytes())

    return change_graph(stage, edit)


def change_attribute(stage: str, operator: str, occurrence: int, name: str, value: float) -> Plant:
    """A fault in the attribute `name` of the n-th node of that operator type."""

    def edit(model: onnx.ModelProto, _folder: Path) -> None:
        node = [node for node in model.graph.node if node.op_type == operator][occurrence]
        kept = [attribute for attribute in node.attribute if attribute.name != name]
        del node.attribute[:]
        node.attribute.extend([*kept, onnx.helper.make_attribute(name, value)])

    return change_graph(stage, edit)


def bump(*at: int, by: float) -> Callable[[Any], None]:
    """Add `by` to one value."""

    def change(array: Any) -> None:
        array[at] += by

    return change


def swap_rows(first: int, second: int) -> Callable[[Any], None]:
    """Exchange two rows of the last but one axis."""

    def change(array: Any) -> None:
        array[..., [first, second], :] = array[..., [second, first], :]

    return change


def resample(name: Any) -> Plant:
    """Another filter for the resize."""
    return _change_step(lambda step: step.model_copy(update={"resample": name}) if isinstance(step, Resize) else step)


def mean(*values: float) -> Plant:
    """Another mean for the normalisation."""
    return _change_step(lambda step: step.model_copy(update={"mean": values}) if isinstance(step, Normalize) else step)


def _change_step(change: Callable[[Any], Any]) -> Plant:
    def edit(manifest: Manifest) -> Manifest:
        steps = tuple(change(step) for step in manifest.image.steps)
        return manifest.model_copy(update={"image": manifest.image.model_copy(update={"steps": steps})})

    return change_manifest(edit)


def prompt(**update: Any) -> Plant:
    """Another prompt contract."""
    return change_manifest(lambda manifest: manifest.model_copy(update={"prompt": changed(manifest.prompt, **update)}))


def tiling(**update: Any) -> Plant:
    """Another layout of the picture."""

    def edit(manifest: Manifest) -> Manifest:
        image = changed(manifest.image, tiling=changed(manifest.image.tiling, **update))
        return manifest.model_copy(update={"image": image})

    return change_manifest(edit)


def changed(record: Any, **update: Any) -> Any:
    """A copy of a record of the manifest with other values."""
    return record.model_copy(update=update)


TEXT_FIRST = (TextSegment(add_special_tokens=True), ImageSegment())
