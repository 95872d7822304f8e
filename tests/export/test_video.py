"""What is frozen of a checkpoint's videos: where its chat template puts them, and that nothing departs unseen."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from tests.checkpoints import edit_config
from tests.checkpoints_llava import VICUNA_TEMPLATE
from tests.checkpoints_llava_video import (
    ORDERED_TEMPLATE,
    VIDEO_TEMPLATE,
    write_llava_next_video_checkpoint,
    write_llava_onevision_checkpoint,
)

from bridgeport.errors import CheckpointError, ExportError, UnsupportedError
from bridgeport.export.processor import freeze_processor
from bridgeport.export.prompts import freeze_chat_prompt
from bridgeport.export.video import check_frozen_video, freeze_placeholder
from bridgeport.image_contract import Frames
from bridgeport.models import load_checkpoint

# A number in front of each video is no fixed text.
COUNTED_TEMPLATE = VIDEO_TEMPLATE.replace("{{ '<video>", "{{ loop.index }}{{ '<video>")
# One after the other as they come, but a picture behind a video is set off.
MIXED_TEMPLATE = (
    "{% for message in messages %}{% for content in message['content'] %}"
    "{% if content['type'] == 'image' and not loop.first and loop.previtem['type'] == 'video' %}{{ ', ' }}{% endif %}"
    "{% if content['type'] == 'text' %}{{ content['text'] }}{% else %}{{ '<' + content['type'] + '>' }}{% endif %}"
    "{% endfor %}{% endfor %}"
)


def placeholder(path: Path, template: str) -> Any:
    (path / "chat_template.jinja").write_text(template)
    config = load_checkpoint(path).config
    return freeze_placeholder(path, config, freeze_chat_prompt(path, config))


@pytest.fixture(scope="module")
def onevision(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_llava_onevision_checkpoint(tmp_path_factory.mktemp("onevision"))


def test_where_templates_put_a_video(onevision: Path) -> None:
    found = placeholder(onevision, VIDEO_TEMPLATE)
    assert (found.text, found.mixed, found.token) == ("{video}\n", "pictures_first", "<video>")
    assert found.token_id == load_checkpoint(onevision).config.video_token_id
    assert found.placeholder.startswith("<|video placeholder ")
    found = placeholder(onevision, ORDERED_TEMPLATE)
    assert (found.text, found.mixed) == ("[{video}]", "as_given")
    found = placeholder(onevision, MIXED_TEMPLATE)
    assert (found.text, found.mixed) == ("{video}", None)


@pytest.mark.parametrize(
    ("template", "message"),
    [
        (VICUNA_TEMPLATE, r"for one video; accepted is one that takes \{.type.: .video.\} and puts <video> where"),
        (COUNTED_TEMPLATE, "the chat template puts more than a fixed text around a video"),
        (ORDERED_TEMPLATE.replace("{% else %}", "{% else %}{{ 1 / (content['type'] == 'image') }}"), "does not render"),
    ],
)
def test_templates_that_cannot_be_frozen_are_named(onevision: Path, template: str, message: str) -> None:
    with pytest.raises(UnsupportedError, match=message) as caught:
        placeholder(onevision, template)
    assert "\n" not in str(caught.value)


def test_a_checkpoint_whose_videos_cannot_be_frozen_still_takes_pictures(tmp_path: Path) -> None:
    """Its video processor writes a quarter of the placeholders that a stride of 4 needs; transformers stops there."""
    path = write_llava_next_video_checkpoint(tmp_path / "checkpoint", stride=4)
    frozen = freeze_processor(load_checkpoint(path), tmp_path / "tokenizer")
    assert frozen.video is None
    assert frozen.prompt.video is None
    assert "spatial_pool_stride 4" in frozen.checks["video"]["not_built"]


def test_another_video_token_is_refused(tmp_path: Path) -> None:
    path = write_llava_onevision_checkpoint(tmp_path)
    config = load_checkpoint(path).config
    edit_config(path, video_token_id=config.image_token_id)
    changed = load_checkpoint(path).config
    with pytest.raises(CheckpointError, match=r"the processor's video token is '<video>', but token \d+"):
        freeze_placeholder(path, changed, freeze_chat_prompt(path, changed))


# What is wrong -> the faulty frozen part.
FAULTS: dict[str, Callable[[Any, Any], tuple[Any, Any]]] = {
    "more tokens": lambda video, prompt: (
        video.model_copy(update={"tiling": Frames(tokens=25, pool_stride=2, newline=True)}),
        prompt,
    ),
    "no newline": lambda video, prompt: (
        video.model_copy(update={"tiling": video.tiling.model_copy(update={"newline": False})}),
        prompt,
    ),
    "another text": lambda video, prompt: (
        video,
        prompt.model_copy(update={"video": prompt.video.model_copy(update={"text": "{video} "})}),
    ),
    "another order": lambda video, prompt: (
        video,
        prompt.model_copy(update={"video": prompt.video.model_copy(update={"mixed": "as_given"})}),
    ),
    "another filter": lambda video, prompt: (
        video.model_copy(
            update={"steps": (video.steps[0].model_copy(update={"resample": "bilinear"}), *video.steps[1:])}
        ),
        prompt,
    ),
}


def test_planted_faults_are_caught(onevision: Path, tmp_path: Path) -> None:
    (onevision / "chat_template.jinja").write_text(VIDEO_TEMPLATE)
    model = load_checkpoint(onevision)
    frozen = freeze_processor(model, tmp_path)
    video, prompt = frozen.video, frozen.prompt
    assert frozen.checks["video"]["image_max_abs"] <= 1e-6
    for name, fault in FAULTS.items():
        bad_video, bad_prompt = fault(video, prompt)
        with pytest.raises(ExportError, match=r"tokenize|resize") as caught:
            check_frozen_video(model.path, model.config, frozen.image, bad_video, bad_prompt, frozen.tokenizer)
        assert ("resize" in str(caught.value)) == (name == "another filter"), name
