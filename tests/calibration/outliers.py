"""A small CLIP vision encoder with activation outliers, planted where trained ones have them.

The graph is what the package's own export makes of transformers' `CLIPVisionModel`; the outliers are then planted in
its weights. "norm": a few channels of every LayerNorm's output 50 to 200 times as large as the others and the rows of
the following weights as much smaller, so that the float function stays what it was (Xiao et al. 2023, arXiv
2211.10438, figure 4). "feed-forward": a few inputs of every fc2 as much larger, behind the GELU, where no LayerNorm
can take a scale. "massive": one unit of the first fc2's input fires for the class token alone and makes one channel of
its residual stream 200 times as large as all else, from there to the output (Sun et al. 2024, "Massive Activations in
Large Language Models", arXiv 2402.17762, section 5).
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any, Literal

import numpy as np
import onnx_ir as ir
from numpy.typing import NDArray

from bridgeport.calibration.records import TensorRange, TensorStats

Arrays = Mapping[str, NDArray[Any]]
Place = Literal["none", "norm", "feed-forward", "massive"]

WIDTH, LAYERS, HEADS, SIDE, PATCH = 64, 4, 4, 32, 8
TOKENS = (SIDE // PATCH) ** 2 + 1
LEAST, MOST, CHANNELS = 50.0, 200.0, 3
_LAYER = "model.encoder.layers.{}."
# Of patches, positions, class token; the positions were gathered at export.
_EMBEDDINGS = ("model.embeddings.patch_embedding.weight", "embedding", "model.embeddings.class_embedding")
_BEHIND = {
    "layer_norm1": ("self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj"),
    "layer_norm2": ("mlp.fc1",),
}


def export_encoder(path: Path, *, seed: int = 0) -> Path:
    """Write the encoder without outliers to `path`: `pixel_values` `[B, 3, 32, 32]` to `image_embeds` `[B, 17, 64]`."""
    from tests.checkpoints import randomize
    from transformers import CLIPVisionConfig

    from bridgeport.export.graph import trace_and_save
    from bridgeport.models.clip import ClipEncoder
    from bridgeport.models.contract import StageContract
    from bridgeport.models.language import batch_axis, float_spec

    config = CLIPVisionConfig(
        hidden_size=WIDTH,
        intermediate_size=2 * WIDTH,
        num_hidden_layers=LAYERS,
        num_attention_heads=HEADS,
        image_size=SIDE,
        patch_size=PATCH,
    )
    module = ClipEncoder(config)
    randomize(module, seed)
    for layer in module.model.encoder.layers:
        # As trained ones are: each layer adds little to the residual stream. Else errors grow from layer to layer.
        for linear in (layer.self_attn.out_proj, layer.mlp.fc2):
            linear.weight.data.mul_(0.5)
    contract = StageContract(
        name="encoder",
        inputs=(float_spec("pixel_values", "batch", 3, SIDE, SIDE),),
        outputs=(float_spec("image_embeds", "batch", TOKENS, WIDTH),),
        axes=(batch_axis(),),
    )
    trace_and_save(module.eval(), contract, path)
    return path


def pictures(seed: int, count: int, batch: int = 2) -> list[dict[str, NDArray[Any]]]:
    """`count` inputs of the encoder: normal noise over a random flat colour."""
    rng = np.random.default_rng(seed)
    shape = (batch, 3, SIDE, SIDE)
    return [
        {"pixel_values": (rng.normal(size=shape) + rng.normal(size=(batch, 3, 1, 1))).astype(np.float32)}
        for _ in range(count)
    ]


def load(path: Path) -> ir.Model:
    """The graph with its weights in memory."""
    return ir.external_data.load_to_model(ir.load(path))


def session(model: ir.Model) -> Any:
    """ONNX Runtime without rewrites of its own, so that it computes what the graph says."""
    import onnxruntime

    options = onnxruntime.SessionOptions()
    options.graph_optimization_level = onnxruntime.GraphOptimizationLevel.ORT_DISABLE_ALL
    options.intra_op_num_threads = 1
    return onnxruntime.InferenceSession(ir.to_proto(model).SerializeToString(), options)


def outputs(model: ir.Model, inputs: Iterable[Arrays]) -> NDArray[Any]:
    """The first output over all `inputs`, end to end."""
    runner = session(model)
    return np.concatenate([runner.run(None, dict(one))[0] for one in inputs])


def plant(model: ir.Model, place: Place, *, seed: int = 0) -> ir.Model:
    """Plant outliers in the weights of `model`, in place."""
    rng = np.random.default_rng(seed)
    if place == "massive":
        _plant_massive(model, rng)
    for layer in range(LAYERS):
        prefix = _LAYER.format(layer)
        if place == "norm":
            for norm, linears in _BEHIND.items():
                _plant_in_norm(model, prefix + norm, [prefix + linear for linear in linears], rng)
        if place == "feed-forward":
            _plant_in_feed_forward(model, prefix, rng)
    return model


def _channels(rng: np.random.Generator, width: int) -> tuple[NDArray[Any], NDArray[Any]]:
    """Which channels, and how many times as large they become."""
    return rng.choice(width, CHANNELS, replace=False), rng.uniform(LEAST, MOST, CHANNELS).astype(np.float32)


def _plant_in_norm(model: ir.Model, norm: str, linears: list[str], rng: np.random.Generator) -> None:
    where, factor = _channels(rng, WIDTH)
    for name in (f"{norm}.weight", f"{norm}.bias"):
        array = _read(model, name)
        array[where] *= factor
        _write(model, name, array)
    for linear in linears:
        array = _read(model, f"{linear}.weight.transposed")
        array[where] /= factor[:, None]
        _write(model, f"{linear}.weight.transposed", array)


def _plant_in_feed_forward(model: ir.Model, prefix: str, rng: np.random.Generator) -> None:
    """Another function than before: the GELU of the larger values is not the larger GELU."""
    where, factor = _channels(rng, 2 * WIDTH)
    for name, turn in (("fc1.weight.transposed", np.s_[:, where]), ("fc1.bias", np.s_[where])):
        array = _read(model, f"{prefix}mlp.{name}")
        array[turn] *= factor
        _write(model, f"{prefix}mlp.{name}", array)
    array = _read(model, f"{prefix}mlp.fc2.weight.transposed")
    array[where] /= factor[:, None]
    _write(model, f"{prefix}mlp.fc2.weight.transposed", array)


def _plant_massive(model: ir.Model, rng: np.random.Generator) -> None:
    """The class token is told by a channel in which it is far outside of what patches reach."""
    prefix = _LAYER.format(0)
    mark, massive, unit = 0, int(rng.integers(1, WIDTH)), int(rng.integers(2 * WIDTH))
    patches, positions = (_read(model, name) for name in _EMBEDDINGS[:2])
    patches[mark], positions[..., mark] = 0.0, 0.0
    token = _read(model, _EMBEDDINGS[2])
    token.reshape(-1)[mark] = MOST
    for name, array in zip(_EMBEDDINGS, (patches, positions, token), strict=True):
        _write(model, name, array)
    for norm, gain in (("model.pre_layrnorm", 4.0), (f"{prefix}layer_norm2", 1.0)):
        for name, value in (("weight", gain), ("bias", 0.0)):
            array = _read(model, f"{norm}.{name}")
            array[mark] = value
            _write(model, f"{norm}.{name}", array)
    weight, bias = _read(model, f"{prefix}mlp.fc1.weight.transposed"), _read(model, f"{prefix}mlp.fc1.bias")
    weight[:, unit], bias[unit] = 0.0, -5.0 * MOST / 2
    weight[mark, unit] = MOST / 2  # the mark is above 7 in the class token and below 3 in patches
    _write(model, f"{prefix}mlp.fc1.weight.transposed", weight)
    _write(model, f"{prefix}mlp.fc1.bias", bias)
    out = _read(model, f"{prefix}mlp.fc2.weight.transposed")
    out[unit] = 0.0
    out[unit, massive] = 1.0
    _write(model, f"{prefix}mlp.fc2.weight.transposed", out)


def _read(model: ir.Model, name: str) -> NDArray[Any]:
    tensor = model.graph.initializers[name].const_value
    if tensor is None:
        raise KeyError(name)
    return tensor.numpy().copy()


def _write(model: ir.Model, name: str, array: NDArray[Any]) -> None:
    model.graph.initializers[name].const_value = ir.Tensor(array, name=name)


def stats_of(rows: NDArray[Any]) -> TensorStats:
    """What min-max observes of `rows` `[R, C]`."""
    low, high = float(rows.min()), float(rows.max())
    return TensorStats(low, high, {"minmax": TensorRange(low, high)}, rows.min(0), rows.max(0), rows)
