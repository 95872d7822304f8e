"""Visual tokens, context, parameters and FLOPs of published models, from the code that exports and runs."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from functools import cache
from pathlib import Path
from typing import Any

import pytest
import transformers
from transformers.models.blip.image_processing_pil_blip import BlipImageProcessorPil
from transformers.models.clip.image_processing_pil_clip import CLIPImageProcessorPil
from transformers.models.llava_next.image_processing_pil_llava_next import LlavaNextImageProcessorPil
from transformers.models.qwen2_vl.image_processing_pil_qwen2_vl import Qwen2VLImageProcessorPil

from bridgeport.errors import InputError
from bridgeport.export.image_processors import freeze_image_contract
from bridgeport.export.tokens import ModelReport, PictureReport, Size, count_tokens, open_subject, subjects
from bridgeport.export.tokens.connectors import CONNECTORS, compare_connectors
from bridgeport.export.tokens.known import KNOWN
from bridgeport.export.tokens.measure import time_calls
from bridgeport.export.tokens.pictures import lay_out
from bridgeport.export.tokens.subjects import Subject
from bridgeport.image_contract import AnyRes, Padded, Patches, Whole
from bridgeport.models.families import FAMILIES

CONTEXT = 4096


def count(subject: Subject, *sizes: str, context: int | None = CONTEXT) -> ModelReport:
    return count_tokens(subject, [Size.parse(size) for size in sizes], context=context)


@cache
def known(name: str) -> Subject:
    return open_subject(name)


def picture_of(name: str, size: str, context: int | None = CONTEXT) -> PictureReport:
    """By the layout's contracts; no module is built."""
    return count(replace(known(name), layout=None), size, context=context).pictures[0]


@pytest.fixture(scope="module")
def whole() -> Callable[[str], ModelReport]:
    """Everything about a known model, its modules built and run on the meta device, once."""
    return cache(lambda name: count(known(name), "640x480"))


@pytest.mark.parametrize(
    ("name", "size", "tokens", "left"),
    [("llava-1.5-7b", "336x336", 576, 3520), ("blip2-opt-2.7b", "224x224", 32, 4064)],
)
def test_the_well_known_table(name: str, size: str, tokens: int, left: int) -> None:
    picture = picture_of(name, size)
    assert (picture.tokens, picture.left, picture.fits) == (tokens, left, True)


def test_anyres_before_and_after_unpadding() -> None:
    """A 2x2 grid: (1 + 4) * 576 features; of a square nothing is border, and 48 rows end with a newline each."""
    square, wide = (picture_of("llava-next-7b", size) for size in ("672x672", "672x400"))
    assert square.unpadded_from == {"tokens": 2880, "left": 1216}
    assert (square.tiles, square.features, square.tokens) == (5, 2880, 2880 + 48)
    # 400 of 672 rows are picture: 28 of 48 rows of features; transformers' unpad_image cuts 10 above and 10 below.
    assert (wide.features, wide.tokens) == (2880, 576 + 28 * (48 + 1))


def test_compression_of_the_q_former_on_both_encoders(whole: Callable[[str], ModelReport]) -> None:
    formers = [report for report in compare_connectors(rounds=0) if report.connector.startswith("Q-Former, 12")]
    assert [(former.tokens, former.features) for former in formers] == [(257, 32), (577, 32)]
    assert [round(former.compression, 1) for former in formers] == [8.0, 18.0]
    # The same connector behind the benchmark and in the checkpoint's layout, but for the language model's width.
    assert whole("blip2-opt-2.7b").parameters["connector"] == formers[0].parameters - (768 + 1) * (4096 - 2560)


def test_flops_are_those_of_the_matrix_products() -> None:
    linear, mlp, _, former = list(compare_connectors(encoders=((257, 1408),), rounds=0))
    assert linear.flops == 2 * 257 * 1408 * 4096
    assert linear.parameters == (1408 + 1) * 4096
    assert mlp.flops == 2 * 257 * 4096 * (1408 + 4096)
    # Self-attention (4 projections, scores, sum), 6 cross-attentions, 12 feed-forwards, the projection.
    q, n, d, v = 32, 257, 768, 1408
    attend = 2 * 2 * q * q * d + 2 * q * d * d * 4
    cross = 2 * q * d * d * 2 + 2 * n * v * d * 2 + 2 * 2 * q * n * d
    assert former.flops == 12 * (attend + 2 * 2 * q * d * 4 * d) + 6 * cross + 2 * q * d * 4096


@pytest.mark.slow
@pytest.mark.parametrize(
    ("name", "millions"),
    [
        ("blip2-opt-2.7b", 3745),
        ("blip2-flan-t5-xl", 3942),
        ("idefics-9b", 8930),
        ("idefics2-8b", 8403),
        ("idefics3-8b", 8462),
        ("smolvlm2-2.2b", 2247),
        ("internvl3-1b", 938),
        ("qwen2-vl-2b", 2209),
        ("qwen2-vl-7b", 8291),
        ("qwen2.5-vl-3b", 3755),
        ("qwen2.5-vl-7b", 8292),
        ("clip-vit-l-14", 428),
    ],
)
def test_parameters_are_as_many_as_the_hub_shows(name: str, millions: int) -> None:
    assert round(sum(count(known(name), "224x224").parameters.values()) / 1e6) == millions


def test_llava_parameters_are_those_of_the_published_model(whole: Callable[[str], ModelReport]) -> None:
    """7.06 B as the hub counts them, without the vision tower's last layer and final norm, which LLaVA leaves out."""
    parameters = whole("llava-1.5-7b").parameters
    last_layer_and_norm = 4 * (1024 + 1) * 1024 + 2 * 1024 * 4096 + 4096 + 1024 + 3 * 2 * 1024
    assert sum(parameters.values()) + last_layer_and_norm == 7_063_427_072
    assert parameters["connector"] == (1024 + 1) * 4096 + (4096 + 1) * 4096


@pytest.mark.parametrize("name", KNOWN)
def test_config_image_contract_and_context_of_a_known_model_fit(name: str) -> None:
    model, contracts = KNOWN[name], known(name).contracts
    tiling: Any = model.image.tiling
    features = contracts["connector"].outputs[0].shape[1:-1]
    if not isinstance(tiling, Patches):
        tokens = tiling.side**2 if isinstance(tiling, AnyRes) else tiling.tokens
        assert tokens == (features[0] if features else 1)
    embedding = contracts.get("embed_tokens")
    assert model.context == (embedding.axis("sequence").max if embedding else None)
    # Any picture comes out as the encoder takes it.
    tensors = lay_out(Size(640, 481), model.image).tensors
    taken = {spec.name for spec in contracts["encoder"].inputs}
    sizes = contracts["encoder"].bind_axes({key: array.shape for key, array in tensors.items() if key in taken})
    assert sizes.get("batch", 1) == len(tensors["pixel_values"]) or "tokens" in sizes


@pytest.mark.parametrize(
    ("name", "processor"),
    [
        ("llava-1.5-7b", CLIPImageProcessorPil(size={"shortest_edge": 336}, crop_size={"height": 336, "width": 336})),
        (
            "llava-next-7b",
            LlavaNextImageProcessorPil(size={"shortest_edge": 336}, crop_size={"height": 336, "width": 336}),
        ),
        ("blip2-opt-2.7b", BlipImageProcessorPil(size={"height": 224, "width": 224})),
        ("qwen2-vl-2b", Qwen2VLImageProcessorPil(size={"shortest_edge": 3136, "longest_edge": 12_845_056})),
    ],
)
def test_image_contract_is_what_transformers_processor_freezes_to(name: str, processor: Any) -> None:
    model = KNOWN[name]
    make: Any = getattr(transformers, FAMILIES[model.config["model_type"]].config_class)
    frozen = freeze_image_contract(Path("/a/checkpoint"), processor, make.from_dict(model.config))
    assert frozen == model.image


def test_flamingo_reads_its_latents_beside_the_prompt() -> None:
    picture = picture_of("idefics-9b", "640x480", None)
    assert (picture.encoder_tokens, picture.features, picture.tokens) == (257, 64, 1)


def test_idefics2_counts_the_patches_of_the_padded_tile(whole: Callable[[str], ModelReport]) -> None:
    """640x480: neither edge is over 980, quarters of 320x240 grow to 378 on an edge; five tiles, padded to 640x480."""
    assert isinstance(KNOWN["idefics2-8b"].image.tiling, Padded)
    (picture,) = whole("idefics2-8b").pictures
    assert (picture.tiles, picture.encoder_tokens, picture.features) == (5, 5 * (640 // 14) * (480 // 14), 5 * 64)


def test_qwen2_merges_four_patches_at_the_pictures_own_size() -> None:
    """1000x500 becomes 1008x504: 72 x 36 patches of 14 pixels."""
    picture = picture_of("qwen2-vl-2b", "1000x500", None)
    assert (picture.encoder_tokens, picture.tokens, picture.compression) == (72 * 36, 72 * 36 // 4, 4.0)


@pytest.mark.parametrize(("size", "tokens"), [("1000x500", 162), ("28x196", 4)])
def test_pooled_patches_are_counted_in_windows(size: str, tokens: int) -> None:
    """36 x 18 and 1 x 7 features in windows of 2 x 2."""
    subject = replace(known("qwen2-vl-2b"), layout=None)
    tiling = subject.image.tiling.model_copy(update={"pool_stride": 2})
    pooled = replace(subject, image=subject.image.model_copy(update={"tiling": tiling}))
    whole, fewer = (count(one, size).pictures[0] for one in (subject, pooled))
    assert (fewer.tokens, fewer.left) == (tokens, CONTEXT - tokens)
    assert fewer.features == whole.features == whole.tokens


def test_a_model_that_scores_has_no_context() -> None:
    picture = picture_of("clip-vit-l-14", "224x224", 100)
    assert (picture.encoder_tokens, picture.features, picture.left, picture.fits) == (257, 1, None, None)


def test_a_context_smaller_than_the_picture_leaves_nothing() -> None:
    picture = picture_of("llava-1.5-7b", "336x336", 500)
    assert (picture.tokens, picture.left, picture.fits) == (576, 0, False)


@pytest.mark.parametrize("name", KNOWN)
def test_tokens_are_the_same_without_torch(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """The table is counted from the image contract alone; the modules come to the same."""
    shapes = picture_of(name, "640x480")
    monkeypatch.setattr(subjects, "has_torch", lambda: False)
    bare = open_subject(name)
    assert (bare.layout, dict(bare.contracts)) == (None, {})
    alone = count(bare, "640x480").pictures[0]
    assert (alone.tokens, alone.features, alone.left) == (shapes.tokens, shapes.features, shapes.left)


def test_every_connector_compares_at_any_size() -> None:
    reports = list(compare_connectors(encoders=((10, 24),), output_width=16, rounds=1))
    assert [report.connector for report in reports] == list(CONNECTORS)
    assert all(report.output_width == 16 and report.latency["PyTorch"].ms > 0 for report in reports)


def test_timing_is_the_median_behind_a_warm_up() -> None:
    calls: list[int] = []
    timing = time_calls(lambda: calls.append(1), "nothing", rounds=4)
    assert (len(calls), timing.rounds, timing.engine) == (5, 4, "nothing")
    assert 0 < timing.best_ms <= timing.ms


@pytest.mark.parametrize("text", ["336", "x336", "336x", "axb", "-1x5", "3x3x3", "", "0x0", "0x5", "99999x99999"])
def test_a_size_that_is_none_is_refused(text: str) -> None:
    with pytest.raises(InputError, match="--image-size"):
        Size.parse(text)


def test_whole_has_a_token_for_every_feature_unless_words_are_told() -> None:
    """What the Flamingo row rests on."""
    assert isinstance(KNOWN["idefics-9b"].image.tiling, Whole)
    assert KNOWN["idefics-9b"].image.tiling.words == 1
