"""`export --reduce-tokens`: graphs, manifest, chain and parity."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from tests.checkpoints import write_blip2_checkpoint
from tests.checkpoints_idefics import write_idefics_checkpoint
from tests.checkpoints_idefics2 import write_idefics2_checkpoint
from tests.checkpoints_instructblip import write_instructblip_checkpoint
from tests.checkpoints_internvl import write_internvl_checkpoint
from tests.checkpoints_llava import write_llava_checkpoint
from tests.checkpoints_llava_video import write_llava_next_video_checkpoint, write_llava_onevision_checkpoint

import bridgeport.export.checkpoint as export
from bridgeport.cli import main
from bridgeport.errors import UnsupportedError
from bridgeport.export import export_checkpoint
from bridgeport.export.reduction import fit_tokens
from bridgeport.export.stages import export_traced
from bridgeport.image_contract import AnyRes, Crops, Frames, ImageContract, Patches, Whole
from bridgeport.models import load_checkpoint
from bridgeport.models.reduction import TokenMerging, reduce_tokens
from bridgeport.models.reduction_contract import parse_reduction
from bridgeport.runtime import Pipeline, check_parity
from bridgeport.runtime.parity.alter import merge, pool

# One layer of each.
BLIP2: dict[str, Any] = {"vision_layers": 1, "qformer_layers": 1, "num_layers": 1, "num_query_tokens": 6}
# Of two vision layers, the first alone is used.
ONE_LAYER: dict[str, Any] = {"vision": {"num_hidden_layers": 2}, "text": {"num_hidden_layers": 1}}
LIMIT = 5e-5


def picture(width: int, height: int, seed: int = 0) -> Image.Image:
    """Noise."""
    pixels = np.random.default_rng(seed).integers(0, 256, (height, width, 3), dtype=np.uint8)
    return Image.fromarray(pixels)


def check_chain(checkpoint: Path, bundle: Path, reduction: str, *, video: bool = False) -> None:
    """Parity on pictures of three shapes, or on videos of four frames."""
    shapes = [picture(40, 90), picture(28, 28, 1), picture(91, 13, 2)]
    films = [[picture(40, 31, 10 * count + frame) for frame in range(4)] for count in range(3)]
    sources: dict[str, Any] = {"videos": films} if video else {"images": shapes}
    report = check_parity(bundle, checkpoint, prompts=["", "what is this?", "hi"], threads=1, max_new_tokens=6,
                          **sources)  # fmt: skip
    assert report.passed, report.summary()
    assert report.tokens_match
    for stage in report.stages:
        assert stage.isolated.worst.max_rel <= LIMIT, stage.name
    assert report.notes == (
        f"transformers knows no {reduction}: parity's own statement of it is applied to transformers' connector",
    )


def export_without_lint(checkpoint: Path, out: Path, reduction: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(export, "lint_stages", lambda *_: None)
    export_checkpoint(checkpoint, out, reduce_tokens=reduction)


@pytest.mark.slow
def test_pooled_tiles_from_checkpoint_to_text(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """AnyRes: transformers puts the pooled tiles together as if a patch were twice as large."""
    checkpoint = write_llava_checkpoint(tmp_path / "checkpoint", anyres=True, **ONE_LAYER)
    export_without_lint(checkpoint, tmp_path / "bundle", "pool:2", monkeypatch)
    check_chain(checkpoint, tmp_path / "bundle", "pool:2")
    with Pipeline.load(tmp_path / "bundle", threads=1) as pipeline:
        manifest = pipeline.manifest
        assert str(manifest.reduction) == "pool:2"
        assert isinstance(manifest.image.tiling, AnyRes)
        assert manifest.image.tiling.side == 2
        rows = pipeline.generate([picture(40, 90), picture(20, 20)], "what?", max_new_tokens=3)
    assert all(row.token_ids for row in rows)
    with Pipeline.load(tmp_path / "bundle", engine="torch", checkpoint=checkpoint) as torch_pipeline:
        again = torch_pipeline.generate([picture(40, 90), picture(20, 20)], "what?", max_new_tokens=3)
    assert [row.token_ids for row in again] == [row.token_ids for row in rows]


@pytest.fixture(scope="module")
def checkpoints(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    root = tmp_path_factory.mktemp("checkpoints")
    return {
        "llava": write_llava_checkpoint(root / "llava"),
        "llava, odd": write_llava_checkpoint(root / "odd", vision={"image_size": 35}, select="full"),
        "blip-2": write_blip2_checkpoint(root / "blip-2", **BLIP2),
    }


@pytest.mark.parametrize(
    ("kind", "reduction", "left"),
    [("llava, odd", "tome:12", 14), ("blip-2", "queries:1", 1),
     *[pytest.param(*case, marks=pytest.mark.slow) for case in (
        ("llava", "pool:4", 1), ("llava", "pool:2", 4), ("llava", "tome:8", 8), ("llava, odd", "tome:1", 25),
        ("blip-2", "tome:2", 4), ("blip-2", "queries:6", 6))]],
)  # fmt: skip
def test_connector_graphs(checkpoints: dict[str, Path], kind: str, reduction: str, left: int, tmp_path: Path) -> None:
    """ONNX Runtime against the checkpoint's own connector and a plain statement of the reduction."""
    import onnxruntime

    model = load_checkpoint(checkpoints[kind])
    reduced = reduce_tokens(model, parse_reduction(reduction))
    stage = export_traced(reduced, "connector", tmp_path, lambda _: None, max_id=2)
    assert stage.record.contract.outputs[0].shape[1] == left
    assert ("attention" in stage.checks) == (reduction.startswith("queries"))
    _, tokens, width = stage.record.contract.inputs[0].shape
    x = np.random.default_rng(1).standard_normal((4, int(tokens), int(width))).astype(np.float32)
    session = onnxruntime.InferenceSession(tmp_path / stage.record.file, providers=["CPUExecutionProvider"])
    made = session.run(["image_features"], {"image_embeds": x})[0]
    method, _, amount = reduction.partition(":")
    if method == "queries":
        own: Any = model.load_stage("connector")
        own.qformer.query_tokens = torch.nn.Parameter(own.qformer.query_tokens[:, : int(amount)])
        expected = own(torch.from_numpy(x)).detach().numpy()
    else:
        plain: Any = pool if method == "pool" else merge
        whole = model.connector(torch.from_numpy(x)).numpy()
        expected = np.stack([plain(tile, int(amount)) for tile in whole])
    assert made.shape == (4, left, expected.shape[2])
    scale = float(np.sqrt(np.mean(expected**2)))
    np.testing.assert_allclose(made, expected, rtol=1e-4, atol=LIMIT * scale)


@pytest.mark.slow
def test_parity_sees_a_wrong_partner(
    checkpoints: dict[str, Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Planted fault: the least similar pairs are merged. Export cannot see it, its module does the same."""
    chosen = TokenMerging._chosen
    monkeypatch.setattr(TokenMerging, "_chosen", lambda self, best: chosen(self, -best))
    export_without_lint(checkpoints["blip-2"], tmp_path / "bundle", "tome:2", monkeypatch)
    report = check_parity(tmp_path / "bundle", checkpoints["blip-2"], images=[picture(30, 30)], prompts=["hi"],
                          threads=1, max_new_tokens=1)  # fmt: skip
    assert not report.passed
    assert report.first_divergence == "connector"


def test_bad_values_on_the_command_line(
    checkpoints: dict[str, Path], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    for reduction, message in (
        ("pool:0", "bridgeport: reduce-tokens 'pool:0' is no token reduction; accepted are pool:S"),
        ("pool:3", "a grid of 4 x 4, which 3 does not divide; accepted are pool:2, pool:4"),
        ("tome:9", "accepted are tome:1 to tome:8"),
        ("queries:2", "has no learned queries; use pool:S or tome:R"),
    ):
        arguments = ["export", str(checkpoints["llava"]), "-o", str(tmp_path / "b"), "--reduce-tokens", reduction]
        assert main(arguments) == 2
        out, err = capsys.readouterr()
        assert out == ""
        assert message in err.splitlines()[-1]
    assert not list(tmp_path.iterdir())


def test_the_picture_s_contract() -> None:
    crops = Crops(tokens=16, height=28, width=28, min_tiles=1, max_tiles=4, resample="bicubic")
    anyres = AnyRes(grids=((28, 56),), tile=28, view=28, side=4, resample="bicubic")
    for tiling, tokens, name, expected in (
        (Whole(tokens=16, before="<a>"), 9, "tokens", 9),
        (crops, 4, "tokens", 4),
        (Frames(tokens=16), 7, "tokens", 7),
        (anyres, 4, "side", 2),
    ):
        fitted = fit_tokens(ImageContract(steps=(), tiling=tiling), tokens).tiling
        assert fitted == tiling.model_copy(update={name: expected})
    patches = Patches(
        patch_size=2, temporal_patch_size=2, merge_size=2, min_pixels=16, max_pixels=64, resample="bicubic"
    )
    for refused in (anyres, patches, Frames(tokens=16, pool_stride=2)):
        with pytest.raises(UnsupportedError, match=r"reduce-tokens|use pool:S"):
            fit_tokens(ImageContract(steps=(), tiling=refused), 5)


@pytest.mark.slow
@pytest.mark.parametrize(
    ("name", "reduction"),
    [("llava", "pool:2"), ("llava", "tome:5"), ("odd", "tome:12"), ("next, class token", "pool:4"),
     ("onevision", "pool:2"), ("onevision, class token", "pool:2"), ("next-video", "pool:2"),
     ("blip-2", "queries:2"), ("blip-2", "tome:3"), ("opt", "queries:1"),
     ("instructblip", "queries:2"), ("instructblip", "tome:2"), ("instructblip, video", "tome:2"),
     ("instructblip, video", "queries:2"), ("idefics2", "queries:1"), ("idefics2", "tome:1"),
     ("flamingo", "queries:1"), ("flamingo", "tome:2"), ("internvl", "pool:2"), ("internvl", "tome:3")],
)  # fmt: skip
def test_other_chains(name: str, reduction: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    write: dict[str, Any] = {
        "llava": lambda: write_llava_checkpoint(tmp_path / "c"),
        "odd": lambda: write_llava_checkpoint(tmp_path / "c", vision={"image_size": 35}, select="full"),
        "next, class token": lambda: write_llava_checkpoint(
            tmp_path / "c", anyres=True, tower="siglip", select="full", layer=-1
        ),
        "onevision": lambda: write_llava_onevision_checkpoint(tmp_path / "c"),
        "onevision, class token": lambda: write_llava_onevision_checkpoint(tmp_path / "c", tower="clip", layer=-2),
        "next-video": lambda: write_llava_next_video_checkpoint(tmp_path / "c"),
        "blip-2": lambda: write_blip2_checkpoint(tmp_path / "c", **BLIP2),
        "opt": lambda: write_blip2_checkpoint(tmp_path / "c", **BLIP2, text="opt"),
        "instructblip": lambda: write_instructblip_checkpoint(tmp_path / "c"),
        "instructblip, video": lambda: write_instructblip_checkpoint(tmp_path / "c", video=True),
        "idefics2": lambda: write_idefics2_checkpoint(tmp_path / "c"),
        "flamingo": lambda: write_idefics_checkpoint(tmp_path / "c", num_layers=2, vision_layers=1),
        "internvl": lambda: write_internvl_checkpoint(
            tmp_path / "c", vision={"image_size": [32, 32], "patch_size": [4, 4]}
        ),
    }
    checkpoint = write[name]()
    export_without_lint(checkpoint, tmp_path / "bundle", reduction, monkeypatch)
    check_chain(checkpoint, tmp_path / "bundle", reduction, video=name.endswith(", video"))
