"""Processors with a video part load without torchvision, and do to pictures and prompts what their classes do."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import transformers
from tests.runtime.tilings import byte_tokenizer, noise
from transformers.models.got_ocr2.image_processing_pil_got_ocr2 import GotOcr2ImageProcessorPil
from transformers.models.qwen2_vl.image_processing_pil_qwen2_vl import Qwen2VLImageProcessorPil
from transformers.models.smolvlm.image_processing_pil_smolvlm import SmolVLMImageProcessorPil

from bridgeport.errors import CheckpointError
from bridgeport.export.checkpoint_processor import load_image_processor, load_tokenizer
from bridgeport.export.processor_without_video import load_without_video, takes_videos

TEMPLATE = "{% for part in messages[0]['content'] %}[{{ part['type'] }}]{% endfor %}"
# The class, its image processor, its own settings, and the image tokens of a 40x30 picture, counted by hand.
CASES: dict[str, tuple[str, Any, dict[str, Any], int]] = {
    "qwen2_vl": ("Qwen2VLProcessor", Qwen2VLImageProcessorPil(size={"shortest_edge": 9, "longest_edge": 9999}), {}, 1),
    "qwen2_5_vl": ("Qwen2_5_VLProcessor", Qwen2VLImageProcessorPil(), {}, 6),
    # Tiles of 384 pixels: 4x3 and a thumbnail.
    "internvl": ("InternVLProcessor", GotOcr2ImageProcessorPil(), {"image_seq_length": 3}, 39),
    # 4 x 3 tiles of 364 pixels and the whole picture.
    "smolvlm": ("SmolVLMProcessor", SmolVLMImageProcessorPil(), {"image_seq_len": 2}, 26),
}


def write(path: Path, name: str, place: str) -> None:
    kind, images, settings, _ = CASES[name]
    tokenizer = byte_tokenizer(
        "<|image_pad|>", image_token="<image>", start_image_token="<img>", end_image_token="</img>",
        context_image_token="<IMG_CONTEXT>", video_token="<video>",
    )  # fmt: skip
    tokenizer.chat_template = TEMPLATE
    tokenizer.save_pretrained(path)
    images.save_pretrained(path)
    (path / "processor_config.json").write_text(json.dumps(settings), encoding="utf-8")
    file = path / place
    old = json.loads(file.read_text(encoding="utf-8")) if file.is_file() else {}
    named = {"model_type": name} if place == "config.json" else {"processor_class": kind}
    file.write_text(json.dumps(old | named), encoding="utf-8")


def load(path: Path) -> Any:
    return load_without_video(path, load_image_processor(path), load_tokenizer(path))


@pytest.mark.parametrize("place", ["processor_config.json", "preprocessor_config.json", "config.json"])
@pytest.mark.parametrize("name", CASES)
def test_pictures_and_prompts(name: str, place: str, tmp_path: Path) -> None:
    write(tmp_path, name, place)
    assert takes_videos(tmp_path)
    processor = load(tmp_path)
    assert isinstance(processor, getattr(transformers, CASES[name][0]))
    content = [{"type": "image"}, {"type": "text", "text": "hi"}]
    rendered = processor.apply_chat_template([{"role": "user", "content": content}], tokenize=False)
    assert rendered == "[image][text]"
    made = processor(images=[noise(40, 30)], text=[f"{processor.image_token} hi"])
    assert list(made["input_ids"][0]).count(processor.image_token_id) == CASES[name][3]
    assert "pixel_values" in made


def test_other_processors_are_refused(tmp_path: Path) -> None:
    write(tmp_path, "smolvlm", "config.json")
    (tmp_path / "config.json").write_text('{"model_type": "idefics3"}', encoding="utf-8")
    (tmp_path / "processor_config.json").write_text('{"processor_class": "Idefics3Processor"}', encoding="utf-8")
    assert not takes_videos(tmp_path)
    with pytest.raises(CheckpointError, match=r"the processor is Idefics3Processor; accepted are InternVLProcessor"):
        load(tmp_path)
    for file in tmp_path.glob("*config.json"):
        file.write_text("{", encoding="utf-8")
    assert not takes_videos(tmp_path)
