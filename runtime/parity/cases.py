"""What a parity check runs on: pictures and videos, each with a prompt."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ...errors import InputError
from ...image_contract import Frames, Tiling
from ...manifest import Manifest
from ..processor import load_image
from ..processor.tiling.frames import choose_frames, load_video
from ..sources import Video
from .pictures import default_films, default_pictures, default_prompts, default_videos
from .stages import Case

if TYPE_CHECKING:
    from PIL import Image

    # A picture; for a model of videos, a film, a directory or a list of its frames.
    Source = str | Path | Image.Image | Sequence[str | Path | Image.Image]
    Described = Sequence[tuple[str, Any]]

# Of the default videos, where the model takes any number: two lengths in one batch.
DEFAULT_FRAMES = (3, 2)


def choose_cases(
    manifest: Manifest, images: Sequence[Source] | None, videos: Sequence[Source] | None, prompts: Sequence[str] | None
) -> list[Case]:
    """Pictures, then videos, with prompts, the shorter list repeated; the default ones where neither came.

    Raises InputError for what is no picture or video, and for videos that the bundle does not take.
    """
    tiling = manifest.image.tiling
    if isinstance(tiling, Frames):  # it takes nothing else
        both = None if images is None and videos is None else [*(images or ()), *(videos or ())]
        return make_cases(both, prompts, tiling)
    contract = None if manifest.video is None else manifest.video.tiling
    if not isinstance(contract, Frames):
        if videos:
            raise InputError(
                f"{len(videos)} videos came, and this bundle ({manifest.model_kind}) takes none; compare on pictures"
            )
        return make_cases(images, prompts)
    if images is None and videos is None:
        fixed = contract.frames or contract.sample
        films = default_films(DEFAULT_FRAMES if fixed is None else [fixed] * len(DEFAULT_FRAMES))
        return _pair([*default_pictures(), *_as_videos(films)], prompts)
    _need_some(images if videos is None else [*(images or ()), *videos])
    opened = [_open(source) for source in images or ()]
    return _pair([*opened, *_as_videos([_open_video(source, contract) for source in videos or ()])], prompts)


def make_cases(
    images: Sequence[Source] | None, prompts: Sequence[str] | None, tiling: Tiling | None = None
) -> list[Case]:
    """Pair pictures with prompts, the shorter list repeated. Raises InputError for what is no picture.

    `tiling`: the bundle's; for one of videos each entry of `images` is a film or a list of frames.
    """
    _need_some(images)
    pictures: Described
    if isinstance(tiling, Frames):
        frames = tiling.frames or tiling.sample or DEFAULT_FRAMES[0]
        pictures = default_videos(frames) if images is None else [_open_video(source, tiling) for source in images]
    else:
        pictures = default_pictures() if images is None else [_open(source) for source in images]
    return _pair(pictures, prompts)


def _need_some(images: Sequence[Source] | None) -> None:
    if images is not None and not images:
        raise InputError("images is empty; give at least one picture, or None for the default ones")


def _pair(pictures: Described, prompts: Sequence[str] | None) -> list[Case]:
    if prompts is not None and not prompts:
        raise InputError('prompts is empty; give at least one (may be ""), or None for the default ones')
    texts = default_prompts() if prompts is None else list(prompts)
    cases = []
    for index in range(max(len(pictures), len(texts))):
        name, image = pictures[index % len(pictures)]
        prompt = texts[index % len(texts)]
        cases.append(Case(f"case {index + 1}", name, image, prompt))
    return cases


def _as_videos(films: Described) -> list[tuple[str, Video]]:
    """As a bundle takes them that takes pictures too. transformers makes one array of the frames of such a video."""
    for name, frames in films:
        if len({frame.size for frame in frames}) > 1:
            raise InputError(
                f"{name}: its frames are of {len({frame.size for frame in frames})} sizes; transformers, which the "
                "bundle is compared with, takes frames of one size"
            )
    return [(name, Video([frame.convert("RGB") for frame in frames])) for name, frames in films]


def _open_video(source: Source, tiling: Frames) -> tuple[str, list[Image.Image]]:
    """The frames as transformers gets them: those of a list keep their modes."""
    name = Path(source).name if isinstance(source, str | Path) else "video"
    given: Any = Video(source).frames()
    if isinstance(given, list | tuple):
        frames = [_open(given[index])[1] for index in choose_frames(len(given), tiling)]
        return f"{name} of {len(frames)} frames", frames
    frames = load_video(given, tiling)
    return f"{name}, {len(frames)} frames", frames


def _open(source: Any) -> tuple[str, Image.Image]:
    """The picture as transformers gets it: upright, its mode kept. Refused is what the run time refuses."""
    from PIL import Image, ImageOps

    load_image(source)
    if isinstance(source, Image.Image):
        return _describe("picture", source), ImageOps.exif_transpose(source)
    with Image.open(source) as image:
        image.load()
        return _describe(Path(source).name, image), ImageOps.exif_transpose(image)


def _describe(name: str, image: Image.Image) -> str:
    return f"{name}, {image.width}x{image.height} {image.mode}"
