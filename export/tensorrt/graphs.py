"""A bundle's graphs without its engines: what is built anew, packed or repaired."""

from __future__ import annotations

import shutil
from pathlib import Path

from ...bundle import MANIFEST, Bundle, is_within
from ...errors import OutputError
from ...manifest import Manifest


def copy_graphs(source: Bundle, target: Path) -> Manifest:
    """Copy every file but plans and the manifest to the directory `target`.

    Returns the manifest of what is there: a plan runs on the machine of its build alone, so no stage has an engine.
    The contracts stay as narrow as the engines' profiles made them.
    """
    manifest = without_engines(source.manifest)
    plans = {stage.engine.file for stage in source.manifest.stages if stage.engine is not None}
    for record in source.manifest.files:
        if record.path in plans or record.path == MANIFEST:
            continue
        place = target / record.path
        place.parent.mkdir(parents=True, exist_ok=True)
        shutil.copyfile(source.path / record.path, place)
    return manifest


def check_outside(out: Path, bundle: Path) -> None:
    """OutputError for a file that would be written into the bundle that is read."""
    if is_within(out, bundle):
        raise OutputError(f"{out} lies in the bundle {bundle}, which is never changed; name a place outside of it")


def without_engines(manifest: Manifest) -> Manifest:
    """The manifest with graphs alone; as it is where no stage has an engine."""
    if all(stage.engine is None for stage in manifest.stages):
        return manifest
    stages = tuple(stage.model_copy(update={"engine": None, "format": "onnx"}) for stage in manifest.stages)
    checks = {name: value for name, value in manifest.checks.items() if name != "build"}
    return manifest.model_copy(update={"stages": stages, "checks": checks})
