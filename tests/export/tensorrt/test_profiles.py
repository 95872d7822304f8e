"""Optimization profiles: the contract's ranges, narrowed by the command line and by nothing else."""

from __future__ import annotations

import pytest
from tests.export.tensorrt.bundles import write_bundle

from bridgeport.bundle import Bundle
from bridgeport.errors import InputError
from bridgeport.export.tensorrt.profiles import bundle_profiles, narrow_contract, parse_profiles


@pytest.fixture(scope="module")
def bundle(tmp_path_factory: pytest.TempPathFactory) -> Bundle:
    return write_bundle(tmp_path_factory.mktemp("profiles") / "bundle")


def test_without_a_request_the_contract_holds(bundle: Bundle) -> None:
    plans = bundle_profiles(bundle.manifest)
    (encoder,) = plans["encoder"]
    assert encoder.shapes == {"pixel_values": ((1, 3, 4, 4), (1, 3, 4, 4), (8, 3, 4, 4))}
    assert plans["embed_tokens"][0].axes == {"batch": (1, 1, 8), "sequence": (1, 16, 64)}


def test_a_language_model_has_prefill_and_decode(bundle: Bundle) -> None:
    prefill, decode = bundle_profiles(bundle.manifest)["llm"]
    assert (prefill.name, decode.name) == ("prefill", "decode")
    assert prefill.axes["past_sequence"] == (0, 0, 0)
    assert prefill.shapes["past_key_values.0.key"] == ((1, 1, 0, 8), (1, 1, 0, 8), (8, 1, 0, 8))
    assert prefill.shapes["attention_mask"] == ((1, 1), (1, 16), (8, 64))
    assert decode.shapes["inputs_embeds"] == ((1, 1, 8), (1, 1, 8), (8, 1, 8))
    assert decode.shapes["past_key_values.0.value"] == ((1, 1, 1, 8), (1, 1, 15, 8), (8, 1, 63, 8))
    assert decode.shapes["attention_mask"] == ((1, 2), (1, 16), (8, 64))


def test_requests_narrow_and_are_profiles_in_their_order(bundle: Bundle) -> None:
    plans = bundle_profiles(bundle.manifest, ["batch=1 sequence=1,8,32", "batch=2,4,8 sequence=1,8,32"])
    assert [one.axes["batch"] for one in plans["encoder"]] == [(1, 1, 1), (2, 4, 8)]
    assert [one.name for one in plans["llm"]] == ["prefill", "decode", "prefill", "decode"]
    assert plans["llm"][0].shapes["inputs_embeds"] == ((1, 1, 8), (1, 8, 8), (1, 32, 8))
    contract = narrow_contract(bundle.manifest.stage("llm").contract, plans["llm"])
    sizes = {axis.name: (axis.min, axis.opt, axis.max) for axis in contract.axes}
    assert sizes == {"batch": (1, 1, 8), "sequence": (1, 8, 32), "total_sequence": (1, 8, 64)}


def test_a_request_for_one_stage(bundle: Bundle) -> None:
    plans = bundle_profiles(bundle.manifest, ["batch=1,1,4 encoder.batch=1,2,8", "batch=1,1,2 encoder.batch=1,2,8"])
    assert [one.axes["batch"] for one in plans["encoder"]] == [(1, 2, 8)]  # the same profile twice is one
    assert [one.axes["batch"] for one in plans["connector"]] == [(1, 1, 4), (1, 1, 2)]


@pytest.mark.parametrize(
    ("texts", "said"),
    [
        (["batch"], "'batch' is not AXIS=MIN,OPT,MAX; write one profile as"),
        (["batch=1,4"], "'batch=1,4' is not AXIS=MIN,OPT,MAX"),
        (["batch=1, 4, 8"], "'batch=1,' is not AXIS=MIN,OPT,MAX"),
        (["batch=-1,4,8"], "is not AXIS=MIN,OPT,MAX"),
        (["batch=4,1,8"], "needs MIN <= OPT <= MAX"),
        (["batch=0"], "MAX of 1 or more"),
        ([""], "names no axis"),
        (["batch=1 batch=2"], "names batch twice"),
        (["batch=1", "sequence=1,8,32"], "names batch once and sequence another time: each --profile is a profile"),
        (["bacth=1"], "no stage has the axis 'bacth'; there are encoder: batch; connector: batch; embed_tokens: batch"),
        (["encoder.sequence=1"], "no stage has the axis 'encoder.sequence'"),
        (["batch=1,4,9"], "batch=1,4,9 is outside of what stage encoder was exported for, 1 to 8"),
        (["batch=0,1,8"], "batch=0,1,8 is outside of what stage encoder was exported for"),
    ],
)
def test_bad_requests_are_refused(texts: list[str], said: str, bundle: Bundle) -> None:
    with pytest.raises(InputError) as refused:
        bundle_profiles(bundle.manifest, texts)
    assert said in str(refused.value)


def test_one_number_stands_for_all_three() -> None:
    assert parse_profiles(["batch=4"])[0].ranges == {"batch": (4, 4, 4)}
