"""Bundles of tiny random checkpoints, exported once and shared."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest


@pytest.fixture(scope="session")
def blip2_bundle(
    blip2_checkpoint: Callable[[str], Path], tmp_path_factory: pytest.TempPathFactory
) -> Callable[[str], Path]:
    """The FP32 bundle of the checkpoint that `TEXT_CONFIGS` has under a name, exported once; do not change it."""
    from bridgeport.export import export_checkpoint

    written: dict[str, Path] = {}

    def get(name: str) -> Path:
        if name not in written:
            out = tmp_path_factory.mktemp(f"{name}-bundle") / "bundle"
            written[name] = export_checkpoint(blip2_checkpoint(name), out).path
        return written[name]

    return get
