"""LLaVA-NeXT-Video checkpoints (Zhang et al. 2024, "LLaVA-NeXT: A Strong Zero-shot Video Understanding Model").

Pictures go the way of LLaVA-NeXT. Frames of a video have a connector of their own, `video_connector`: their tokens are
pooled before they are projected, by the same projector.
"""

from __future__ import annotations

from dataclasses import replace
from typing import Any

from torch import Tensor, nn

from ..errors import CheckpointError
from . import llava_next
from .contract import StageContract
from .language import batch_axis, float_spec
from .llava import projector, projector_stage
from .pooling import WindowPooling
from .stages import Layout, Stage


class PooledProjector(nn.Module):
    """Pool the tokens of a frame, then project them."""

    def __init__(self, pooling: WindowPooling, projector: nn.Module) -> None:
        super().__init__()
        self.pooling, self.projector = pooling, projector

    def forward(self, image_embeds: Tensor) -> Tensor:
        """`image_embeds` `[F, N, Dv]` of F frames to `image_features` `[F, N / stride^2, D]`."""
        features: Tensor = self.projector(self.pooling(image_embeds))
        return features


def conditional_generation(config: Any) -> Layout:
    """`LlavaNextVideoForConditionalGeneration`: encoder, connector, video_connector, embed_tokens and llm."""
    layout = llava_next.conditional_generation(config)
    rows, columns = _pooling(config).output_grid
    _, tokens, width = layout.contracts["encoder"].outputs[0].shape
    contract = StageContract(
        name="video_connector",
        inputs=(float_spec("image_embeds", "batch", tokens, width),),
        outputs=(float_spec("image_features", "batch", rows * columns, config.text_config.hidden_size),),
        axes=(batch_axis(),),
    )
    return replace(
        layout,
        kind="llava-next-video",
        stages=_behind_connector(layout.stages, Stage(lambda: _module(config), _stored(config))),
        contracts=_behind_connector(layout.contracts, contract),
    )


def _pooling(config: Any) -> WindowPooling:
    vision = config.vision_config
    side: int = vision.image_size // vision.patch_size
    width = vision.hidden_size
    if not isinstance(config.vision_feature_layer, int) and config.spatial_pool_mode == "conv":
        raise CheckpointError("config.json: spatial_pool_mode 'conv' reads one vision_feature_layer, not a list")
    return WindowPooling(
        (side, side),
        mode=config.spatial_pool_mode,
        stride=config.spatial_pool_stride,
        width=width,
        output_width=getattr(config, "spatial_pool_out_channels", width),
    )


def _module(config: Any) -> PooledProjector:
    return PooledProjector(_pooling(config), projector(config))


def _stored(config: Any) -> Any:
    project = projector_stage(config).checkpoint_name

    def stored(name: str) -> str:
        if name.startswith("pooling."):
            return f"model.vision_resampler.{name.removeprefix('pooling.')}"
        return project(name.removeprefix("projector."))

    return stored


def _behind_connector(stages: Any, video: Any) -> dict[str, Any]:
    """`stages` in the order of the chain, with `video_connector` behind `connector`."""
    ordered: dict[str, Any] = {}
    for name, stage in stages.items():
        ordered[name] = stage
        if name == "connector":
            ordered["video_connector"] = video
    return ordered
