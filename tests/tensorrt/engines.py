"""Bundles whose engines the double built, and one stage of its own, for the tests of the TensorRT engine class."""

from __future__ import annotations

import shutil
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
from tests.tensorrt.cuda_double import CudaDouble, install_cuda_double
from tests.tensorrt.double import TensorRtDouble, install_double
from tests.tensorrt.small_model import build

from bridgeport._version import __version__
from bridgeport.bundle import Bundle, sha256, write_manifest
from bridgeport.engine_record import BuildOptions, EngineProfile, EngineRecord, MachineRecord
from bridgeport.export.tensorrt.profiles import bundle_profiles, narrow_contract
from bridgeport.manifest import StageRecord
from bridgeport.models.contract import Axis, StageContract, TensorSpec
from bridgeport.runtime.tensorrt import loader
from bridgeport.runtime.tensorrt.api import Api, load_api
from bridgeport.runtime.tensorrt.device import Device
from bridgeport.runtime.tensorrt.loader import LoadedEngine
from bridgeport.runtime.tensorrt.memory import load_cuda
from bridgeport.runtime.tensorrt.runner import TensorRtEngine

MACHINE = MachineRecord(
    platform="linux-x86_64",
    gpu="NVIDIA L4",
    compute_capability="8.9",
    memory=24 << 30,
    tensorrt="11.4.0.106",
    cuda="13.0",
    driver="580.65.06",
)


@dataclass
class Doubles:
    """Both doubles of a test, `api` over the first."""

    tensorrt: TensorRtDouble
    cuda: CudaDouble
    api: Api


def install_doubles(monkeypatch: pytest.MonkeyPatch, tmp_path: Path, version: str = "11.4", **knobs: Any) -> Doubles:
    """The doubles, a machine that fits them, and no child process: `test_engine_loader.py` starts the real one."""
    double = install_double(monkeypatch, version, sm="8.9")
    cuda = install_cuda_double(monkeypatch, double, **knobs)
    api = load_api()
    machine = MACHINE.model_copy(update={"tensorrt": str(api.version)})
    monkeypatch.setattr(loader, "find_machine", lambda *_, **__: machine)
    monkeypatch.setattr(loader, "_run_trial", lambda _: None)
    monkeypatch.setenv("BRIDGEPORT_CACHE", str(tmp_path / "cache"))
    return Doubles(double, cuda, api)


def write_engines(source: Bundle, folder: Path, api: Api, *, profiles: Sequence[str] = (), **options: Any) -> Bundle:
    """A copy of `source` with an engine for each stage, as `bridgeport build` writes it."""
    shutil.copytree(source.path, folder)
    chosen = BuildOptions(**options)
    records = []
    plans = bundle_profiles(source.manifest, profiles)
    for stage in source.manifest.stages:
        mine = plans[stage.contract.name]
        file = str(Path(stage.file).with_suffix(".plan"))
        plan = build(api, folder / stage.file, *chosen.flags(), profiles=[one.shapes for one in mine])
        (folder / file).write_bytes(plan)
        records.append(_with_engine(stage, file, mine, api, folder, chosen))
    update = {"stages": tuple(records), "target": "tensorrt"}
    return Bundle(folder, write_manifest(folder, source.manifest.model_copy(update=update)))


def _with_engine(
    stage: StageRecord,
    file: str,
    profiles: tuple[EngineProfile, ...],
    api: Api,
    folder: Path,
    options: BuildOptions,
) -> StageRecord:
    engine = EngineRecord(
        file=file,
        machine=MACHINE.model_copy(update={"tensorrt": str(api.version)}),
        profiles=profiles,
        precision=stage.precision,
        sources={stage.file: sha256(folder / stage.file)},
        flags=options.flags(),
        options=options,
        bridgeport_version=__version__,
    )
    contract = narrow_contract(stage.contract, profiles)
    return stage.model_copy(update={"engine": engine, "format": "tensorrt", "contract": contract})


def make_stage(api: Api, model: Path, profiles: Any, *flags: str, rows: int = 8, graphs: bool = True) -> Any:
    """The stage `y = x @ WEIGHT` of `small_model.py`, `x` of up to `rows` rows, on a device of its own."""
    x = TensorSpec(name="x", dtype="float32", shape=("batch", 3))
    y = TensorSpec(name="y", dtype="float32", shape=("batch", 2))
    contract = StageContract(
        name="encoder", inputs=(x,), outputs=(y,), axes=(Axis(name="batch", min=1, opt=2, max=rows),)
    )
    runtime = api.create_runtime()
    engine = api.deserialize(runtime, build(api, model, *flags, profiles=profiles))
    record: Any = None  # read by the loader alone
    loaded = LoadedEngine(record, engine, runtime)
    return TensorRtEngine(contract, api, loaded, Device(load_cuda()), graphs=graphs)
