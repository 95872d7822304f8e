"""ONNX Runtime's TensorRT provider: what it is asked for, and what is said where it cannot run.

No session of it runs here: it needs a GPU. Its library is checked where onnxruntime-gpu is installed.
"""

from __future__ import annotations

import ctypes
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from bridgeport.bundle import Bundle
from bridgeport.errors import DependencyError, InputError
from bridgeport.runtime import onnxruntime as backend
from bridgeport.runtime.backends import EngineOptions, load_engines
from bridgeport.runtime.onnxruntime import tensorrt_provider as provider
from bridgeport.runtime.onnxruntime.loader import Device, import_onnxruntime

GetPath = Callable[[str], Path]
# Options that the library of onnxruntime-gpu 1.31.1 names.
KNOWN = {
    "device_id", "trt_auxiliary_streams", "trt_bf16_enable", "trt_build_heuristics_enable",
    "trt_builder_optimization_level", "trt_context_memory_sharing_enable", "trt_cuda_graph_enable",
    "trt_detailed_build_log", "trt_dla_core", "trt_dla_enable", "trt_dump_ep_context_model", "trt_dump_subgraphs",
    "trt_engine_cache_enable", "trt_engine_cache_path", "trt_engine_cache_prefix", "trt_engine_decryption_enable",
    "trt_engine_decryption_lib_path", "trt_engine_hw_compatible", "trt_ep_context_embed_mode",
    "trt_ep_context_file_path", "trt_force_sequential_engine_build", "trt_force_timing_cache", "trt_fp16_enable",
    "trt_int8_calibration_table_name", "trt_int8_enable", "trt_int8_use_native_calibration_table",
    "trt_layer_norm_fp32_fallback", "trt_load_user_initializer", "trt_max_partition_iterations",
    "trt_max_workspace_size", "trt_min_subgraph_size", "trt_onnx_model_folder_path", "trt_op_types_to_exclude",
    "trt_preview_features", "trt_profile_max_shapes", "trt_profile_min_shapes", "trt_profile_opt_shapes",
    "trt_sparsity_enable", "trt_tactic_sources", "trt_timing_cache_enable", "trt_timing_cache_path",
    "trt_weight_stripped_engine_enable",
}  # fmt: skip


@pytest.fixture(scope="module")
def bundle(blip2_bundle: GetPath) -> Bundle:
    return Bundle.load(blip2_bundle("llama-gqa-tied"))


def test_options_are_those_of_the_library(bundle: Bundle, tmp_path: Path) -> None:
    contract = bundle.manifest.stage("encoder").contract
    options = provider.provider_options(contract, Device("cuda", 1), tmp_path)
    assert set(options) <= KNOWN
    assert options["device_id"] == "1"
    assert options["trt_engine_cache_path"] == str(tmp_path)


@pytest.mark.parametrize(("precision", "flags"), [("fp32", []), ("fp16", ["fp16"]), ("int8", ["fp16", "int8"])])
def test_flags_are_those_that_the_graph_needs(precision: str, flags: list[str], bundle: Bundle, tmp_path: Path) -> None:
    """A weakly typed network with FP16 in it is refused without the flag; an INT8 stage is FP16 elsewhere."""
    contract = bundle.manifest.stage("encoder").contract
    options = provider.provider_options(contract, Device("cuda"), tmp_path, precision=precision)
    assert [kind for kind in ("fp16", "bf16", "int8") if options[f"trt_{kind}_enable"] == "True"] == flags


def test_the_profile_is_the_contract(bundle: Bundle, tmp_path: Path) -> None:
    contract = bundle.manifest.stage("encoder").contract
    options = provider.provider_options(contract, Device("cuda"), tmp_path)
    batch = contract.axis("batch")
    for bound, size in (("min", batch.min), ("opt", batch.opt), ("max", batch.max)):
        assert options[f"trt_profile_{bound}_shapes"] == f"pixel_values:{size}x3x28x28"
    fixed = contract.model_copy(
        update={"axes": (), "inputs": (contract.inputs[0].model_copy(update={"shape": (1, 3, 28, 28)}),)}
    )
    assert not any("profile" in name for name in provider.provider_options(fixed, Device("cuda"), tmp_path))


def test_a_library_of_onnxruntime_gpu_takes_these_options(bundle: Bundle, tmp_path: Path) -> None:
    import onnxruntime

    library = Path(onnxruntime.__file__).parent / "capi" / "libonnxruntime_providers_tensorrt.so"
    if not library.is_file():
        pytest.skip("needs onnxruntime-gpu: pip install onnxruntime-gpu, in an environment without onnxruntime")
    data = library.read_bytes()
    options = provider.provider_options(bundle.manifest.stage("encoder").contract, Device("cuda"), tmp_path)
    assert [name for name in options if name.encode() not in data] == []


def test_which_stages_it_takes(bundle: Bundle) -> None:
    taken = [s.contract.name for s in bundle.manifest.stages if provider.why_not(bundle, s.contract.name) is None]
    assert taken == ["encoder", "connector"]
    typed = "its fp8 needs a strongly typed network, which the engine tensorrt builds"
    for precision, target, reason in (
        ("int8", "cpu", "its int8 is made for cpu; quantise it for tensorrt"),
        ("int8", "tensorrt", None),
        ("fp16", "cuda", None),
        ("fp8", "tensorrt", typed),
        ("int4", "tensorrt", typed.replace("fp8", "int4")),
    ):
        stages = tuple(stage.model_copy(update={"precision": precision}) for stage in bundle.manifest.stages)
        manifest = bundle.manifest.model_copy(update={"stages": stages, "target": target})
        assert provider.why_not(Bundle(bundle.path, manifest), "encoder") == reason


def fake_onnxruntime(monkeypatch: pytest.MonkeyPatch, home: Path, *, linked: bytes, found: dict[str, int]) -> None:
    """An onnxruntime-gpu whose provider is linked against `linked`, on a machine with the libraries `found`."""
    genuine = import_onnxruntime()

    class Module:
        __file__ = str(home / "__init__.py")
        __version__ = genuine.__version__

        @staticmethod
        def get_available_providers() -> list[str]:
            return [provider.PROVIDER, "CUDAExecutionProvider", "CPUExecutionProvider"]

    (home / "capi").mkdir()
    (home / "capi" / "libonnxruntime_providers_tensorrt.so").write_bytes(b"\x7fELF..." + linked + b"\0more")

    class Library:
        def __init__(self, name: str, mode: int = 0) -> None:
            if name not in found:
                raise OSError(f"{name}: cannot open shared object file")
            assert mode == ctypes.RTLD_GLOBAL
            self.getInferLibVersion = lambda: found[name]

    monkeypatch.setattr(provider, "import_onnxruntime", lambda: Module)
    monkeypatch.setattr(ctypes, "CDLL", Library)


def test_the_library_that_is_wanted(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    both = {"libnvinfer.so.10": 101600, "libnvonnxparser.so.10": 101600}
    fake_onnxruntime(monkeypatch, tmp_path, linked=b"libnvinfer.so.10", found=both)
    assert provider.check_tensorrt() == "101600"


@pytest.mark.parametrize(
    ("found", "said"),
    [
        ({"libnvinfer.so.11": 110400}, "is linked against libnvinfer.so.10, found is libnvinfer.so.11; install"),
        ({}, "is linked against libnvinfer.so.10, found is no TensorRT; install TensorRT 10.x beside it"),
        ({"libnvinfer.so.10": 101600}, "found is libnvinfer.so.10 without its ONNX parser; install TensorRT 10.x"),
    ],
)
def test_another_library_than_the_wanted(
    found: dict[str, int], said: str, monkeypatch: pytest.MonkeyPatch, tmp_path: Path, bundle: Bundle
) -> None:
    fake_onnxruntime(monkeypatch, tmp_path, linked=b"libnvinfer.so.10", found=found)
    with pytest.raises(DependencyError, match=said):
        load_engines("onnxruntime-tensorrt", bundle, EngineOptions("cuda"))


def test_a_library_that_names_none(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    fake_onnxruntime(monkeypatch, tmp_path, linked=b"libcudart.so.13", found={})
    with pytest.raises(DependencyError, match="names no one TensorRT; install onnxruntime-gpu again"):
        provider.check_tensorrt()


def test_without_the_provider_or_a_gpu(bundle: Bundle) -> None:
    with pytest.raises(InputError, match="device 'cpu': the engine onnxruntime-tensorrt runs on a GPU"):
        load_engines("onnxruntime-tensorrt", bundle, EngineOptions())
    if provider.PROVIDER in import_onnxruntime().get_available_providers():
        pytest.skip("this onnxruntime has the provider; run `pytest -m gpu` for it")
    with pytest.raises(DependencyError, match=r"needs TensorrtExecutionProvider, which onnxruntime [\d.]+ here lacks"):
        load_engines("onnxruntime-tensorrt", bundle, EngineOptions("cuda"))


def test_sessions_and_their_caches(bundle: Bundle, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """Each stage's providers, and a cache that another TensorRT or another bundle does not share."""
    genuine, asked = backend.load_session, dict[str, Any]()

    def load(file: Path, device: Device, *, providers: Any = None, **settings: Any) -> Any:
        asked[str(file)] = providers
        return genuine(file, Device(), **settings)

    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    monkeypatch.setattr(provider, "check_tensorrt", lambda: "101600")
    monkeypatch.setattr(provider, "load_session", load)
    monkeypatch.setattr(backend, "load_session", load)
    for engine in load_engines("onnxruntime-tensorrt", bundle, EngineOptions("cuda", 1)).values():
        engine.close()
    first, *others = asked[str(bundle.graph("encoder"))]
    assert first[0] == "TensorrtExecutionProvider"
    assert others == [("CUDAExecutionProvider", {"device_id": "0"}), "CPUExecutionProvider"]
    assert asked[str(bundle.graph("llm"))] is None  # the CUDA engine's own
    caches = {
        provider.cache_directory(bundle, "encoder", "101600"),
        provider.cache_directory(bundle, "connector", "101600"),
        provider.cache_directory(bundle, "encoder", "101300"),
        provider.cache_directory(
            Bundle(bundle.path, bundle.manifest.model_copy(update={"files": bundle.manifest.files[1:]})),
            "encoder",
            "101600",
        ),
    }
    assert len(caches) == 4
    assert Path(first[1]["trt_engine_cache_path"]) in caches
    assert Path(first[1]["trt_engine_cache_path"]).is_dir()
