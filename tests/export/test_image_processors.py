"""Every image processor that is frozen runs as transformers' own; what cannot be frozen is refused in one line."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from PIL import Image
from transformers import (
    Blip2Config,
    CLIPConfig,
    LlavaConfig,
    LlavaNextConfig,
    LlavaOnevisionConfig,
    SiglipConfig,
)
from transformers.models.beit.image_processing_pil_beit import BeitImageProcessorPil
from transformers.models.blip.image_processing_pil_blip import BlipImageProcessorPil
from transformers.models.clip.image_processing_pil_clip import CLIPImageProcessorPil
from transformers.models.deit.image_processing_pil_deit import DeiTImageProcessorPil
from transformers.models.llava.image_processing_pil_llava import LlavaImageProcessorPil
from transformers.models.llava_next.image_processing_pil_llava_next import LlavaNextImageProcessorPil
from transformers.models.llava_onevision.image_processing_pil_llava_onevision import LlavaOnevisionImageProcessorPil
from transformers.models.siglip.image_processing_pil_siglip import SiglipImageProcessorPil
from transformers.models.vit.image_processing_pil_vit import ViTImageProcessorPil

from bridgeport.errors import BridgeportError, CheckpointError, ExportError, UnsupportedError
from bridgeport.export.image_processors import IMAGE_PROCESSORS, freeze_image_contract
from bridgeport.export.picture_check import check_frozen_pictures
from bridgeport.image_contract import AnyRes, ImageContract, ImageStep, Normalize, Rescale, Whole

PATH = Path("/a/checkpoint")
CLIP = {"model_type": "clip_vision_model", "image_size": 28, "patch_size": 14, "hidden_size": 12}
SIGLIP = {"model_type": "siglip_vision_model", "image_size": 28, "patch_size": 7, "hidden_size": 12}
GRIDS = [[28, 56], [56, 28], [56, 56], [84, 28], [28, 84]]
TEXT = {"model_type": "llama", "hidden_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2, "vocab_size": 99}

CROPPED: dict[str, Any] = {"size": {"shortest_edge": 28}, "crop_size": {"height": 28, "width": 28}}
EXACT: dict[str, Any] = {"size": {"height": 28, "width": 28}}


def llava(**options: Any) -> Any:
    return LlavaConfig(vision_config=dict(CLIP), text_config=TEXT, **options)


def llava_next(vision: dict[str, Any] = CLIP, **options: Any) -> Any:
    return LlavaNextConfig(vision_config=dict(vision), text_config=TEXT, **{"image_grid_pinpoints": GRIDS} | options)


def onevision(**options: Any) -> Any:
    return LlavaOnevisionConfig(
        vision_config=dict(SIGLIP), text_config=TEXT, **{"image_grid_pinpoints": GRIDS} | options
    )


def blip2() -> Any:
    return Blip2Config(vision_config={"image_size": 28, "patch_size": 14}, num_query_tokens=5)


def make(kind: Any, **options: Any) -> Any:
    return kind(**options)


# Name -> (processor, config, tokens of one tile).
CASES: dict[str, tuple[Callable[[], Any], Callable[[], Any], int]] = {
    "blip-2": (lambda: make(BlipImageProcessorPil, **EXACT), blip2, 5),
    "clip": (lambda: make(CLIPImageProcessorPil, **CROPPED), lambda: CLIPConfig(vision_config=dict(CLIP)), 1),
    "siglip": (
        lambda: make(SiglipImageProcessorPil, **EXACT, resample=2),
        lambda: SiglipConfig(vision_config=dict(SIGLIP)),
        1,
    ),
    "llava": (lambda: make(CLIPImageProcessorPil, **CROPPED), llava, 4),
    "llava, class token kept": (
        lambda: make(CLIPImageProcessorPil, **CROPPED),
        lambda: llava(vision_feature_select_strategy="full"),
        5,
    ),
    "llava, padded": (lambda: make(LlavaImageProcessorPil, **CROPPED, do_pad=True), llava, 4),
    "llava, padded, no crop": (
        lambda: make(LlavaImageProcessorPil, size={"shortest_edge": 28}, do_pad=True, do_center_crop=False),
        llava,
        4,
    ),
    "llava, padded with black": (
        lambda: make(LlavaImageProcessorPil, **CROPPED, do_pad=True, do_normalize=False, image_mean=None),
        llava,
        4,
    ),
    "deit": (
        lambda: make(DeiTImageProcessorPil, size={"height": 33, "width": 31}, crop_size={"height": 28, "width": 28}),
        llava,
        4,
    ),
    "vit, one mean for all": (
        lambda: make(ViTImageProcessorPil, **EXACT, resample=1, image_mean=0.4, image_std=0.6),
        llava,
        4,
    ),
    "crop without resize": (lambda: make(CLIPImageProcessorPil, **CROPPED, do_resize=False), llava, 4),
    "no rescale": (lambda: make(BlipImageProcessorPil, **EXACT, do_rescale=False), blip2, 5),
}
TILED: dict[str, tuple[Callable[[], Any], Callable[[], Any]]] = {
    "llava-next": (lambda: make(LlavaNextImageProcessorPil, **CROPPED, image_grid_pinpoints=GRIDS), llava_next),
    "llava-next, exact size": (
        lambda: make(
            LlavaNextImageProcessorPil, **EXACT, crop_size=None, do_center_crop=False, image_grid_pinpoints=GRIDS
        ),
        llava_next,
    ),
    "llava-next, larger view": (
        lambda: make(
            LlavaNextImageProcessorPil,
            size={"shortest_edge": 33},
            crop_size={"height": 28, "width": 28},
            image_grid_pinpoints=GRIDS,
        ),
        llava_next,
    ),
    "onevision": (lambda: make(LlavaOnevisionImageProcessorPil, **EXACT, image_grid_pinpoints=GRIDS), onevision),
}


def freeze(name: str) -> tuple[Any, ImageContract]:
    made, config = TILED[name] if name in TILED else CASES[name][:2]
    processor = made()
    return processor, freeze_image_contract(PATH, processor, config())


@pytest.mark.parametrize("name", [*CASES, *TILED])
def test_frozen_equals_the_processor(name: str) -> None:
    processor, contract = freeze(name)
    report = check_frozen_pictures(processor, contract)
    assert report["image_max_abs"] <= 1e-6
    assert report["pictures"] >= 40
    # What goes to the manifest comes back as it was.
    assert ImageContract.model_validate_json(contract.model_dump_json()) == contract


@pytest.mark.parametrize("name", CASES)
def test_tokens_of_one_tile(name: str) -> None:
    processor, contract = freeze(name)
    assert contract.tiling == Whole(tokens=CASES[name][2])
    counted = freeze_image_contract(PATH, processor, CASES[name][1](), tokens=77)
    assert counted.tiling == Whole(tokens=77)


def test_values_of_the_tilings() -> None:
    grids = tuple((height, width) for height, width in GRIDS)
    assert freeze("llava-next")[1].tiling == AnyRes(grids=grids, tile=28, view=28, side=2, resample="bicubic")
    assert freeze("llava-next, larger view")[1].tiling == AnyRes(
        grids=grids, tile=28, view=33, side=2, resample="bicubic"
    )
    # The color is the mean of CLIP, cut to an int.
    assert freeze("onevision")[1].tiling == AnyRes(
        grids=grids, tile=28, view=28, side=4, resample="bicubic", max_tiles=9, several=(122, 116, 104)
    )


def test_every_processor_is_frozen_here() -> None:
    """A processor in the table without a case is not known to work; the other tilings have tests of their own."""
    ours = {name for name, module in IMAGE_PROCESSORS.items() if module in ("common", "anyres")}
    made = [case[0] for case in CASES.values()] + [case[0] for case in TILED.values()]
    elsewhere = {"IdeficsImageProcessorPil"}  # tests/runtime/test_flamingo.py holds its pixels against transformers
    assert {type(processor()).__name__ for processor in made} | elsewhere == ours


def _step(contract: ImageContract, place: int, **changes: Any) -> ImageContract:
    steps = list(contract.steps)
    steps[place] = steps[place].model_copy(update=changes)
    return contract.model_copy(update={"steps": tuple(steps)})


def _tiling(contract: ImageContract, **changes: Any) -> ImageContract:
    return contract.model_copy(update={"tiling": contract.tiling.model_copy(update=changes)})


def _without(contract: ImageContract, kind: type[Any]) -> ImageContract:
    steps: tuple[ImageStep, ...] = tuple(step for step in contract.steps if not isinstance(step, kind))
    return contract.model_copy(update={"steps": steps})


# A planted fault -> (case, the frozen contract spoilt, what the error names first).
FAULTS: dict[str, tuple[str, Callable[[ImageContract], ImageContract], str]] = {
    "filter": ("clip", lambda c: _step(c, 0, resample="bilinear"), "step resize_shortest of picture"),
    "shortest edge": ("clip", lambda c: _step(c, 0, size=29), "step resize_shortest of picture"),
    "crop": ("deit", lambda c: _step(c, 1, height=27), "step center_crop of picture"),
    "color": ("llava, padded", lambda c: _step(c, 0, color=(0, 0, 0)), "step pad_square of picture"),
    "factor": ("llava, padded", lambda c: _step(c, 3, factor=1 / 256), "step rescale of picture"),
    "mean": ("llava-next", lambda c: _step(c, 3, mean=(0.5, 0.5, 0.5)), "step normalize of picture"),
    "no normalisation": ("clip", lambda c: _without(c, Normalize), "a step is missing from the contract"),
    "no rescale": ("onevision", lambda c: _without(c, Rescale), "a step is missing from the contract"),
    "tile filter": ("llava-next", lambda c: _tiling(c, resample="lanczos"), "tiling anyres of picture"),
    "grids": ("onevision", lambda c: _tiling(c, grids=((56, 56),)), "tiling anyres of picture"),
}


@pytest.mark.parametrize("name", FAULTS)
def test_a_planted_fault_is_named(name: str) -> None:
    case, plant, message = FAULTS[name]
    processor, contract = freeze(case)
    with pytest.raises(ExportError, match=message) as caught:
        check_frozen_pictures(processor, plant(contract))
    assert "\n" not in str(caught.value)


def test_a_picture_that_only_one_of_both_takes_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    processor, contract = freeze("llava, padded")
    monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", 200 * 200)
    with pytest.raises(ExportError, match=r"picture 201x7 RGB is refused .* transformers takes it"):
        check_frozen_pictures(processor, contract)

    def refuse(*_: Any, **__: Any) -> Any:
        raise ValueError("too wide")

    monkeypatch.setattr(type(processor), "_preprocess", refuse)
    with pytest.raises(ExportError, match=r"picture 1x1 RGB is taken; transformers refuses it \(too wide\)"):
        check_frozen_pictures(processor, contract)


NEXT: dict[str, Any] = {**CROPPED, "image_grid_pinpoints": GRIDS}
# What is wrong -> (processor, config, the error, what it says).
BAD: dict[str, tuple[Callable[[], Any], Callable[[], Any], type[BridgeportError], str]] = {
    "another class": (
        lambda: make(BeitImageProcessorPil),
        llava,
        UnsupportedError,
        "image processor BeitImageProcessor is not built; built are BlipImageProcessor, CLIPImageProcessor",
    ),
    "no crop": (
        lambda: make(CLIPImageProcessorPil, **CROPPED, do_center_crop=False),
        llava,
        UnsupportedError,
        r"size \{'shortest_edge': 28\} keeps the aspect ratio",
    ),
    "two edges": (
        lambda: make(CLIPImageProcessorPil, **CROPPED | {"size": {"shortest_edge": 28, "longest_edge": 56}}),
        llava,
        UnsupportedError,
        "'longest_edge': 56.* keeps the aspect ratio",
    ),
    "no resize": (
        lambda: make(BlipImageProcessorPil, **EXACT, do_resize=False),
        blip2,
        UnsupportedError,
        "do_resize is false",
    ),
    "batch padding": (
        lambda: make(BlipImageProcessorPil, **EXACT, do_pad=True),
        blip2,
        UnsupportedError,
        "do_pad is true",
    ),
    "crop of another size": (
        lambda: make(CLIPImageProcessorPil, **CROPPED | {"crop_size": {"height": 20, "width": 24}}),
        llava,
        CheckpointError,
        "makes 20x24 pictures, the vision encoder takes 28x28",
    ),
    "filter": (
        lambda: make(BlipImageProcessorPil, **EXACT, resample=9),
        blip2,
        CheckpointError,
        "resample 9 is unknown",
    ),
    "tower": (
        lambda: make(CLIPImageProcessorPil, **CROPPED),
        lambda: LlavaConfig(vision_config={"model_type": "vit", "image_size": 28}, text_config=TEXT),
        UnsupportedError,
        "the vision tower is a 'vit'; supported are clip_vision_model, siglip_vision_model",
    ),
    "grids of the model": (
        lambda: make(LlavaNextImageProcessorPil, **NEXT),
        lambda: llava_next(image_grid_pinpoints=GRIDS[:4]),
        CheckpointError,
        r"image_grid_pinpoints .* \(5 and 4 in all\); make them one",
    ),
    "grids that are no multiples": (
        lambda: make(LlavaNextImageProcessorPil, **NEXT | {"image_grid_pinpoints": [[28, 57]]}),
        lambda: llava_next(image_grid_pinpoints=[[28, 57]]),
        CheckpointError,
        r"image_grid_pinpoints are \[\(28, 57\)\]; accepted are multiples of the tile, 28 pixels",
    ),
    "tiles of another size": (
        lambda: make(LlavaNextImageProcessorPil, **NEXT | EXACT | {"crop_size": {"height": 14, "width": 14}},
                     do_center_crop=False),
        llava_next,
        CheckpointError,
        "cuts tiles of 14 pixels and the model counts tiles of 28",
    ),
    "a view of another size": (
        lambda: make(LlavaNextImageProcessorPil, **NEXT | {"size": {"height": 33, "width": 33}}, do_resize=False,
                     do_center_crop=False),
        llava_next,
        CheckpointError,
        r"28x28 pixels of a tile and another size of the global view \(33x33 before its crop\)",
    ),
    "a view that is no square": (
        lambda: make(LlavaNextImageProcessorPil, **NEXT | {"size": {"height": 28, "width": 35}}),
        llava_next,
        UnsupportedError,
        "is no square; AnyRes takes square tiles",
    ),
    "class token in a grid": (
        lambda: make(LlavaNextImageProcessorPil, **NEXT),
        lambda: llava_next(vision_feature_select_strategy="full"),
        UnsupportedError,
        "a tile has 5 features where its patches are 2x2",
    ),
    "SigLIP without its first patch": (
        lambda: make(LlavaNextImageProcessorPil, **NEXT),
        lambda: llava_next(SIGLIP),
        UnsupportedError,
        "a tile has 15 features where its patches are 4x4",
    ),
    "aspect ratio": (
        lambda: make(LlavaOnevisionImageProcessorPil, **EXACT, image_grid_pinpoints=GRIDS),
        lambda: onevision(vision_aspect_ratio="pad"),
        UnsupportedError,
        "vision_aspect_ratio is 'pad'; accepted is anyres_max_N",
    ),
}  # fmt: skip


@pytest.mark.parametrize("name", BAD)
def test_what_cannot_be_frozen_is_named(name: str) -> None:
    processor, config, kind, message = BAD[name]
    with pytest.raises(kind, match=message) as caught:
        freeze_image_contract(PATH, processor(), config())
    assert "\n" not in str(caught.value)
    assert str(PATH) in str(caught.value)
