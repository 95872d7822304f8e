"""Token reduction: what the modules compute, and which checkpoint takes which reduction."""

from __future__ import annotations

from collections.abc import Callable
from inspect import signature
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from tests.checkpoints import write_blip2_checkpoint
from tests.checkpoints_idefics import write_idefics_checkpoint
from tests.checkpoints_idefics2 import write_idefics2_checkpoint
from tests.checkpoints_instructblip import write_instructblip_checkpoint
from tests.checkpoints_internvl import write_internvl_checkpoint
from tests.checkpoints_llava import write_llava_checkpoint
from tests.checkpoints_score import write_score_checkpoint
from torch import Tensor

from bridgeport.errors import BridgeportError, InputError, UnsupportedError
from bridgeport.export.graph import example_inputs
from bridgeport.export.idefics_processor import freeze_flamingo
from bridgeport.models import load_checkpoint
from bridgeport.models.reduction import TokenMerging, reduce_tokens
from bridgeport.models.reduction_contract import Reduction, parse_reduction


def merge_by_hand(tokens: Any, count: int) -> Any:
    """Bolya et al. 2022, section 3, on one picture's tokens `[N, D]`, in float64 and without a matrix."""
    tokens = np.asarray(tokens, np.float64)
    unit = tokens / np.linalg.norm(tokens, axis=1, keepdims=True)
    odd = np.arange(1, len(tokens), 2)
    best = {even: max((float(unit[even] @ unit[o]), -o) for o in odd) for even in range(0, len(tokens), 2)}
    chosen = sorted(best, key=lambda even: (-best[even][0], even))[:count]
    target = {place: -best[place][1] if place in chosen else place for place in range(len(tokens))}
    kept = [place for place in range(len(tokens)) if target[place] == place]
    return np.stack([tokens[[p for p in target if target[p] == k]].mean(axis=0) for k in kept])


@pytest.mark.parametrize(("tokens", "count"), [(2, 1), (7, 3), (16, 1), (16, 8), (25, 12)])
def test_merging_is_the_papers(tokens: int, count: int) -> None:
    x = torch.randn(3, tokens, 5, generator=torch.Generator().manual_seed(tokens * count))
    merged = TokenMerging(count)(x)
    expected = np.stack([merge_by_hand(picture, count) for picture in x.numpy()])
    assert merged.shape == (3, tokens - count, 5)
    # Sums of at most `tokens` FP32 numbers of size 1; another partner or order is off by about 1.
    np.testing.assert_allclose(merged.numpy(), expected, rtol=1e-5, atol=1e-6)


def test_merging_by_numbers() -> None:
    """Places 0 and 2 resemble 3 most, 4 nothing; the mean is over all that came together."""
    x = torch.tensor([[[3.0, 0.0], [0.0, 1.0], [2.0, 0.0], [1.0, 0.0], [-1.0, -1.0], [0.0, -3.0]]])
    expected = torch.tensor([[[0.0, 1.0], [2.0, 0.0], [-1.0, -1.0], [0.0, -3.0]]])
    torch.testing.assert_close(TokenMerging(2)(x), expected, rtol=0, atol=1e-6)


def test_equal_similarities_count_by_place() -> None:
    """All tokens alike but in length: place 0 goes to place 1, and nothing else."""
    x = torch.tensor([[[1.0, 0.0], [2.0, 0.0], [4.0, 0.0], [8.0, 0.0], [16.0, 0.0], [0.0, 0.0]]])
    merged = TokenMerging(1)(x)
    assert merged[0, :, 0].tolist() == [1.5, 4.0, 8.0, 16.0, 0.0]
    assert not merged.isnan().any()


@pytest.mark.parametrize("text", ["pool:0", "pool:1", "pool", "pool:two", "tome:-1", "tome:0", "queries:0", "other:2",
                                  "", "pool:2:2", "queries:1.5", "pool: 2", "tome:²"])  # fmt: skip
def test_what_is_no_reduction(text: str) -> None:
    with pytest.raises(InputError, match=r"is no token reduction; accepted are pool:S .* tome:R .* and queries:K"):
        parse_reduction(text)


def test_a_reduction_is_data() -> None:
    reduction = parse_reduction("tome:12")
    assert reduction == Reduction(method="tome", amount=12)
    assert Reduction.model_validate_json(reduction.model_dump_json()) == reduction
    assert str(reduction) == "tome:12"


@pytest.fixture(scope="module")
def checkpoints(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    root = tmp_path_factory.mktemp("checkpoints")
    return {
        "blip-2": write_blip2_checkpoint(root / "blip-2", vision_layers=1, qformer_layers=2, num_layers=1),
        "llava": write_llava_checkpoint(root / "llava"),
        "llava, class token": write_llava_checkpoint(root / "full", select="full"),
        "llava-next": write_llava_checkpoint(root / "next", anyres=True),
    }


@pytest.mark.parametrize(
    ("kind", "reduction", "message"),
    [
        ("llava", "pool:3", r"a grid of 4 x 4, which 3 does not divide; accepted are pool:2, pool:4$"),
        ("llava", "tome:9", r"gives 16 tokens, of which one round .* accepted are tome:1 to tome:8$"),
        ("llava", "queries:2", r"the connector of this llava has no learned queries; use pool:S or tome:R$"),
        ("llava, class token", "pool:2", r"17 tokens are no grid \(a class token is among them\); use tome:R$"),
        ("llava-next", "tome:2", r"a llava-next puts its features back into the picture's grid.*; use pool:S$"),
        ("blip-2", "pool:2", r"tokens are no grid \(learned queries have no places\); use tome:R or queries:K$"),
        ("blip-2", "queries:99", r"has \d+ learned queries; accepted are queries:1 to queries:\d+$"),
    ],
)
def test_reductions_that_do_not_fit(checkpoints: dict[str, Path], kind: str, reduction: str, message: str) -> None:
    model = load_checkpoint(checkpoints[kind])
    with pytest.raises(BridgeportError, match=message) as caught:
        reduce_tokens(model, parse_reduction(reduction))
    assert str(caught.value).startswith(str(checkpoints[kind]))
    assert caught.value.exit_code == 2


def test_pooling_keeps_the_grid(checkpoints: dict[str, Path]) -> None:
    model = load_checkpoint(checkpoints["llava"])
    reduced = reduce_tokens(model, parse_reduction("pool:2"))
    x = torch.randn(2, 16, 24)
    whole, pooled = model.connector(x), reduced.connector(x)
    # Rows of four: the first window is 0, 1, 4, 5.
    torch.testing.assert_close(pooled[:, 0], whole[:, [0, 1, 4, 5]].mean(dim=1), rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(pooled[:, 2], whole[:, [8, 9, 12, 13]].mean(dim=1), rtol=1e-5, atol=1e-5)
    assert reduced.contracts["connector"].outputs[0].shape == ("batch", 4, 32)
    assert model.contracts["connector"].outputs[0].shape == ("batch", 16, 32)


def test_queries_that_are_left_out_are_not_computed(checkpoints: dict[str, Path]) -> None:
    """The queries see each other, so the first two alone are not the first two of all."""
    from transformers import Blip2ForConditionalGeneration

    model = load_checkpoint(checkpoints["blip-2"])
    connector = reduce_tokens(model, parse_reduction("queries:2")).connector
    shapes: list[torch.Size] = []
    first: Any = connector.get_submodule("qformer.layers.0")
    first.query_feed_forward.register_forward_hook(lambda _module, inputs, _: shapes.append(inputs[0].shape))
    encoded = model.contracts["connector"].inputs[0].shape
    x = torch.randn(3, int(encoded[1]), int(encoded[2]))
    features = connector(x)
    assert shapes[0][1] == 2

    make: Any = Blip2ForConditionalGeneration
    theirs = make.from_pretrained(checkpoints["blip-2"]).eval()
    queries: Tensor = theirs.query_tokens[:, :2].expand(3, -1, -1)
    with torch.no_grad():
        read = theirs.qformer(query_embeds=queries, encoder_hidden_states=x)[0]
        expected = theirs.language_projection(read)
    torch.testing.assert_close(features, expected, rtol=1e-4, atol=1e-5)
    assert (model.connector(x)[:, :2] - features).abs().max() > 1e-3, "planted fault: cut instead of not computed"


def test_latents_that_are_left_out_are_not_computed(tmp_path: Path) -> None:
    """Idefics2's Perceiver Resampler, behind pictures of two sizes in one batch."""
    from transformers import Idefics2ForConditionalGeneration

    checkpoint = write_idefics2_checkpoint(tmp_path)
    model = reduce_tokens(load_checkpoint(checkpoint), parse_reduction("queries:2"))
    shape = model.contracts["connector"].outputs[0].shape
    assert shape[1] == 2
    patch, width = model.config.vision_config.patch_size, model.config.vision_config.hidden_size
    mask = torch.ones(2, 3 * patch, 4 * patch, dtype=torch.int64)
    mask[1, :, 2 * patch :] = 0
    x = torch.randn(2, 12, width)
    features = model.connector(x, mask)

    make: Any = Idefics2ForConditionalGeneration
    connector = make.from_pretrained(checkpoint).eval().model.connector
    resampler = connector.perceiver_resampler
    resampler.latents = torch.nn.Parameter(resampler.latents[:2])
    with torch.no_grad():
        expected = connector(x, attention_mask=mask[:, ::patch, ::patch].flatten(1).bool())
    torch.testing.assert_close(features, expected, rtol=1e-4, atol=1e-5)


def test_pixel_shuffle_leaves_a_grid(tmp_path: Path) -> None:
    model = load_checkpoint(write_internvl_checkpoint(tmp_path, vision={"image_size": [32, 32], "patch_size": [4, 4]}))
    reduced = reduce_tokens(model, parse_reduction("pool:2"))
    _, tokens, width = model.contracts["connector"].inputs[0].shape
    x = torch.randn(1, int(tokens), int(width))
    whole, pooled = model.connector(x), reduced.connector(x)
    assert (whole.shape[1], pooled.shape[1]) == (16, 4)
    torch.testing.assert_close(pooled[:, 1], whole[:, [2, 3, 6, 7]].mean(dim=1), rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("write", [write_instructblip_checkpoint, write_idefics2_checkpoint])
def test_merging_behind_connectors_that_read_more(write: Callable[[Path], Path], tmp_path: Path) -> None:
    """The instruction of InstructBLIP, the mask of Idefics2."""
    model = load_checkpoint(write(tmp_path))
    reduced = reduce_tokens(model, parse_reduction("tome:1"))
    contract = model.contracts["connector"]
    names = [spec.name for spec in contract.inputs]
    assert [spec.name for spec in reduced.contracts["connector"].inputs] == names
    assert [one.name for one in signature(reduced.connector.forward).parameters.values()] == names
    sizes = {axis.name: max(axis.min, 12) for axis in contract.axes}
    inputs = example_inputs(contract, sizes, examples=model.layout.stages["connector"].examples).values()
    whole, merged = model.connector(*inputs), reduced.connector(*inputs)
    expected = np.stack([merge_by_hand(picture, 1) for picture in whole.numpy()])
    assert merged.shape[1] == reduced.contracts["connector"].outputs[0].shape[1] == whole.shape[1] - 1
    np.testing.assert_allclose(merged.numpy(), expected, rtol=1e-4, atol=1e-5)


def test_flamingo_s_other_stages_read_as_many_latents_as_are_left(tmp_path: Path) -> None:
    from transformers import IdeficsForVisionText2Text

    model = load_checkpoint(write_idefics_checkpoint(tmp_path, num_layers=2, vision_layers=1))
    reduced = reduce_tokens(model, parse_reduction("queries:3"))
    for stage in ("cross_kv", "llm"):
        rows = reduced.contracts[stage].axis("image_sequence")
        assert (rows.min, rows.opt, rows.max) == (3, 3, 3 * 64)
    assert freeze_flamingo(reduced).latents == 3
    _, tokens, width = model.contracts["connector"].inputs[0].shape
    x = torch.randn(2, int(tokens), int(width), generator=torch.Generator().manual_seed(0))
    make: Any = IdeficsForVisionText2Text
    resampler = make.from_pretrained(tmp_path).eval().model.perceiver_resampler
    resampler.latents = torch.nn.Parameter(resampler.latents[:3])
    with torch.no_grad():
        expected = resampler(x)
    torch.testing.assert_close(reduced.connector(x), expected, rtol=1e-4, atol=1e-5)


def test_models_without_image_tokens(tmp_path: Path) -> None:
    clip = load_checkpoint(write_score_checkpoint(tmp_path / "clip", "clip"))
    with pytest.raises(UnsupportedError, match=r"a clip gives no image tokens to a language model; leave it out$"):
        reduce_tokens(clip, parse_reduction("queries:1"))
