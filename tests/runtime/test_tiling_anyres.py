"""AnyRes: tiles, token order and token count are those of transformers' LLaVA-NeXT and LLaVA-OneVision."""

from __future__ import annotations

from dataclasses import replace
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from transformers.models.llava_next.image_processing_pil_llava_next import LlavaNextImageProcessorPil
from transformers.models.llava_next.modeling_llava_next import LlavaNextModel
from transformers.models.llava_next.processing_llava_next import LlavaNextProcessor
from transformers.models.llava_onevision.image_processing_pil_llava_onevision import LlavaOnevisionImageProcessorPil
from transformers.models.llava_onevision.modeling_llava_onevision import LlavaOnevisionModel
from transformers.models.llava_onevision.processing_llava_onevision import LlavaOnevisionProcessor

from bridgeport.errors import InputError
from bridgeport.image_contract import AnyRes, CenterCrop, ImageContract, Normalize, Rescale, Resize, ResizeShortest
from bridgeport.runtime.processor.picture import PictureTensors, prepare_picture
from bridgeport.runtime.processor.tiling import anyres

# The same operations in the same order and types: equal bit for bit here. One unit in the last place of values near
# 3 is left to a numpy built for another machine; a tile moved by one pixel is 1e5 times that.
PIXEL_TOLERANCE = 1e-6
# Interpolated features equal torch's but for the order of four float32 sums (1e-6 of values near 4), where torch's
# positions are one fused operation, as on this machine; elsewhere a position near 160 moves a weight by 1.5e-5. A wrong
# neighbour moves features by more than 0.1. Features that are only put in order are equal bit for bit.
FEATURE_ABSOLUTE, FEATURE_RELATIVE = 1e-4, 1e-6

MEAN, STD = (0.48145466, 0.4578275, 0.40821073), (0.26862954, 0.26130258, 0.27577711)
NEXT_GRIDS = ((2, 4), (4, 2), (4, 4), (6, 2), (2, 6))  # in half tiles: 1x2, 2x1, 2x2, 3x1, 1x3
ONE_GRIDS = tuple((rows, columns) for rows in range(1, 7) for columns in range(1, 7))
# (width, height): one pixel, below a patch, odd ones, extreme ones in both directions, exact fits, photographs.
SIZES = (
    (1, 1), (2, 5), (13, 13), (37, 53), (201, 7), (3, 90), (28, 28), (56, 28), (84, 85), (331, 240), (640, 479),
    (1, 200), (200, 1), (1000, 3), (7, 1400), (5000, 1),
)  # fmt: skip


def next_contract(tile: int = 28, side: int = 2, view: int | None = None) -> ImageContract:
    steps = (
        ResizeShortest(size=view or tile, resample="bicubic"),
        CenterCrop(height=tile, width=tile),
        Rescale(factor=1 / 255),
        Normalize(mean=MEAN, std=STD),
    )
    grids = tuple((rows * tile // 2, columns * tile // 2) for rows, columns in NEXT_GRIDS)
    return ImageContract(
        steps=steps, tiling=AnyRes(grids=grids, tile=tile, view=view or tile, side=side, resample="bicubic")
    )


def one_contract(tile: int = 28, side: int = 2, max_tiles: int = 9) -> ImageContract:
    steps = (
        Resize(height=tile, width=tile, resample="bicubic"),
        Rescale(factor=1 / 255),
        Normalize(mean=(0.5,) * 3, std=(0.5,) * 3),
    )
    grids = tuple((rows * tile, columns * tile) for rows, columns in ONE_GRIDS)
    several = (127, 127, 127)
    tiling = AnyRes(
        grids=grids, tile=tile, view=tile, side=side, resample="bicubic", max_tiles=max_tiles, several=several
    )
    return ImageContract(steps=steps, tiling=tiling)


def anyres_of(contract: ImageContract) -> AnyRes:
    assert isinstance(contract.tiling, AnyRes)
    return contract.tiling


def next_processor(contract: ImageContract) -> Any:
    tiling = anyres_of(contract)
    make: Any = LlavaNextImageProcessorPil
    return make(
        size={"shortest_edge": tiling.view},
        crop_size={"height": tiling.tile, "width": tiling.tile},
        image_grid_pinpoints=[list(grid) for grid in tiling.grids],
    )


def one_processor(contract: ImageContract) -> Any:
    tiling = anyres_of(contract)
    make: Any = LlavaOnevisionImageProcessorPil
    return make(
        size={"height": tiling.view, "width": tiling.view},
        image_grid_pinpoints=[list(grid) for grid in tiling.grids],
        image_mean=[0.5] * 3,
        image_std=[0.5] * 3,
    )


def noise(width: int, height: int) -> Image.Image:
    random = np.random.default_rng(width * 10007 + height)
    return Image.fromarray(random.integers(0, 256, (height, width, 3), dtype=np.uint8))


def pixels_of(processor: Any, pictures: Any) -> np.ndarray[Any, Any]:
    values: np.ndarray[Any, Any] = processor(pictures, return_tensors="np")["pixel_values"]
    return values


def config_of(contract: ImageContract) -> SimpleNamespace:
    """What `pack_image_features` reads of a config."""
    tiling = anyres_of(contract)
    vision = SimpleNamespace(image_size=tiling.tile, patch_size=tiling.tile // tiling.side)
    return SimpleNamespace(vision_config=vision, image_grid_pinpoints=[list(grid) for grid in tiling.grids])


def gather(picture: PictureTensors, features: torch.Tensor, newline: torch.Tensor) -> np.ndarray[Any, Any]:
    """The tokens of the picture, as the run time puts them together."""
    table = np.concatenate([features.reshape(-1, features.shape[-1]).numpy(), newline[None].numpy()])
    chosen: np.ndarray[Any, Any] = table[picture.rows]
    return chosen if picture.weights is None else (chosen * picture.weights[..., None]).sum(axis=1)


def packed(contract: ImageContract, size: tuple[int, int], features: torch.Tensor, newline: torch.Tensor) -> Any:
    """transformers' own order of the features of a picture of `(width, height)`."""
    tiling, stand_in = anyres_of(contract), SimpleNamespace(config=config_of(contract))
    sizes = torch.tensor([size[::-1]])
    if tiling.max_tiles is None:
        pack: Any = LlavaNextModel.pack_image_features
        return pack(stand_in, [features], sizes, "default", image_newline=newline)[0][0].numpy()
    pack = LlavaOnevisionModel.pack_image_features
    ratio = f"anyres_max_{tiling.max_tiles}"
    return pack(stand_in, [features], sizes, image_newline=newline, vision_aspect_ratio=ratio)[0][0].numpy()


def random_features(picture: PictureTensors, side: int, seed: int) -> tuple[torch.Tensor, torch.Tensor]:
    generator = torch.Generator().manual_seed(seed)
    tiles = len(picture.tensors["pixel_values"])
    return torch.randn(tiles, side * side, 5, generator=generator), torch.randn(5, generator=generator)


def feature_error(contract: ImageContract, size: tuple[int, int], picture: PictureTensors) -> float:
    """By how much the tokens miss transformers', in tolerances; infinite where there are more or fewer."""
    features, newline = random_features(picture, anyres_of(contract).side, seed=size[0] + size[1])
    ours, theirs = gather(picture, features, newline), packed(contract, size, features, newline)
    if ours.shape != theirs.shape:
        return float("inf")
    if picture.weights is None:
        return float((ours != theirs).mean()) * 1e6
    return float((np.abs(ours - theirs) / (FEATURE_ABSOLUTE + FEATURE_RELATIVE * np.abs(theirs))).max(initial=0))


CONTRACTS: dict[str, ImageContract] = {
    "next": next_contract(),
    "next, odd side": next_contract(tile=42, side=3),
    "next, larger view": next_contract(tile=28, side=4, view=31),
    "onevision": one_contract(),
    "onevision, odd side": one_contract(tile=42, side=3, max_tiles=2),
    "onevision, one tile": one_contract(tile=28, side=7, max_tiles=1),
}


def processor_of(contract: ImageContract) -> Any:
    return next_processor(contract) if anyres_of(contract).max_tiles is None else one_processor(contract)


@pytest.mark.parametrize("name", CONTRACTS)
@pytest.mark.parametrize("size", SIZES, ids=lambda size: f"{size[0]}x{size[1]}")
def test_tiles_and_tokens_equal_transformers(name: str, size: tuple[int, int]) -> None:
    contract, image = CONTRACTS[name], noise(*size)
    picture = prepare_picture(image, contract)
    theirs = pixels_of(processor_of(contract), image)[0]
    assert picture.tensors["pixel_values"].shape == theirs.shape
    assert np.abs(picture.tensors["pixel_values"] - theirs).max() <= PIXEL_TOLERANCE
    assert picture.rows.dtype == np.int64
    assert picture.pieces == (len(picture.rows),)
    assert feature_error(contract, size, picture) <= 1


def stand_in_processor(contract: ImageContract) -> Any:
    """A processor with what it reads to count tokens."""
    tiling = anyres_of(contract)
    kind: Any = LlavaNextProcessor if tiling.max_tiles is None else LlavaOnevisionProcessor
    processor = object.__new__(kind)
    processor.image_processor = SimpleNamespace(image_grid_pinpoints=[list(grid) for grid in tiling.grids])
    processor.patch_size = tiling.tile // tiling.side
    processor.num_additional_image_tokens = 0
    processor.num_image_tokens = tiling.side**2
    processor.vision_aspect_ratio = f"anyres_max_{tiling.max_tiles}"
    return processor


@pytest.mark.parametrize("name", CONTRACTS)
def test_token_count_is_the_processors(name: str) -> None:
    """Over many random sizes, from the size alone: no picture is made."""
    contract, random = CONTRACTS[name], np.random.default_rng(3)
    processor, tiling = stand_in_processor(contract), anyres_of(contract)
    sizes = [*SIZES, *(tuple(np.exp(random.uniform(0, 8, 2)).astype(int).tolist()) for _ in range(300))]
    for width, height in sizes:
        rows, _ = anyres.token_rows(anyres.lay_out((width, height), tiling), tiling)
        expected = processor._get_number_of_features(height, width, tiling.tile, tiling.tile)
        assert len(rows) == expected, f"{width}x{height}"


def test_real_sizes_have_the_known_counts() -> None:
    """LLaVA-NeXT at 336 px: 2880 tokens for a 2x2 grid before its 48 newlines; OneVision at 384 px: 729 a tile."""
    grids = tuple((rows * 168, columns * 168) for rows, columns in NEXT_GRIDS)
    tiling = AnyRes(grids=grids, tile=336, view=336, side=24, resample="bicubic")
    layout = anyres.lay_out((672, 672), tiling)
    assert layout == anyres.Layout((2, 2), (slice(0, 48), slice(0, 48)), None)
    assert len(anyres.token_rows(layout, tiling)[0]) == 576 + 48 * 48 + 48 == 2880 + 48
    # 640x480 fills 48 of the 48 columns and 36 of the 48 rows.
    layout = anyres.lay_out((640, 480), tiling)
    assert (layout.grid, layout.kept_size) == ((2, 2), (36, 48))
    onevision = AnyRes(
        grids=tuple((r * 384, c * 384) for r, c in ONE_GRIDS),
        tile=384,
        view=384,
        side=27,
        resample="bicubic",
        max_tiles=9,
    )
    layout = anyres.lay_out((2304, 2304), onevision)
    assert (layout.grid, layout.kept_size, layout.scaled) == ((6, 6), (162, 162), (81, 81))


@pytest.mark.parametrize("count", [2, 3])
def test_several_pictures_in_a_prompt_are_one_square_tile_each(count: int) -> None:
    contract = one_contract()
    images = [noise(*size) for size in ((37, 53), (201, 7), (28, 28))][:count]
    theirs = pixels_of(one_processor(contract), [images])
    newline = torch.randn(5)
    for image, expected in zip(images, theirs, strict=True):
        picture = prepare_picture(image, contract, pictures=count)
        assert np.abs(picture.tensors["pixel_values"] - expected).max() <= PIXEL_TOLERANCE
        features = torch.randn(1, 4, 5)
        assert picture.pieces == (5,)
        # One tile: the features and a newline, whatever the picture's size.
        pack: Any = LlavaOnevisionModel.pack_image_features
        sizes = torch.tensor([image.size[::-1]])
        order = pack(SimpleNamespace(config=config_of(contract)), [features], sizes, image_newline=newline)[0][0]
        assert np.array_equal(gather(picture, features, newline), order.numpy())


def test_several_pictures_of_llava_next_keep_their_tiles() -> None:
    image, contract = noise(37, 53), next_contract()
    alone, shared = prepare_picture(image, contract), prepare_picture(image, contract, pictures=2)
    assert np.array_equal(alone.rows, shared.rows)
    assert np.array_equal(alone.tensors["pixel_values"], shared.tensors["pixel_values"])


def test_a_picture_too_thin_to_interpolate_is_named() -> None:
    """transformers' interpolation raises there too."""
    contract = one_contract(side=2, max_tiles=1)
    contract = contract.model_copy(update={"tiling": anyres_of(contract).model_copy(update={"grids": ((28, 168),)})})
    size = (168, 28)
    with pytest.raises(InputError, match="a picture of 168x28 is too thin") as caught:
        prepare_picture(noise(*size), contract)
    assert "\n" not in str(caught.value)
    with pytest.raises(RuntimeError, match="greater than 0"):
        packed(contract, size, torch.randn(7, 4, 5), torch.randn(5))


# A planted fault, in the rows, must show on a picture that has borders.
FAULTS: dict[str, Any] = {
    "global view last": lambda p: replace(p, rows=np.concatenate([p.rows[4:], p.rows[:4]])),
    "no newline": lambda p: replace(p, rows=p.rows[p.rows != p.rows.max()]),
    "tiles one after the other": lambda p: replace(p, rows=np.sort(p.rows)),
    "one row off": lambda p: replace(p, rows=np.maximum(p.rows - 1, 0)),
}


@pytest.mark.parametrize("name", FAULTS)
def test_a_planted_fault_in_the_rows_shows(name: str) -> None:
    contract, size = next_contract(side=2), (56, 40)
    picture = prepare_picture(noise(*size), contract)
    assert feature_error(contract, size, picture) <= 1
    assert feature_error(contract, size, FAULTS[name](picture)) > 1e3


def test_a_planted_fault_in_the_weights_shows() -> None:
    contract, size = one_contract(side=7, max_tiles=1), (56, 40)
    picture = prepare_picture(noise(*size), contract)
    assert picture.weights is not None
    assert feature_error(contract, size, picture) <= 1
    assert feature_error(contract, size, replace(picture, weights=picture.weights[:, ::-1])) > 1e3


@pytest.mark.parametrize("change", [{"resample": "bilinear"}, {"grids": ((28, 56),)}, {"view": 27}])
def test_a_planted_fault_in_the_contract_shows(change: dict[str, Any]) -> None:
    contract, image = next_contract(), noise(37, 53)
    wrong = contract.model_copy(update={"tiling": anyres_of(contract).model_copy(update=change)})
    ours = prepare_picture(image, wrong).tensors["pixel_values"]
    theirs = pixels_of(next_processor(contract), image)[0]
    assert ours.shape != theirs.shape or np.abs(ours - theirs).max() > 0.1


def test_no_unpadding_shows(monkeypatch: pytest.MonkeyPatch) -> None:
    contract, size = next_contract(side=4), (56, 20)
    monkeypatch.setattr(anyres, "_kept", lambda size, shape: (slice(0, shape[0]), slice(0, shape[1])))
    assert feature_error(contract, size, prepare_picture(noise(*size), contract)) == float("inf")


@pytest.mark.slow
@pytest.mark.parametrize("name", CONTRACTS)
def test_random_sizes_equal_transformers(name: str) -> None:
    contract, random = CONTRACTS[name], np.random.default_rng(11)
    processor = processor_of(contract)
    for _ in range(120):
        width, height = np.exp(random.uniform(0, 7, 2)).astype(int).tolist()
        image = noise(width, height)
        picture = prepare_picture(image, contract)
        worst = np.abs(picture.tensors["pixel_values"] - pixels_of(processor, image)[0]).max()
        assert worst <= PIXEL_TOLERANCE, f"{width}x{height}: max abs {worst:.3g}"
        assert feature_error(contract, (width, height), picture) <= 1, f"{width}x{height}"
