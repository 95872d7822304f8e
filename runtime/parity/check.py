"""The parity check from beginning to end."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from importlib.metadata import PackageNotFoundError, version
from importlib.util import find_spec
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ...bundle import Bundle, sha256
from ...errors import DependencyError, InputError
from ...models.remote_code import remote_code
from ..processor.instruction import InstructionTokenizer
from .alter import describe
from .audit import audit_epsilons, audit_int4_weights
from .cases import choose_cases
from .drill import DrillReport, GraphRun
from .gates import FP32_LOGITS, ChosenGates, choose_gates
from .locate import drill_into, llm_feeds, prompt_alone
from .metrics import compare
from .names import find_probes
from .report import CaseReport, Measurement, ParityReport, StageReport
from .stages import BundleStages, Case, Differences, run_chained, run_isolated

if TYPE_CHECKING:
    from ...manifest import Manifest
    from ...models.checkpoint import VisionLanguageModel
    from ...models.contract import KvCacheContract
    from .cases import Source
    from .reference import Reference, ReferenceValues


MAX_NEW_TOKENS = 24
Reports = tuple[StageReport, ...]
_VERSIONS = ("bridgeport", "onnxruntime", "torch", "transformers", "numpy", "pillow", "tokenizers")


def check_parity(
    bundle: Bundle | str | Path,
    checkpoint: str | Path,
    *,
    images: Sequence[Source] | None = None,
    prompts: Sequence[str] | None = None,
    videos: Sequence[Source] | None = None,
    drill: bool = False,
    max_new_tokens: int = MAX_NEW_TOKENS,
    device: str = "cpu",
    threads: int | None = None,
    trust_remote_code: bool = False,
) -> ParityReport:
    """Run every stage of `bundle` against the same stage of `checkpoint` in transformers, FP32, on the CPU.

    Each stage runs isolated, fed PyTorch's input, and chained, fed what the bundle computed before; all cases
    in one batch, so that padding and row positions are checked too. There is a case for each picture, each video and
    each prompt; the shorter list is repeated. `images`: files or Pillow pictures. `videos`: films, directories or lists
    of frames. Where neither is given: a set that tells resize filters apart, and two videos for a bundle that takes
    them. `prompts`: default the empty one and a question. `drill`: inside the first stage that diverges, find the
    first node that does. `device`, `threads`: where and how the bundle runs, as for `Pipeline.load`.
    `trust_remote_code`: run Python code that the checkpoint's directory holds for its config, tokenizer and processor.

    Raises BundleError, CheckpointError, InputError and their kin for what cannot be compared. A bundle that
    is not equal is no error: see `ParityReport.passed`.
    """
    if max_new_tokens < 1:
        raise InputError(f"max_new_tokens is {max_new_tokens}; accepted is 1 or more")
    _need_libraries()
    loaded = bundle if isinstance(bundle, Bundle) else Bundle.load(bundle)
    with remote_code(allowed=trust_remote_code):
        if loaded.manifest.score is not None:
            from .score import check_score_parity

            if drill:
                raise InputError(f"{loaded.path} scores pictures against texts; the drill knows bundles that generate")
            if videos:
                raise InputError(f"{loaded.path} scores pictures against texts; it takes no videos")
            pictures: Any = images  # lists of frames are for other bundles
            return check_score_parity(
                loaded, checkpoint, images=pictures, texts=prompts, device=device, threads=threads
            )
        cases = choose_cases(loaded.manifest, images, videos, prompts)
        return _check_generation(loaded, checkpoint, cases, drill, max_new_tokens, device, threads)


def _check_generation(
    loaded: Bundle,
    checkpoint: str | Path,
    cases: Sequence[Case],
    drill: bool,
    max_new_tokens: int,
    device: str,
    threads: int | None,
) -> ParityReport:
    """`check_parity` of a bundle that generates."""
    from ..pipeline import Pipeline
    from .reference import Reference

    gates = choose_gates(loaded.manifest)
    _check_instructions(loaded, cases)
    manifest = loaded.manifest
    reference = Reference.load(checkpoint, manifest.reduction, manifest.custom_connector)
    _check_same_shapes(loaded, reference)
    values = [reference.run(case.image, case.prompt, max_new_tokens) for case in cases]
    _check_length(loaded, values, max_new_tokens)
    with Pipeline.load(loaded, device=device, threads=threads) as pipeline:
        check = _Check(loaded, BundleStages(pipeline), reference, cases, values)
        isolated = run_isolated(check.stages, cases, values)
        chained, tokens = run_chained(check.stages, cases, values, max_new_tokens)
        reports = check.add_findings(_stage_reports(gates, cases, isolated, chained))
        if has_blocks_alone(loaded.manifest):
            reports = check.add_same_weights(reports)
        found = check.drill(reports) if drill else None
    return ParityReport(
        bundle=str(loaded.path),
        checkpoint=str(checkpoint),
        stages=reports,
        cases=_case_reports(reference, cases, values, tokens),
        same_checkpoint=same_checkpoint(loaded, reference.checkpoint),
        drill=found,
        versions=_versions(),
        notes=describe(reference.checkpoint),
    )


@dataclass(frozen=True)
class _Check:
    """Both sides, and PyTorch's values for each case."""

    bundle: Bundle
    stages: BundleStages
    reference: Reference
    cases: Sequence[Case]
    values: Sequence[ReferenceValues]

    def add_findings(self, reports: Reports) -> Reports:
        """Read the graphs: wrong epsilons, and 4-bit weights that are no rounding of the checkpoint's."""
        import onnx

        manifest, model = self.bundle.manifest, self.reference.model
        found = {}
        for stage in ("encoder", "connector", "llm"):
            graph = onnx.load(str(self.bundle.graph(stage)), load_external_data=False).graph
            found[stage] = audit_epsilons(graph, find_probes(stage, graph, manifest, self.reference), model)
        if has_blocks_alone(manifest) and rounds_to_nearest(manifest):
            found["llm"] += audit_int4_weights(self.bundle.graph("llm"), self.reference.decoder())
        names = {"encoder": "encoder", "connector": "connector", "first_logits": "llm"}
        return tuple(
            replace(report, findings=found[names[report.name]]) if report.name in names else report
            for report in reports
        )

    def add_same_weights(self, reports: Reports) -> Reports:
        """Hold the 4-bit graph, activations not rounded, against PyTorch with the graph's own weights.

        Then nothing is left but FP32 rounding, and a wrong graph does not pass for quantisation. The reference keeps
        these weights from here on.
        """
        import onnx

        path = self.bundle.graph("llm")
        self.reference.use_weights_of(path)
        run = GraphRun(onnx.load(str(path), load_external_data=False), path.parent, ["logits"])
        cases = {
            case.label: compare(
                self.reference.first_logits(value.inputs_embeds),
                run(llm_feeds(self.bundle.manifest, value.inputs_embeds))["logits"][0],
            )
            for case, value in zip(self.cases, self.values, strict=True)
        }
        measured = Measurement(cases, FP32_LOGITS)
        return tuple(
            replace(report, same_weights=measured) if report.name == "first_logits" else report for report in reports
        )

    def drill(self, reports: Reports) -> DrillReport | None:
        """Look into the first stage that does not pass, with the case that shows it most."""
        first = next((report for report in reports if not report.passed), None)
        if first is None:
            return None
        run = next((run for run in first.runs.values() if not run.passed), first.isolated)
        worst = [case.label for case in self.cases].index(run.worst_case)
        case, values = self.cases[worst], self.values[worst]
        return drill_into(first.name, self.bundle, self.stages, self.reference, case, values, first.findings)


def _need_libraries() -> None:
    """DependencyError unless what the reference and the drill import is there."""
    missing = [name for name in ("torch", "transformers", "onnx", "onnx_ir") if find_spec(name) is None]
    if missing:
        raise DependencyError(
            f"parity holds a bundle against PyTorch and needs {', '.join(missing)}; install them with "
            "`pip install 'bridgeport[export]'`"
        )


def _check_same_shapes(bundle: Bundle, reference: Reference) -> None:
    """A checkpoint of another kind or of other sizes cannot be compared with; one of other weights can, and shows."""
    kind = reference.checkpoint.kind
    if bundle.manifest.model_kind != kind:
        raise InputError(
            f"{bundle.path} and {reference.checkpoint.path} are of different models: the bundle's kind is "
            f"{bundle.manifest.model_kind}, the checkpoint's {kind}; give the checkpoint that the bundle was made from"
        )
    made_from, text = bundle.manifest.checkpoint, reference.checkpoint.text_config
    if made_from.text_model_type != text.model_type:
        raise InputError(
            f"{bundle.path} and {reference.checkpoint.path} are of different models: the bundle's text model is "
            f"{made_from.text_model_type}, the checkpoint's {text.model_type}; give the checkpoint that "
            "the bundle was made from"
        )
    for record in bundle.manifest.stages:
        ours, theirs = record.contract, reference.checkpoint.contracts[record.contract.name]
        pairs = zip((*ours.inputs, *ours.outputs), (*theirs.inputs, *theirs.outputs), strict=True)
        for tensor, other in pairs:
            if tensor != other:
                raise InputError(
                    f"{bundle.path} and {reference.checkpoint.path} are of different models: {tensor.name} of "
                    f"{ours.name} is {list(tensor.shape)} in the bundle and {list(other.shape)} in the checkpoint; "
                    "give the checkpoint that the bundle was made from"
                )
    if _cache_sizes(bundle.manifest.kv_cache) != _cache_sizes(reference.checkpoint.kv_cache):
        raise InputError(
            f"{bundle.path} and {reference.checkpoint.path} are of different models: their key/value caches differ in "
            "layers, heads or head size; give the checkpoint that the bundle was made from"
        )


def has_blocks_alone(manifest: Manifest) -> bool:
    """Whether the language model is FP32 but for 4-bit weights, so that PyTorch can hold the same weights."""
    return manifest.stage("llm").precision == "int4" and manifest.target == "cpu" and prompt_alone(manifest)


def rounds_to_nearest(manifest: Manifest) -> bool:
    """Whether every 4-bit weight is the level nearest to the checkpoint's: GPTQ takes others on purpose."""
    record = manifest.stage("llm").quantization
    return record is None or record.details.get("method") == "rtn"


def _cache_sizes(cache: KvCacheContract | None) -> tuple[int, int, int] | None:
    """What a quantised bundle's cache keeps of its checkpoint's; its type and how it grows are the target's."""
    return None if cache is None else (cache.num_layers, cache.num_heads, cache.head_size)


def _check_instructions(bundle: Bundle, cases: Sequence[Case]) -> None:
    """InputError for a prompt that the connector cannot read; transformers would stop with a traceback."""
    contract = None if bundle.manifest.prompt is None else bundle.manifest.prompt.instruction
    if contract is not None:
        tokenizer = InstructionTokenizer(bundle.file(contract.tokenizer), contract)
        for case in cases:
            tokenizer.tensors(case.prompt, 1)


def _check_length(bundle: Bundle, values: Sequence[ReferenceValues], max_new_tokens: int) -> None:
    generation = bundle.manifest.generation
    if generation is None:
        return
    context, longest = (
        generation.context_length,
        max(len(value.input_ids) for value in values),
    )
    if longest + max_new_tokens > context:
        raise InputError(
            f"a prompt has {longest} tokens (the picture's included) and max_new_tokens is {max_new_tokens}, but the "
            f"context holds {context}; shorten the prompt or ask for fewer tokens"
        )


def _stage_reports(
    gates: Sequence[ChosenGates], cases: Sequence[Case], isolated: Differences, chained: Differences
) -> Reports:
    labels = [case.label for case in cases]
    return tuple(
        StageReport(
            gate.stage.name,
            gate.precision,
            Measurement(dict(zip(labels, isolated[gate.stage.name], strict=True)), gate.isolated),
            Measurement(dict(zip(labels, chained[gate.stage.name], strict=True)), gate.chained),
        )
        for gate in gates
    )


def _case_reports(
    reference: Reference,
    cases: Sequence[Case],
    values: Sequence[ReferenceValues],
    tokens: Sequence[Sequence[int]],
) -> tuple[CaseReport, ...]:
    return tuple(
        CaseReport(
            case.label,
            case.picture,
            case.prompt,
            reference.decode(value.token_ids),
            reference.decode(list(row)),
            tuple(value.token_ids),
            tuple(row),
        )
        for case, value, row in zip(cases, values, tokens, strict=True)
    )


def same_checkpoint(bundle: Bundle, checkpoint: VisionLanguageModel) -> bool | None:
    """Whether the checkpoint's files are those that the bundle names; None when it names none."""
    named = bundle.manifest.checkpoint.sha256
    if not named:
        return None
    found = {checkpoint.relative_path(path): path for path in checkpoint.files}
    return set(named) == set(found) and all(sha256(found[name]) == digest for name, digest in named.items())


def _versions() -> dict[str, str]:
    found = {}
    for name in _VERSIONS:
        try:
            found[name] = version(name)
        except PackageNotFoundError:
            continue
    return found
