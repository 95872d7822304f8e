"""Mixed precision against an exhaustive search, and its picture."""

from __future__ import annotations

import itertools
from collections.abc import Callable
from pathlib import Path

import pytest
from PIL import Image

from bridgeport.calibration.pareto import pareto_front, pareto_markdown, pareto_rows, write_pareto
from bridgeport.calibration.search import MixedPlan, MixedPoint, search_mixed
from bridgeport.calibration.sensitivity import LayerDamage
from bridgeport.errors import CalibrationError, InputError

Keep = frozenset[str]
# Layer i has the node "n<i>", and the second one two nodes.
LOSSES = (0.001, 0.04, 0.002, 0.0005, 0.01, 0.0001, 0.003, 0.0)
SAVED = (1.0, 2.0, 4.0, 1.0, 0.5, 8.0, -0.5, 2.0)


def layers() -> list[LayerDamage]:
    found = [LayerDamage(i, (f"n{i}",), f"layers.{i}", loss, loss / 10) for i, loss in enumerate(LOSSES)]
    found[1] = LayerDamage(1, ("n1", "n1b"), "layers.1", LOSSES[1], LOSSES[1])
    return sorted(found, key=lambda one: -one.cosine_loss)


def times() -> dict[str, float]:
    saved = {f"n{i}": ms for i, ms in enumerate(SAVED)}
    return saved | {"n1": 1.5, "n1b": 0.5}


def additive(keep: Keep) -> float:
    return 1.0 - sum(loss for i, loss in enumerate(LOSSES) if f"n{i}" not in keep)


def search(
    min_cosine: float = 0.99,
    evaluate: Callable[[Keep], float] = additive,
    *,
    damages: list[LayerDamage] | None = None,
    verify: Callable[[Keep], float] | None = None,
    measure: Callable[[Keep], float] | None = None,
) -> MixedPlan:
    return search_mixed(
        layers() if damages is None else damages,
        times(),
        evaluate,
        min_cosine=min_cosine,
        quantised_ms=10.0,
        verify=verify,
        measure=measure,
    )


def chosen(plan: MixedPlan) -> MixedPoint:
    assert plan.chosen is not None
    return plan.chosen


def best_of_all(min_cosine: float) -> float:
    """Least latency of all 256 sets; layers are kept with all their nodes."""
    latencies = []
    for kept in itertools.product((False, True), repeat=len(LOSSES)):
        loss = sum(one for one, keep in zip(LOSSES, kept, strict=True) if not keep)
        if 1.0 - loss >= min_cosine:
            latencies.append(10.0 + sum(ms for ms, keep in zip(SAVED, kept, strict=True) if keep))
    return min(latencies)


def test_no_latency_is_below_zero() -> None:
    """Layers timed alone on a busy machine seemed to cost more in 8 bits than the whole stage takes."""
    saved = dict.fromkeys(times(), -20.0)
    plan = search_mixed(layers(), saved, additive, min_cosine=0.99, quantised_ms=10.0)
    assert [one.latency_ms for one in plan.points] == [0.0]


@pytest.mark.parametrize("min_cosine", [0.9, 0.96, 0.98, 0.99, 0.995, 0.9985, 0.9999])
def test_the_least_latency_that_keeps_the_budget(min_cosine: float) -> None:
    plan = search(min_cosine)
    assert chosen(plan).cosine >= min_cosine
    assert chosen(plan).latency_ms == pytest.approx(best_of_all(min_cosine))
    assert chosen(plan).cosine == additive(frozenset(chosen(plan).keep))


def test_nothing_is_kept_but_what_saves_no_time_when_the_budget_allows() -> None:
    plan = search(0.5)
    assert chosen(plan).keep == ("n6",)
    assert chosen(plan).latency_ms == 9.5
    assert len(plan.points) == 1


def test_the_order_is_damage_for_time() -> None:
    """layers.1 and layers.4 harm as much for each millisecond, so the order of the graph decides."""
    expected = [1, 4, 0, 2, 3, 5, 7]
    assert search().order == tuple(f"layers.{i}" for i in expected)


def test_a_layer_that_is_not_needed_is_quantised_after_all() -> None:
    """Alone layers.2 harms; next to the others it does not, and it is the one that costs most time to keep."""

    def together(keep: Keep) -> float:
        needed = {"n1", "n1b", "n4", "n0", "n3"}
        return 1.0 if needed <= keep else 0.5

    plan = search(0.9, together)
    assert chosen(plan).keep == ("n0", "n1", "n1b", "n3", "n4", "n6")


def test_each_set_is_evaluated_once_and_few_are() -> None:
    seen: list[Keep] = []

    def counted(keep: Keep) -> float:
        seen.append(keep)
        return additive(keep)

    many = [LayerDamage(i, (f"n{i}",), str(i), 1.0 / (i + 1), 0.0) for i in range(128)]
    search_mixed(
        many, {f"n{i}": 1.0 for i in range(128)}, lambda keep: counted(keep) * 0 + len(keep) / 128,
        min_cosine=0.7, quantised_ms=1.0,
    )  # fmt: skip
    assert len(seen) == len(set(seen))
    assert len(seen) <= 2 + 7 + 8


def test_the_same_measurements_give_the_same_plan_in_any_order() -> None:
    assert search(0.99, damages=layers()) == search(0.99, damages=layers()[::-1])


@pytest.mark.parametrize("cosine", [0.5, float("nan")])
def test_no_set_keeps_the_budget(cosine: float) -> None:
    plan = search(0.9, lambda keep: cosine)
    assert plan.chosen is None
    assert len(plan.points) == 2  # nothing kept, all kept


def test_verification_takes_more_layers_back() -> None:
    """On more pictures the found set fails until layers.3 is kept too."""

    def strict(keep: Keep) -> float:
        return additive(keep) if "n3" in keep else 0.0

    plain, verified = search(0.99), search(0.99, verify=strict)
    assert "n3" not in chosen(plain).keep
    assert "n3" in chosen(verified).keep
    assert chosen(verified).verified
    assert search(0.99, verify=lambda keep: 0.0).chosen is None


def test_latency_is_measured_where_it_can_be() -> None:
    plan = search(0.99, measure=lambda keep: 100.0 + len(keep))
    assert [point.latency_ms for point in plan.points] == [100.0 + len(point.keep) for point in plan.points]


def test_what_cannot_be_searched_is_refused() -> None:
    with pytest.raises(CalibrationError, match="no layers"):
        search(damages=[])
    with pytest.raises(InputError, match="'unknown'"):
        search(damages=[LayerDamage(0, ("unknown",), "", 0.0, 0.0)])


def points() -> tuple[MixedPoint, ...]:
    return (
        MixedPoint((), 0, 0.90, 10.0),
        MixedPoint(("a",), 1, 0.95, 12.0),
        MixedPoint(("b",), 1, 0.94, 13.0),
        MixedPoint(("a", "b"), 2, 0.95, 14.0),
        MixedPoint(("a", "b", "c"), 3, 1.0, 20.0),
    )


def test_the_front_has_the_points_that_none_beats() -> None:
    assert [point.latency_ms for point in pareto_front(points()[::-1])] == [10.0, 12.0, 20.0]


def test_picture_and_tables_show_every_point(tmp_path: Path) -> None:
    plan = MixedPlan(points()[1], points(), 0.945, ("layers.1", "layers.0", "layers.2"))
    picture, table = write_pareto(plan, tmp_path / "report", stage="encoder")
    lines = table.read_text(encoding="utf-8").splitlines()
    assert lines[0] == "layers in float,latency ms,worst-token cosine,best for its time,chosen"
    assert lines[1:4] == ["0,10.00,0.900000,yes,", "1,12.00,0.950000,yes,yes", "1,13.00,0.940000,,"]
    assert len(lines) == 6
    assert pareto_markdown(plan).splitlines()[3] == "| 1 | 12.00 | 0.950000 | yes | yes |"
    assert len(pareto_rows(plan)) == 6
    with Image.open(picture) as image:
        colours = {colour for _, colour in image.convert("RGB").getcolors(1 << 20) or []}
        assert image.size == (1080, 690)
    # The front's blue, the budget's red, the ring's ink: each is drawn.
    assert {(0x25, 0x63, 0xA8), (0xC2, 0x41, 0x0C), (0x24, 0x29, 0x2F)} <= colours


def test_a_plan_without_choice_is_drawn_too(tmp_path: Path) -> None:
    plan = MixedPlan(None, (MixedPoint((), 0, float("nan"), 10.0),), 0.99, ())
    picture, _ = write_pareto(plan, tmp_path, stage="connector")
    assert picture.stat().st_size > 1000
