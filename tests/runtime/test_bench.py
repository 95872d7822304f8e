"""The benchmark: its arithmetic on made-up rounds, and one real run beside PyTorch."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest

from bridgeport.cli import main
from bridgeport.errors import EngineError, InputError
from bridgeport.runtime.bench import Contestant, bench
from bridgeport.runtime.bench.peers import Job
from bridgeport.runtime.bench.report import BenchReport, PeerResult, Round
from bridgeport.runtime.processor import PictureTensors

FEATURES = np.ones((1, 2, 4), np.float32)


def rounds(*encoder_ms: float, token_ids: tuple[int, ...] = (5, 6, 7), peak: int = 2**20) -> tuple[Round, ...]:
    return tuple(
        Round({"encoder": ms / 1e3, "connector": 1e-3, "prefill": 1e-3, "decode": 4e-3}, token_ids, peak)
        for ms in encoder_ms
    )


def report(ours: PeerResult, theirs: PeerResult) -> BenchReport:
    return BenchReport((ours, theirs), threads=2, new_tokens=3, prompt_tokens=9)


def test_ratios_are_taken_within_rounds_so_that_a_slow_round_cancels_out() -> None:
    ours = PeerResult("Bridgeport FP32", "bridgeport", rounds(10, 100, 10), FEATURES)
    theirs = PeerResult("PyTorch FP32", "torch", rounds(20, 200, 20), FEATURES)
    document = report(ours, theirs).to_json()
    assert document["baseline"] == "PyTorch FP32"
    mine, reference = document["peers"]
    assert mine["speed_up"]["encoder"] == pytest.approx(2.0)
    assert reference["speed_up"]["total"] == pytest.approx(1.0)
    assert mine["median_ms"]["total"] == pytest.approx(16.0)
    assert mine["decode_ms_per_token"] == pytest.approx(2.0), "two steps follow the prefill's token"
    assert mine["peak_mib"] == 1.0


def test_wrong_outputs_show() -> None:
    turned = FEATURES.copy()
    turned[0, 1] = [1, 1, -1, -1]
    ours = PeerResult("Bridgeport FP32", "bridgeport", rounds(10, token_ids=(5, 9, 7)), turned)
    theirs = PeerResult("PyTorch FP32", "torch", rounds(10), FEATURES)
    agreement = report(ours, theirs).agreement(ours)
    assert agreement is not None
    assert agreement["equal_leading_tokens"] == 1
    assert agreement["min_token_cosine"] == pytest.approx(0.0)
    assert agreement["max_abs"] == 2.0


def test_bench_beside_torch(small_bundle: Path, capsys: pytest.CaptureFixture[str]) -> None:
    from bridgeport.models.small import checkpoint_path

    arguments = ["bench", str(small_bundle), "--against", "torch", "--reference", str(checkpoint_path())]
    assert main([*arguments, "--new-tokens", "5", "--rounds", "2", "--threads", "1", "--json"]) == 0
    document = json.loads(capsys.readouterr().out)
    ours, theirs = document["peers"]
    assert (ours["label"], theirs["label"]) == ("Bridgeport FP32", "PyTorch FP32")
    assert ours["agreement"]["equal_leading_tokens"] == 5
    assert ours["agreement"]["min_token_cosine"] > 1 - 1e-6
    assert all(value > 0 for value in ours["median_ms"].values())
    assert theirs["peak_mib"] > ours["peak_mib"] > 10, "a process with torch in it is the larger one"


def test_without_the_checkpoint_torch_runs_random_weights_and_outputs_are_not_compared(
    small_bundle: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    arguments = ["bench", str(small_bundle), "--against", "torch", "--new-tokens", "3", "--rounds", "1"]
    assert main([*arguments, "--threads", "1", "--json"]) == 0
    ours, theirs = json.loads(capsys.readouterr().out)["peers"]
    assert theirs["label"] == "PyTorch FP32, random weights"
    assert ours["agreement"] is theirs["agreement"] is None
    assert ours["speed_up"]["total"] > 0


def test_unknown_peer_is_named(small_bundle: Path) -> None:
    with pytest.raises(InputError, match="'tensorflow' is not a peer; known are bridgeport, "):
        bench(small_bundle, against=["tensorflow"])


def test_a_peer_that_cannot_start_says_why(tmp_path: Path) -> None:
    from bridgeport.runtime.bench import measure

    picture = PictureTensors({"pixel_values": np.zeros((1, 3, 8, 8), np.float32)}, (2,), np.arange(2))
    job = Job(picture, np.zeros((1, 4), np.int64), np.arange(2), 2)
    with pytest.raises(EngineError, match=r"the peer 'Nobody' stopped: .*does not exist"):
        measure([Contestant("Nobody", "bridgeport", tmp_path / "none")], job, rounds=1, threads=1)
