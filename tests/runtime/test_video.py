"""Videos through LLaVA-NeXT-Video and LLaVA-OneVision, from checkpoint to text, against transformers.

transformers' video processors need torchvision; the picture processor of the same settings makes the pixels here, and
the model, its prompt and its number of video tokens are transformers' own.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from numpy.typing import NDArray
from PIL import Image
from tests.checkpoints_llava_video import write_llava_next_video_checkpoint, write_llava_onevision_checkpoint
from transformers.models.clip.image_processing_pil_clip import CLIPImageProcessorPil

import bridgeport.export.checkpoint as export
from bridgeport.cli import main
from bridgeport.errors import InputError
from bridgeport.export import export_checkpoint
from bridgeport.export.checkpoint_processor import load_processor
from bridgeport.runtime import Pipeline, Video, check_parity
from bridgeport.runtime.parity.metrics import compare
from bridgeport.runtime.sources import order_group, prepare_source

NEW_TOKENS = 6
# Stage values against PyTorch's, by the RMS of PyTorch's value: FP32 rounding over a few layers. Frames in another
# order, or without their pooling, are off by more than CAUGHT.
LIMIT, CAUGHT = 5e-5, 1e-2

Write = Callable[..., Path]
Chain = tuple[Path, Pipeline]
WRITERS: dict[str, Write] = {
    "llava-next-video": write_llava_next_video_checkpoint,
    "llava-onevision": write_llava_onevision_checkpoint,
}


def picture(width: int = 40, height: int = 90, seed: int = 0) -> Image.Image:
    """Noise."""
    pixels = np.random.default_rng(seed).integers(0, 256, (height, width, 3), dtype=np.uint8)
    return Image.fromarray(pixels)


def film(count: int, width: int = 40, height: int = 31) -> list[Image.Image]:
    return [picture(width, height, 100 * count + frame) for frame in range(count)]


class FrameProcessor(dict[str, Any]):
    """The picture processor of the video processor's settings, in its place."""

    model_input_names = ("pixel_values_videos",)

    def __init__(self, checkpoint: Path) -> None:
        super().__init__()
        settings = json.loads((checkpoint / "processor_config.json").read_text())["video_processor"]
        make: Any = CLIPImageProcessorPil
        crop = {"do_center_crop": "crop_size" in settings, "crop_size": settings.get("crop_size")}
        self.pictures = make(size=settings["size"], **crop)

    def __call__(self, videos: Sequence[list[Image.Image]], **_: Any) -> dict[str, Any]:
        made = [self.pictures(frames, return_tensors="np")["pixel_values"] for frames in videos]
        return {"pixel_values_videos": torch.from_numpy(np.stack(made))}


class Transformers:
    """The checkpoint's own model, chat template and placeholders."""

    def __init__(self, checkpoint: Path) -> None:
        import transformers

        make: Any = transformers.AutoModelForImageTextToText
        self.model = make.from_pretrained(checkpoint, dtype=torch.float32).eval()
        self.processor = load_processor(checkpoint)
        self.processor.video_processor = FrameProcessor(checkpoint)

    def inputs(self, content: Sequence[Any], text: str) -> Any:
        """One user turn; a list in `content` is a video."""
        kinds = ["video" if isinstance(one, list) else "image" for one in content]
        pictures = [one for one in content if not isinstance(one, list)]
        videos = [one for one in content if isinstance(one, list)]
        turn = [{"role": "user", "content": [*({"type": kind} for kind in kinds), {"type": "text", "text": text}]}]
        rendered = self.processor.apply_chat_template(turn, tokenize=False, add_generation_prompt=True)
        options: dict[str, Any] = {"images": [pictures]} if pictures else {}
        options |= {"videos": videos} if videos else {}
        return self.processor(text=[rendered], return_tensors="pt", **options)

    def generate(self, content: Sequence[Any], text: str) -> list[int]:
        """New greedy tokens."""
        inputs = self.inputs(content, text)
        with torch.no_grad():
            ids = self.model.generate(**inputs, do_sample=False, max_new_tokens=NEW_TOKENS)[0]
        return [int(i) for i in ids[inputs["input_ids"].shape[1] :]]

    def stages(self, frames: list[Image.Image], text: str) -> dict[str, NDArray[Any]]:
        """What each stage gives for one video; LLaVA-NeXT-Video pools before it projects."""
        model, seen = self.model.model, {}
        pools = hasattr(model, "vision_resampler")

        def keep(name: str) -> Any:
            return lambda _module, args, kwargs: seen.update(
                {name: kwargs.get("inputs_embeds", next(iter(args), None))}
            )

        handles = [
            (model.vision_resampler if pools else model.multi_modal_projector).register_forward_pre_hook(
                keep("encoder"), with_kwargs=True
            ),
            model.multi_modal_projector.register_forward_hook(lambda _m, _a, out: seen.update(connector=out)),
            model.language_model.register_forward_pre_hook(keep("merged"), with_kwargs=True),
        ]
        inputs = self.inputs([frames], text)
        with torch.no_grad():
            logits = self.model(**inputs).logits[0, -1]
            features = model.get_video_features(inputs["pixel_values_videos"]).pooler_output
        for handle in handles:
            handle.remove()
        features = features[0] if isinstance(features, tuple | list) else features
        found = {**seen, "features": features.reshape(-1, features.shape[-1]), "logits": logits}
        made = {name: value.numpy() for name, value in found.items()}
        return {**made, "merged": made["merged"][0], "ids": inputs["input_ids"][0].numpy()}


def our_stages(pipeline: Pipeline, frames: list[Image.Image], text: str) -> dict[str, NDArray[Any]]:
    prepared = pipeline.prepare(Video(frames), text)
    videos = prepared.pictures[0]
    image_embeds = pipeline.vision.encode(videos)
    connected = pipeline.vision.connect(videos, image_embeds)
    features = [pipeline.vision.arrange(videos[0], connected[0])]
    merged, lengths = pipeline.merge(prepared, features)
    logits = pipeline.prefill_logits(merged, lengths)
    return {
        "encoder": image_embeds[0],
        "connector": connected[0],
        "features": features[0],
        "merged": merged[0],
        "logits": logits[0],
        "ids": prepared.input_ids[0],
    }


def check_stages(checkpoint: Path, pipeline: Pipeline, counts: Sequence[int]) -> None:
    reference = Transformers(checkpoint)
    for count in counts:
        theirs, ours = reference.stages(film(count), "what?"), our_stages(pipeline, film(count), "what?")
        assert ours.pop("ids").tolist() == theirs["ids"].tolist()
        for name, value in ours.items():
            assert value.shape == theirs[name].shape, name
            assert compare(theirs[name], value).max_rel <= LIMIT, (name, count)
        if count > 1:  # a planted fault: frames in another order
            turned = our_stages(pipeline, film(count)[::-1], "what?")
            assert compare(theirs["features"], turned["features"]).max_rel > CAUGHT


def build(root: Path, kind: str, **options: Any) -> Path:
    """Writes the checkpoint and the bundle; returns the checkpoint."""
    checkpoint = WRITERS[kind](root / "checkpoint", **options)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(export, "lint_stages", lambda *_: None)
        export_checkpoint(checkpoint, root / "bundle")
    return checkpoint


@pytest.fixture(scope="module", params=WRITERS)
def chain(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Chain]:
    """Checkpoint and loaded bundle."""
    root = tmp_path_factory.mktemp(request.param)
    checkpoint = build(root, request.param, vision={"num_hidden_layers": 2})
    with Pipeline.load(root / "bundle", threads=1) as pipeline:
        yield checkpoint, pipeline


def tokens(pipeline: Pipeline, images: Any, text: Any, **options: Any) -> list[list[int]]:
    return [list(row.token_ids) for row in pipeline.generate(images, text, max_new_tokens=NEW_TOKENS, **options)]


def test_every_stage(chain: Chain) -> None:
    check_stages(*chain, counts=[1, 3])


def test_greedy_tokens_of_videos_of_different_lengths_in_one_batch(chain: Chain) -> None:
    checkpoint, pipeline = chain
    reference = Transformers(checkpoint)
    films, texts = [film(3), film(1), film(2)], ["what happens?", "a longer question about this", ""]
    expected = [reference.generate([one], text) for one, text in zip(films, texts, strict=True)]
    assert tokens(pipeline, [Video(one) for one in films], texts) == expected
    assert tokens(pipeline, [Video(films[0])], texts[0]) == expected[:1]
    single = pipeline.generate(Video(films[1]), texts[1], max_new_tokens=NEW_TOKENS)
    assert list(single.token_ids) == expected[1]
    assert len({tuple(row) for row in expected}) == 3, "rows that answer alike prove nothing: choose another seed"


def test_pictures_and_videos_together(chain: Chain) -> None:
    checkpoint, pipeline = chain
    reference = Transformers(checkpoint)
    photo, clip, second = picture(), film(2), [picture(40, 31, 900 + frame) for frame in range(2)]
    expected = [
        reference.generate([clip, photo], "which?"),
        reference.generate([clip, second], "which?"),
        reference.generate([photo], "which?"),
    ]
    rows: list[list[Any]] = [[Video(clip), photo], [Video(clip), Video(second)], [photo]]
    assert tokens(pipeline, rows, "which?") == expected
    # The chat template has pictures first, whatever their order.
    assert tokens(pipeline, [[photo, Video(clip)]], "which?") == expected[:1]
    assert expected[0] == reference.generate([photo, clip], "which?")
    assert tokens(pipeline, [[Video(second), Video(clip)]], "which?") != expected[1:2]
    prepared = pipeline.prepare([rows[0]], "which?")
    ids = reference.inputs([clip, photo], "which?")["input_ids"][0].tolist()
    assert prepared.input_ids[0].tolist() == ids
    places = [place for place, token in enumerate(ids) if token in (pipeline.prompt.image_token_id, video_token(chain))]
    assert prepared.image_positions[0].tolist() == places


def test_marks_say_where_pictures_and_videos_stand(chain: Chain) -> None:
    checkpoint, pipeline = chain
    reference = Transformers(checkpoint)
    text = "first <video>\n then <image>\n?"
    wanted = reference.processor(
        text=[f"USER: {text} ASSISTANT:"], images=[[picture()]], videos=[film(2)], return_tensors="pt"
    )["input_ids"][0]
    prompt = "first {image} then {image}?"
    group: list[Any] = [Video(film(2)), picture()]
    made = pipeline.prepare([group], prompt, interleave=True)
    assert made.input_ids[0].tolist() == wanted.tolist()
    assert [one.video for one in made.pictures[0]] == [True, False]


def video_token(chain: Chain) -> int:
    video = chain[1].prompt.video
    assert video is not None
    return video.token_id


def test_typed_placeholder_text_is_no_video(chain: Chain) -> None:
    _, pipeline = chain
    prepared = pipeline.prepare(Video(film(2)), "what does <video> mean, and <image>?")
    count = np.count_nonzero(prepared.input_ids[0] == video_token(chain))
    assert count == len(prepared.pictures[0][0].rows) == len(prepared.image_positions[0]) > 0
    assert not np.any(prepared.input_ids[0] == pipeline.prompt.image_token_id)
    plain = pipeline.prepare(None, "<video>")
    assert video_token(chain) not in plain.input_ids[0]
    assert pipeline.prompt.video is not None
    with pytest.raises(InputError, match=rf"keeps for pictures \(token {video_token(chain)}\)"):
        pipeline.prepare(None, f"a {pipeline.prompt.video.placeholder}")


def test_files_directories_and_lists_are_one_video(chain: Chain, tmp_path: Path) -> None:
    _, pipeline = chain
    frames = film(3)
    frames[0].save(tmp_path / "film.png", save_all=True, append_images=frames[1:])
    folder = tmp_path / "frames"
    folder.mkdir()
    (folder / ".hidden").write_text("no picture")
    for name, frame in zip(("c.png", "a.png", "b.png"), (frames[2], frames[0], frames[1]), strict=True):
        frame.save(folder / name)
    wanted = pipeline.prepare(Video(frames), "").pictures[0][0].tensors["pixel_values"]
    with Image.open(tmp_path / "film.png") as opened:
        for source in (tmp_path / "film.png", str(folder), folder, sorted(folder.glob("*.png")), opened):
            made = pipeline.prepare(Video(source), "").pictures[0][0].tensors["pixel_values"]
            assert np.array_equal(made, wanted), source
    assert not np.array_equal(wanted[::-1], wanted)


def test_what_is_no_video_is_named(chain: Chain, tmp_path: Path) -> None:
    _, pipeline = chain
    cases: list[tuple[Any, str]] = [
        ([], "a video has 0 frames; give at least one picture"),
        (tmp_path, "holds 0 frames of a video; put at least one picture there"),
        (tmp_path / "none.gif", r"none\.gif does not exist"),
        ([picture(), 3], "a frame is a int"),
        (3, "a video is a int; accepted is an animated picture, a directory of frames, or a list"),
    ]
    for source, message in cases:
        with pytest.raises(InputError, match=message) as caught:
            pipeline.generate(Video(source), "")
        assert "\n" not in str(caught.value)
    checkpoint, clip = chain[0], Video(film(1))
    with pytest.raises(InputError, match="a picture is a Video; accepted is a path or a Pillow picture"):
        check_parity(pipeline.bundle, checkpoint, images=[clip])  # type: ignore[list-item]


def test_bundles_that_take_no_videos_or_nothing_else(chain: Chain) -> None:
    _, pipeline = chain
    manifest = pipeline.manifest
    with pytest.raises(InputError, match=r"a video came, and this bundle \(llava-.*\) takes none; give pictures") as no:
        prepare_source(Video(film(2)), manifest.model_copy(update={"video": None}), 1)
    assert "\n" not in str(no.value)
    assert manifest.video is not None
    # As in InstructBLIP-Video's: its picture is a video, its image token the video's.
    videos_alone = manifest.model_copy(update={"image": manifest.video, "video": None})
    made, bare = (prepare_source(source, videos_alone, 1) for source in (Video(film(2)), film(2)))
    assert not made.video
    assert np.array_equal(made.tensors["pixel_values"], bare.tensors["pixel_values"])


def test_an_order_that_the_template_does_not_say_is_asked_for(chain: Chain) -> None:
    prompt = chain[1].prompt
    assert prompt.video is not None
    group = [Video(film(1)), picture()]
    for mixed, wanted in (("as_given", group), ("pictures_first", group[::-1])):
        video = prompt.video.model_copy(update={"mixed": mixed})
        assert order_group(group, prompt.model_copy(update={"video": video}), interleave=False) == wanted
    unknown = prompt.model_copy(update={"video": prompt.video.model_copy(update={"mixed": None})})
    assert order_group(group, unknown, interleave=True) == group
    assert order_group(group[:1] * 2, unknown, interleave=False) == group[:1] * 2
    with pytest.raises(InputError, match="pictures and videos came for one prompt, and this model's chat template"):
        order_group(group, unknown, interleave=False)


def test_a_video_goes_through_the_video_connector(chain: Chain) -> None:
    _, pipeline = chain
    (videos,) = pipeline.prepare(Video(film(2)), "").pictures
    as_picture = [replace(one, video=False) for one in videos]
    embeds = pipeline.vision.encode(videos)
    own = pipeline.vision.connect(videos, embeds)[0]
    other = pipeline.vision.connect(as_picture, embeds)[0]
    assert ("video_connector" in pipeline.engines) == (own.shape != other.shape)
    both = pipeline.vision.connect([videos[0], as_picture[0], videos[0]], embeds * 3)
    for made, wanted in zip(both, (own, other, own), strict=True):
        assert compare(wanted, made).max_rel <= LIMIT


def test_the_command_line(chain: Chain, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    _, pipeline = chain
    frames = film(3)
    frames[0].save(tmp_path / "film.png", save_all=True, append_images=frames[1:])
    picture().save(tmp_path / "photo.png")
    folder = tmp_path / "folder"
    folder.mkdir()
    for number, frame in enumerate(film(2)):
        frame.save(folder / f"{number}.png")
    base = [
        "run",
        str(pipeline.bundle.path),
        "--prompt",
        "what?",
        "--threads",
        "1",
        "--max-new-tokens",
        str(NEW_TOKENS),
    ]
    words = ["--video", str(tmp_path / "film.png"), "--video", str(folder), "--image", str(tmp_path / "photo.png")]
    assert main([*base, *words, "--json"]) == 0
    results = json.loads(capsys.readouterr().out)["results"]
    wanted = tokens(pipeline, [picture(), Video(frames), Video(film(2))], "what?")
    assert [one["token_ids"] for one in results] == wanted
    assert [Path(one["image"]).name for one in results] == ["photo.png", "film.png", "folder"]
    assert main([*base, *words, "--together", "--json"]) == 0
    together = json.loads(capsys.readouterr().out)
    assert [together["token_ids"]] == tokens(pipeline, [[picture(), Video(frames), Video(film(2))]], "what?")
    assert main([*base, *words[:2]]) == 0
    assert (
        capsys.readouterr().out.strip()
        == pipeline.generate(Video(frames), "what?", max_new_tokens=NEW_TOKENS).text.strip()
    )
    for bad, message in (
        (["--video", str(tmp_path / "none.gif")], "does not exist"),
        ([*words[:2], "--attention-map", str(tmp_path / "map.png")], "--attention-map draws one picture"),
    ):
        assert main([*base, *bad]) == 2
        shown = capsys.readouterr().err
        assert message in shown
        assert shown.count("\n") == 1


# Name -> kind and shape. The number of patches along an edge is even for LLaVA-NeXT-Video, whose processor counts so.
SHAPES: dict[str, tuple[str, dict[str, Any]]] = {
    "max": ("llava-next-video", {"mode": "max", "vision": {"image_size": 42}, "layer": -1}),
    "convolution": ("llava-next-video", {"mode": "conv", "vision": {"hidden_size": 30, "num_attention_heads": 5}}),
    "two layers": ("llava-next-video", {"layer": [-2, 1]}),
    "odd edge": ("llava-onevision", {"vision": {"image_size": 35}, "tie": True}),
    "clip": ("llava-onevision", {"tower": "clip", "layer": -2, "vision": {"image_size": 33, "patch_size": 11}}),
}


@pytest.mark.slow
@pytest.mark.parametrize("name", SHAPES)
def test_other_shapes(name: str, tmp_path: Path) -> None:
    kind, options = SHAPES[name]
    checkpoint = build(tmp_path, kind, seed=len(name), **options)
    with Pipeline.load(tmp_path / "bundle", threads=1) as pipeline:
        check_stages(checkpoint, pipeline, counts=[1, 4])
        reference = Transformers(checkpoint)
        wanted = [reference.generate([film(4)], "what?"), reference.generate([film(2)], "why?")]
        assert tokens(pipeline, [Video(film(4)), Video(film(2))], ["what?", "why?"]) == wanted


@pytest.mark.slow
def test_more_frames_than_one_batch_of_the_encoder(tmp_path: Path) -> None:
    checkpoint = build(tmp_path, "llava-next-video")
    with Pipeline.load(tmp_path / "bundle", threads=1) as pipeline:
        count = pipeline.engines["encoder"].contract.axis("batch").max + 3
        check_stages(checkpoint, pipeline, counts=[count])
