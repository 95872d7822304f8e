"""The report's three faces: JSON, terminal table, HTML page."""

from __future__ import annotations

import io
import json
import re
from dataclasses import replace
from html.parser import HTMLParser
from pathlib import Path
from xml.etree import ElementTree

import pytest
from rich.console import Console

from bridgeport.errors import OutputError
from bridgeport.runtime.parity import write_html
from bridgeport.runtime.parity.chart import PANELS, chart
from bridgeport.runtime.parity.drill import DrillReport, Step
from bridgeport.runtime.parity.gates import EXACT, FP32, STAGES
from bridgeport.runtime.parity.html import page
from bridgeport.runtime.parity.metrics import Difference, Gate, unreached
from bridgeport.runtime.parity.report import CaseReport, Finding, Measurement, ParityReport, StageReport
from bridgeport.runtime.parity.table import cosine, number, render

SMALL = Difference(2e-6, 3e-7, 1e-6, 1.5e-7, 1 - 1e-12, 2.0, (3, 4), (3,), (5, 8))
LARGE = Difference(0.2, 0.03, 0.1, 0.015, 0.91, 2.0, (1, 2), (1,), (5, 8))
NONE = Difference(0.0, 0.0, 0.0, 0.0, 1.0, 1.0)
STEP = Step("node_<expand>", "Expand", "expand", "input of qformer.layernorm", LARGE)


def measure(*differences: Difference, gate: Gate | None = FP32) -> Measurement:
    return Measurement({f"case {i + 1}": one for i, one in enumerate(differences)}, gate)


def make_report(**wrong: StageReport) -> ParityReport:
    """A report of all stages, right but for those given."""
    right = {
        stage.name: StageReport(stage.name, "fp32", measure(NONE, SMALL), measure(SMALL, SMALL)) for stage in STAGES
    }
    case = CaseReport("case 1", "scene, 9x9 RGB", "What <b>?", "a [red] disc", "a [red] disc", (5, 6), (5, 6))
    stages = tuple((right | wrong).values())
    return ParityReport("b/undle", "check/point", stages, (case,), True, None, {"torch": "2.13"})


def failing() -> ParityReport:
    connector = StageReport("connector", "fp32", measure(SMALL, LARGE), measure(SMALL, LARGE))
    logits = StageReport("first_logits", "fp32", measure(SMALL), measure(unreached("the chain stopped: <no>")))
    drill = DrillReport("connector", STEP, replace(STEP, node="before"), 34, ("rows [0, 2] of query_tokens",))
    return replace(make_report(connector=connector, first_logits=logits), drill=drill)


def test_right_report() -> None:
    report = make_report()
    assert report.passed
    assert report.first_divergence is None
    assert report.tokens_match
    assert report.summary() == "all 7 stages are within their gates of PyTorch, greedy tokens equal"


def test_first_divergence_is_the_first_in_the_chain() -> None:
    report = failing()
    assert not report.passed
    assert report.first_divergence == "connector"
    assert report.stage("connector").isolated.worst_case == "case 2"
    assert report.stage("connector").isolated.broken == ("max_abs", "mean_abs", "min_token_cosine")
    assert report.summary() == (
        "parity failed: connector is the first stage to diverge (isolated: max_abs, mean_abs, min_token_cosine), "
        "at node_<expand> (input of qformer.layernorm)"
    )


def test_gate_holds_for_each_case_with_its_own_scale() -> None:
    """The error of a case with small values must not hide behind another case's large ones."""
    small_values = replace(SMALL, max_abs=1e-3, mean_abs=1e-4, scale=1e-2, max_rel=0.1, mean_rel=0.01)
    large_values = replace(SMALL, max_abs=1e-2, mean_abs=1e-3, scale=1e3, max_rel=1e-5, mean_rel=1e-6)
    assert measure(large_values).passed
    assert measure(small_values, large_values).broken == ("max_abs", "mean_abs")


def test_finding_alone_fails_a_stage() -> None:
    encoder = replace(make_report().stage("encoder"), findings=(Finding("node_7", "epsilon of node_7 is 1e-05"),))
    report = make_report(encoder=encoder)
    assert report.first_divergence == "encoder"
    assert "epsilon of node_7 is 1e-05" in report.summary()


def test_run_without_gate_does_not_judge() -> None:
    tokens = StageReport("tokens", "int4", measure(LARGE, gate=None), measure(LARGE, gate=None), measure(SMALL))
    assert make_report(tokens=tokens).passed
    assert make_report(tokens=replace(tokens, same_weights=measure(LARGE))).first_divergence == "tokens"


def test_json_document() -> None:
    document = json.loads(json.dumps(failing().to_dict(), allow_nan=False))
    assert list(document)[:4] == ["passed", "stages", "first_divergence", "tokens_match"]
    assert (document["passed"], document["first_divergence"], document["tokens_match"]) == (False, "connector", True)
    stage = document["stages"][3]
    assert stage["name"] == "connector"
    assert stage["passed"] is False
    assert {"max_abs", "mean_abs", "min_token_cosine"} <= set(stage["isolated"]) & set(stage["chained"])
    assert stage["isolated"]["max_abs"] == 0.2
    assert stage["isolated"]["gate"]["max_abs"] == FP32.max_abs
    assert document["stages"][5]["chained"]["max_abs"] is None
    assert document["drill"]["departure"]["node"] == "node_<expand>"


def render_text(report: ParityReport, width: int = 80) -> str:
    console = Console(file=io.StringIO(), width=width)
    console.print(render(report))
    file = console.file
    assert isinstance(file, io.StringIO)
    return file.getvalue()


def test_table_fits_a_terminal_of_80_columns() -> None:
    text = render_text(failing())
    assert max(len(line.rstrip()) for line in text.splitlines()) <= 80
    assert "…" not in text
    for stage in STAGES:
        assert stage.name in text
    assert "connector, isolated: max abs 2.0e-01, mean abs 3.0e-02, worst at case 2" in text
    assert "Expand node_<expand>" in text
    assert "cause: rows [0, 2] of query_tokens" in text
    assert "a [red] disc" in text
    assert text.rstrip().splitlines()[-3].startswith("FAILED")


def test_table_of_a_quantised_bundle_fits_too() -> None:
    int4 = {
        name: StageReport(name, "int4", measure(LARGE, gate=None), measure(LARGE, gate=None), measure(SMALL))
        for name in ("first_logits", "tokens")
    }
    text = render_text(make_report(**int4))
    assert "…" not in text
    assert "first_logits int4" in text
    assert "no gate" in text


@pytest.mark.parametrize(
    ("value", "text"), [(0.0, "0"), (1.23e-5, "1.2e-05"), (float("inf"), "infinite"), (float("nan"), "infinite")]
)
def test_number(value: float, text: str) -> None:
    assert number(value) == text


@pytest.mark.parametrize(
    ("value", "text"), [(1.0, "1"), (1 - 3e-9, "1 - 3.0e-09"), (0.25, "0.2500"), (-1.0, "-1.0000")]
)
def test_cosine(value: float, text: str) -> None:
    assert cosine(value) == text


def test_chart_shows_every_stage_both_ways_and_its_gates() -> None:
    """Well-formed, a point per stage, panel and way; those that break their bound are marked, those with 0 too."""
    report = failing()
    root = ElementTree.fromstring(chart(report))
    ns = {"s": "http://www.w3.org/2000/svg"}
    circles = root.findall("s:circle", ns)
    assert len(circles) == len(STAGES) * len(PANELS) * 2
    fails = [circle for circle in circles if "fails" in circle.get("class", "")]
    assert len(fails) == len(PANELS) * 3  # connector both ways, first_logits chained
    gates = [line for line in root.findall("s:line", ns) if line.get("class") == "gate"]
    assert len(gates) == len(STAGES) * len(PANELS) * 2
    left, top, width, height = (float(part) for part in root.get("viewBox", "").split())
    for circle in circles:
        assert left <= float(circle.get("cx", "")) <= width
        assert top <= float(circle.get("cy", "")) <= height


def test_chart_is_logarithmic() -> None:
    panel = PANELS[0]
    decade = panel.offset(1e-4) - panel.offset(1e-5)
    assert panel.offset(1e-2) - panel.offset(1e-3) == pytest.approx(decade)
    assert panel.offset(0.0) == panel.offset(10.0**panel.low) == 0.0
    assert panel.offset(float("inf")) == panel.offset(10.0**panel.high)


def test_gate_of_zero_is_not_drawn() -> None:
    exact = StageReport("tokens", "fp32", measure(NONE, gate=EXACT), measure(NONE, gate=EXACT))
    assert chart(make_report()).count('class="gate"') - chart(make_report(tokens=exact)).count('class="gate"') == 6


class Tags(HTMLParser):
    """Open tags must close in order; what a page loads from elsewhere is collected."""

    def __init__(self) -> None:
        super().__init__()
        self.open: list[str] = []
        self.loads: list[str] = []

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.loads += [value or "" for name, value in attrs if name in ("src", "href")]
        if tag != "meta":
            self.open.append(tag)

    def handle_startendtag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.loads += [value or "" for name, value in attrs if name in ("src", "href")]

    def handle_endtag(self, tag: str) -> None:
        assert self.open.pop() == tag


def test_page_stands_alone_and_is_well_formed() -> None:
    text = page(failing())
    tags = Tags()
    tags.feed(text)
    assert tags.open == []
    assert tags.loads == []
    assert not re.search(r"@import|url\(|<script", text)
    assert "node_&lt;expand&gt;" in text
    assert "What &lt;b&gt;?" in text
    assert "prefers-color-scheme: dark" in text
    assert page(make_report()).count('class="verdict ok"') == 1


def test_page_is_written_whole_or_not_at_all(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    target = tmp_path / "new" / "report.html"
    write_html(failing(), target)
    assert target.read_text(encoding="utf-8") == page(failing())
    assert [path.name for path in target.parent.iterdir()] == ["report.html"]

    def broken(_report: ParityReport) -> str:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr("bridgeport.runtime.parity.html.page", broken)
    with pytest.raises(OutputError, match="the disk is full"):
        write_html(make_report(), target)
    assert target.read_text(encoding="utf-8") == page(failing())
    assert [path.name for path in target.parent.iterdir()] == ["report.html"]


def test_page_over_a_directory_is_refused(tmp_path: Path) -> None:
    with pytest.raises(OutputError, match="is a directory; name a file"):
        write_html(make_report(), tmp_path)
