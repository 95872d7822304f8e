"""Memory counted on graphs small enough to count by hand, and devices against what they can do."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import onnx_ir as ir
import pytest
from tests.export.preflight.stages import manifest, record, write_graph

from bridgeport.bundle import Bundle
from bridgeport.errors import InputError
from bridgeport.export.preflight.devices import (
    MIB,
    Device,
    check_precisions,
    check_reports,
    check_version_on,
    devices,
    find_device,
    supports,
    tables,
)
from bridgeport.export.preflight.liveness import activations, weight_bytes
from bridgeport.export.preflight.memory import (
    MemoryEstimate,
    StageMemory,
    check_memory,
    estimate_bundle,
    estimate_stage,
)
from bridgeport.runtime.tensorrt.versions import Version

# a and b are alive together, then b and c; r is a view of c. Rows are 4 floats, that is 16 bytes.
CHAIN = """a = Exp(x) b = Abs(a) c = Neg(a) shape = Constant<value_ints = [-1, 2]>() r = Reshape(c, shape)
    back = Constant<value_ints = [-1, 4]>() s = Reshape(r, back) y = Add(b, s)"""
WIDE = """w = Constant<value_floats = [1.0, 2.0, 3.0]>() one = Constant<value_ints = [1]>() u = Unsqueeze(x, one)
    shape = Constant<value_ints = [1, 64, 1]>() t = Expand(u, shape) axes = Constant<value_ints = [1]>()
    y = ReduceSum<keepdims = 0>(t, axes)"""


def test_liveness_of_a_chain(tmp_path: Path) -> None:
    found = activations(write_graph(tmp_path, CHAIN), {"x": (10, 4)}, {"batch": 10})
    # Exp, Abs and Neg are alive at Neg; views take nothing, and y is the caller's.
    assert (found.peak, found.largest, found.unknown) == (3 * 160, 160, 0)


def test_activations_follow_the_sizes_and_name_the_largest(tmp_path: Path) -> None:
    path = write_graph(tmp_path, WIDE)
    small, large = (activations(path, {"x": (batch, 4)}, {"batch": batch}) for batch in (1, 8))
    assert small.largest == 64 * 16
    assert large.largest == 8 * small.largest


def test_a_shape_that_is_not_found_is_told(tmp_path: Path) -> None:
    body = (
        "n = NonZero(x) f = Cast<to = 1>(n) axes = Constant<value_ints = [1]>() m = ReduceMax(f, axes) y = Identity(x)"
    )
    assert activations(write_graph(tmp_path, body), {"x": (2, 4)}, {"batch": 2}).unknown == 2


def test_weights_by_type() -> None:
    values = [
        ir.Value(name=name, const_value=ir.tensor([1, 2, 3], dtype=dtype))
        for name, dtype in (("f", ir.DataType.FLOAT), ("h", ir.DataType.FLOAT16), ("q", ir.DataType.INT8))
    ]
    graph = ir.Graph([], [], nodes=[], initializers=values, opset_imports={"": 20})
    assert weight_bytes(ir.Model(graph, ir_version=10)) == {"float": 12, "float16": 6, "int8": 3}


def test_a_decoder_is_counted_with_its_cache(blip2_bundle: Callable[[str], Path]) -> None:
    bundle = Bundle.load(blip2_bundle("llama"))
    llm, cache = bundle.manifest.stage("llm"), bundle.manifest.kv_cache
    assert cache is not None
    batch, total = llm.contract.axis("batch").max, llm.contract.axis("total_sequence").max
    one_side = 2 * cache.num_layers * cache.num_heads * cache.head_size * batch * 4
    found = estimate_stage(llm, bundle.manifest, bundle.graph("llm"))
    assert found.cache_max == one_side * total
    apart = bundle.manifest.model_copy(update={"kv_cache": cache.model_copy(update={"shared_buffer": False})})
    # Past and present are two buffers then, the past one token shorter.
    assert estimate_stage(llm, apart, bundle.graph("llm")).cache_max == one_side * (2 * total - 1)
    stored = sum(file.stat().st_size for file in (bundle.path / "llm").glob("decoder.onnx*"))
    assert 0.9 * stored < found.weights_total <= stored
    assert found.build_least > 2 * found.weights_total
    assert found.build_most > found.build_least


def memory(weights: int, *, run: int = 0) -> MemoryEstimate:
    """Of one stage with `weights` MiB and activations of `run` MiB at max."""
    total = weights * MIB
    stage = StageMemory("llm", {"float16": total}, 0, run * MIB, 0, 0, 0, 0, 0, 2 * total, 3 * total + run * MIB, 0)
    return estimate_bundle([stage])


def checks(estimate: MemoryEstimate, device: Device) -> dict[str, str]:
    """Check -> severity."""
    full = estimate_bundle(estimate.stages, device)
    return {one.check: one.severity for one in check_memory(full, device)}


def test_too_little_memory() -> None:
    nano = find_device("orin-nano")
    assert checks(memory(100), nano) == {"build-settings": "note"}
    assert checks(memory(7000), nano) == {"memory": "error", "build-memory": "warning", "build-settings": "note"}
    assert checks(memory(100, run=7000), nano) == {
        "memory": "warning",
        "build-memory": "warning",
        "build-settings": "note",
    }
    assert checks(memory(2500), nano)["build-memory"] == "warning"
    assert checks(memory(7000), find_device("h200")) == {}


def test_settings_of_small_boards() -> None:
    nano = find_device("orin-nano")
    light, heavy = (estimate_bundle(memory(weights).stages, nano).settings for weights in (100, 2900))
    assert light is not None
    assert (light.workspace_mib, light.tactic_dram_mib, light.builder_optimization_level) == (1024, 2048, 2)
    assert not light.unload_others
    # 6144 MiB are left, less twice 2900: a quarter and half of 344, down to powers of two.
    assert heavy is not None
    assert (heavy.workspace_mib, heavy.tactic_dram_mib, heavy.unload_others) == (64, 128, True)
    assert estimate_bundle(memory(100).stages, find_device("agx-orin")).settings is None
    assert estimate_bundle(memory(100).stages, find_device("l4")).settings is None
    text = [one.fix for one in check_memory(estimate_bundle(memory(2900).stages, nano), nano)][-1]
    assert "WORKSPACE to 64 MiB" in text
    assert "with the other stages unloaded" in text


PRECISIONS = [
    ("orin-nano", "fp8", "error"),
    ("agx-orin", "fp8", "error"),
    ("agx-orin", "bf16", None),
    ("agx-orin", "int8", None),
    ("agx-orin", "int4", "warning"),
    ("a10", "fp8", "error"),
    ("l4", "fp8", None),
    ("h200", "fp8", None),
    ("h200", "fp4", "error"),
    ("thor", "fp4", None),
    ("l4", "fp32", None),
]


@pytest.mark.parametrize(("device", "precision", "severity"), PRECISIONS)
def test_precisions(device: str, precision: str, severity: str | None) -> None:
    found = [one.severity for one in check_precisions(find_device(device), [("llm", precision)])]
    assert found == ([] if severity is None else [severity])


def test_what_somebody_reports_is_a_warning_there_alone() -> None:
    def found(device: str, version: str, precision: str = "fp16", stage: str = "llm") -> list[str]:
        pairs = [(stage, precision)]
        return [one.severity for one in check_reports(find_device(device), Version.parse(version), pairs)]

    assert found("thor", "10.13.3") == ["warning"]
    others = [found("thor", "10.16"), found("agx-orin", "10.13"), found("thor", "10.13", "fp32")]
    assert [*others, found("thor", "10.13", stage="encoder")] == [[], [], [], []]


VERSIONS = [
    ("orin-nano", "10.3", None),
    ("orin-nano", "10.13", "error"),
    ("orin-nano", "10.16.2", None),
    ("orin-nano", "11.4", "error"),
    ("orin-nano", "11.4.1", "warning"),
    ("agx-orin", "11.4.1", None),
    ("agx-orin", "11.4.0.106", "error"),
    ("thor", "10.3", "error"),
    ("thor", "10.13.3", None),
    ("thor", "11.0", "error"),
    ("h200", "10.3", None),
    ("h200", "11.4", None),
]


@pytest.mark.parametrize(("device", "version", "severity"), VERSIONS)
def test_versions_on_devices(device: str, version: str, severity: str | None) -> None:
    found = [one.severity for one in check_version_on(find_device(device), Version.parse(version))]
    assert found == ([] if severity is None else [severity])


def test_every_device_has_a_source_and_room() -> None:
    for device in devices().values():
        assert device.source
        assert 0 < device.usable_bytes < device.memory_gib * 2**30
        assert supports(device, "fp16")
    for row in (*tables()["precisions"].values(), *tables()["jetpacks"], *tables()["reports"]):
        assert row["source"]


def test_an_unknown_device_lists_the_known() -> None:
    with pytest.raises(InputError, match=r"device 'orin' is unknown; accepted are .*orin-nano, .*h200"):
        find_device("orin")


def test_a_stage_without_a_cache(tmp_path: Path) -> None:
    found = estimate_stage(record(), manifest(), write_graph(tmp_path, CHAIN))
    assert (found.io_opt, found.io_max) == (2 * 2 * 16, 2 * 8 * 16)
    assert found.cache_max == 0
    assert found.activations_max == 4 * found.activations_opt
    assert replace(found, weights={"float": 3, "int64": 4}).weights_total == 7
