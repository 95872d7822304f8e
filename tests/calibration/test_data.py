"""Calibration data: what is read, in which order, and what is refused with one line."""

from __future__ import annotations

import json
import zipfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from numpy.typing import NDArray
from PIL import Image
from polygraphy.json import save_json  # type: ignore[import-untyped]

from bridgeport.bundle import Bundle
from bridgeport.calibration.data import CalibrationData, open_calibration
from bridgeport.calibration.data_tensors import read_tensors
from bridgeport.errors import InputError
from bridgeport.manifest import Manifest, StageRecord
from bridgeport.models.contract import Axis, StageContract, TensorSpec

NAN = np.float32(np.nan)


def noise(seed: int, width: int = 24, height: int = 18) -> Image.Image:
    return Image.fromarray(np.random.default_rng(seed).integers(0, 256, (height, width, 3), dtype=np.uint8))


def write_pictures(root: Path, count: int = 10) -> Path:
    root.mkdir(parents=True, exist_ok=True)
    for number in range(count):
        noise(number).save(root / f"{number:02}.png")
    return root


def write_prompts(root: Path, *lines: Any) -> Path:
    text = "\n".join(line if isinstance(line, str) else json.dumps(line) for line in lines)
    (root / "prompts.jsonl").write_text(text + "\n")
    return root


def names(data: CalibrationData) -> list[str]:
    return [sample.picture.name for sample in data.samples() if sample.picture is not None]


def refusal(path: Path, **options: Any) -> str:
    """The one line with which `path` is refused."""
    with pytest.raises(InputError) as caught:
        open_calibration(path, **options)
    assert "\n" not in str(caught.value)
    return str(caught.value)


@pytest.fixture(scope="module")
def pictures(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_pictures(tmp_path_factory.mktemp("data") / "pictures", 24)


def contract(stage: str, **inputs: tuple[int | str, ...]) -> StageContract:
    axes = {dim for shape in inputs.values() for dim in shape if isinstance(dim, str)}
    return StageContract(
        name=stage,
        inputs=tuple(TensorSpec(name=name, dtype="float32", shape=shape) for name, shape in inputs.items()),
        outputs=(),
        axes=tuple(Axis(name=name, min=1, opt=2, max=64) for name in sorted(axes)),
    )


def bundle_of(*contracts: StageContract) -> Bundle:
    """A bundle of which nothing but the stages' contracts is looked at."""
    stages = tuple(StageRecord.model_construct(contract=one) for one in contracts)
    return Bundle(Path("bundle"), Manifest.model_construct(stages=stages))


@pytest.fixture(scope="module")
def bundle() -> Bundle:
    return bundle_of(
        contract("encoder", pixel_values=("batch", 3, 28, 28)),
        contract("connector", image_embeds=("batch", 5, 6)),
        contract("llm", inputs_embeds=("batch", "sequence", 8), attention_mask=("batch", "sequence")),
    )


# Pictures


def test_the_order_follows_the_seed_alone(pictures: Path) -> None:
    data = open_calibration(pictures)
    assert len(data) == data.pictures == 24
    assert names(data) == names(data) == names(open_calibration(pictures))
    assert names(data)[:6] == [
        "19.png",
        "06.png",
        "02.png",
        "01.png",
        "11.png",
        "14.png",
    ]  # by `printf 0:19.png | sha256sum`
    other = open_calibration(pictures, seed=1)
    assert names(other) != names(data)
    assert sorted(names(other)) == sorted(names(data)) == sorted(path.name for path in pictures.iterdir())


def test_a_limit_takes_the_first_of_the_order(pictures: Path) -> None:
    assert names(open_calibration(pictures, limit=9)) == names(open_calibration(pictures))[:9]


def test_the_hash_is_of_content_order_and_seed(tmp_path: Path) -> None:
    root = write_pictures(tmp_path / "a")
    before = open_calibration(root).sha256
    assert open_calibration(write_pictures(tmp_path / "b")).sha256 == before
    assert open_calibration(root, seed=1).sha256 != before
    assert open_calibration(root, limit=9).sha256 != before
    write_prompts(root, {"image": "03.png", "prompt": "what?"})
    asked = open_calibration(root).sha256
    assert asked != before
    (root / "prompts.jsonl").unlink()
    noise(99).save(root / "03.png")
    assert open_calibration(root).sha256 not in (before, asked)


@pytest.mark.parametrize(("held_out", "expected"), [(5, 5), (0.25, 6), (0.001, 1)])
def test_a_split_never_divides_a_picture(pictures: Path, tmp_path: Path, held_out: float, expected: int) -> None:
    root = write_pictures(tmp_path / "pictures", 24)
    (root / "again.png").write_bytes((root / "07.png").read_bytes())
    lines = [{"image": f"{n:02}.png", "prompt": prompt} for n in range(24) for prompt in ("", "what?", "where?")]
    data = open_calibration(write_prompts(root, *lines, {"image": "again.png", "prompt": "why?"}))
    assert (data.pictures, len(data)) == (24, 73)  # equal files are one picture
    parts = data.split(held_out)
    assert parts[1].pictures == expected
    here, there = (
        {sample.picture.read_bytes() for sample in part.samples() if sample.picture is not None} for part in parts
    )
    assert len(here) == 24 - expected
    assert not here & there
    assert [list(part.samples()) for part in parts] == [list(part.samples()) for part in data.split(held_out)]
    assert len({data.sha256, *(part.sha256 for part in parts)}) == 3


@pytest.mark.parametrize("held_out", [0, 24, 25, -1, 1.0])
def test_a_split_leaves_something_on_both_sides(pictures: Path, held_out: float) -> None:
    with pytest.raises(InputError, match="of 24 pictures are to be held out; accepted are 1 to 23"):
        open_calibration(pictures).split(held_out)


def test_prompts_answers_and_texts_come_with_their_picture(tmp_path: Path) -> None:
    root = write_pictures(tmp_path / "pictures", 8)
    write_pictures(root / "class")
    write_prompts(
        root,
        {"image": "00.png"},
        "",
        {"image": "class/09.png", "prompt": "how many?", "answer": "two"},
        {"image": "class/09.png", "texts": ["a dog", "a cat"]},
    )
    data = open_calibration(root)
    asked = [sample for sample in data.samples() if sample.picture == root / "class/09.png"]
    assert [(one.prompt, one.answer, one.texts) for one in asked] == [
        ("how many?", "two", ()),
        ("", None, ("a dog", "a cat")),
    ]
    # Ten different pictures: the eight of the top lie in "class" once more. One of them has two lines.
    assert (data.pictures, len(data)) == (10, 11)


def test_hidden_and_other_files_are_no_pictures(tmp_path: Path) -> None:
    root = write_pictures(tmp_path / "pictures", 9)
    (root / "README.md").write_text("mine")
    (root / ".hidden.png").write_bytes(b"no picture")
    write_pictures(root / ".thumbnails")
    assert open_calibration(root).pictures == 9


def test_frames_of_a_video_are_no_pictures(tmp_path: Path) -> None:
    root = write_pictures(tmp_path / "pictures", 8)
    write_pictures(root / "film" / "part", 3)
    data = open_calibration(write_prompts(root, {"video": "film/part", "prompt": "what happens?"}))
    videos = [sample for sample in data.samples() if sample.video]
    assert [video.picture for video in videos] == [root / "film" / "part"]
    assert data.pictures == 9


def test_paths_that_are_no_calibration_data(tmp_path: Path) -> None:
    assert "does not exist; accepted are a directory of pictures" in refusal(tmp_path / "none")
    (tmp_path / "empty").mkdir()
    assert "is empty; accepted are" in refusal(tmp_path / "empty")
    (tmp_path / "notes.txt").write_text("hi")
    assert "is no calibration data" in refusal(tmp_path / "notes.txt")
    assert "holds neither pictures nor tensors" in refusal(tmp_path)
    noise(0).save(tmp_path / "one.png")
    assert "one.png is one picture; give a directory with at least 8" in refusal(tmp_path / "one.png")
    np.savez(tmp_path / "more.npz", x=np.zeros(1))
    assert "holds pictures (one.png) and tensors (more.npz)" in refusal(tmp_path)


def test_too_few_pictures(tmp_path: Path) -> None:
    root = write_pictures(tmp_path / "pictures", 3)
    (root / "copy.png").write_bytes((root / "00.png").read_bytes())
    assert refusal(root).endswith("has 3 different pictures, calibration needs at least 8; add more")
    assert "the limit is 4, but calibration needs at least 8" in refusal(root, limit=4)
    assert open_calibration(root, minimum=3).pictures == 3


def test_all_bad_pictures_are_listed(tmp_path: Path) -> None:
    root = write_pictures(tmp_path / "pictures", 30)
    for number in range(12):
        file = root / f"{number:02}.png"
        file.write_bytes(file.read_bytes()[:-400] if number else b"no picture")
    message = refusal(root)
    assert "12 of 30 pictures cannot be used: 00.png, 01.png, 02.png" in message
    assert "09.png and 2 more; replace or remove them (the first: " in message
    assert "00.png is not a picture that Pillow can read" in message
    (root / "00.png").unlink()
    assert "cannot be decoded" in refusal(root)


@pytest.mark.parametrize(
    ("line", "said"),
    [
        ("{", "line 2 is no JSON"),
        ("3", "line 2 is a int; write a JSON object with the keys image, video, prompt, answer, texts"),
        ({"image": "99.png"}, "line 2 names '99.png', which "),
        ({"image": "../00.png"}, "line 2 names '../00.png', which is not below"),
        ({"image": "00.png", "question": "?"}, "line 2 has the unknown key 'question'; accepted are image, video"),
        ({"prompt": "?"}, "line 2 must have either 'image' or 'video'"),
        ({"image": "00.png", "video": "00.png"}, "line 2 must have either 'image' or 'video'"),
        ({"image": "00.png", "prompt": 3}, "line 2: 'prompt' is 3; accepted is a string"),
        ({"image": "00.png", "texts": "a"}, "line 2: 'texts' is 'a'; accepted is a list of strings"),
        ('{"image": "\udcff"}'.encode("utf-8", "surrogateescape").decode("latin-1"), "line 2 names"),
    ],
)
def test_a_bad_line_of_prompts_is_named(tmp_path: Path, line: Any, said: str) -> None:
    root = write_prompts(write_pictures(tmp_path / "pictures"), {"image": "00.png"}, line)
    assert said in refusal(root)


def test_prompts_that_are_no_text(tmp_path: Path) -> None:
    root = write_pictures(tmp_path / "pictures")
    (root / "prompts.jsonl").write_bytes(b'{"image": "00.png"}\n\xff\xfe\n')
    assert "line 2 is no JSON" in refusal(root)


# Tensors


def pixels(count: int, size: int = 28) -> NDArray[np.float32]:
    return np.random.default_rng(0).standard_normal((count, 3, size, size), np.float32)


def tensors(data: CalibrationData) -> list[Any]:
    return [sample.tensors for sample in data.samples()]


@pytest.mark.parametrize("save", [np.savez, np.savez_compressed])
@pytest.mark.parametrize("name", ["pixel_values", "encoder/pixel_values"])
def test_rows_of_an_npz_are_samples(tmp_path: Path, bundle: Bundle, save: Any, name: str) -> None:
    values = pixels(12)
    save(tmp_path / "a.npz", **{name: values})
    data = open_calibration(tmp_path / "a.npz", bundle=bundle)
    rows = tensors(data)
    assert len(data) == len(rows) == 12
    for row, expected in zip(rows, values, strict=True):
        np.testing.assert_array_equal(row["encoder"]["pixel_values"], expected[None])
    here, there = (part.split(1)[0] if part.pictures > 6 else part for part in data.split(4))
    kept = [row["encoder"]["pixel_values"].tobytes() for part in (here, there) for row in tensors(part)]
    assert len(set(kept)) == len(kept) == 11
    limited = open_calibration(tmp_path, bundle=bundle, limit=8)
    assert len(tensors(limited)) == 8
    assert limited.sha256 != data.sha256


def test_stages_share_a_sample_by_row(tmp_path: Path, bundle: Bundle) -> None:
    embeds = np.arange(9 * 5 * 6, dtype=np.float32).reshape(9, 5, 6)
    arrays: dict[str, Any] = {"encoder/pixel_values": pixels(9), "connector/image_embeds": embeds}
    np.savez(tmp_path / "a.npz", **arrays)
    for row, sample in zip(tensors(open_calibration(tmp_path, bundle=bundle)), embeds, strict=True):
        np.testing.assert_array_equal(row["connector"]["image_embeds"][0], sample)
        assert row["encoder"]["pixel_values"].shape == (1, 3, 28, 28)


def test_a_file_without_a_batch_is_one_sample(tmp_path: Path) -> None:
    patches = bundle_of(contract("encoder", pixel_values=("patches", 4), positions=("patches", 2)))
    for count in range(1, 10):
        values, positions = np.full((count, 4), count, np.float32), np.zeros((count, 2), np.float32)
        np.savez(tmp_path / f"{count}.npz", pixel_values=values, positions=positions)
    found = tensors(open_calibration(tmp_path, bundle=patches))
    assert sorted(len(one["encoder"]["pixel_values"]) for one in found) == list(range(1, 10))


def test_an_npz_is_read_row_by_row(tmp_path: Path, bundle: Bundle) -> None:
    np.savez(tmp_path / "a.npz", pixel_values=pixels(10))
    with (tmp_path / "a.npz").open("r+b") as file:  # what lies behind the third row is never looked at
        file.seek(-3000, 2)
        file.write(b"\xff" * 40)
    contracts = {"encoder": bundle.manifest.stage("encoder").contract}
    rows = read_tensors(tmp_path / "a.npz", contracts)
    for expected in pixels(10)[:3]:
        np.testing.assert_array_equal(next(rows)["encoder"]["pixel_values"][0], expected)
    with pytest.raises(InputError, match=r"NaN or infinite|no whole \.npz archive"):
        list(rows)


def test_iterations_of_polygraphy_are_samples(tmp_path: Path, bundle: Bundle) -> None:
    values = pixels(9)
    save_json([{"pixel_values": row[None]} for row in values], str(tmp_path / "inputs.json"))
    rows = tensors(open_calibration(tmp_path / "inputs.json", bundle=bundle))
    for row, expected in zip(rows, values, strict=True):
        np.testing.assert_array_equal(row["encoder"]["pixel_values"][0], expected)
    for number, row in enumerate(values):  # one file per iteration, as an output name without an ending gives them
        save_json({"pixel_values": row[None]}, str(tmp_path / "parts" / f"{number:010}.json"))
    assert len(tensors(open_calibration(tmp_path / "parts", bundle=bundle))) == 9


def bad_archives() -> Iterator[tuple[str, dict[str, Any], str]]:
    """(name, arrays, what is said)."""
    good = pixels(9)
    yield "nan", {"pixel_values": np.where(np.arange(9)[:, None, None, None] == 4, NAN, good)}, "sample 4: encoder"
    yield (
        "inf",
        {"pixel_values": np.where(good > 2.5, -np.float32(np.inf), good)},
        "values of 2352 that are NaN or infinite",
    )
    yield "name", {"pixels": good}, "holds pixels; accepted are all inputs of a stage, as `stage/input` or `input`"
    yield "stage", {"vision/pixel_values": good}, "holds vision/pixel_values; accepted are"
    yield "part", {"llm/inputs_embeds": good}, "holds llm/inputs_embeds; accepted are"
    yield "mixed", {"pixel_values": good, "connector/image_embeds": good}, "accepted are all inputs"
    yield "shape", {"pixel_values": good[..., :20]}, "pixel_values is [1, 3, 28, 20], accepted is ['batch', 3, 28, 28]"
    yield "rank", {"pixel_values": good[0]}, "pixel_values is [1, 28, 28], accepted is"
    yield "type", {"pixel_values": good.astype(np.float64)}, "pixel_values is float64, accepted is float32; convert it"
    yield "swapped", {"pixel_values": good.astype(">f4")}, "pixel_values is >f4, accepted is float32"
    yield "pickle", {"pixel_values": np.array([{}, None], object)}, "holds pickled objects (object), which are never"
    yield "order", {"pixel_values": np.asfortranarray(good)}, "is in Fortran order"
    yield "none", {}, "holds no tensor; save the inputs of a stage"
    yield "few", {"pixel_values": good[:3]}, "has 3 different samples of tensors, calibration needs at least 8"


@pytest.mark.parametrize(("arrays", "said"), [pytest.param(*rest, id=name) for name, *rest in bad_archives()])
def test_bad_archives(tmp_path: Path, bundle: Bundle, arrays: dict[str, Any], said: str) -> None:
    np.savez(tmp_path / "a.npz", **arrays)
    assert said in refusal(tmp_path / "a.npz", bundle=bundle)


def test_names_that_two_stages_have_need_the_stage(tmp_path: Path) -> None:
    twice = bundle_of(*(contract(stage, image_embeds=("batch", 5, 6)) for stage in ("connector", "matcher")))
    np.savez(tmp_path / "a.npz", image_embeds=np.zeros((9, 5, 6), np.float32))
    said = refusal(tmp_path, bundle=twice)
    assert "image_embeds are inputs of connector and matcher; name the stage too (connector/image_embeds)" in said


def test_damaged_archives(tmp_path: Path, bundle: Bundle) -> None:
    file = tmp_path / "a.npz"
    np.savez_compressed(file, pixel_values=pixels(9))
    whole = file.read_bytes()
    for name, content in {"cut": whole[: len(whole) // 2], "empty": b"", "text": b"hello"}.items():
        file.write_bytes(content)
        assert "a.npz is no whole .npz archive" in refusal(file, bundle=bundle), name
    file.write_bytes(whole[:9000] + bytes(64) + whole[9064:])
    assert "a.npz" in refusal(file, bundle=bundle)
    with zipfile.ZipFile(file, "w") as archive:
        archive.writestr("pixel_values.npy", b"no array")
    assert "no whole .npz archive" in refusal(file, bundle=bundle)


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("{", "is no JSON of inputs"),
        ("5", "iteration 0 is no set of named arrays"),
        ('[{"pixel_values": 3}]', "iteration 0 is no set of named arrays"),
        ('[{"pixel_values": {"polygraphy_class": "ndarray"}}]', "is no JSON of inputs"),
        ('[{"pixel_values": {"polygraphy_class": "ndarray", "array": "gAR9lC4="}}]', "is no JSON of inputs"),
        ('[{"pixel_values": {"polygraphy_class": "Tensor", "tensor": "gAR9lC4="}}]', "holds a Tensor; accepted are"),
        ("[]", "has 0 different samples of tensors, calibration needs at least 8"),
    ],
)
def test_bad_json(tmp_path: Path, bundle: Bundle, text: str, said: str) -> None:
    (tmp_path / "a.json").write_text(text)
    assert said in refusal(tmp_path / "a.json", bundle=bundle)


def test_tensors_need_a_bundle(tmp_path: Path) -> None:
    np.savez(tmp_path / "a.npz", pixel_values=pixels(9))
    assert "checked against a bundle" in refusal(tmp_path)
