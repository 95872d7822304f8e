"""`make reduction-curve`: what fewer image tokens cost in accuracy and save in time, on the small model.

Every point is a bundle that `export --reduce-tokens` makes. The metric: captions and answers that are right word by
word on held-out pictures (as in docs/small-model.md), and the median time from picture to first token, one picture at a
time. Three models: the shipped one, which never saw a reduction, and two that were trained for one in a few hundred
steps (see `benchmarks.reduction_variants`).

Ends in one line of JSON, which is also kept in `benchmarks/results/`; draws docs/token-reduction.png and puts the
figures into docs/token-reduction.md.
"""

from __future__ import annotations

import argparse
import json
import shutil
import statistics
import sys
import tempfile
from collections.abc import Mapping, Sequence
from contextlib import ExitStack
from dataclasses import asdict, dataclass
from datetime import datetime, timezone
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.progress import Progress

from benchmarks.reduction_variants import train_variants
from bridgeport.bundle import Bundle, staged_directory, write_manifest
from bridgeport.export import export_checkpoint
from bridgeport.export.reduction import fit_tokens
from bridgeport.export.stages import export_traced
from bridgeport.models import load_checkpoint
from bridgeport.models.reduction import reduce_tokens
from bridgeport.models.reduction_contract import parse_reduction
from bridgeport.models.small import checkpoint_path, pictures
from bridgeport.runtime import Pipeline
from bridgeport.runtime.cli.doctor import examine

HERE = Path(__file__).parent
DOCS = HERE.parent / "docs"
MARKS = "<!-- figures: written by `make reduction-curve` -->", "<!-- end of figures -->"
STAGES = ("encoder", "connector", "prefill")
BATCH = 50
# Model and reduction.
Key = tuple[str, str]
_QUERIES = ("", "queries:12", "queries:8", "queries:6", "queries:4", "queries:2", "queries:1")
# Model -> reductions, "" for none.
CURVES: dict[str, tuple[str, ...]] = {
    "shipped": (*_QUERIES, "tome:2", "tome:4", "tome:8"),
    "nested": _QUERIES,
    "patches": ("", "pool:2", "pool:5", "tome:25", "tome:50"),
}


@dataclass(frozen=True)
class Point:
    """One bundle: exact matches (0 to 1), and the medians of milliseconds for one picture."""

    model: str
    reduction: str
    tokens: int
    captions: float
    answers: float
    connector_ms: float
    prefill_ms: float
    first_token_ms: float


def main() -> int:
    """Train the variants, export and measure every point, write the figures."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--pictures", type=int, default=200, help="held-out pictures (default 200)")
    parser.add_argument("--steps", type=int, default=300, help="training steps of a variant (default 300)")
    parser.add_argument("--rounds", type=int, default=41, help="of timing (default 41)")
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--work", type=Path, default=None, help="keep variants and bundles here, and reuse them")
    options = parser.parse_args()
    import torch

    torch.set_num_threads(options.threads)
    with tempfile.TemporaryDirectory() as folder, Progress(console=Console(stderr=True)) as progress:
        work = options.work or Path(folder)
        checkpoints = {"shipped": checkpoint_path(), **train_variants(work, options.steps, progress)}
        task = progress.add_task("bundles", total=sum(map(len, CURVES.values())))
        examples = pictures.held_out(options.pictures)
        found: dict[Key, tuple[Path, float, float]] = {}
        for model, reductions in CURVES.items():
            for reduction in reductions:
                bundle = _bundle(checkpoints[model], work, model, reduction)
                found[model, reduction] = bundle, *accuracy(bundle, examples, options.threads)
                progress.update(task, advance=1, description=f"{model} {reduction}")
        points = time_together(found, examples[0].image, options.rounds, options.threads)
    document = _document(points, options)
    _keep(document, points)
    print(json.dumps(document))
    return 0


def _bundle(checkpoint: Path, work: Path, model: str, reduction: str) -> Path:
    """The bundle that `export --reduce-tokens` makes; the stages that a reduction leaves as they are, are copied."""
    whole, out = work / f"{model}-all", work / f"{model}-{reduction.replace(':', '-') or 'all'}"
    if out.exists():
        return out
    if not reduction:
        return export_checkpoint(checkpoint, out).path
    reduced = reduce_tokens(load_checkpoint(checkpoint), parse_reduction(reduction))
    manifest = Bundle.load(whole).manifest
    with staged_directory(out) as staging:
        shutil.copytree(whole, staging, dirs_exist_ok=True, ignore=shutil.ignore_patterns("connector"))
        connector = export_traced(reduced, "connector", staging, lambda _: None, max_id=2).record
        stages = tuple(connector if one.contract.name == "connector" else one for one in manifest.stages)
        image = fit_tokens(manifest.image, int(connector.contract.outputs[0].shape[1]))
        changed = {"stages": stages, "image": image, "reduction": reduced.layout.reduction, "files": ()}
        write_manifest(staging, manifest.model_copy(update=changed))
    return out


def accuracy(bundle: Path, examples: Sequence[Any], threads: int) -> tuple[float, float]:
    """The parts of captions and of answers that are right."""
    asked = [(example.image, "", example.caption) for example in examples]
    captions = len(asked)
    asked += [(e.image, question.prompt, question.answer) for e in examples for question in e.questions]
    right = []
    with Pipeline.load(bundle, threads=threads) as pipeline:
        for start in range(0, len(asked), BATCH):
            part = asked[start : start + BATCH]
            rows = pipeline.generate([p[0] for p in part], [p[1] for p in part])
            right += [row.text.strip() == expected for row, (_, _, expected) in zip(rows, part, strict=True)]
    return sum(right[:captions]) / captions, sum(right[captions:]) / (len(asked) - captions)


def time_together(found: Mapping[Key, tuple[Path, float, float]], image: Any, rounds: int, threads: int) -> list[Point]:
    """All bundles in turn in every round, so that what else the machine does is spread over all of them."""
    with ExitStack() as stack:
        loaded = {key: stack.enter_context(Pipeline.load(entry[0], threads=threads)) for key, entry in found.items()}
        timings: dict[Key, list[dict[str, float]]] = {key: [] for key in loaded}
        for _ in range(rounds + 1):
            for key, pipeline in loaded.items():
                timings[key].append(pipeline.generate(image, "", max_new_tokens=1).timings_ms)
        tokens = {key: pipeline.encode(image).shape[1] for key, pipeline in loaded.items()}
    points = []
    for key, (_, captions, answers) in found.items():
        kept = timings[key][1:]
        points.append(
            Point(
                model=key[0],
                reduction=key[1],
                tokens=tokens[key],
                captions=round(captions, 4),
                answers=round(answers, 4),
                connector_ms=_median([t["connector"] for t in kept]),
                prefill_ms=_median([t["prefill"] for t in kept]),
                first_token_ms=_median([sum(t[stage] for stage in STAGES) for t in kept]),
            )
        )
    return points


def _median(values: Sequence[float]) -> float:
    return round(statistics.median(values), 3)


def _document(points: Sequence[Point], options: argparse.Namespace) -> dict[str, Any]:
    environment = examine()
    return {
        "benchmark": "reduction",
        "date": datetime.now(timezone.utc).strftime("%Y-%m-%d"),
        "machine": environment["machine"],
        "libraries": {name: version for name, version in environment["libraries"].items() if version},
        "pictures": options.pictures,
        "training_steps": options.steps,
        "rounds": options.rounds,
        "threads": options.threads,
        "points": [asdict(point) for point in points],
    }


def _keep(document: dict[str, Any], points: Sequence[Point]) -> None:
    results = HERE / "results"
    results.mkdir(exist_ok=True)
    file = results / f"reduction-{document['date']}.json"
    file.write_text(json.dumps(document, indent=2) + "\n", encoding="utf-8")
    draw(points, DOCS / "token-reduction.png")
    page = DOCS / "token-reduction.md"
    before, _, rest = page.read_text(encoding="utf-8").partition(MARKS[0])
    _, _, after = rest.partition(MARKS[1])
    page.write_text(f"{before}{MARKS[0]}\n{table(points)}\n{MARKS[1]}{after}", encoding="utf-8")


def table(points: Sequence[Point]) -> str:
    """The points as Markdown."""
    rows = [
        "| model | reduction | tokens | captions | answers | connector | prefill | picture to first token |",
        "|---|---|---:|---:|---:|---:|---:|---:|",
    ]
    rows += [
        f"| {p.model} | {f'`{p.reduction}`' if p.reduction else 'none'} | {p.tokens} | {p.captions:.1%} | "
        f"{p.answers:.1%} | {p.connector_ms:.1f} ms | {p.prefill_ms:.1f} ms | {p.first_token_ms:.1f} ms |"
        for p in points
    ]
    return "\n".join(rows)


def draw(points: Sequence[Point], path: Path) -> None:
    """Answers and captions against tokens, and prefill against tokens; a line for each model and method."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    lines: dict[str, list[Point]] = {}
    for model, reductions in CURVES.items():
        whole = [p for p in points if p.model == model and not p.reduction]
        for method in dict.fromkeys(name.partition(":")[0] for name in reductions if name):
            own = [p for p in points if p.model == model and p.reduction.startswith(f"{method}:")]
            lines[f"{model}, {method}"] = sorted([*whole, *own], key=lambda p: p.tokens)
    figure = Figure(figsize=(12, 3.8), layout="constrained")
    FigureCanvasAgg(figure)
    panels = (("answers", "exact answers"), ("captions", "exact captions"), ("prefill_ms", "prefill, ms"))
    for axis, (field, label) in zip(figure.subplots(1, 3), panels, strict=True):
        for name, line in lines.items():
            axis.plot([p.tokens for p in line], [getattr(p, field) for p in line], "o-", label=name, linewidth=1.2)
        ticks = (1, 2, 4, 8, 16, 25, 50, 100)
        axis.set(xlabel="image tokens", ylabel=label, xscale="log", ylim=(0, None if field == "prefill_ms" else 1.02))
        axis.set_xticks(ticks, [str(tick) for tick in ticks])
        axis.minorticks_off()
        axis.grid(alpha=0.3)
    figure.axes[0].legend()
    figure.savefig(path, dpi=110)


if __name__ == "__main__":
    sys.exit(main())
