"""A parity report as one HTML file that needs nothing else: the picture of errors, the tables, the drill's
finding.
"""

from __future__ import annotations

import os
import tempfile
from collections.abc import Iterable
from html import escape
from pathlib import Path
from typing import TYPE_CHECKING

from ...bundle import output_errors
from ...errors import OutputError
from .chart import chart
from .table import FED_BY, cosine, number, place

if TYPE_CHECKING:
    from .drill import DrillReport
    from .report import Measurement, ParityReport

_STYLE = """
:root { color-scheme: light dark; --ink: #1b1f24; --soft: #5b6470; --page: #fbfbfa; --band: #f0f1ef; --line: #d9dcd8;
  --good: #1a7f4b; --bad: #c62f2f; --mark: #2f5fb3; }
@media (prefers-color-scheme: dark) { :root { --ink: #e7e9ea; --soft: #9aa4ae; --page: #15181b; --band: #1d2125;
  --line: #343a40; --good: #4cc38a; --bad: #ff6b63; --mark: #7fa8f0; } }
body { margin: 0 auto; padding: 2.2rem 1.4rem 4rem; max-width: 68rem; background: var(--page); color: var(--ink);
  font: 15px/1.5 system-ui, sans-serif; }
h1 { font-size: 1.5rem; margin: 0 0 .3rem; } h2 { font-size: 1.1rem; margin: 2.2rem 0 .6rem; }
p { margin: .3rem 0; } .soft { color: var(--soft); } code { font: .92em ui-monospace, monospace; }
.verdict { display: inline-block; padding: .1rem .6rem; border-radius: .3rem; color: var(--page); font-weight: 600; }
.verdict.ok { background: var(--good); } .verdict.fails { background: var(--bad); }
.scroll { overflow-x: auto; } svg { width: 100%; min-width: 46rem; height: auto; }
table { border-collapse: collapse; width: 100%; font-variant-numeric: tabular-nums; font-size: .88rem; }
th, td { text-align: left; padding: .32rem .6rem; border-bottom: 1px solid var(--line); vertical-align: top; }
th { color: var(--soft); font-weight: 500; } td.n, th.n { text-align: right; white-space: nowrap; }
tr.next td { border-bottom-color: transparent; } td.fails { color: var(--bad); font-weight: 600; }
td.ok { color: var(--good); } td code { overflow-wrap: anywhere; } td:first-child { white-space: nowrap; }
svg text { fill: var(--ink); font: 12px system-ui, sans-serif; } svg .tick { fill: var(--soft); font-size: 11px; }
svg .title { font-weight: 600; } svg text.fails { fill: var(--bad); font-weight: 700; }
svg .band { fill: var(--band); } svg .grid { stroke: var(--line); } svg .gate { stroke: var(--ink); stroke-width: 2; }
svg .dot { fill: var(--mark); stroke: var(--mark); } svg .ring { fill: var(--page); stroke: var(--mark); }
svg circle { stroke-width: 2; } svg .dot.fails { fill: var(--bad); stroke: var(--bad); }
svg .ring.fails { stroke: var(--bad); } svg .dot.same { fill: none; stroke-dasharray: 2 2; }
.cause { border-left: 3px solid var(--bad); padding-left: .7rem; }
"""


def write_html(report: ParityReport, path: Path) -> None:
    """Write the page to `path`, whole or not at all. Raises OutputError when it cannot be written."""
    target = Path(path).absolute()
    if target.is_dir():
        raise OutputError(f"{path} is a directory; name a file for the HTML report")
    with output_errors(target):
        target.parent.mkdir(parents=True, exist_ok=True)
        handle, name = tempfile.mkstemp(prefix=f".{target.name}.", suffix=".partial", dir=target.parent)
        try:
            with os.fdopen(handle, "w", encoding="utf-8") as file:
                file.write(page(report))
            Path(name).chmod(0o644)
            Path(name).replace(target)
        finally:
            Path(name).unlink(missing_ok=True)


def page(report: ParityReport) -> str:
    """The whole page."""
    verdict = ("ok", "passed") if report.passed else ("fails", "failed")
    sections = [
        f'<h1>Parity with PyTorch <span class="verdict {verdict[0]}">{verdict[1]}</span></h1>',
        f"<p>{escape(report.summary())}</p>",
        f'<p class="soft">bundle <code>{escape(report.bundle)}</code> against <code>{escape(report.checkpoint)}'
        f"</code>{_origin(report)}</p>",
        "<h2>Errors by stage</h2>",
        f'<div class="scroll">{chart(report)}</div>',
        '<p class="soft">Filled dot: the stage fed PyTorch\'s input. Ring: fed what the bundle computed before it. '
        "Upright bar: the gate. Dotted: held against PyTorch with the bundle's own quantised weights. Errors are over "
        "the RMS of PyTorch's value; on the left edge they are below what is shown, or zero.</p>",
        _drill(report.drill),
        "<h2>Figures</h2>",
        _stages(report),
        *(
            f'<p class="cause">{escape(f"{stage.name}: {one.text}")}</p>'
            for stage in report.stages
            for one in stage.findings
        ),
        *(f"<p>{escape(note)}.</p>" for note in report.notes),
        f"<h2>{escape(report.ids.capitalize())} of the whole chain</h2>",
        _cases(report),
        f'<p class="soft">{escape(", ".join(f"{name} {version}" for name, version in report.versions.items()))}</p>',
    ]
    return (
        '<!doctype html>\n<html lang="en"><head><meta charset="utf-8">'
        '<meta name="viewport" content="width=device-width, initial-scale=1">'
        f"<title>Parity: {escape(Path(report.bundle).name)}</title><style>{_STYLE}</style></head>\n"
        f"<body>{''.join(sections)}</body></html>\n"
    )


def _origin(report: ParityReport) -> str:
    return " (the bundle was made from other files than these)" if report.same_checkpoint is False else ""


def _stages(report: ParityReport) -> str:
    rows = []
    for stage in report.stages:
        for way, measured in stage.runs.items():
            first = way == "isolated"
            names = (stage.name, stage.precision, FED_BY[way]) if first else ("", "", FED_BY[way])
            cells = [_cell(escape(name)) for name in names] + _figures(measured)
            rows.append(f"<tr{' class=next' if way != 'chained' else ''}>{''.join(cells)}</tr>")
    heads = (
        "stage",
        "precision",
        "fed by",
        "max abs",
        "mean abs",
        "max / scale",
        "mean / scale",
        "worst cosine",
    )
    return _table((*heads, "worst at", ""), rows, numbers=range(3, 8))


def _figures(measured: Measurement) -> list[str]:
    worst = measured.worst
    figures = (
        ("max_abs", number(worst.max_abs)),
        ("mean_abs", number(worst.mean_abs)),
        ("max_abs", number(worst.max_rel)),
        ("mean_abs", number(worst.mean_rel)),
        ("min_token_cosine", cosine(worst.min_token_cosine)),
    )
    cells = [_cell(text, "n fails" if name in measured.broken else "n") for name, text in figures]
    verdict = "not gated" if measured.gate is None else "ok" if measured.passed else "fails"
    return [*cells, _cell(escape(place(measured))), _cell(verdict, "" if measured.gate is None else verdict)]


def _cases(report: ParityReport) -> str:
    rows = []
    for case in report.cases:
        same = case.reference_ids == case.bundle_ids
        texts = (case.label, case.picture, case.prompt, case.reference_text, case.bundle_text)
        verdict = _cell("equal" if same else "differ", "ok" if same else "fails")
        rows.append(f"<tr>{''.join(_cell(escape(text)) for text in texts)}{verdict}</tr>")
    return _table(("case", "picture", "prompt", "PyTorch", "bundle", ""), rows)


def _drill(drill: DrillReport | None) -> str:
    if drill is None:
        return ""
    head = f"<h2>Inside {escape(drill.stage)}</h2>"
    if drill.departure is None:
        return f"{head}<p>{drill.compared} values compared; {escape(drill.note)}</p>"
    rows = []
    for name, step in (("last that agrees", drill.before), ("first that departs", drill.departure)):
        if step is not None:
            one = step.difference
            texts = [
                name,
                step.op_type,
                f"<code>{escape(step.node)}</code>",
                f"<code>{escape(step.module)}</code>",
            ]
            figures = [number(one.max_rel), number(one.mean_rel), cosine(one.min_token_cosine)]
            rows.append(f"<tr>{''.join(_cell(t) for t in texts)}{''.join(_cell(f, 'n') for f in figures)}</tr>")
    heads = ("", "operator", "ONNX node", "PyTorch module", "max / scale", "mean / scale", "worst cosine")
    causes = "".join(f'<p class="cause">{escape(cause)}</p>' for cause in drill.causes)
    return f"{head}{_table(heads, rows, numbers=range(4, 7))}{causes}"


def _table(heads: Iterable[str], rows: Iterable[str], numbers: Iterable[int] = ()) -> str:
    right = set(numbers)
    columns = "".join(f"<th{' class=n' if i in right else ''}>{head}</th>" for i, head in enumerate(heads))
    return f'<div class="scroll"><table><thead><tr>{columns}</tr></thead><tbody>{"".join(rows)}</tbody></table></div>'


def _cell(text: str, style: str = "") -> str:
    return f'<td class="{style}">{text}</td>' if style else f"<td>{text}</td>"
