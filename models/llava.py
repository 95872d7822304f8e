"""LLaVA checkpoints (Liu et al. 2023, arXiv 2304.08485 and 2310.03744): vision tower, MLP projector, language model.

What `LlavaForConditionalGeneration` and the classes that grew out of it have in common is here too.
"""

from __future__ import annotations

from typing import Any

from torch import nn

from ..errors import CheckpointError, UnsupportedError
from .contract import StageContract
from .language import (
    batch_axis,
    check_image_token,
    float_spec,
    kv_cache,
    language_contracts,
    language_stages,
    tied_head,
)
from .projector import LinearProjector, MlpProjector, transformers_names
from .stages import Layout, Stage
from .vision_tower import feature_layers, vision_tower

# Names of the releases before transformers 4.52, which `save_pretrained` still writes.
RENAMES = (
    (r"^language_model\.lm_head\.", "lm_head."),
    (r"^language_model\.model\.", "model.language_model."),
    (r"^(model\.)?vision_tower\.(vision_model\.)?", "model.vision_tower."),
    (r"^(model\.)?mm_projector\.(weight|bias)$", r"model.multi_modal_projector.linear_1.\2"),
    (r"^multi_modal_projector\.", "model.multi_modal_projector."),
    (r"^image_newline$", "model.image_newline"),
)
# LLaVA 1.0 has one linear layer, which its project's checkpoints call `mm_projector`.
PROJECTOR_TYPES = ("linear", "mlp2x_gelu")
LANGUAGE_MODEL = {"model": "model.language_model.", "lm_head": "lm_head."}
PROJECTOR = "model.multi_modal_projector."
ROTARY_BUFFERS = frozenset({"model.language_model.rotary_emb.inv_freq"})


def conditional_generation(config: Any) -> Layout:
    """`LlavaForConditionalGeneration` in the stages encoder, connector, embed_tokens and llm."""
    text = config.text_config
    check_image_token(config, text)
    encoder, contract, unused = vision_tower(config, prefix="model.vision_tower.")
    connector = projector_stage(config)
    return Layout(
        kind="llava",
        stages={"encoder": encoder, "connector": connector, **language_stages(text, **LANGUAGE_MODEL)},
        contracts={
            "encoder": contract,
            "connector": token_wise_contract(contract, text.hidden_size),
            **language_contracts(text),
        },
        kv_cache=kv_cache(text),
        text_config=text,
        ignored=unused | rotary_buffers(text),
        tied=tied_head(text, **LANGUAGE_MODEL),
        renames=RENAMES,
    )


def projector_stage(config: Any) -> Stage:
    """The 2-layer MLP, or the one linear layer of LLaVA 1.0 where config.json has "mm_projector_type": "linear"."""
    bias = config.multimodal_projector_bias
    if projector_type(config) == "linear":
        names = {f"linear.{part}": f"{PROJECTOR}linear_1.{part}" for part in ("weight", "bias")}
    else:
        names = {ours: PROJECTOR + theirs for ours, theirs in transformers_names(bias=bias).items()}
    return Stage(lambda: projector(config), names.__getitem__)


def projector_type(config: Any) -> str:
    """`mm_projector_type`, the LLaVA project's own key; UnsupportedError for one that is not built."""
    kind: str = getattr(config, "mm_projector_type", None) or "mlp2x_gelu"
    if kind not in PROJECTOR_TYPES:
        raise UnsupportedError(
            f"config.json: mm_projector_type is {kind!r}; supported are {', '.join(PROJECTOR_TYPES)}"
        )
    return kind


def projector(config: Any) -> nn.Module:
    """Our module for transformers' `multi_modal_projector`."""
    if not isinstance(config.projector_hidden_act, str):
        raise CheckpointError(
            f"config.json: projector_hidden_act is {config.projector_hidden_act!r}; name an activation, say 'gelu'"
        )
    width = config.vision_config.hidden_size * len(feature_layers(config))
    out = config.text_config.hidden_size
    if projector_type(config) == "linear":
        return LinearProjector(width, out, bias=config.multimodal_projector_bias)
    return MlpProjector(
        (width, out, out), activation=config.projector_hidden_act, bias=config.multimodal_projector_bias
    )


def token_wise_contract(encoder: StageContract, width: int) -> StageContract:
    """A connector that makes one feature of `width` of every token of the encoder."""
    _, tokens, vision_width = encoder.outputs[0].shape
    return StageContract(
        name="connector",
        inputs=(float_spec("image_embeds", "batch", tokens, vision_width),),
        outputs=(float_spec("image_features", "batch", tokens, width),),
        axes=(batch_axis(),),
    )


def rotary_buffers(text: Any) -> frozenset[str]:
    """Buffers that older transformers stored."""
    layers = (f"model.language_model.layers.{i}.self_attn.rotary_emb.inv_freq" for i in range(text.num_hidden_layers))
    return ROTARY_BUFFERS | frozenset(layers)
