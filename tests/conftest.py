"""Fixtures that every folder of tests shares. What is heavy is imported inside them."""

from __future__ import annotations

import functools
import gc
import sys
from collections.abc import Callable
from pathlib import Path

import pytest

# Modules that had been imported when their objects were last put aside.
_settled = 0


@pytest.hookimpl(trylast=True)
def pytest_runtest_teardown() -> None:
    """Keep what libraries hold for good out of every collection, and what torch.onnx reads for every graph.

    An export collects garbage between its stages: with torch, transformers and onnxscript imported, that alone is
    40 % of the time of a small one. And torch.onnx.export parses the source of 500 operators each time, another 15 %.
    """
    global _settled
    if len(sys.modules) < _settled + 100:
        return
    _settled = len(sys.modules)
    gc.collect()
    gc.freeze()
    apis = getattr(sys.modules.get("torch.onnx._internal.exporter._registration"), "onnxscript_apis", None)
    if apis is not None and not hasattr(apis.get_torchlib_ops, "cache_info"):
        apis.get_torchlib_ops = functools.cache(apis.get_torchlib_ops)


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
def blip2_bundle(
    blip2_checkpoint: Callable[[str], Path], tmp_path_factory: pytest.TempPathFactory
) -> Callable[[str], Path]:
    """The FP32 bundle of the checkpoint that `TEXT_CONFIGS` has under a name, exported once; do not change it."""
    from bridgeport.export import checkpoint as export

    written: dict[str, Path] = {}

    def get(name: str) -> Path:
        if name not in written:
            out = tmp_path_factory.mktemp(f"{name}-bundle") / "bundle"
            with pytest.MonkeyPatch.context() as patch:
                patch.setattr(export, "lint_stages", lambda *_: None)  # takes half the time, and has tests of its own
                written[name] = export.export_checkpoint(blip2_checkpoint(name), out).path
        return written[name]

    return get


@pytest.fixture(scope="session")
def retrieval_checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A random `Blip2ForImageTextRetrieval`, written once; do not change it."""
    from tests.checkpoints import write_retrieval_checkpoint

    return write_retrieval_checkpoint(tmp_path_factory.mktemp("retrieval"))


@pytest.fixture(scope="session")
def score_checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], Path]:
    """The random checkpoint that `SCORE_CONFIGS` has under a name, written once; do not change it."""
    from tests.checkpoints_score import write_score_checkpoint

    written: dict[str, Path] = {}

    def get(name: str) -> Path:
        if name not in written:
            written[name] = write_score_checkpoint(tmp_path_factory.mktemp(name), name)
        return written[name]

    return get


@pytest.fixture(scope="session")
def score_bundle(
    score_checkpoint: Callable[[str], Path], tmp_path_factory: pytest.TempPathFactory
) -> Callable[[str], Path]:
    """The bundle of the checkpoint that `SCORE_CONFIGS` has under a name, exported once; do not change it."""
    from bridgeport.export import export_checkpoint, score

    written: dict[str, Path] = {}

    def get(name: str) -> Path:
        if name not in written:
            out = tmp_path_factory.mktemp(f"{name}-bundle") / "bundle"
            with pytest.MonkeyPatch.context() as patch:
                patch.setattr(score, "lint_stages", lambda *_: None)  # takes half the time; a slow test does it
                written[name] = export_checkpoint(score_checkpoint(name), out).path
        return written[name]

    return get


@pytest.fixture(scope="session")
def small_bundle(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The shipped small model, exported in FP32 once; do not change it."""
    from bridgeport.export import export_checkpoint
    from bridgeport.models.small import checkpoint_path

    return export_checkpoint(checkpoint_path(), tmp_path_factory.mktemp("small") / "bundle").path


@pytest.fixture(scope="session")
def held_out_picture(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A picture that the small model was not trained on, as a PNG file."""
    from bridgeport.models.small.pictures import held_out

    file = tmp_path_factory.mktemp("pictures") / "held-out.png"
    held_out(1)[0].image.save(file)
    return file
