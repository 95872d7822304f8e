"""InstructBLIP and InstructBLIP-Video from checkpoint to text, against transformers on the same weights."""

from __future__ import annotations

import json
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from tests.checkpoints import copy_of
from tests.checkpoints_instructblip import FRAMES, write_instructblip_checkpoint
from tests.runtime.parity_faults import bump, change_weight

import bridgeport.export.checkpoint as export
from bridgeport.bundle import Bundle, read_manifest, write_manifest
from bridgeport.cli import main
from bridgeport.errors import BundleIntegrityError, ExportError, InputError
from bridgeport.export import export_checkpoint
from bridgeport.export.checkpoint_processor import load_processor
from bridgeport.export.instruction import freeze_instruction
from bridgeport.export.processor import freeze_image_processor, freeze_prompt, freeze_tokenizer
from bridgeport.export.processor_check import check_frozen_processor
from bridgeport.export.stages import ExportedStage
from bridgeport.image_contract import Frames
from bridgeport.manifest import InstructionContract
from bridgeport.models import load_checkpoint
from bridgeport.runtime import Pipeline, check_parity
from bridgeport.runtime.parity.cases import make_cases
from bridgeport.runtime.processor.instruction import InstructionTokenizer
from bridgeport.runtime.sources import Video

NEW_TOKENS = 6
# Stage values against PyTorch's, by the RMS of PyTorch's value.
LIMIT = 5e-5
PROMPTS = ["", "what is this?", "how many shapes are there, and is the yellow star above the purple hexagon?"]


def noise(width: int, height: int, seed: int = 0) -> Image.Image:
    pixels = np.random.default_rng(seed).integers(0, 256, (height, width, 3), dtype=np.uint8)
    return Image.fromarray(pixels)


def sources(kind: str) -> list[Any]:
    """Three pictures, or three videos, of different shapes."""
    if kind == "picture":
        return [noise(40, 90), noise(28, 28, 1), noise(91, 13, 2)]
    return [[noise(40 + 9 * video, 30 + frame, frame + 7 * video) for frame in range(FRAMES)] for video in range(3)]


class Transformers:
    """The checkpoint's own model and processor."""

    def __init__(self, checkpoint: Path) -> None:
        import transformers

        name = load_checkpoint(checkpoint).architecture
        self.model: Any = getattr(transformers, name).from_pretrained(checkpoint, dtype=torch.float32).eval()
        self.processor = load_processor(checkpoint)

    def generate(self, images: Any, prompt: str) -> list[int]:
        """New greedy tokens."""
        inputs = self.processor(images=images, text=prompt, return_tensors="pt")
        with torch.no_grad():
            ids: list[int] = self.model.generate(**inputs, do_sample=False, max_new_tokens=NEW_TOKENS)[0].tolist()
        # Behind the prompt, or, where that has an encoder of its own, behind the token that starts the decoder.
        length = 1 if self.model.config.text_config.is_encoder_decoder else inputs["input_ids"].shape[1]
        return ids[length:]


def make_bundle(root: Path, **options: Any) -> tuple[Path, Path]:
    """Checkpoint and bundle."""
    checkpoint = write_instructblip_checkpoint(root / "checkpoint", **options)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(export, "lint_stages", lambda *_: None)  # takes half the time; a slow test does it
        export_checkpoint(checkpoint, root / "bundle")
    return checkpoint, root / "bundle"


@pytest.fixture(scope="module")
def picture_chain(tmp_path_factory: pytest.TempPathFactory) -> Iterator[tuple[Path, Pipeline]]:
    checkpoint, bundle = make_bundle(tmp_path_factory.mktemp("instructblip"), seed=1)
    with Pipeline.load(bundle, threads=1) as pipeline:
        yield checkpoint, pipeline


@pytest.fixture(scope="module")
def video_chain(
    picture_chain: tuple[Path, Pipeline], tmp_path_factory: pytest.TempPathFactory
) -> Iterator[tuple[Path, Pipeline]]:
    """The graphs are those of the pictures' bundle: of the same seed, both models have the same weights."""
    graphs = picture_chain[1].bundle
    root = tmp_path_factory.mktemp("instructblip-video")

    def reuse(model: Any, name: str, staging: Path, *_: Any, **__: Any) -> ExportedStage:
        record = graphs.manifest.stage(name)
        assert model.contracts[name] == record.contract
        folder = Path(record.file).parent
        shutil.copytree(graphs.path / folder, staging / folder, dirs_exist_ok=True)
        return ExportedStage(record, {})

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(export, "export_traced", reuse)
        patch.setattr(export, "export_decoder", lambda model, _, staging, *__: reuse(model, "llm", staging))
        checkpoint, bundle = make_bundle(root, video=True, seed=1)
    with Pipeline.load(bundle, threads=1) as pipeline:
        yield checkpoint, pipeline


def check_chain(kind: str, checkpoint: Path, pipeline: Pipeline) -> None:
    """Every stage, isolated and chained, and the greedy tokens, alone and in a batch."""
    images = sources(kind)
    report = check_parity(pipeline.bundle, checkpoint, images=images, prompts=PROMPTS, max_new_tokens=8, threads=1)
    assert report.passed, [(stage.name, stage.isolated.worst, stage.chained.worst) for stage in report.stages]
    for stage in report.stages:
        assert stage.isolated.worst.max_rel <= LIMIT, stage.name
        assert stage.chained.worst.max_rel <= LIMIT, stage.name
    reference = Transformers(checkpoint)
    expected = [reference.generate(one, prompt) for one, prompt in zip(images, PROMPTS, strict=True)]
    rows = pipeline.generate(images, PROMPTS, max_new_tokens=NEW_TOKENS)
    assert [list(row.token_ids) for row in rows] == expected
    for one, prompt, want in zip(images, PROMPTS, expected, strict=True):
        assert [list(row.token_ids) for row in pipeline.generate([one], prompt, max_new_tokens=NEW_TOKENS)] == [want]
    assert len({tuple(row) for row in expected}) == 3, "rows that answer alike prove nothing: choose another seed"


def test_pictures(picture_chain: tuple[Path, Pipeline]) -> None:
    check_chain("picture", *picture_chain)


def test_videos(video_chain: tuple[Path, Pipeline]) -> None:
    check_chain("video", *video_chain)


def test_one_picture_for_several_prompts(picture_chain: tuple[Path, Pipeline]) -> None:
    """The encoder runs once, the connector once for each prompt; padding of the shorter ones changes nothing."""
    _, pipeline = picture_chain
    one = noise(50, 31, 5)
    alone = [pipeline.generate(one, prompt, max_new_tokens=NEW_TOKENS).token_ids for prompt in PROMPTS]
    assert [row.token_ids for row in pipeline.generate(one, PROMPTS, max_new_tokens=NEW_TOKENS)] == alone
    prepared = pipeline.prepare(one, [*PROMPTS, PROMPTS[1]])
    pictures = [row[0] for row in prepared.pictures]
    assert len({id(picture.tensors["pixel_values"]) for picture in pictures}) == 1
    assert len({id(picture) for picture in pictures}) == 3
    assert pictures[1] is pictures[3]


def test_features_follow_the_instruction(picture_chain: tuple[Path, Pipeline]) -> None:
    checkpoint, pipeline = picture_chain
    one = noise(33, 44, 3)
    reference = Transformers(checkpoint)
    found = []
    for prompt in ("what is left?", "what is right?"):
        inputs = reference.processor(images=one, text=prompt, return_tensors="pt")
        names = ("pixel_values", "qformer_input_ids", "qformer_attention_mask")
        with torch.no_grad():
            theirs = reference.model.get_image_features(**{name: inputs[name] for name in names}).pooler_output.numpy()
        found.append(pipeline.encode(one, prompt))
        assert np.abs(found[-1] - theirs).max() <= LIMIT * np.abs(theirs).max()
    assert np.abs(found[0] - found[1]).max() > 0.01 * np.abs(found[0]).max()


def test_attention_follows_the_instruction(picture_chain: tuple[Path, Pipeline]) -> None:
    _, pipeline = picture_chain
    maps = [pipeline.cross_attention([noise(20, 20), noise(9, 30)], prompt) for prompt in ("left?", "a blue square")]
    assert maps[0].shape == (2, 2, 2, 5, 5)  # layers 0 and 2 read the picture; 2 heads, 5 queries, 4 patches and [CLS]
    assert np.allclose(maps[0].sum(-1), 1, atol=1e-5)
    # Layer 0 too: its self-attention over queries and words comes before it reads the picture.
    assert np.abs(maps[0] - maps[1]).max() > 1e-3


def test_prompts_that_the_qformer_cannot_read(picture_chain: tuple[Path, Pipeline]) -> None:
    checkpoint, pipeline = picture_chain
    long = "a " * 219
    with pytest.raises(InputError, match="the prompt takes 221 tokens of the Q-Former, which reads 1 to 220; shorten"):
        pipeline.generate(noise(8, 8), long)
    with pytest.raises(InputError, match="the prompt takes 221 tokens of the Q-Former"):
        check_parity(pipeline.bundle, checkpoint, images=[noise(8, 8)], prompts=[long], threads=1)
    with pytest.raises(InputError, match="remove lone surrogates"):
        pipeline.generate(noise(8, 8), "\ud800")


def test_a_token_without_an_embedding(picture_chain: tuple[Path, Pipeline]) -> None:
    _, pipeline = picture_chain
    assert pipeline.prompt.instruction is not None
    file = pipeline.bundle.file(pipeline.prompt.instruction.tokenizer)
    contract = InstructionContract(tokenizer="x", max_length=9, vocab_size=3)
    with pytest.raises(InputError, match=r"holds '\[SEP\]', token 3, but the Q-Former has embeddings for 3 tokens"):
        InstructionTokenizer(file, contract).tensors("", 1)


def test_typed_image_token_is_text(picture_chain: tuple[Path, Pipeline]) -> None:
    _, pipeline = picture_chain
    prepared = pipeline.prepare(noise(30, 30), "what does <image> mean?")
    assert np.count_nonzero(prepared.input_ids[0] == pipeline.prompt.image_token_id) == 5
    assert list(prepared.image_positions[0]) == [0, 1, 2, 3, 4]


def test_a_bundle_lists_its_second_tokenizer(
    picture_chain: tuple[Path, Pipeline], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    _, pipeline = picture_chain
    assert main(["inspect", str(pipeline.bundle.path)]) == 0
    shown = " ".join(capsys.readouterr().out.split())
    assert "reads the prompt too, through tokenizer/qformer_tokenizer.json, at most 220 tokens" in shown
    bundle = copy_of(pipeline.bundle.path, tmp_path / "bundle")
    file = bundle / "tokenizer" / "qformer_tokenizer.json"
    file.write_text(file.read_text().replace("[CLS]", "[XLS]"))
    with pytest.raises(BundleIntegrityError, match=r"qformer_tokenizer\.json has SHA-256"):
        Bundle.load(bundle)


@pytest.mark.parametrize(
    ("video", "message"),
    [
        ([], "a video has 0 frames; give at least one picture"),
        ([noise(9, 9)] * 3, "a video has 3 frames where the model takes exactly 4"),
        ([[noise(9, 9)] * 4] * 2, "a frame is a list; accepted is a path or a Pillow picture"),
    ],
)
def test_videos_that_are_none(video_chain: tuple[Path, Pipeline], video: Any, message: str) -> None:
    _, pipeline = video_chain
    with pytest.raises(InputError, match=message):
        pipeline.generate([video], "what?")


def test_a_film_is_its_frames(
    video_chain: tuple[Path, Pipeline], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """Through the command, from a file; the frames as files of their own answer alike."""
    _, pipeline = video_chain
    frames = [noise(40, 30, seed).quantize(64).convert("RGB") for seed in range(FRAMES)]
    film = tmp_path / "film.png"
    frames[0].save(film, save_all=True, append_images=frames[1:])
    files = [tmp_path / f"{index}.png" for index in range(FRAMES)]
    for frame, file in zip(frames, files, strict=True):
        frame.save(file)
    (want,) = pipeline.generate([frames], "what?", max_new_tokens=NEW_TOKENS)
    shared = ["run", str(pipeline.bundle.path), "--prompt", "what?", "--max-new-tokens", str(NEW_TOKENS), "--json"]
    for arguments in (["--image", str(film)], [*(f"--image={file}" for file in files), "--together"]):
        assert main([*shared, *arguments]) == 0
        assert json.loads(capsys.readouterr().out)["token_ids"] == list(want.token_ids)


def test_videos_by_their_own_name(
    video_chain: tuple[Path, Pipeline], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """`Video` and `--video` say what is meant; a model of videos alone takes them as it takes bare frames."""
    _, pipeline = video_chain
    videos = [[noise(40, 30, 10 * video + frame) for frame in range(FRAMES)] for video in range(2)]
    want = [row.token_ids for row in pipeline.generate(videos, "what?", max_new_tokens=NEW_TOKENS)]
    rows = pipeline.generate([[Video(frames)] for frames in videos], "what?", max_new_tokens=NEW_TOKENS)
    assert [row.token_ids for row in rows] == want
    with pipeline.stream(Video(videos[0]), "what?", max_new_tokens=NEW_TOKENS) as pieces:
        assert "".join(pieces) == rows[0].text
    with pytest.raises(InputError, match="2 pictures came for one prompt; this model takes at most 1"):
        pipeline.generate([[Video(frames) for frames in videos]], "what?")
    for number, frames in enumerate(videos):
        (tmp_path / str(number)).mkdir()
        for index, frame in enumerate(frames):
            frame.save(tmp_path / str(number) / f"{index}.png")
    folders = [f"--video={tmp_path / str(number)}" for number in range(2)]
    shared = ["run", str(pipeline.bundle.path), "--prompt", "what?", "--max-new-tokens", str(NEW_TOKENS)]
    assert main([*shared, *folders, "--json"]) == 0
    assert [tuple(row["token_ids"]) for row in json.loads(capsys.readouterr().out)["results"]] == want
    assert main([*shared, folders[0]]) == 0
    assert capsys.readouterr().out == rows[0].text + "\n"


def test_more_frames_than_one_call_takes(video_chain: tuple[Path, Pipeline]) -> None:
    """68 frames where encoder and connector take 64: the last video's are cut off from the others, and answer alike."""
    _, pipeline = video_chain
    videos = [[noise(30 + video, 20, 4 * video + frame) for frame in range(FRAMES)] for video in range(17)]
    prompts = [f"{video} shapes? " * (1 + video % 3) for video in range(17)]
    rows = pipeline.generate(videos, prompts, max_new_tokens=3)
    for index in (0, 15, 16):
        (alone,) = pipeline.generate([videos[index]], prompts[index], max_new_tokens=3)
        assert rows[index].token_ids == alone.token_ids
    assert len({row.token_ids for row in rows}) > 3


def test_parity_takes_films_and_lists_of_frames(tmp_path: Path) -> None:
    frames = [noise(8, 6, seed).quantize(32).convert("RGB") for seed in range(FRAMES)]
    film = tmp_path / "film.png"
    frames[0].save(film, save_all=True, append_images=frames[1:])
    tiling = Frames(tokens=1, frames=FRAMES)
    cases = make_cases([film, [frame.convert("L") for frame in frames]], ["what?"], tiling)
    assert [case.picture for case in cases] == ["film.png, 4 frames", "video of 4 frames"]
    assert [frame.tobytes() for frame in cases[0].image] == [frame.tobytes() for frame in frames]
    assert [frame.mode for frame in cases[1].image] == ["L"] * FRAMES, "transformers is to convert them itself"
    assert [len(case.image) for case in make_cases(None, None, tiling)] == [FRAMES] * 2
    with pytest.raises(InputError, match="0 frames"):
        make_cases([[]], None, tiling)


@pytest.mark.parametrize("side", ["left", "right"])
def test_texts_are_cut_where_the_processor_cuts_them(tmp_path: Path, side: str) -> None:
    """The processor passes a longest length that its tokenizer was saved with on to both tokenizers."""
    checkpoint = write_instructblip_checkpoint(tmp_path / "checkpoint", max_length=40, instruction_side=side)
    model = load_checkpoint(checkpoint)
    image = freeze_image_processor(checkpoint, model.config)
    tokenizer = freeze_tokenizer(checkpoint, tmp_path / "tokenizer", model.config.image_token_index)
    instruction = freeze_instruction(checkpoint, model.config, tokenizer)
    prompt = freeze_prompt(model).model_copy(update={"instruction": instruction})
    check_frozen_processor(checkpoint, image, prompt, tokenizer)
    frozen = InstructionTokenizer(tokenizer.with_name("qformer_tokenizer.json"), instruction)
    words = frozen.encode("green " + "a " * 60 + "yellow")
    assert len(words) == 40
    kept = frozen.encode("yellow")[1:-1] if side == "left" else frozen.encode("green")[1:-1]
    assert set(kept) <= set(words)
    cut = json.loads(tokenizer.with_name("qformer_tokenizer.json").read_text())["truncation"]
    assert (cut["direction"].lower(), cut["max_length"]) == (side, 40)


def test_a_wrong_instruction_tokenizer_is_found_at_export(tmp_path: Path) -> None:
    checkpoint = write_instructblip_checkpoint(tmp_path / "checkpoint")
    model = load_checkpoint(checkpoint)
    tokenizer = freeze_tokenizer(checkpoint, tmp_path / "tokenizer", model.config.image_token_index)
    instruction = freeze_instruction(checkpoint, model.config, tokenizer)
    prompt = freeze_prompt(model).model_copy(update={"instruction": instruction})
    file = tokenizer.with_name("qformer_tokenizer.json")
    document = json.loads(file.read_text())
    document["normalizer"]["lowercase"] = False
    file.write_text(json.dumps(document))
    with pytest.raises(ExportError, match="tokenize: instruction 'Question: what is this"):
        check_frozen_processor(checkpoint, freeze_image_processor(checkpoint, model.config), prompt, tokenizer)


SHAPES: dict[str, tuple[str, dict[str, Any]]] = {
    "opt-odd": (
        "picture",
        {
            "seed": 11,
            "text": "opt",
            "num_query_tokens": 3,
            "vision": {"image_size": 35, "patch_size": 7, "num_hidden_layers": 3},
            "qformer": {"hidden_size": 30, "num_attention_heads": 3, "num_hidden_layers": 4},
        },
    ),
    "gqa-one-query": (
        "picture",
        {
            "seed": 12,
            "num_query_tokens": 1,
            "qformer": {"num_hidden_layers": 1},
            "text_config": {"num_key_value_heads": 2, "head_dim": 16, "num_hidden_layers": 3},
        },
    ),
    "tied-every-layer": (
        "picture",
        {
            "seed": 13,
            "num_query_tokens": 9,
            "qformer": {"cross_attention_frequency": 1, "num_hidden_layers": 2},
            "text_config": {"tie_word_embeddings": True, "num_hidden_layers": 1},
        },
    ),
    "t5": ("picture", {"seed": 15, "text": "t5"}),
    "t5-odd": (
        "picture",
        {"seed": 16, "text": "t5", "text_config": {"d_model": 40, "d_kv": 12, "num_heads": 3, "num_decoder_layers": 1}},
    ),
    "video-odd": ("video", {"seed": 14, "video": True, "num_query_tokens": 7, "vision": {"image_size": 42}}),
}


@pytest.mark.slow
@pytest.mark.parametrize("name", SHAPES)
def test_shapes(name: str, tmp_path: Path) -> None:
    kind, options = SHAPES[name]
    checkpoint, bundle = make_bundle(tmp_path, **options)
    with Pipeline.load(bundle, threads=1) as pipeline:
        check_chain(kind, checkpoint, pipeline)


@pytest.mark.slow
def test_the_drill_finds_a_fault_in_the_connector(tmp_path: Path) -> None:
    """A weight of the text's branch is changed in the graph: the drill names the module that reads it."""
    checkpoint, bundle = make_bundle(tmp_path, seed=1)
    name = "qformer.layers.1.text_feed_forward.up.weight.transposed"
    change_weight("connector", name, bump(1, 7, by=0.5))(bundle)
    write_manifest(bundle, read_manifest(bundle))
    report = check_parity(bundle, checkpoint, prompts=PROMPTS, max_new_tokens=4, threads=1, drill=True)
    assert not report.passed
    assert report.drill is not None
    assert report.drill.stage == "connector"
    assert report.drill.departure is not None
    assert report.drill.departure.module == "qformer.encoder.layer.1.intermediate.dense"


@pytest.mark.slow
def test_lint(tmp_path: Path) -> None:
    checkpoint = write_instructblip_checkpoint(tmp_path / "checkpoint")
    bundle = export_checkpoint(checkpoint, tmp_path / "bundle")
    assert bundle.manifest.checks["export"]["stages"]["connector"]["polygraphy_lint"]
