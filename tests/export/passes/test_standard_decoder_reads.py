"""The standard form of decoders that read an encoder (T5) or pictures (Flamingo) beside their tokens."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import onnx_ir as ir
import pytest
from tests.checkpoints_idefics import IDEFICS_CONFIGS, write_idefics_checkpoint
from tests.checkpoints_t5 import T5_CONFIGS, exported_t5
from tests.export.graphs import make_model, run, weight
from tests.export.passes.test_standard_decoder import (
    LENGTHS,
    OF_LARGEST,
    Exported,
    check_logits,
    exported,
    run_original,
    run_standard,
    standardize,
)

from bridgeport.calibration.rules import check_rules
from bridgeport.errors import ExportError
from bridgeport.export.graph import save_graph
from bridgeport.export.llm.flamingo import export_flamingo_decoder
from bridgeport.export.passes import apply_passes
from bridgeport.export.passes.standard_decoder import standard_decoder_passes
from bridgeport.export.passes.standard_decoder_places import WholeNumberClip
from bridgeport.models import load_checkpoint
from bridgeport.models.contract import StageContract
from bridgeport.models.idefics import FlamingoDecoder, flamingo_contract

# What else the rows read: tokens of an encoder (the last row's end is padding), or three pictures.
ENCODED, IMAGES = 6, 3
# "odd" has heads that the operator does not turn: the graph turns them itself.
CASES = [*(f"t5-{name}" for name in T5_CONFIGS), *(f"idefics-{name}" for name in IDEFICS_CONFIGS)]


def beside(contract: StageContract, latents: int) -> tuple[dict[str, Any], dict[str, Any]]:
    """Random inputs that are neither tokens nor mask, of the prompts and of a step."""
    random = np.random.default_rng(2)
    sizes = {"batch": len(LENGTHS), "images": IMAGES, "image_sequence": IMAGES * latents, "encoder_sequence": ENCODED}
    found: list[dict[str, Any]] = []
    for tokens in (max(LENGTHS), 1):
        feed: dict[str, Any] = {}
        for spec in contract.inputs[3:]:
            shape = [dim if isinstance(dim, int) else {**sizes, "sequence": tokens}[dim] for dim in spec.shape]
            if spec.dtype == "int64":
                feed[spec.name] = np.ones(shape, np.int64)
                feed[spec.name][-1, ..., -1] = 0
            else:
                feed[spec.name] = random.normal(size=shape).astype(np.float32)
        found.append(feed)
    found[1] |= {name: array for name, array in found[0].items() if name in found[1] and array.ndim == 4}
    return found[0], found[1]


@pytest.fixture(scope="module")
def case_of(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], Exported]:
    """The decoder of a name, exported and brought to its standard form once."""
    done: dict[str, Exported] = {}

    def get(name: str) -> Exported:
        if name not in done:
            directory = tmp_path_factory.mktemp(name)
            kind, _, config = name.partition("-")
            original, latents = directory / "decoder.onnx", 0
            if kind == "t5":
                t5 = exported_t5(config)
                contract, cache, original = t5.layout.contracts["llm"], t5.kv_cache, t5.decoder
            else:
                model = load_checkpoint(write_idefics_checkpoint(directory / "ck", **IDEFICS_CONFIGS[config]))
                assert model.kv_cache is not None
                contract, cache, flamingo = (
                    model.contracts["llm"],
                    model.kv_cache,
                    flamingo_contract(model.config, None),
                )
                latents, stage = flamingo.latents, model.load_stage("llm")
                assert isinstance(stage, FlamingoDecoder)
                export_flamingo_decoder(stage, contract, cache, flamingo, original, precision="fp32")
            width = int(contract.input("inputs_embeds").shape[2])
            standard = standardize(original, directory / "standard.onnx")
            done[name] = replace(exported(original, standard, cache, width), more=beside(contract, latents))
        return done[name]

    return get


@pytest.mark.slow
@pytest.mark.parametrize("name", CASES)
def test_logits_are_those_of_the_original(case_of: Callable[[str], Exported], name: str) -> None:
    """Prompts of different length, so that padding lies in the cache, and steps behind them."""
    case = case_of(name)
    check_logits(case, name)
    onnx.checker.check_model(str(case.standard), full_check=True)
    model = ir.load(case.standard)
    assert {node.domain for node in model.graph} == {""}
    assert not [node for node in model.graph if node.op_type == "Clip"]
    assert not [one for one in check_rules(model, precision="fp32") if one.severity == "error"]


@pytest.mark.slow
@pytest.mark.parametrize("name", ["t5-odd", "idefics-odd"])
def test_wrong_positions_are_found(case_of: Callable[[str], Exported], name: str, tmp_path: Path) -> None:
    """Every token at position 0."""
    case = case_of(name)
    model = ir.load(case.standard)
    positions = next(node for node in model.graph if node.name == "decoder_mask/positions")
    positions.replace_input_with(1, positions.inputs[0])
    save_graph(model, tmp_path / "wrong.onnx")
    found, expected = run_standard(tmp_path / "wrong.onnx", case), run_original(case.original, case)
    off = max(np.abs(a - b).max() for a, b in zip(found, expected, strict=True))
    assert off > 100 * OF_LARGEST * max(np.abs(one).max() for one in expected)


@pytest.mark.slow
def test_a_decoder_that_reads_the_mask_in_another_way_is_refused(case_of: Callable[[str], Exported]) -> None:
    model = ir.load(case_of("t5-odd").original)
    mask = next(value for value in model.graph.inputs if value.name == "attention_mask")
    node = ir.node("Cast", [mask], {"to": ir.DataType.FLOAT}, name="my_positions")
    node.outputs[0].name, node.outputs[0].type = "seen", ir.TensorType(ir.DataType.FLOAT)
    model.graph.append(node)
    model.graph.outputs.append(node.outputs[0])
    with pytest.raises(ExportError, match=r"\['my_positions'\] read the mask by themselves"):
        apply_passes(model, standard_decoder_passes(), stage="llm")


@pytest.mark.parametrize("bounds", [("low", "high"), ("", "high"), ("low",)])
def test_a_clip_of_whole_numbers(bounds: tuple[str, ...]) -> None:
    numbers = ir.Value(name="x", type=ir.TensorType(ir.DataType.INT64), shape=ir.Shape([None]))
    limits = {"low": np.array(-2, np.int64), "high": np.array(5, np.int64)}
    given = [weight(name, limits[name]) if name else None for name in bounds]
    node = ir.node("Clip", [numbers, *given], name="clip")
    node.outputs[0].name, node.outputs[0].type = "y", ir.TensorType(ir.DataType.INT64)
    model = make_model([numbers], list(node.outputs), [node], 20)
    feed = {"x": np.arange(-5, 9)}
    expected = run(model, feed)
    model, _ = apply_passes(model, [WholeNumberClip()], stage="llm")
    assert {node.op_type for node in model.graph} <= {"Max", "Min"}
    np.testing.assert_array_equal(run(model, feed)[0], expected[0])
