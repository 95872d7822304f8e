"""Fixtures that every folder of tests shares. What is heavy is imported inside them."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest


@pytest.fixture(scope="session")
def blip2_checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], Path]:
    """The random checkpoint that `TEXT_CONFIGS` has under a name, written once; do not change it."""
    from tests.checkpoints import TEXT_CONFIGS, write_blip2_checkpoint

    written: dict[str, Path] = {}

    def get(name: str) -> Path:
        if name not in written:
            written[name] = write_blip2_checkpoint(tmp_path_factory.mktemp(name), **TEXT_CONFIGS[name])
        return written[name]

    return get


@pytest.fixture(scope="session")
def retrieval_checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A random `Blip2ForImageTextRetrieval`, written once; do not change it."""
    from tests.checkpoints import write_retrieval_checkpoint

    return write_retrieval_checkpoint(tmp_path_factory.mktemp("retrieval"))
