"""Freeze what a checkpoint of pictures and videos does with videos, and hold it against transformers.

transformers' video processors run on torchvision alone. Here the picture processor of the same settings stands in
for them, run by Pillow and numpy (see image_processors/frames.py for how far the two are apart); all else, the prompt
with the right number of video tokens above all, is transformers' own.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

import numpy as np
from PIL import Image

from ..errors import CheckpointError, ExportError, UnsupportedError
from ..image_contract import Frames, ImageContract, Whole
from ..manifest import PromptContract, TextSegment, VideoPlaceholder
from ..runtime.processor import PictureTensors, load_tokenizer, prepare_picture, tokenize_prompt
from .checkpoint_processor import image_token_text, load_processor
from .checkpoint_processor import load_tokenizer as load_checkpoint_tokenizer
from .image_processors.frames import freeze_video_contract, read_video_processor
from .picture_check import check_frozen_pictures
from .processor_check import PROMPTS
from .prompts import MARK, render_content
from .tokenizer import placeholder_text

if TYPE_CHECKING:
    from ..models.checkpoint import VisionLanguageModel

# Kinds of models that take pictures and videos.
VIDEO_KINDS = ("llava-next-video", "llava-onevision")
# What the prompts are checked with: pictures and videos in an order.
_CONTENTS = (("video",), ("video", "video"), ("image", "video"), ("video", "image", "video"))


@dataclass(frozen=True)
class FrozenVideo:
    """What is done to the frames of a video, and what stands for them in a prompt."""

    contract: ImageContract
    placeholder: VideoPlaceholder


class VideoProcessor(dict[str, Any]):
    """`pixel_values_videos` `[videos, F, 3, H, W]`; a dict, as processors print themselves as JSON.

    `pictures`: the picture processor that each frame goes through.
    """

    model_input_names = ("pixel_values_videos",)

    def __init__(self, pictures: Any) -> None:
        super().__init__()
        self.pictures = pictures

    def __call__(self, videos: Sequence[Sequence[Image.Image]], **_: Any) -> dict[str, Any]:
        """The options are the whole processor's business. Videos of different lengths make no tensor."""
        made = [self.pictures(list(frames), return_tensors="np")["pixel_values"] for frames in videos]
        return {"pixel_values_videos": np.stack(made)}


def load_video_processor(path: Path, config: Any) -> Any:
    """The checkpoint's whole processor, which takes `videos` as lists of frames.

    Raises CheckpointError for files that do not load.
    """
    from transformers.models.clip.image_processing_pil_clip import CLIPImageProcessorPil

    names = (
        "size", "crop_size", "resample", "image_mean", "image_std", "rescale_factor", "do_resize", "do_center_crop",
        "do_rescale", "do_normalize",
    )  # fmt: skip
    settings, make = read_video_processor(path, config.model_type), CLIPImageProcessorPil
    given: dict[str, Any] = {name: getattr(settings, name, None) for name in names}
    # What its class leaves out for videos is on in the picture processor's.
    given |= {name: bool(given[name]) for name in names if name.startswith("do_")}
    processor = load_processor(path)
    processor.video_processor = VideoProcessor(make(**{name: one for name, one in given.items() if one is not None}))
    return processor


def freeze_video(model: VisionLanguageModel, prompt: PromptContract) -> FrozenVideo:
    """The videos of `model`, of a kind of `VIDEO_KINDS`, whose pictures are frozen in `prompt`.

    Raises CheckpointError where video processor, tokenizer and model do not fit each other, UnsupportedError for what
    the contracts cannot say; such a checkpoint still takes pictures.
    """
    if model.layout.reduction is not None or model.layout.custom_connector is not None:
        raise UnsupportedError("a reduced or custom connector takes pictures alone; export without it for videos")
    contract = freeze_video_contract(model.path, model.config)
    return FrozenVideo(contract, freeze_placeholder(model.path, model.config, prompt))


def freeze_placeholder(path: Path, config: Any, prompt: PromptContract) -> VideoPlaceholder:
    """The video token, and where the chat template puts it; see `freeze_video`."""
    tokenizer, processor = load_checkpoint_tokenizer(path), load_processor(path)
    token = image_token_text(path, tokenizer, config.video_token_id)
    named = getattr(processor.video_token, "content", processor.video_token)
    if named != token:
        raise CheckpointError(
            f"{path}: the processor's video token is {named!r}, but token {config.video_token_id} (the video token of "
            f"config.json) is {token!r}; make them one"
        )
    segment = prompt.segments[-1]
    if not isinstance(segment, TextSegment):
        raise UnsupportedError(f"{path}: the prompt keeps no place for videos; accepted is one with a chat template")
    texts = {"image": prompt.image.replace("{image}", prompt.image_token)}
    texts["video"] = _block(path, processor, segment.template, token)
    turn = _Turn(processor, segment.template, texts)
    if turn.order(("video",) * 3) is None:
        raise UnsupportedError(
            f"{path}: the chat template puts more than a fixed text around a video (it renders "
            f"{turn.rendered(('video', 'video'))!r} for two); accepted is one whose videos stand one after the other"
        )
    return VideoPlaceholder(
        text=texts["video"].replace(token, "{video}"),
        mixed=turn.order(("video", "image", "video", "image")),
        token_id=config.video_token_id,
        token=token,
        placeholder=placeholder_text(tokenizer, "video"),
    )


@dataclass(frozen=True)
class _Turn:
    """A user turn with pictures and videos: as the template renders it, and put together of its `texts` by kind."""

    processor: Any
    template: str
    texts: dict[str, str]

    def rendered(self, kinds: Sequence[str]) -> str:
        return render_content(self.processor, MARK, kinds)

    def order(self, kinds: Sequence[str]) -> Literal["pictures_first", "as_given"] | None:
        """How the template has them stand; None where they are put together in another way."""
        rendered = self.rendered(kinds)
        if rendered == self._joined(kinds):
            return "as_given"
        return "pictures_first" if rendered == self._joined(sorted(kinds)) else None

    def _joined(self, kinds: Sequence[str]) -> str:
        head, tail = self.template.replace("{prompt}", MARK).split("{images}")
        return head + "".join(self.texts[kind] for kind in kinds) + tail


def _block(path: Path, processor: Any, template: str, token: str) -> str:
    """The text of one video."""
    try:
        rendered = render_content(processor, MARK, ["video"])
    except Exception as error:
        # Jinja's errors, and whatever a template raises by itself.
        reason = " ".join(str(error).split())[:160]
        raise UnsupportedError(f"{path}: the chat template does not render a video ({reason})") from error
    head, tail = template.replace("{prompt}", MARK).split("{images}")
    inside = rendered.startswith(head) and rendered.endswith(tail) and len(rendered) >= len(head) + len(tail)
    block = rendered[len(head) : len(rendered) - len(tail)]
    if not inside or block.count(token) != 1:
        raise UnsupportedError(
            f'{path}: the chat template renders {rendered!r} for one video; accepted is one that takes {{"type": '
            f'"video"}} and puts {token} where pictures stand'
        )
    return block


def check_frozen_video(
    checkpoint: Path, config: Any, image: ImageContract, video: ImageContract, prompt: PromptContract, tokenizer: Path
) -> dict[str, Any]:
    """Frames of odd sizes and modes, and prompts with videos and pictures, through both processors.

    Returns what was compared, for the manifest: `pictures`, `prompts`, `image_max_abs`. Raises ExportError naming the
    first step that departs from transformers' own.
    """
    processor = load_video_processor(checkpoint, config)
    tiling = video.tiling
    tokens = tiling.tokens if isinstance(tiling, Frames) else 1
    frame = video.model_copy(update={"tiling": Whole(tokens=tokens)})
    found = check_frozen_pictures(processor.video_processor.pictures, frame)
    frozen, placeholder = load_tokenizer(tokenizer), prompt.video
    contents = [kinds for kinds in _CONTENTS if "image" not in kinds or (placeholder and placeholder.mixed)]
    for kinds in contents:
        _check_prompts(processor, frozen, prompt, kinds, image, video)
    return {**found, "prompts": len(contents) * len(PROMPTS)}


def _check_prompts(
    processor: Any,
    frozen: Any,
    prompt: PromptContract,
    kinds: Sequence[str],
    image: ImageContract,
    video: ImageContract,
) -> None:
    sources = _sources(kinds, video)
    if prompt.video is not None and prompt.video.mixed == "pictures_first":
        sources.sort(key=lambda one: one[0])
    pictures = [one for kind, one in sources if kind == "image"]
    videos = [one for kind, one in sources if kind == "video"]
    ours = [_prepare(one, image if kind == "image" else video, len(pictures)) for kind, one in sources]
    tokens = {prompt.image_token_id} | ({prompt.video.token_id} if prompt.video else set())
    special = any(isinstance(segment, TextSegment) and segment.add_special_tokens for segment in prompt.segments)
    for text in PROMPTS:
        theirs = processor(
            images=[pictures] if pictures else None,
            videos=videos,
            text=[render_content(processor, text, kinds)],
            add_special_tokens=special,
        )["input_ids"][0]
        wanted = [int(i) for i in theirs]
        made = tokenize_prompt(
            frozen,
            prompt,
            text,
            [one.pieces for one in ours],
            videos=[i for i, (kind, _) in enumerate(sources) if kind == "video"],
        )
        if made.input_ids != wanted or made.image_positions != [i for i, token in enumerate(wanted) if token in tokens]:
            raise ExportError(
                f"tokenize: prompt {text[:40]!r} with {' and '.join(kinds)} gives {made.input_ids[:24]}, transformers' "
                f"processor gives {wanted[:24]}; the frozen prompt contract does not describe this checkpoint"
            )


def _sources(kinds: Sequence[str], video: ImageContract) -> list[tuple[str, Any]]:
    """A picture or a video for each kind; videos of another length each time, where the model lets them."""
    blank = Image.new("RGB", (8, 8))
    sample = video.tiling.sample if isinstance(video.tiling, Frames) else None
    return [(kind, blank if kind == "image" else [blank] * (sample or len(kinds))) for kind in kinds]


def _prepare(source: Any, contract: ImageContract, pictures: int) -> PictureTensors:
    return prepare_picture(source, contract, pictures=pictures)
