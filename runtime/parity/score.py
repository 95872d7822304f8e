"""A bundle that scores pictures against texts, held against transformers' model and processor on the same weights.

The stages are those of `Scorer`: pixels, input_ids, encoder, connector, text_encoder, scores, BLIP-2's matcher, and
the probabilities. A case is a picture with a text; all cases run as one batch on both sides, so every picture
also meets the texts of the other cases.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

from ...bundle import Bundle
from ...errors import BridgeportError, CheckpointError, InputError
from ..processor import load_image, prepare_picture
from ..score import Scorer, cosines, score_contract, sigmoid, softmax
from ..score_text import TextTensors
from .cases import make_cases
from .check import _need_libraries, _versions, same_checkpoint
from .gates import EXACT, PIXELS, coarsest, score_gate
from .metrics import Difference, Gate, compare, compare_ids, unreached
from .reference import _quiet_transformers, array
from .report import CaseReport, Measurement, ParityReport, StageReport

if TYPE_CHECKING:
    from PIL import Image

    from ...models.checkpoint import VisionLanguageModel
    from ...score_contract import ScoreContract
    from .stages import Case

# Stage -> its value for `n` cases: arrays whose first axis counts them, or `TextTensors`.
Values = dict[str, Any]
Differences = dict[str, list[Difference]]

# Stage of the check -> the bundle's stages that compute it from PyTorch's values.
_COMPUTED_BY: dict[str, tuple[str, ...]] = {
    "encoder": ("encoder",),
    "connector": ("connector",),
    "text_encoder": ("text_encoder",),
    "scores": (),
    "matcher": ("matcher",),
    "probabilities": (),
}
_LOGITS = frozenset({"scores", "matcher", "probabilities"})


def check_score_parity(
    bundle: Bundle | str | Path,
    checkpoint: str | Path,
    *,
    images: Sequence[str | Path | Image.Image] | None = None,
    texts: Sequence[str] | None = None,
    device: str = "cpu",
    threads: int | None = None,
) -> ParityReport:
    """Run every stage of `bundle` against the same values of `checkpoint` in transformers, FP32, on the CPU.

    Each stage runs isolated, fed PyTorch's values, and chained, fed what the bundle computed before. There is a case
    for each picture and each text; the shorter list is repeated. `images`: files or Pillow pictures, default a set that
    tells resize filters apart. `texts`: default some captions, one of them longer than the model reads.

    Raises BundleError, CheckpointError, InputError and their kin for what cannot be compared. A bundle that is not
    equal is no error: see `ParityReport.passed`.
    """
    _need_libraries()
    loaded = bundle if isinstance(bundle, Bundle) else Bundle.load(bundle)
    contract = score_contract(loaded)
    cases = make_cases(images, default_texts(contract) if texts is None else texts)
    reference = ScoreReference.load(checkpoint)
    _check_same_model(loaded, reference.checkpoint)
    with Scorer.load(loaded, device=device, threads=threads) as scorer:
        scorer.tokenize([case.prompt for case in cases])  # what the run time refuses is refused before PyTorch runs
        expected = reference.run(cases)
        isolated, _ = _run(scorer, cases, expected, chained=False)
        chained, computed = _run(scorer, cases, expected, chained=True)
    stages = _reports(loaded, isolated, chained)
    return ParityReport(
        bundle=str(loaded.path),
        checkpoint=str(checkpoint),
        stages=stages,
        cases=tuple(_case_report(row, case, expected, computed) for row, case in enumerate(cases)),
        same_checkpoint=same_checkpoint(loaded, reference.checkpoint),
        versions=_versions(),
        ids="tokens of the texts",
    )


def default_texts(contract: ScoreContract) -> list[str]:
    """Captions of different lengths, the last one too long for the model."""
    captions = ["a photo of a red circle on the left", "two blue squares", "A green triangle, above a yellow star!"]
    return [*captions, "one small shape and " * contract.text.max_length]


class ScoreReference:
    """A checkpoint in transformers, model and processor. Make one with `ScoreReference.load`.

    What is done with it follows from the checkpoint alone, never from the bundle that is held against it.
    """

    def __init__(self, checkpoint: VisionLanguageModel, model: Any, processor: Any) -> None:
        self.checkpoint = checkpoint
        self.model = model
        self.processor = processor

    @classmethod
    def load(cls, checkpoint: str | Path) -> ScoreReference:
        """Load from a directory, never from the network. CheckpointError for one that transformers cannot load."""
        import torch
        import transformers

        from ...models import load_checkpoint
        from ...models.remote_code import loader_options

        found = load_checkpoint(checkpoint)
        if "text_encoder" not in found.contracts:
            raise InputError(
                f"{checkpoint} is a {found.architecture}, which generates text; give the checkpoint that the bundle, "
                "which scores pictures against texts, was made from"
            )
        make: Any = getattr(transformers, found.architecture)
        processors: Any = transformers.AutoProcessor
        options = {"local_files_only": True}
        try:
            with _quiet_transformers():
                model = make.from_pretrained(checkpoint, dtype=torch.float32, use_safetensors=True, **options)
                processor = processors.from_pretrained(checkpoint, backend="pil", **loader_options())
        except (OSError, ValueError, RuntimeError, KeyError, AttributeError) as error:
            raise CheckpointError(
                f"transformers cannot load {checkpoint} ({' '.join(str(error).split())[:200]}); give the directory "
                "that the bundle was exported from, with its processor and tokenizer files"
            ) from error
        # Tokenizers without a limit of their own leave it to the model's positions.
        tokenizer, positions = processor.tokenizer, found.contracts["text_encoder"].axis("sequence").max
        tokenizer.model_max_length = min(tokenizer.model_max_length, positions)
        return cls(found, model.eval(), processor)

    def run(self, cases: Sequence[Case]) -> Values:
        """All cases as one batch, through the model's own `forward`; every picture meets every text."""
        import torch

        pictures, texts = [case.image for case in cases], [case.prompt for case in cases]
        # As transformers' documentation has it: SigLIP was trained on texts of full length.
        padding = "max_length" if self.checkpoint.kind == "siglip" else "longest"
        with _quiet_transformers(), torch.no_grad():  # a tokenizer tells of texts that are too long, then cuts them
            inputs = self.processor(images=pictures, text=texts, padding=padding, truncation=True, return_tensors="pt")
            outputs = self.model(**inputs)
        values = {
            "pixels": array(inputs["pixel_values"]),
            "input_ids": self._text(inputs),
            "encoder": array(outputs.vision_model_output.last_hidden_state),
            "connector": array(outputs.image_embeds),
            "text_encoder": array(outputs.text_embeds),
            "scores": array(outputs.logits_per_image),
        }
        return values | self._judge(inputs, outputs.logits_per_image)

    def _judge(self, inputs: Any, logits: Any) -> Values:
        """What is made of the scores: of every pair, or by the matcher of each picture with its own text."""
        import torch

        if self.checkpoint.kind == "blip-2-retrieval":
            with torch.no_grad():
                logits = self.model(**inputs, use_image_text_matching_head=True).logits_per_image
            return {"matcher": array(logits), "probabilities": array(logits.softmax(-1)[:, 1:])}
        return {"probabilities": array(logits.softmax(-1) if self.checkpoint.kind == "clip" else logits.sigmoid())}

    def _text(self, inputs: Any) -> TextTensors:
        """Without the placeholders that `Blip2Processor` puts first and the model cuts off."""
        config = self.model.config
        cut = config.num_query_tokens if getattr(config, "image_token_index", None) is not None else 0
        ids = inputs["input_ids"].numpy()[:, cut:]
        mask = inputs["attention_mask"].numpy()[:, cut:] if "attention_mask" in inputs else np.ones_like(ids)
        return TextTensors(np.ascontiguousarray(ids), np.ascontiguousarray(mask), tuple(mask.sum(1).tolist()))


def _pixels(scorer: Scorer, cases: Sequence[Case], _: Values) -> NDArray[np.float32]:
    contract = scorer.bundle.manifest.image
    tensors = [prepare_picture(load_image(case.image), contract).tensors["pixel_values"] for case in cases]
    return np.concatenate(tensors)


def _scores(scorer: Scorer, _: Sequence[Case], values: Values) -> NDArray[np.float32]:
    """`[n, n]`: CLIP's and SigLIP's logits, BLIP-2's cosines."""
    cosine = cosines(values["connector"], values["text_encoder"])
    logits = scorer.logits(cosine)
    return cosine if logits is None else logits


def _matcher(scorer: Scorer, cases: Sequence[Case], values: Values) -> NDArray[np.float32]:
    pairs = np.repeat(np.arange(len(cases))[:, None], 2, axis=1)
    return scorer.match_pairs(values["encoder"], values["input_ids"], pairs)


def _probabilities(scorer: Scorer, _: Sequence[Case], values: Values) -> NDArray[np.float32]:
    """`[n, n]`, or `[n, 1]` from the matcher."""
    if "match" in scorer.contract.methods:
        return softmax(values["matcher"])[:, 1:]
    return softmax(values["scores"]) if "softmax" in scorer.contract.methods else sigmoid(values["scores"])


# How the bundle computes each stage from the values of those before it.
_COMPUTE: Mapping[str, Callable[[Scorer, Sequence[Case], Values], Any]] = {
    "pixels": _pixels,
    "input_ids": lambda scorer, cases, _: scorer.tokenize([case.prompt for case in cases]),
    "encoder": lambda scorer, _, values: scorer.encode_pixels(values["pixels"]),
    "connector": lambda scorer, _, values: scorer.connect(values["encoder"]),
    "text_encoder": lambda scorer, _, values: scorer.encode_text(values["input_ids"]),
    "scores": _scores,
    "matcher": _matcher,
    "probabilities": _probabilities,
}


def _run(scorer: Scorer, cases: Sequence[Case], expected: Values, *, chained: bool) -> tuple[Differences, Values]:
    """The differences of every stage, fed PyTorch's values or (`chained`) the bundle's own; and the bundle's values."""
    found: Differences = {}
    computed: Values = {}
    stopped = ""
    for name in expected:
        try:
            if not stopped:
                computed[name] = _COMPUTE[name](scorer, cases, computed if chained else expected)
        except BridgeportError as error:
            stopped = str(error)
        if name in computed:
            found[name] = _compare(expected[name], computed[name])
        else:
            found[name] = [unreached(f"the {'chain' if chained else 'stage'} stopped: {stopped}")] * len(cases)
        if not chained:
            stopped = ""
    return found, computed


def _compare(expected: Any, computed: Any) -> list[Difference]:
    """Row by row; of texts the ids and then the mask."""
    if not isinstance(expected, TextTensors):
        return [compare(*rows) for rows in zip(expected, computed, strict=True)]
    found = []
    for row in range(len(expected.input_ids)):
        ids = compare_ids(expected.input_ids[row].tolist(), computed.input_ids[row].tolist())
        mask = compare_ids(expected.attention_mask[row].tolist(), computed.attention_mask[row].tolist())
        found.append(ids if ids.max_abs else mask)
    return found


def _reports(bundle: Bundle, isolated: Differences, chained: Differences) -> tuple[StageReport, ...]:
    """Every stage by the gate of its own precision, and in the chain by that of the coarsest stage of the bundle."""
    precisions = {stage.contract.name: stage.precision for stage in bundle.manifest.stages}
    reports = []
    for name, differences in isolated.items():
        own: list[str] = [precisions[stage] for stage in _COMPUTED_BY.get(name, ())]
        exact = {"pixels": PIXELS, "input_ids": EXACT}.get(name)
        before = [*precisions.values()] if name in _LOGITS else own + [precisions["encoder"]] * (name == "connector")
        reports.append(
            StageReport(
                name,
                coarsest(own),
                _measure(differences, exact or score_gate(coarsest(own), logits=name in _LOGITS)),
                _measure(chained[name], exact or score_gate(coarsest(before), logits=name in _LOGITS)),
            )
        )
    return tuple(reports)


def _measure(differences: Sequence[Difference], gate: Gate) -> Measurement:
    return Measurement({f"case {row}": one for row, one in enumerate(differences, start=1)}, gate)


def _case_report(row: int, case: Case, expected: Values, computed: Values) -> CaseReport:
    return CaseReport(
        case.label,
        case.picture,
        case.prompt,
        reference_text=_say(expected, row),
        bundle_text=_say(computed, row),
        reference_ids=_ids(expected.get("input_ids"), row),
        bundle_ids=_ids(computed.get("input_ids"), row),
    )


def _ids(text: TextTensors | None, row: int) -> tuple[int, ...]:
    return () if text is None else tuple(text.input_ids[row].tolist())


def _say(values: Values, row: int) -> str:
    """The score of the case's picture with its own text, in words."""
    if "probabilities" not in values:
        return "not reached"
    probability = values["probabilities"][row]
    return f"{values['scores'][row, row]:.4f}, {probability[row if len(probability) > 1 else 0]:.2%}"


def _check_same_model(bundle: Bundle, checkpoint: VisionLanguageModel) -> None:
    """A checkpoint of another kind or of other sizes cannot be compared with; one of other weights can, and shows."""
    made_from = bundle.manifest.checkpoint.architecture
    if made_from != checkpoint.architecture:
        raise InputError(
            f"{bundle.path} was made from a {made_from}, {checkpoint.path} is a {checkpoint.architecture}; give the "
            "checkpoint that the bundle was made from"
        )
    for record in bundle.manifest.stages:
        name = record.contract.name
        if record.contract != checkpoint.contracts[name]:
            raise InputError(
                f"{bundle.path} and {checkpoint.path} are of different sizes (inputs or outputs of {name} differ); "
                "give the checkpoint that the bundle was made from"
            )
