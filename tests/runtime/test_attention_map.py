"""Attention over the picture: every number lands on the patch that it belongs to, and the file is whole or absent."""

from __future__ import annotations

import errno
import os
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

from bridgeport.errors import InputError, OutputError, UnsupportedError
from bridgeport.runtime import attention_map
from bridgeport.runtime.attention_map import draw_sheet, overlay, query_maps, write_attention_map

WHITE = Image.new("RGB", (320, 160), (255, 255, 255))


def attention(queries: int = 3, rows: int = 4, columns: int = 4) -> Any:
    """2 layers, 3 heads: the class token has 0.2, query `q` looks at patch `q` for the rest."""
    values = np.zeros((2, 3, queries, 1 + rows * columns), np.float32)
    values[..., 0] = 0.2
    for query in range(queries):
        values[:, :, query, 1 + query] = 0.8
    return values


def test_maps_are_laid_out_by_rows() -> None:
    maps = query_maps(attention(6), 56, 56)
    assert maps.shape == (6, 4, 4)
    assert maps[5, 1, 1] == pytest.approx(0.8)
    assert maps.sum() == pytest.approx(6 * 0.8)


def test_maps_are_the_mean_of_layers_and_heads() -> None:
    values = attention(1)
    values[0, 0, 0, 1], values[0, 0, 0, 16] = 0.0, 0.8
    maps = query_maps(values, 56, 56)
    assert maps[0, 0, 0] == pytest.approx(0.8 * 5 / 6)
    assert maps[0, 3, 3] == pytest.approx(0.8 / 6)


def test_the_grid_has_the_shape_of_the_picture() -> None:
    assert query_maps(attention(2, 2, 8), 28, 112).shape == (2, 2, 8)
    assert query_maps(attention(2, 8, 2), 112, 28).shape == (2, 8, 2)


@pytest.mark.parametrize("tokens", [1, 16, 18])
def test_tokens_that_are_no_grid(tokens: int) -> None:
    with pytest.raises(UnsupportedError, match=f"^{tokens} image tokens are not a class token and a grid"):
        query_maps(np.zeros((1, 1, 2, tokens), np.float32), 56, 56)


def test_heat_is_brightest_where_the_query_looks() -> None:
    values = np.zeros((4, 4), np.float32)
    values[1, 3] = 0.3
    pixels = np.asarray(overlay(WHITE, values), np.float32)
    heat = pixels[..., 0] - pixels[..., 2]  # yellow and orange, on grey
    y, x = np.unravel_index(heat.argmax(), heat.shape)
    assert (int(y) // 40, int(x) // 80) == (1, 3)
    assert heat[:, :160].max() < 10


def test_the_sheet_has_a_tile_per_query_and_one_for_the_mean() -> None:
    sheets = [np.asarray(draw_sheet(WHITE, query_maps(attention(q), 56, 56), (2, 3))) for q in (2, 4, 5)]
    assert sheets[0].shape == sheets[0].shape
    assert sheets[1].shape[0] < sheets[2].shape[0], "six tiles stand in a row, the seventh begins the next"
    tile = sheets[1][76 + 20 : 76 + 20 + 80, 24 : 24 + 176]
    assert (tile > 250).mean() > 0.95, "the first tile is the picture itself"


@pytest.mark.parametrize("size", [(1, 1), (2000, 3), (3, 2000)])
def test_pictures_of_any_shape(size: tuple[int, int]) -> None:
    sheet = draw_sheet(Image.new("RGB", size), query_maps(attention(), 56, 56), (2, 3))
    assert min(sheet.size) > 100


def test_the_file_is_a_png(tmp_path: Path) -> None:
    target = tmp_path / "new" / "map.PNG"
    write_attention_map(target, WHITE, attention(), 56, 56)
    write_attention_map(target, WHITE, attention(), 56, 56)
    with Image.open(target) as image:
        assert image.format == "PNG"
    assert list(target.parent.iterdir()) == [target]
    assert target.stat().st_mode & 0o777 == 0o644


@pytest.mark.parametrize("name", ["map.jpg", "map", "folder.png"])
def test_other_names_are_refused(tmp_path: Path, name: str) -> None:
    (tmp_path / "folder.png").mkdir()
    with pytest.raises(InputError, match=r"name a file that ends in \.png"):
        write_attention_map(tmp_path / name, WHITE, attention(), 56, 56)


def test_a_full_disk_leaves_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    class Unsaved:
        def save(self, file: Any, **_: Any) -> None:
            file.write(b"half")
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    monkeypatch.setattr(attention_map, "draw_sheet", lambda *_: Unsaved())
    with pytest.raises(OutputError, match="the disk is full"):
        write_attention_map(tmp_path / "map.png", WHITE, attention(), 56, 56)
    assert list(tmp_path.iterdir()) == []
