"""What transformers computes inside Qwen2-VL and Qwen2.5-VL, in the order and grouping of a bundle's stages."""

from __future__ import annotations

from typing import Any


def group_patches(seen: dict[str, Any], image_grid_thw: Any, vision_config: Any) -> dict[str, Any]:
    """The tensors of one picture: `pixel_values` `[N, F]`, `image_embeds` `[N, Dv]` and `image_features` `[T, D]`, the
    latter two in window order where there are windows, to `[T, M, F]`, `[T, M, Dv]` and `[1, T, D]` in the picture's.

    `image_grid_thw` `[1, 3]`: the processor's. Other entries stay.
    """
    patches = vision_config.spatial_merge_size**2

    def group(values: Any) -> Any:
        return values.reshape(-1, patches, values.shape[-1])

    embeds, features = group(seen["image_embeds"]), seen["image_features"]
    order = _window_order(image_grid_thw, vision_config)
    if order is not None:
        embeds, features = embeds[order], features[order]
    pixel_values = group(seen["pixel_values"])
    return seen | {"pixel_values": pixel_values, "image_embeds": embeds, "image_features": features[None]}


def _window_order(image_grid_thw: Any, vision_config: Any) -> Any:
    """Where each token stands in window order; None without windows."""
    from transformers.vision_utils import get_vision_window_index

    size = getattr(vision_config, "window_size", None)
    if size is None:
        return None
    index, _ = get_vision_window_index(image_grid_thw, vision_config.spatial_merge_size, size, vision_config.patch_size)
    return index.argsort()
