"""Where on the picture each query looks, as a contact sheet."""

from __future__ import annotations

import os
import tempfile
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray
from PIL import Image, ImageDraw, ImageFont

from ..bundle import Bundle, output_errors
from ..errors import EngineError, InputError, UnsupportedError
from ..models.contract import TensorSpec
from .backends import EngineOptions

if TYPE_CHECKING:
    from .engine import Engine

VARIANT, OUTPUT = "attention", "cross_attention"

_TILE = 176  # pixels of a tile's longer side
_GAP, _MARGIN, _LABEL = 14, 24, 22
_COLUMNS = 6
_INK, _FAINT, _PAPER = (28, 30, 36), (110, 116, 128), (255, 255, 255)
# Perceptually even from dark to bright, readable by the colour-blind (anchors of Matplotlib's "inferno").
_COLOURS = np.array(
    [(0, 0, 4), (40, 11, 84), (101, 21, 110), (159, 42, 99), (212, 72, 66), (245, 125, 21), (250, 193, 39),
     (252, 255, 164)], np.float32,
)  # fmt: skip


def load_attention_engine(bundle: Bundle, options: EngineOptions) -> Engine:
    """The connector's graph that also gives `cross_attention` `[B, layers, heads, Q, N]`; close it after use.

    Raises UnsupportedError when the bundle has no such graph.
    """
    from .onnxruntime import Device, OnnxRuntimeEngine, load_session

    check_attention_graph(bundle)
    record = bundle.manifest.stage("connector")
    device = Device.parse(options.device)
    session = load_session(bundle.graph("connector", VARIANT), device, threads=options.threads)
    shapes = {node.name: tuple(node.shape) for node in session.get_outputs()}
    if OUTPUT not in shapes:
        raise EngineError(f"{bundle.graph('connector', VARIANT)} has no output {OUTPUT}; export the bundle again")
    shape: tuple[int | str, ...] = ("batch", *(int(size) for size in shapes[OUTPUT][1:]))
    outputs = (*record.contract.outputs, TensorSpec(name=OUTPUT, dtype="float32", shape=shape))
    return OnnxRuntimeEngine(record.contract.model_copy(update={"outputs": outputs}), session, device)


def check_attention_graph(bundle: Bundle) -> None:
    """Raise UnsupportedError when `bundle` cannot say where its queries look."""
    if VARIANT not in bundle.manifest.stage("connector").variants:
        raise UnsupportedError(
            f"{bundle.path} ({bundle.manifest.model_kind}) has no attention graph: only a Q-Former's queries have "
            "attention to draw; export such a checkpoint (again, if this one has a Q-Former)"
        )


def check_target(path: str | Path) -> Path:
    """The absolute path of the PNG to write; InputError for another ending than .png or a directory."""
    target = Path(os.path.abspath(path))  # noqa: PTH100 - a link is replaced, not followed
    if target.suffix.lower() != ".png" or target.is_dir():
        raise InputError(f"the attention map is a PNG file, {path} is not; name a file that ends in .png")
    return target


def query_maps(cross_attention: NDArray[np.float32], height: int, width: int) -> NDArray[np.float32]:
    """One picture's `cross_attention` `[layers, heads, Q, N]` to maps `[Q, rows, columns]` over its patches.

    The mean over layers and heads. Token 0 is the encoder's class token, which stands for no place: it is
    left out, so a map sums to less than 1, the rest being the class token's. `height` and `width`: the
    encoder's picture in pixels, whose shape the grid of patches has. Raises UnsupportedError when the tokens
    are not such a grid and one.
    """
    queries, tokens = cross_attention.shape[2:]
    patches = tokens - 1
    rows = round((patches * height / width) ** 0.5)
    if rows < 1 or patches % rows or rows * width != patches // rows * height:
        raise UnsupportedError(
            f"{tokens} image tokens are not a class token and a grid of patches over {height}x{width} "
            "pixels, so the attention cannot be laid over the picture"
        )
    mean: NDArray[np.float32] = cross_attention.mean(axis=(0, 1))
    return mean[:, 1:].reshape(queries, rows, patches // rows)


def write_attention_map(
    path: str | Path, image: Image.Image, cross_attention: NDArray[np.float32], height: int, width: int
) -> None:
    """Write the contact sheet of one picture as PNG to `path`, aside and then renamed.

    Arguments as in `query_maps`; `image` is the picture as it came, RGB. Raises InputError for another ending
    than .png, OutputError when it cannot be written.
    """
    target = check_target(path)
    sheet = draw_sheet(image, query_maps(cross_attention, height, width), cross_attention.shape[:2])
    with output_errors(target):
        target.parent.mkdir(parents=True, exist_ok=True)
        handle, aside = tempfile.mkstemp(prefix=f".{target.name}.", suffix=".partial", dir=target.parent)
        try:
            with os.fdopen(handle, "wb") as file:
                sheet.save(file, format="PNG", optimize=True)
            Path(aside).chmod(0o644)
            Path(aside).replace(target)
        finally:
            Path(aside).unlink(missing_ok=True)


def draw_sheet(image: Image.Image, maps: NDArray[np.float32], averaged: tuple[int, ...]) -> Image.Image:
    """The sheet: the picture, the mean over queries, then a tile per query. `averaged`: layers and heads."""
    tile = _fit(image.size)
    picture = image.resize(tile, Image.Resampling.LANCZOS)
    tiles = [("picture", picture), ("mean of all queries", overlay(picture, maps.mean(axis=0)))]
    tiles += [(f"query {i}   peak {each.max():.1%}", overlay(picture, each)) for i, each in enumerate(maps)]
    columns = min(_COLUMNS, len(tiles))
    rows = -(-len(tiles) // columns)
    header = 76
    size = (
        2 * _MARGIN + columns * (tile[0] + _GAP) - _GAP,
        header + _MARGIN + rows * (tile[1] + _LABEL + _GAP) - _GAP,
    )
    sheet = Image.new("RGB", (max(size[0], 620), size[1]), _PAPER)
    draw = ImageDraw.Draw(sheet)
    _draw_header(sheet, draw, averaged, 1.0 - float(maps.sum(axis=(1, 2)).mean()))
    for index, (label, content) in enumerate(tiles):
        x = _MARGIN + index % columns * (tile[0] + _GAP)
        y = header + index // columns * (tile[1] + _LABEL + _GAP)
        draw.text((x, y), label, font=_font(13), fill=_INK if index < 2 else _FAINT)
        sheet.paste(content, (x, y + _LABEL - 2))
    return sheet


def overlay(picture: Image.Image, values: NDArray[np.float32]) -> Image.Image:
    """`values` `[rows, columns]` as heat over `picture`: the strongest patch is the brightest."""
    peak = float(values.max())
    scaled = (values / peak if peak > 0 else values).astype(np.float32)
    heat = np.asarray(Image.fromarray(scaled).resize(picture.size, Image.Resampling.BICUBIC)).clip(0, 1)
    colour, grey = (np.asarray(picture.convert(mode).convert("RGB"), np.float32) for mode in ("RGB", "L"))
    base = 0.2 * colour + 0.4 * grey  # dark and pale, so that heat stands out and shapes stay known
    alpha = (0.15 + 0.7 * heat)[..., None]
    return Image.fromarray((base * (1 - alpha) + colourise(heat) * alpha).astype(np.uint8))


def colourise(values: NDArray[np.float32]) -> NDArray[np.float32]:
    """Values 0..1 to RGB 0..255, `[..., 3]`."""
    at = np.linspace(0, 1, len(_COLOURS))
    return np.stack([np.interp(values, at, _COLOURS[:, channel]) for channel in range(3)], axis=-1)


def _draw_header(sheet: Image.Image, draw: ImageDraw.ImageDraw, averaged: tuple[int, ...], class_share: float) -> None:
    layers, heads = averaged
    draw.text((_MARGIN, 14), "Where each query looks", font=_font(20), fill=_INK)
    note = (
        f"cross-attention, mean of {_count(layers, 'layer')} and {_count(heads, 'head')}; "
        f"the class token, with {class_share:.0%} of it, is no place and left out"
    )
    draw.text((_MARGIN, 44), note, font=_font(12), fill=_FAINT)
    bar = colourise(np.linspace(0, 1, 96, dtype=np.float32)[None].repeat(10, axis=0)).astype(np.uint8)
    right = sheet.width - _MARGIN
    sheet.paste(Image.fromarray(bar), (right - 96, 16))
    draw.text((right - 102, 12), "0", font=_font(12), fill=_FAINT, anchor="ra")
    draw.text((right, 28), "tile's peak", font=_font(11), fill=_FAINT, anchor="ra")


def _count(number: int, noun: str) -> str:
    return f"{number} {noun}" if number == 1 else f"{number} {noun}s"


def _fit(size: tuple[int, int]) -> tuple[int, int]:
    scale = _TILE / max(size)
    # A sliver of a picture keeps a tile that can be seen and labelled.
    return max(120, round(size[0] * scale)), max(60, round(size[1] * scale))


def _font(size: int) -> Any:
    return ImageFont.load_default(size)
