"""What `bridgeport demo` computes."""

from __future__ import annotations

import tempfile
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ...models.small import checkpoint_path
from ...models.small.pictures import Example, held_out

if TYPE_CHECKING:
    from ..parity import ParityReport
    from ..pipeline import Pipeline

PRECISIONS = ("fp32", "int8", "int4")
_LABELS = {
    "fp32": "Bridgeport FP32",
    "int8": "Bridgeport INT8, language model with INT4 weights",
    "int4": "Bridgeport FP32, language model with INT4 weights",
}
_BATCH = 50
# Pictures of the training set: three quarters calibrate, the others are the gate's.
_CALIBRATION_PICTURES = 48
# Stages of a millisecond say nothing about speed, and of sixty questions one is 1.7 points: here the gate looks at the
# worst token alone, and accuracy is what the demo's own table is about.
_LIMITS = {"max_slowdown": 1000.0, "task_drop": 100.0}

Asked = tuple[Any, str, str]  # picture, prompt, expected text


@dataclass(frozen=True)
class Answered:
    """One question (an empty prompt asks for the caption), what is right and what the bundle said."""

    picture: str
    prompt: str
    expected: str
    text: str


@dataclass(frozen=True)
class Score:
    """Exact matches of one way to run the model, out of `pictures` captions and `questions` answers."""

    label: str
    captions: int
    answers: int
    pictures: int
    questions: int
    seconds: float
    megabytes: float


@dataclass(frozen=True)
class DemoReport:
    """Everything that the demo prints. `bundles` maps a precision to its bundle, while that is kept."""

    shown: tuple[Answered, ...]
    parity: ParityReport
    scores: tuple[Score, ...]
    bundles: dict[str, Path]


def run_demo(folder: Path, *, pictures: int, progress: Callable[[str], None]) -> DemoReport:
    """Export the shipped checkpoint in each precision into `folder`, run it on held-out pictures, compare and score.

    `pictures`: how many held-out pictures the accuracy is taken over. Writes the shown pictures beside the bundles.
    """
    from ...export import export_checkpoint
    from ..parity import check_parity
    from ..pipeline import Pipeline

    checkpoint = checkpoint_path()
    examples = held_out(pictures)
    bundles = {precision: folder / precision for precision in PRECISIONS}
    for precision in ("fp32", "int4"):
        progress(f"exporting {precision}")
        export_checkpoint(checkpoint, bundles[precision], precision=precision)
    _quantize(bundles["fp32"], bundles["int8"], progress)
    progress("comparing with PyTorch, stage by stage")
    parity = check_parity(bundles["fp32"], checkpoint)
    progress("scoring PyTorch")
    scores = [_score("PyTorch FP32", _torch_texts(checkpoint), examples, _megabytes(checkpoint))]
    shown: tuple[Answered, ...] = ()
    for precision, bundle in bundles.items():
        progress(f"scoring Bridgeport {precision}")
        with Pipeline.load(bundle) as pipeline:
            scores.append(_score(_LABELS[precision], _bundle_texts(pipeline), examples, _megabytes(bundle)))
            if not shown:
                shown = _show(pipeline, examples[:3], folder)
    return DemoReport(shown, parity, tuple(scores), bundles)


def _quantize(source: Path, out: Path, progress: Callable[[str], None]) -> None:
    """INT8 encoder and connector, INT4 weights in the language model, calibrated on pictures that are thrown away."""
    from ...calibration import GateLimits, QuantizeOptions, quantize_bundle
    from ...calibration.task import write_small_data

    options = QuantizeOptions(precision="int8", stages={"llm": "int4"})
    with tempfile.TemporaryDirectory() as folder:
        data = write_small_data(Path(folder) / "pictures", _CALIBRATION_PICTURES)
        limits = GateLimits(**_LIMITS)
        quantize_bundle(source, out, data, options, limits=limits, progress=progress)


def _show(pipeline: Pipeline, examples: Sequence[Example], folder: Path) -> tuple[Answered, ...]:
    answered = []
    for number, example in enumerate(examples):
        file = folder / f"picture-{number}.png"
        example.image.save(file)
        question = example.questions[number % len(example.questions)]
        for prompt, expected in (("", example.caption), (question.prompt, question.answer)):
            answered.append(Answered(file.name, prompt, expected, pipeline.generate(file, prompt).text.strip()))
    return tuple(answered)


def _score(
    label: str, texts: Callable[[Sequence[Asked]], list[str]], examples: Sequence[Example], megabytes: float
) -> Score:
    captions: list[Asked] = [(example.image, "", example.caption) for example in examples]
    questions: list[Asked] = [(e.image, asked.prompt, asked.answer) for e in examples for asked in e.questions]
    start = time.perf_counter()
    right_captions, right_answers = (
        sum(text.strip() == expected for text, (_, _, expected) in zip(texts(asked), asked, strict=True))
        for asked in (captions, questions)
    )
    seconds = time.perf_counter() - start
    return Score(label, right_captions, right_answers, len(captions), len(questions), seconds, megabytes)


def _bundle_texts(pipeline: Pipeline) -> Callable[[Sequence[Asked]], list[str]]:
    def texts(asked: Sequence[Asked]) -> list[str]:
        results = pipeline.generate([image for image, _, _ in asked], [prompt for _, prompt, _ in asked])
        return [result.text for result in results]

    return _in_batches(texts)


def _torch_texts(checkpoint: Path) -> Callable[[Sequence[Asked]], list[str]]:
    from ...models.small.evaluate import generate_texts, load

    model, processor = load(checkpoint)

    def texts(asked: Sequence[Asked]) -> list[str]:
        return generate_texts(model, processor, [image for image, _, _ in asked], [prompt for _, prompt, _ in asked])

    return _in_batches(texts)


def _in_batches(texts: Callable[[Sequence[Asked]], list[str]]) -> Callable[[Sequence[Asked]], list[str]]:
    def all_texts(asked: Sequence[Asked]) -> list[str]:
        parts = (asked[start : start + _BATCH] for start in range(0, len(asked), _BATCH))
        return [text for part in parts for text in texts(part)]

    return all_texts


def _megabytes(folder: Path) -> float:
    return sum(path.stat().st_size for path in folder.rglob("*") if path.is_file()) / 1e6
