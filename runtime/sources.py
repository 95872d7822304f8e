"""What may come as pictures: files, Pillow pictures, videos, and lists of them for each prompt."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ..errors import InputError
from ..image_contract import Frames
from ..manifest import ImageContract, Manifest, PromptContract
from .processor import PictureTensors, load_picture, prepare_picture

if TYPE_CHECKING:
    from .processor.tiling.frames import VideoSource


@dataclass(frozen=True, eq=False)
class Video:
    """A video, which may stand wherever a picture may.

    `source`: an animated GIF, WebP or PNG (a file, or opened by Pillow), a directory of frames in the order of their
    names, or a list of pictures. It is looked at, and refused for anything else, when it is used.
    """

    source: VideoSource

    def frames(self) -> VideoSource:
        """What `load_video` takes: `source`, or the files of the directory, hidden ones left out."""
        if not isinstance(self.source, str | Path) or not Path(self.source).is_dir():
            return self.source
        try:
            files = sorted(file for file in Path(self.source).iterdir() if not file.name.startswith("."))
        except OSError as error:
            raise InputError(f"{self.source} may not be read ({error.strerror}); change its permissions") from error
        if not files:
            raise InputError(f"{self.source} holds 0 frames of a video; put at least one picture there")
        return files


def prepare_source(source: Any, manifest: Manifest, pictures: int) -> PictureTensors:
    """One picture or video as the encoder takes it; `pictures`: how many the prompt holds, videos not counted.

    A model that takes nothing but videos takes their frames without a `Video` around them. Raises InputError for what
    is neither, and for a video that the bundle does not take.
    """
    contract = manifest.image
    if not isinstance(source, Video):
        return prepare_picture(load_picture(source, contract), contract, pictures=pictures)
    video = _video_contract(manifest)
    prepared = prepare_picture(load_picture(source.frames(), video), video)
    return replace(prepared, video=video is manifest.video)


def _video_contract(manifest: Manifest) -> ImageContract:
    if isinstance(manifest.image.tiling, Frames):
        return manifest.image
    if manifest.video is None:
        raise InputError(
            f"a video came, and this bundle ({manifest.model_kind}) takes none; give pictures, or a bundle exported "
            "from a checkpoint with a video processor (LLaVA-NeXT-Video, LLaVA-OneVision, InstructBLIP-Video)"
        )
    return manifest.video


def group_sources(images: Any, manifest: Manifest) -> list[list[Any]]:
    """The pictures of each prompt. With a model of videos alone, a list of frames is one video."""
    if images is None:
        return [[]]
    sources = as_list(images)
    if not sources:
        raise InputError("no picture came; give at least one, or None for a prompt without pictures")
    nested = [not is_one(source) for source in sources]
    if isinstance(manifest.image.tiling, Frames):
        # A list of `Video`s is the group of a prompt; any other list is the frames of one video.
        return [list(source) if _holds_videos(source) else [source] for source in sources]
    if not any(nested):
        return [[source] for source in sources]
    if not all(nested):
        raise InputError("pictures and lists of pictures came mixed; give a list of pictures for each prompt")
    return [list(source) for source in sources]


def _holds_videos(source: Any) -> bool:
    return not is_one(source) and any(isinstance(one, Video) for one in source)


def order_group(group: Sequence[Any], prompt: PromptContract, *, interleave: bool) -> list[Any]:
    """The pictures and videos of one prompt in the order in which they stand there."""
    kinds = {isinstance(source, Video) for source in group}
    if len(kinds) < 2 or interleave or prompt.video is None:
        return list(group)
    if prompt.video.mixed is None:
        raise InputError(
            "pictures and videos came for one prompt, and this model's chat template does not say how they stand "
            "together; put an {image} mark for each into the prompt and set interleave (--interleave)"
        )
    if prompt.video.mixed == "as_given":
        return list(group)
    return sorted(group, key=lambda source: isinstance(source, Video))


def prepare_groups(
    groups: Sequence[Sequence[Any]], prepare: Callable[[Any, int], PictureTensors]
) -> tuple[tuple[PictureTensors, ...], ...]:
    """`prepare(source, pictures)` of every source; one that stands in several prompts alike stays one object.

    `pictures`: how many stand in its prompt, videos not counted.
    """
    made: dict[tuple[int, int], PictureTensors] = {}
    rows = []
    for group in groups:
        pictures = sum(not isinstance(source, Video) for source in group)
        for source in group:
            if (id(source), pictures) not in made:
                made[id(source), pictures] = prepare(source, pictures)
        rows.append(tuple(made[id(source), pictures] for source in group))
    return tuple(rows)


def is_one(images: Any) -> bool:
    """Whether it is one picture or video, and no list."""
    return not isinstance(images, list | tuple)


def as_list(images: Any) -> list[Any]:
    """One picture as a list of one."""
    return [images] if is_one(images) else list(images)


def some_of(images: Any) -> list[Any]:
    """As `as_list`; InputError for an empty list."""
    if not (sources := as_list(images)):
        raise InputError("no picture came; give at least one")
    return sources


def as_texts(prompts: Any) -> list[Any]:
    """One prompt as a list of one. Raises InputError for no prompt at all, and for what is neither str nor sequence."""
    texts = [prompts] if isinstance(prompts, str) else list(prompts) if isinstance(prompts, Sequence) else None
    if not texts:
        came = "an empty list" if texts is not None else f"a {type(prompts).__name__}"
        raise InputError(f'the prompt is {came}; accepted is a string ("" captions) or a list of at least one')
    return texts
