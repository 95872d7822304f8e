"""Inputs of every stage for calibration: those that the chain itself computes for the same picture and prompt."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from numpy.typing import NDArray
from PIL import Image

import bridgeport.calibration.feed as feed
from bridgeport.bundle import Bundle
from bridgeport.calibration.data import CalibrationData, open_calibration
from bridgeport.calibration.feed import feed_stages, stage_inputs, with_empty_cache
from bridgeport.calibration.task import write_small_data
from bridgeport.errors import InputError
from bridgeport.runtime import Pipeline
from bridgeport.runtime.onnxruntime import load_engine
from bridgeport.runtime.score import Scorer
from bridgeport.runtime.sources import Video

Inputs = Mapping[str, NDArray[Any]]


def noise(seed: int, width: int = 40, height: int = 30) -> Image.Image:
    return Image.fromarray(np.random.default_rng(seed).integers(0, 256, (height, width, 3), dtype=np.uint8))


def write_data(root: Path, lines: str, *, films: int = 0) -> CalibrationData:
    """Three pictures of different shapes and `lines` of prompts about them; `films` of three frames each."""
    root.mkdir()
    for number, size in enumerate(((40, 30), (28, 28), (33, 80))):
        noise(number, *size).save(root / f"{number}.png")
    for number in range(films):
        frames = [noise(10 * number + frame, 40, 31) for frame in range(4)]
        frames[0].save(root / f"film-{number}.gif", save_all=True, append_images=frames[1:])
    (root / "prompts.jsonl").write_text(lines)
    return open_calibration(root, minimum=3)


ASKED = '{"image": "0.png", "prompt": "what is this?"}\n{"image": "0.png", "prompt": "hi"}\n'


def same(one: Inputs, other: Inputs) -> bool:
    """Bit for bit: the same engines computed both."""
    return one.keys() == other.keys() and all(np.array_equal(one[name], other[name]) for name in one)


def by_hand(pipeline: Pipeline, source: Any, prompt: str) -> dict[str, Inputs]:
    """What each stage takes, from the pipeline's own steps one by one."""
    prepared = pipeline.prepare([[source]], prompt)
    (picture,) = prepared.pictures[0]
    (image_embeds,) = pipeline.vision.encode([picture])
    (connected,) = pipeline.vision.connect([picture], [image_embeds])
    features = [pipeline.vision.arrange(picture, connected)]
    inputs_embeds, lengths = pipeline.merge(prepared, features)
    more = pipeline.step_inputs(prepared, lengths, features)
    mask, last = np.ones((1, int(lengths[0])), np.int64), lengths - 1
    tensors = {**picture.tensors, "image_embeds": image_embeds}
    names = {name: [spec.name for spec in engine.contract.inputs] for name, engine in pipeline.engines.items()}
    connector = "video_connector" if picture.video and "video_connector" in names else "connector"
    found: dict[str, Inputs] = {
        stage: {name: tensors[name] for name in names[stage]} for stage in ("encoder", connector)
    }
    if "llm_encoder" not in names:
        extra = {} if more is None else dict(more.prefill())
        found["llm"] = {"inputs_embeds": inputs_embeds, "attention_mask": mask, "logits_position": last, **extra}
    else:
        decoder: Any = pipeline.decoder
        found["llm_encoder"] = {"inputs_embeds": inputs_embeds, "attention_mask": mask}
        start, one = decoder.embed([np.array([decoder.contract.decoder_start_token_id])])
        first = {"inputs_embeds": start, "attention_mask": np.ones((1, 1), np.int64), "logits_position": one - 1}
        found["llm"] = {**first, **decoder.encode_prompt(inputs_embeds, lengths).inputs}
    if "cross_kv" in names:
        found["cross_kv"] = {"image_features": features[0][None]}
    return found


def check_against_pipeline(bundle: Bundle, data: CalibrationData) -> None:
    """Every stage of every sample; one sample's inputs are not another's."""
    stages = [stage.contract.name for stage in bundle.manifest.stages if stage.contract.name != "embed_tokens"]
    fed = list(feed_stages(bundle, data, stages, threads=1))
    samples = list(data.samples())
    seen: set[str] = set()
    with Pipeline.load(bundle, threads=1) as pipeline:
        expected = [by_hand(pipeline, feed.source_of(sample), sample.prompt) for sample in samples]
    for number, (sample, found) in enumerate(zip(samples, fed, strict=True)):
        new = number == 0 or samples[number - 1].picture != sample.picture
        for stage in stages:
            calls = found[stage]
            vision = stage in ("encoder", "connector", "video_connector", "cross_kv")
            instructed = bundle.manifest.prompt is not None and bundle.manifest.prompt.instruction is not None
            if stage not in expected[number] or (vision and not new and not (instructed and stage == "connector")):
                assert calls == (), (stage, number)
                continue
            (inputs,) = calls
            assert same(inputs, expected[number][stage]), (stage, number)
            other = expected[(number + 1) % len(expected)].get(stage)
            if stage == "llm" and other is not None:  # a planted fault: the next sample's
                assert not same(inputs, other), number
            seen.add(stage)
    assert seen == set(stages)


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> CalibrationData:
    return open_calibration(write_small_data(tmp_path_factory.mktemp("data"), 3), minimum=3)


@pytest.fixture(scope="module")
def small(small_bundle: Path) -> Bundle:
    return Bundle.load(small_bundle)


def test_every_stage_gets_what_the_chain_computes(small: Bundle, data: CalibrationData) -> None:
    check_against_pipeline(small, data)


def test_the_inputs_of_a_stage_give_the_outputs_of_the_chain(small: Bundle, data: CalibrationData) -> None:
    with Pipeline.load(small, threads=1) as pipeline:
        first = next(data.samples())
        assert first.picture is not None
        (inputs, *_) = stage_inputs(small, data, "connector", threads=1)
        features = pipeline.engines["connector"].run(inputs)["image_features"]
        np.testing.assert_array_equal(features, pipeline.encode(first.picture))
        shifted = {"image_embeds": inputs["image_embeds"] * np.float32(1.001)}  # a planted fault
        assert not np.array_equal(pipeline.engines["connector"].run(shifted)["image_features"], features)
        prompts = [sample.prompt for sample in data.samples()]
        for prompt, prefill in zip(prompts[:2], stage_inputs(small, data, "llm", threads=1), strict=False):
            token = int(pipeline.engines["llm"].run(prefill)["logits"][0].argmax())
            assert token == pipeline.generate(first.picture, prompt, max_new_tokens=1).token_ids[0]


def test_progress_counts_samples_and_pictures_are_not_repeated(small: Bundle, data: CalibrationData) -> None:
    calls: list[tuple[int, int]] = []
    found = list(stage_inputs(small, data, "encoder", progress=lambda *call: calls.append(call), threads=1))
    assert len(data) == 15
    assert calls == [(number, 15) for number in range(1, 16)]
    assert len(found) == 3
    assert len(list(stage_inputs(small, data, "llm", threads=1))) == 15


@pytest.mark.parametrize(
    ("stages", "loaded"),
    [
        (["encoder"], []),
        (["connector"], ["encoder"]),
        (["embed_tokens"], []),
        (["llm"], ["connector", "embed_tokens", "encoder"]),
        (["llm", "encoder"], ["connector", "embed_tokens", "encoder"]),
    ],
)
def test_only_stages_that_are_read_are_loaded(
    small: Bundle, data: CalibrationData, monkeypatch: pytest.MonkeyPatch, stages: list[str], loaded: list[str]
) -> None:
    names: list[str] = []
    runs: list[str] = []

    def note(bundle: Bundle, stage: str, options: Any) -> Any:
        engine = load_engine(bundle, stage, options)
        run = engine.run

        def counted(inputs: Inputs) -> Inputs:
            runs.append(stage)
            return run(inputs)

        monkeypatch.setattr(engine, "run", counted)
        names.append(stage)
        return engine

    monkeypatch.setattr(feed, "load_engine", note)
    assert len(list(feed_stages(small, data, stages, threads=1))) == 15
    assert sorted(names) == loaded
    assert runs.count("encoder") == (3 if "encoder" in loaded else 0)  # once per picture, whatever is asked


def test_tensors_are_given_as_they_are_and_feed_the_connector(
    small: Bundle, data: CalibrationData, tmp_path: Path
) -> None:
    pixel_values = [inputs["pixel_values"] for inputs in stage_inputs(small, data, "encoder", threads=1)]
    np.savez(tmp_path / "a.npz", pixel_values=np.concatenate(pixel_values))
    tensors = open_calibration(tmp_path, bundle=small, minimum=3)
    given = sorted(one["pixel_values"].tobytes() for one in stage_inputs(small, tensors, "encoder"))
    assert given == sorted(one.tobytes() for one in pixel_values)
    computed = sorted(one["image_embeds"].tobytes() for one in stage_inputs(small, tensors, "connector", threads=1))
    expected = stage_inputs(small, data, "connector", threads=1)
    assert computed == sorted(one["image_embeds"].tobytes() for one in expected)
    with pytest.raises(InputError, match=r"sample 1: the tensors are inputs of encoder alone, and llm takes inputs_em"):
        next(stage_inputs(small, tensors, "llm"))


def test_what_cannot_be_fed(small: Bundle, tmp_path: Path) -> None:
    root = write_small_data(tmp_path / "data", 3)
    with pytest.raises(InputError, match=r"has no stage 'decoder'; it has encoder, connector, embed_tokens, llm"):
        next(stage_inputs(small, open_calibration(root, minimum=3), "decoder"))
    (root / "prompts.jsonl").write_text('{"image": "train-00001.png", "prompt": "%s"}' % ("word " * 900))
    with pytest.raises(InputError, match=r"data, sample \d: the prompt has \d+ tokens .* the context holds"):
        list(stage_inputs(small, open_calibration(root, minimum=3), "llm", threads=1))


def test_an_empty_cache_completes_the_graphs_inputs(small: Bundle, data: CalibrationData) -> None:
    import onnxruntime

    session = onnxruntime.InferenceSession(str(small.graph("llm")), providers=["CPUExecutionProvider"])
    inputs = next(stage_inputs(small, data, "llm", threads=1))
    (logits, *_) = session.run(["logits"], with_empty_cache(small.manifest.kv_cache, inputs))
    with Pipeline.load(small, threads=1) as pipeline:
        expected = pipeline.engines["llm"].run(inputs)["logits"]
    # Another session, with threads of its own: sums may run in another order. Without the cache it does not run.
    np.testing.assert_allclose(logits, expected, rtol=1e-4, atol=1e-4)
    assert with_empty_cache(None, inputs) == inputs


@pytest.mark.slow
def test_scoring_stages(score_bundle: Callable[[str], Path], tmp_path: Path) -> None:
    bundle = Bundle.load(score_bundle("retrieval"))
    lines = "".join(f'{{"image": "{number}.png", "texts": ["a red circle", "two"]}}\n' for number in range(3))
    data = write_data(tmp_path / "data", lines)
    fed = list(feed_stages(bundle, data, ["encoder", "connector", "text_encoder", "matcher"], threads=1))
    with Scorer.load(bundle, threads=1) as scorer:
        for sample, found in zip(data.samples(), fed, strict=True):
            scores = scorer.score(str(sample.picture), list(sample.texts))
            (pixels,), (embeds,), (text,), (pairs,) = (found[stage] for stage in found)
            np.testing.assert_array_equal(embeds["image_embeds"], scorer.encode_pixels(pixels["pixel_values"]))
            features = scorer.connect(embeds["image_embeds"]), scorer.engines["text_encoder"].run(text)["text_features"]
            assert same(text, {name: pairs[name] for name in text})
            logits = scorer.engines["matcher"].run(pairs)["logits"]
            np.testing.assert_array_equal(logits, np.asarray(scores.match_logits)[0])
            cosine = (features[0] @ features[1].T).max(axis=1)
            np.testing.assert_allclose(cosine, scores.cosine, rtol=1e-6)
    assert len({found["encoder"][0]["pixel_values"].tobytes() for found in fed}) == 3
    silent = write_data(tmp_path / "silent", "")
    assert len(list(stage_inputs(bundle, silent, "connector", threads=1))) == 3
    with pytest.raises(InputError, match=r"has no text to compare it with; give it some in prompts.jsonl"):
        next(stage_inputs(bundle, silent, "matcher", threads=1))


def write_family(name: str, root: Path) -> Bundle:
    from tests.checkpoints_idefics import IDEFICS_CONFIGS, write_idefics_checkpoint
    from tests.checkpoints_instructblip import write_instructblip_checkpoint
    from tests.checkpoints_llava_video import write_llava_next_video_checkpoint
    from tests.checkpoints_qwen2_vl import write_qwen2_vl_checkpoint
    from tests.checkpoints_t5 import T5_CONFIGS, write_blip2_t5_checkpoint

    from bridgeport.export import checkpoint as export

    writers: dict[str, Callable[[Path], Path]] = {
        "t5": lambda path: write_blip2_t5_checkpoint(path, **T5_CONFIGS["odd"]),
        "instructblip": write_instructblip_checkpoint,
        "idefics": lambda path: write_idefics_checkpoint(path, **IDEFICS_CONFIGS["small"]),
        "qwen2-vl": write_qwen2_vl_checkpoint,
        "llava-next-video": write_llava_next_video_checkpoint,
    }
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(export, "lint_stages", lambda *_: None)  # takes half the time, and has tests of its own
        return export.export_checkpoint(writers[name](root / "checkpoint"), root / "bundle")


@pytest.mark.slow
@pytest.mark.parametrize("name", ["t5", "instructblip", "idefics", "qwen2-vl", "llava-next-video"])
def test_every_stage_of_every_family(name: str, tmp_path: Path) -> None:
    bundle = write_family(name, tmp_path)
    video = name == "llava-next-video"
    data = write_data(tmp_path / "data", ASKED + '{"video": "film-0.gif", "prompt": "hm"}\n' * video, films=int(video))
    assert any(isinstance(feed.source_of(sample), Video) for sample in data.samples()) == video
    check_against_pipeline(bundle, data)
