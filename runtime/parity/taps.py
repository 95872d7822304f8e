"""Where in transformers' models the values are that a bundle's stages are held against."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace
from typing import Any, Literal


@dataclass(frozen=True)
class Tap:
    """What goes into, or comes out of, the module called `module`; `skip_first` leaves its first token out."""

    module: str
    side: Literal["input", "output"]
    skip_first: bool = False


@dataclass(frozen=True)
class Taps:
    """One kind of model.

    `pixels`: the vision tower, whose argument `pixel_values` is the preprocessed picture. `language`: the module that
    gets the merged `inputs_embeds`, or, for a model that merges nothing, its embedding (`embeds_itself`). `text_model`:
    the module that makes logits of them, "" for the whole model.
    """

    pixels: str
    image_embeds: Tap
    image_features: Tap
    language: str
    text_model: str = ""
    embeds_itself: bool = False


_LLAVA = Taps(
    pixels="model.vision_tower",
    image_embeds=Tap("model.multi_modal_projector", "input"),
    image_features=Tap("model.multi_modal_projector", "output"),
    language="model.language_model",
)

# What they give is brought into a bundle's order by `patches.group_patches`.
_QWEN_VL = Taps(
    pixels="model.visual",
    image_embeds=Tap("model.visual", "output"),
    image_features=Tap("model.visual.merger", "output"),
    language="model.language_model",
)

_BLIP_2 = Taps(
    pixels="vision_model",
    image_embeds=Tap("vision_model", "output"),
    image_features=Tap("language_projection", "output"),
    language="language_model",
    text_model="language_model",
)

_FLAMINGO = Taps(
    pixels="model.vision_model",
    image_embeds=Tap("model.vision_model", "output"),
    image_features=Tap("model.perceiver_resampler", "output"),
    language="model.embed_tokens",
    embeds_itself=True,
)

_IDEFICS_2_3 = Taps(
    pixels="model.vision_model",
    image_embeds=Tap("model.connector", "input"),
    image_features=Tap("model.connector", "output"),
    language="model.text_model",
)

# Its connector shuffles pixels before the projector, so what the connector takes is the tower's output.
_INTERNVL = Taps(
    pixels="model.vision_tower",
    image_embeds=Tap("model.vision_tower", "output", skip_first=True),
    image_features=Tap("model.multi_modal_projector", "output"),
    language="model.language_model",
)

# A composition of ours, export/qwen_vl_reference.py.
_FIRST_QWEN_VL = Taps(
    pixels="vision_model",
    image_embeds=Tap("vision_model", "output"),
    image_features=Tap("connector", "output"),
    language="language_model",
    text_model="language_model",
)

# Model kind (`Layout.kind`) -> its taps.
TAPS: dict[str, Taps] = {
    "blip-2": _BLIP_2,
    "instructblip": _BLIP_2,
    "instructblip-video": _BLIP_2,
    "flamingo": _FLAMINGO,
    "llava": _LLAVA,
    "llava-next": _LLAVA,
    "llava-next-video": _LLAVA,
    "llava-onevision": _LLAVA,
    "idefics2": _IDEFICS_2_3,
    "idefics3": _IDEFICS_2_3,
    "smolvlm": _IDEFICS_2_3,
    "internvl": _INTERNVL,
    "qwen-vl": _FIRST_QWEN_VL,
    "qwen2-vl": _QWEN_VL,
    "qwen2.5-vl": _QWEN_VL,
}
# The same for the frames of a video, where they go another way: LLaVA-NeXT-Video pools them before it projects.
VIDEO_TAPS: dict[str, Taps] = {
    "llava-next-video": replace(_LLAVA, image_embeds=Tap("model.vision_resampler", "input")),
}


@contextmanager
def tapped(model: Any, taps: Taps) -> Iterator[dict[str, Any]]:
    """Collects `pixel_values`, `image_embeds`, `image_features` and `inputs_embeds` as tensors, on their first way
    through `model`.
    """
    seen: dict[str, Any] = {}

    def take(name: str, value: Any) -> None:
        seen.setdefault(name, tensor_of(value))

    def before(name: str, argument: str | None = None) -> Any:
        """`argument`, or whatever comes first where it has another name."""

        def hook(_module: Any, args: Any, kwargs: Any) -> None:
            take(name, kwargs[argument] if argument in kwargs else next(iter((*args, *kwargs.values()))))

        return hook

    def after(name: str, *, skip_first: bool = False) -> Any:
        def hook(_module: Any, _args: Any, output: Any) -> None:
            value = tensor_of(output)
            take(name, value[:, 1:] if skip_first else value)

        return hook

    handles = [
        model.get_submodule(taps.pixels).register_forward_pre_hook(
            before("pixel_values", "pixel_values"), with_kwargs=True
        ),
        model.get_submodule(taps.language).register_forward_hook(after("inputs_embeds"))
        if taps.embeds_itself
        else model.get_submodule(taps.language).register_forward_pre_hook(
            before("inputs_embeds", "inputs_embeds"), with_kwargs=True
        ),
    ]
    for name, tap in (("image_embeds", taps.image_embeds), ("image_features", taps.image_features)):
        module = model.get_submodule(tap.module)
        if tap.side == "output":
            handles.append(module.register_forward_hook(after(name, skip_first=tap.skip_first)))
        else:
            handles.append(module.register_forward_pre_hook(before(name), with_kwargs=True))
    try:
        yield seen
    finally:
        for handle in handles:
            handle.remove()


def tensor_of(value: Any) -> Any:
    """The tensor in what a module gave: itself, the `last_hidden_state` of an output, or the first of several."""
    if hasattr(value, "last_hidden_state"):
        return value.last_hidden_state
    return value[0] if isinstance(value, tuple) else value
