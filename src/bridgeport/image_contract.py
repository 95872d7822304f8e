"""What is done to a picture before the encoder, as data: frozen at export, executed without torch or transformers.

A picture is laid out in tiles first (`ImageContract.tiling`: whole, or cut as the checkpoint's processor cuts it), then
every tile goes through `steps`.
"""

from __future__ import annotations

from typing import Annotated, Literal

from pydantic import Field

from .models.contract import Record

Filter = Literal["nearest", "box", "bilinear", "hamming", "bicubic", "lanczos"]


class Resize(Record):
    """Resize to `height` x `width` pixels, the aspect ratio ignored, with Pillow's filter of that name."""

    op: Literal["resize"] = "resize"
    height: int = Field(ge=1)
    width: int = Field(ge=1)
    resample: Filter


class ResizeShortest(Record):
    """Resize so that the shorter edge has `size` pixels, the aspect ratio kept (the longer one is cut to an int)."""

    op: Literal["resize_shortest"] = "resize_shortest"
    size: int = Field(ge=1)
    resample: Filter


class CenterCrop(Record):
    """Cut `height` x `width` pixels out of the middle; what lies outside the picture is black."""

    op: Literal["center_crop"] = "center_crop"
    height: int = Field(ge=1)
    width: int = Field(ge=1)


class PadSquare(Record):
    """Make it square by borders of `color` (RGB) on the shorter axis; of an odd border, the smaller half is first."""

    op: Literal["pad_square"] = "pad_square"
    color: tuple[int, int, int]


class Rescale(Record):
    """Multiply the 0..255 values by `factor`."""

    op: Literal["rescale"] = "rescale"
    factor: float


class Normalize(Record):
    """Subtract `mean`, divide by `std`, per channel."""

    op: Literal["normalize"] = "normalize"
    mean: tuple[float, float, float]
    std: tuple[float, float, float]


ImageStep = Annotated[Resize | ResizeShortest | CenterCrop | PadSquare | Rescale | Normalize, Field(discriminator="op")]


class Whole(Record):
    """One tile, the picture itself: `tokens` features stand for it, between the texts `before` and `after`.

    `words`: image tokens in the prompt, None for as many as features; Flamingo's features stand beside the prompt.
    """

    kind: Literal["whole"] = "whole"
    tokens: int = Field(ge=1)
    words: int | None = Field(default=None, ge=1)
    before: str = ""
    after: str = ""


class Split(Record):
    """Idefics3 and SmolVLM: square tiles row by row, then the whole picture as one more tile.

    The longer edge becomes `longest_edge`, both edges then multiples of `tile_size`; without `splitting` the picture
    is one tile, squeezed to a square. `tokens` features stand for a tile, after `boundary` and its tag.
    """

    kind: Literal["split"] = "split"
    tokens: int = Field(ge=1)
    longest_edge: int = Field(ge=1)
    tile_size: int = Field(ge=1)
    resample: Filter
    splitting: bool
    boundary: str = "<fake_token_around_image>"
    # Counted from 1, as in "<row_2_col_1>".
    tile_tag: str = "<row_{row}_col_{column}>"
    global_tag: str = "<global-img>"


class Padded(Record):
    """Idefics2: the aspect ratio kept as far as both edges fit; zeros up to its largest tile, masked.

    No edge is longer than `longest_edge` or shorter than `shortest_edge`. With `splitting` the four quarters come
    first. `tokens` features (latents) stand for a tile, between two `boundary`; neighbours share one.
    """

    kind: Literal["padded"] = "padded"
    tokens: int = Field(ge=1)
    shortest_edge: int = Field(ge=1)
    longest_edge: int = Field(ge=1)
    resample: Filter
    splitting: bool
    boundary: str = "<fake_token_around_image>"


class Crops(Record):
    """InternVL: the grid of `min_tiles` to `max_tiles` tiles closest in shape, then, if it has several, a thumbnail.

    `tokens` features stand for a tile, all of them between one `before` and one `after`.
    """

    kind: Literal["crops"] = "crops"
    tokens: int = Field(ge=1)
    height: int = Field(ge=1)
    width: int = Field(ge=1)
    min_tiles: int = Field(ge=1)
    max_tiles: int = Field(ge=1)
    resample: Filter
    before: str = "<img>"
    after: str = "</img>"


class Patches(Record):
    """Qwen2-VL and Qwen2.5-VL: the picture at its own size, as flattened patches in groups of `merge_size` squared.

    Both edges become multiples of `patch_size * merge_size` with `min_pixels` to `max_pixels` in all; one feature
    stands for a group. `window_size` (pixels): the edge of an attention window, None where every patch sees all. With
    `pool_stride` above 1 the mean of that many features squared, fewer at the right and lower edge, is a token.
    """

    kind: Literal["patches"] = "patches"
    patch_size: int = Field(ge=1)
    temporal_patch_size: int = Field(ge=1)
    merge_size: int = Field(ge=1)
    min_pixels: int = Field(ge=1)
    max_pixels: int = Field(ge=1)
    resample: Filter
    window_size: int | None = Field(default=None, ge=1)
    pool_stride: int = Field(default=1, ge=1)


class AnyRes(Record):
    """LLaVA-NeXT and LLaVA-OneVision: the whole picture at `view` x `view` pixels, then the tiles of a grid, by rows.

    The picture is fitted with black borders into the best of `grids` (height and width in pixels), which is cut into
    tiles of `tile` x `tile` pixels. A tile's features are `side` x `side`; features of borders are left out, a
    newline ends every row. With `max_tiles`, a grid of more than 1.21 times that many tiles' features is interpolated
    down to it. `several` (RGB): what pads a picture to one square tile where a prompt holds more than one.
    """

    kind: Literal["anyres"] = "anyres"
    grids: tuple[tuple[int, int], ...] = Field(min_length=1)
    tile: int = Field(ge=1)
    view: int = Field(ge=1)
    side: int = Field(ge=1)
    resample: Filter
    max_tiles: int | None = Field(default=None, ge=1)
    several: tuple[int, int, int] | None = None


class Frames(Record):
    """A video, one tile per frame: LLaVA-NeXT-Video, LLaVA-OneVision, InstructBLIP-Video.

    `tokens`: features of a frame. With `pool_stride` above 1 they are a square that is interpolated down by that
    factor, rounded up (pooling in the connector's graph is none of it). `newline`: one newline ends the video.
    `sample`: of a longer video, that many frames at equal distances; None: all. `frames`: the only count accepted.
    """

    kind: Literal["frames"] = "frames"
    tokens: int = Field(ge=1)
    pool_stride: int = Field(default=1, ge=1)
    newline: bool = False
    sample: int | None = Field(default=None, ge=1)
    frames: int | None = Field(default=None, ge=1)


Tiling = Annotated[Whole | AnyRes | Frames | Split | Padded | Crops | Patches, Field(discriminator="kind")]


class ImageContract(Record):
    """Picture -> the encoder's inputs: RGB, then `tiling`, then `steps` in order on every tile, channels first."""

    steps: tuple[ImageStep, ...]
    tiling: Tiling
