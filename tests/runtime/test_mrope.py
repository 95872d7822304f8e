"""M-RoPE's positions equal transformers' `get_rope_index`, in the prompt and for the tokens after it."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch
from transformers import Qwen2_5_VLConfig, Qwen2VLConfig
from transformers.models.qwen2_5_vl.modeling_qwen2_5_vl import Qwen2_5_VLModel
from transformers.models.qwen2_vl.modeling_qwen2_vl import Qwen2VLModel

from bridgeport.errors import EngineError
from bridgeport.runtime.mrope import ImageSpan, MRopePositions, positions_of, rope_index
from bridgeport.runtime.processor.picture import PictureTensors

MERGE = 2
# A row: texts as numbers of tokens, pictures as grids of patches. Odd and thin grids, pictures first and last.
Row = tuple[int | tuple[int, int, int], ...]
ROWS: dict[str, Row] = {
    "text": (7,),
    "one-token": (1,),
    "picture": ((1, 4, 6),),
    "text-picture-text": (3, (1, 6, 10), 5),
    "picture-last": (4, (1, 2, 14)),
    "thin": (1, (1, 26, 2), 1),
    "three-pictures": (2, (1, 4, 4), 1, (1, 2, 8), 3, (1, 10, 6), 4),
    "frames": (2, (3, 4, 6), 5),
}
BATCHES = (["text"], ["three-pictures", "text", "thin"], list(ROWS))


def tokens(grid: tuple[int, int, int]) -> int:
    return grid[0] * (grid[1] // MERGE) * (grid[2] // MERGE)


def length_of(row: Row) -> int:
    return sum(part if isinstance(part, int) else tokens(part) for part in row)


def spans(row: Row) -> list[ImageSpan]:
    found, at = [], 0
    for part in row:
        if isinstance(part, int):
            at += part
        else:
            found.append(ImageSpan(at, (part[0], part[1] // MERGE, part[2] // MERGE)))
            at += tokens(part)
    return found


def theirs(names: list[str], kind: Any) -> tuple[Any, Any]:
    """transformers' positions `[3, B, S]` and deltas `[B]` of right-padded rows."""
    rows = [ROWS[name] for name in names]
    width = max(length_of(row) for row in rows)
    kinds, mask = torch.zeros(len(rows), width, dtype=torch.int), torch.zeros(len(rows), width, dtype=torch.long)
    grids = [part for row in rows for part in row if not isinstance(part, int)]
    for i, row in enumerate(rows):
        mask[i, : length_of(row)] = 1
        for span in spans(row):
            kinds[i, span.start : span.start + int(np.prod(span.grid))] = 1
    config_class: Any = Qwen2VLConfig if kind is Qwen2VLModel else Qwen2_5_VLConfig
    # The method reads nothing of the model but its config, so no model is made.
    model = kind.__new__(kind)
    torch.nn.Module.__init__(model)
    model.config = config_class(vision_config={"spatial_merge_size": MERGE})
    positions, deltas = model.get_rope_index(
        torch.zeros_like(mask), kinds, image_grid_thw=torch.tensor(grids) if grids else None, attention_mask=mask
    )
    return positions.numpy(), deltas[:, 0].numpy()


def ours(names: list[str]) -> MRopePositions:
    rows = [ROWS[name] for name in names]
    return MRopePositions(np.array([length_of(row) for row in rows]), [spans(row) for row in rows])


@pytest.mark.parametrize("kind", [Qwen2VLModel, Qwen2_5_VLModel])
@pytest.mark.parametrize("names", BATCHES, ids=len)
def test_prompts_equal_transformers(names: list[str], kind: Any) -> None:
    positions, _ = theirs(names, kind)
    assert np.array_equal(ours(names).prefill()["position_ids"], positions)


@pytest.mark.parametrize("names", BATCHES, ids=len)
def test_steps_equal_transformers(names: list[str]) -> None:
    """transformers counts a row's tokens and adds its delta."""
    _, deltas = theirs(names, Qwen2VLModel)
    positions = ours(names)
    lengths = np.array([length_of(ROWS[name]) for name in names])
    array = positions.step()["position_ids"]
    for _ in range(3):
        lengths += 1
        positions.advance(lengths)
        assert array.shape == (3, len(names), 1)
        assert np.array_equal(array, np.broadcast_to((lengths - 1 + deltas)[:, None], array.shape))


def test_golden_positions_of_a_picture_between_texts() -> None:
    """By hand after figure 3 of the paper: two words, 2 x 3 tokens, two words."""
    assert rope_index(10, [ImageSpan(2, (1, 2, 3))]).tolist() == [
        [0, 1, 2, 2, 2, 2, 2, 2, 5, 6],
        [0, 1, 2, 2, 2, 3, 3, 3, 5, 6],
        [0, 1, 2, 3, 4, 2, 3, 4, 5, 6],
    ]


def test_pictures_of_prepared_prompts_are_found() -> None:
    names = ["three-pictures", "text", "picture-last"]
    pictures, at = [], []
    for name in names:
        row = [part for part in ROWS[name] if not isinstance(part, int)]
        pictures.append([picture(grid) for grid in row])
        starts = [np.arange(span.start, span.start + int(np.prod(span.grid))) for span in spans(ROWS[name])]
        at.append(np.concatenate([np.zeros(0, np.int64), *starts]))
    lengths = np.array([length_of(ROWS[name]) for name in names])
    found = positions_of(lengths, at, pictures, MERGE).prefill()["position_ids"]
    assert np.array_equal(found, theirs(names, Qwen2VLModel)[0])
    turned = [[picture((t, w, h)) for t, h, w in (p.tensors["image_grid_thw"][0] for p in row)] for row in pictures]
    assert not np.array_equal(positions_of(lengths, at, turned, MERGE).prefill()["position_ids"], found)


@pytest.mark.parametrize("kind", [Qwen2VLModel, Qwen2_5_VLModel])
def test_pooled_pictures_have_the_places_of_the_smaller_grid(kind: Any) -> None:
    """Of `2h - 1` x `2w` features, windows of 2 x 2 leave `h` x `w`; the last row of windows is cut off."""
    names = ["three-pictures", "text", "thin"]
    rows = [[part for part in ROWS[name] if not isinstance(part, int)] for name in names]
    pictures = [[pooled_to(grid) for grid in row] for row in rows]
    places = [[np.arange(s.start, s.start + int(np.prod(s.grid))) for s in spans(ROWS[name])] for name in names]
    at = [np.concatenate([np.zeros(0, np.int64), *row]) for row in places]
    lengths = np.array([length_of(ROWS[name]) for name in names])
    positions, deltas = theirs(names, kind)
    found = positions_of(lengths, at, pictures, MERGE, 2)
    assert np.array_equal(found.prefill()["position_ids"], positions)
    found.advance(lengths + 1)
    assert np.array_equal(found.step()["position_ids"][0, :, 0], lengths + deltas)
    with pytest.raises(EngineError, match="stands at"):
        positions_of(lengths, at, pictures, MERGE, 1)


def pooled_to(grid: tuple[int, int, int]) -> PictureTensors:
    time, height, width = grid
    count = tokens(grid)
    whole = np.array([(time, 2 * height - MERGE, 2 * width)])
    return PictureTensors({"image_grid_thw": whole}, (count,), np.zeros((count, 4), np.int64))


def picture(grid: tuple[int, int, int]) -> PictureTensors:
    count = tokens(grid)
    return PictureTensors({"image_grid_thw": np.array([grid])}, (count,), np.arange(count))


@pytest.mark.parametrize("images", [[ImageSpan(5, (1, 2, 3))], [ImageSpan(0, (1, 2, 2)), ImageSpan(3, (1, 1, 1))]])
def test_pictures_that_do_not_fit_are_refused(images: list[ImageSpan]) -> None:
    with pytest.raises(EngineError, match=r"stands at . of 10"):
        rope_index(10, images)
