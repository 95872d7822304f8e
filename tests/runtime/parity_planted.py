"""The faults that parity must find in a right bundle, in each of its stages and formats."""

from __future__ import annotations

from .parity_faults import (
    TEXT_FIRST,
    Fault,
    bump,
    change_attribute,
    change_weight,
    mean,
    prompt,
    resample,
    swap_rows,
    tiling,
)

ENCODER = "vision_model.encoder.layers"
QFORMER = "qformer.encoder.layer"
LLAMA = "language_model.model.layers"
OPT = "language_model.model.decoder.layers"

# What each fault does to its own stage is at least ten times the gate; docs/parity.md has the figures.
FAULTS: dict[str, Fault] = {
    "encoder-patch-embedding": Fault(
        change_weight("encoder", "model.embeddings.patch_embedding.weight", bump(3, 1, 2, 5, by=0.2)),
        "encoder",
        "vision_model.embeddings.patch_embedding",
        "Conv",
        "1 of 18816 values of vision_model.embeddings.patch_embedding.weight differ",
    ),
    "encoder-query-weight": Fault(
        change_weight("encoder", "model.encoder.layers.1.self_attn.qkv.weight.transposed.query", bump(3, 5, by=0.3)),
        "encoder",
        f"{ENCODER}.1.self_attn.qkv (query)",
        "Add",
        f"1 of 1024 values of {ENCODER}.1.self_attn.qkv.weight differ",
    ),
    "encoder-swapped-positions": Fault(
        change_weight("encoder", "alias", swap_rows(1, 4)),
        "encoder",
        "vision_model.embeddings",
        "Add",
        "rows [1, 4] of vision_model.embeddings.position_embedding stand in each other's place",
    ),
    "encoder-epsilon": Fault(
        change_attribute("encoder", "LayerNormalization", 2, "epsilon", 1e-3),
        "encoder",
        f"{ENCODER}.1.layer_norm1",
        "LayerNormalization",
        "epsilon of node_layer_norm_2 is 0.001, PyTorch has 1e-06",
    ),
    "encoder-epsilon-too-small-to-see": Fault(
        change_attribute("encoder", "LayerNormalization", 3, "epsilon", 1.5e-6),
        "encoder",
        f"{ENCODER}.1.layer_norm2",
        "LayerNormalization",
        "epsilon of node_layer_norm_3 is 1.5e-06, PyTorch has 1e-06",
    ),
    "encoder-attention-scale": Fault(
        change_weight("encoder", "val_25", lambda array: array.__imul__(1.1)),
        "encoder",
        f"input of {ENCODER}.0.self_attn.projection",
        "Reshape",
    ),
    "connector-swapped-query": Fault(
        change_weight("connector", "qformer.query_tokens", swap_rows(0, 2)),
        "connector",
        "input of qformer.layernorm",
        "Expand",
        "rows [0, 2] of query_tokens stand in each other's place",
    ),
    "connector-cross-attention-key": Fault(
        change_weight("connector", "qformer.layers.2.cross_attention.key.weight.transposed", bump(1, 7, by=0.3)),
        "connector",
        f"{QFORMER}.2.crossattention.attention.key",
        "Add",
        f"1 of 768 values of {QFORMER}.2.crossattention.attention.key.weight differ",
    ),
    "connector-epsilon": Fault(
        change_attribute("connector", "LayerNormalization", 5, "epsilon", 1e-3),
        "connector",
        f"{QFORMER}.1.output_query.LayerNorm",
        "LayerNormalization",
        "PyTorch has 1e-12",
    ),
    "connector-projection": Fault(
        change_weight("connector", "language_projection.bias", bump(9, by=0.05)),
        "connector",
        "language_projection",
        "Add",
        "1 of 64 values of language_projection.bias differ",
    ),
    "embed-tokens": Fault(
        # The first token of every prompt, BOS.
        change_weight("embed_tokens", "weight", bump(1, 11, by=0.1)),
        "merged_embeddings",
        "language_model.model.embed_tokens",
        "Gather",
        "1 of 20736 values of language_model.model.embed_tokens.weight differ",
    ),
    "llm-packed-weight": Fault(
        change_weight("llm", "model.layers.1.attn.qkv_proj.MatMul.weight", bump(8, 70, by=0.3)),
        "first_logits",
        f"{LLAMA}.1.self_attn.{{q_proj,k_proj,v_proj}}",
        "MatMul",
        f"1 of 12288 values of {LLAMA}.1.self_attn.{{q_proj,k_proj,v_proj}}.weight differ",
    ),
    "llm-rotary-table": Fault(
        change_weight("llm", "sin_cache", lambda array: array.__imul__(-1)),
        "first_logits",
        f"input of {LLAMA}.0.self_attn.o_proj",
        "GroupQueryAttention",
    ),
    "llm-epsilon": Fault(
        change_attribute("llm", "SkipSimplifiedLayerNormalization", 1, "epsilon", 1e-2),
        "first_logits",
        f"{LLAMA}.1.input_layernorm",
        "SkipSimplifiedLayerNormalization",
        "epsilon of /model/layers.1/input_layernorm/SkipLayerNorm is 0.01, PyTorch has 1e-06",
    ),
    "llm-head": Fault(
        change_weight("llm", "lm_head.MatMul.weight", bump(3, 200, by=0.5)),
        "first_logits",
        "language_model.lm_head",
        "MatMul",
        "1 of 20736 values of language_model.lm_head.weight differ",
    ),
    "resize-bilinear": Fault(
        resample("bilinear"),
        "pixels",
        "BlipImageProcessorPil, resize",
        cause="resample is bilinear, the checkpoint's processor has bicubic",
    ),
    "resize-lanczos": Fault(
        resample("lanczos"),
        "pixels",
        "BlipImageProcessorPil, resize",
        cause="resample is lanczos, the checkpoint's processor has bicubic",
    ),
    "normalisation-mean": Fault(
        mean(0.48145466, 0.4578275, 0.4082),
        "pixels",
        "BlipImageProcessorPil, normalize",
        cause="mean is [0.48145466, 0.4578275, 0.4082]",
    ),
    "placeholder-count": Fault(tiling(tokens=3), "placeholder_ids", cause="3 image placeholders, PyTorch has 4"),
    "placeholder-position": Fault(prompt(segments=TEXT_FIRST), "placeholder_ids", cause="in PyTorch at [0]"),
    "placeholder-id": Fault(prompt(image_token_id=7), "placeholder_ids", cause="position 0 holds 7"),
}

OPT_FAULTS: dict[str, Fault] = {
    "learned-positions": Fault(
        # Row 2 is position 0: OPT's table has two rows of offset.
        change_weight("llm", "model.decoder.embed_positions.weight", bump(2, 30, by=0.2)),
        "first_logits",
        "language_model.model.decoder.embed_positions",
        "Gather",
        "language_model.model.decoder.embed_positions.weight differ",
    ),
    "value-weight": Fault(
        change_weight("llm", "model.decoder.layers.1.self_attn.v_proj.weight.transposed", bump(6, 2, by=0.4)),
        "first_logits",
        f"{OPT}.1.self_attn.v_proj",
        "Add",
        f"1 of 4096 values of {OPT}.1.self_attn.v_proj.weight differ",
    ),
    "epsilon": Fault(
        change_attribute("llm", "LayerNormalization", 3, "epsilon", 1e-2),
        "first_logits",
        f"{OPT}.1.final_layer_norm",
        "LayerNormalization",
        "PyTorch has 1e-05",
    ),
}

INT4_FAULTS: dict[str, Fault] = {
    "scale": Fault(
        change_weight("llm", "model.layers.0.mlp.down_proj.MatMul.weight_scales", lambda array: array[5].__imul__(1.5)),
        "first_logits",
        f"{LLAMA}.0.mlp.down_proj",
        "MatMulNBits",
        "/model/layers.0/mlp/down_proj/MatMul_Q4 holds",
    ),
    "epsilon": Fault(
        change_attribute("llm", "SkipSimplifiedLayerNormalization", 1, "epsilon", 1e-1),
        "first_logits",
        f"{LLAMA}.1.input_layernorm",
        "SkipSimplifiedLayerNormalization",
        "epsilon of /model/layers.1/input_layernorm/SkipLayerNorm is 0.1",
    ),
    "rotary-table": Fault(
        change_weight("llm", "sin_cache", lambda array: array.__imul__(-1)),
        "first_logits",
        f"input of {LLAMA}.0.self_attn.o_proj",
        "GroupQueryAttention",
    ),
    "encoder-weight": FAULTS["encoder-query-weight"],
}
