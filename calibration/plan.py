"""Which precision each stage of a bundle gets, and what a target can do."""

from __future__ import annotations

from collections.abc import Mapping

from ..errors import InputError
from ..export.options import PRECISIONS, TARGETS
from ..manifest import Manifest, Precision, Target

# What a target runs. FP8 needs TensorRT's kernels; the CPU provider computes FP16 by casting back and forth, which the
# gate on speed then refuses unless it is raised.
_CAN: Mapping[Target, tuple[Precision, ...]] = {
    "cpu": ("fp32", "fp16", "int8", "int4"),
    "cuda": ("fp32", "fp16", "int8", "int4"),
    "tensorrt": ("fp32", "fp16", "fp8", "int8", "int4"),
}
# What a stage stays in that the wanted precision is not meant for.
_BASE: Mapping[Target, Precision] = {"cpu": "fp32", "cuda": "fp16", "tensorrt": "fp16"}

# Parts of a language model: weights rounded, activations left alone. Their activations have outliers that INT8 does
# not survive, and decoding is bound by reading weights.
LANGUAGE_STAGES = frozenset({"llm", "llm_encoder", "cross_kv"})
# A table that rows are read from: nothing to compute.
LOOKUP_STAGES = frozenset({"embed_tokens"})


def plan_stages(
    manifest: Manifest, precision: str, target: str, overrides: Mapping[str, str] | None = None
) -> dict[str, Precision]:
    """Stage name -> precision, for every stage of the bundle.

    ``precision``: "fp16" for all stages; "int8" for INT8 weights and activations in the stages that see pictures and
    INT8 weights in the language model; "fp8" likewise, with the language model in FP16; "int4" for 4-bit weights in
    the language model. ``overrides``: stage -> its own precision.

    Raises InputError for an unknown precision, target or stage, for one that the target cannot do, and for a bundle
    that is quantised already or built to engines.
    """
    wanted = _known_precision(precision)
    aim = _known_target(target)
    _check_target(wanted, aim)
    names = [stage.contract.name for stage in manifest.stages]
    plan = {name: _default(name, wanted, aim) for name in names}
    for name, override in (overrides or {}).items():
        if name not in plan:
            raise InputError(f"stage {name!r} is unknown; this bundle has {', '.join(names)}")
        plan[name] = _check_stage(name, _known_precision(override), aim)
    _check_source(manifest, plan)
    if aim == "cpu" and all(plan[stage.contract.name] == stage.precision for stage in manifest.stages):
        raise InputError(f"precision {precision} for cpu is what the bundle has already; choose fp16, int8 or int4")
    return plan


def check_gptq(plan: Mapping[str, Precision]) -> None:
    """Raise InputError for a plan without 4-bit weights, which is what GPTQ is for."""
    if "int4" not in plan.values():
        planned = ", ".join(f"{stage} {precision}" for stage, precision in plan.items())
        raise InputError(
            f"--weights gptq fits the 4-bit weights of a language model, and none is asked for ({planned}); add "
            "--stage llm=int4, or leave --weights out"
        )


def parse_overrides(texts: list[str]) -> dict[str, str]:
    """``["llm=int4"]`` as a mapping; InputError for what has no "=", and for a stage that is named twice."""
    found: dict[str, str] = {}
    for text in texts:
        stage, separator, precision = text.partition("=")
        if not separator or not stage or not precision:
            raise InputError(f"--stage {text!r} is not STAGE=PRECISION; write for example --stage llm=int4")
        if stage in found:
            raise InputError(
                f"--stage names {stage} twice ({found[stage]} and {precision}); give every stage one precision"
            )
        found[stage] = precision
    return found


def _known_precision(text: str) -> Precision:
    for known in PRECISIONS:
        if text == known:
            return known
    raise InputError(f"precision {text!r} is unknown; accepted are {', '.join(PRECISIONS)}")


def _known_target(text: str) -> Target:
    for known in TARGETS:
        if text == known:
            return known
    raise InputError(f"target {text!r} is unknown; accepted are {', '.join(TARGETS)}")


def _check_target(precision: Precision, target: Target) -> None:
    if precision not in _CAN[target]:
        raise InputError(
            f"precision {precision} cannot run on target {target}, which takes {', '.join(_CAN[target])}; "
            f"choose one of these, or --target tensorrt"
        )


def _default(stage: str, precision: Precision, target: Target) -> Precision:
    base = _BASE[target]
    if precision in ("fp32", "fp16"):
        return precision
    if stage in LOOKUP_STAGES:
        return base
    if stage in LANGUAGE_STAGES:
        return base if precision == "fp8" else precision
    return base if precision == "int4" else precision


def _check_stage(stage: str, precision: Precision, target: Target) -> Precision:
    _check_target(precision, target)
    if stage in LOOKUP_STAGES and precision not in ("fp32", "fp16"):
        raise InputError(f"--stage {stage}={precision}: a table of embeddings takes fp32 or fp16")
    if stage in LANGUAGE_STAGES and precision == "fp8":
        raise InputError(f"--stage {stage}=fp8: a language model takes fp32, fp16, int8 or int4 (weights alone)")
    if stage not in LANGUAGE_STAGES and precision == "int4":
        raise InputError(f"--stage {stage}=int4: 4-bit weights are for language models; take fp16 or int8 here")
    return precision


def _check_source(manifest: Manifest, plan: Mapping[str, Precision]) -> None:
    engines = [stage.contract.name for stage in manifest.stages if stage.format == "tensorrt"]
    if engines:
        raise InputError(
            f"the bundle holds TensorRT engines ({', '.join(engines)}), whose precision is that of the graphs behind "
            "them; quantise the FP32 bundle that `bridgeport build` was given, and build the result"
        )
    if manifest.target != "cpu" or manifest.calibration is not None:
        done = ", ".join(f"{stage.contract.name} {stage.precision}" for stage in manifest.stages)
        raise InputError(
            f"the bundle was quantised already (for {manifest.target}: {done}); quantise the FP32 bundle that it was "
            "made from, because rounding twice loses twice"
        )
    for stage in manifest.stages:
        name, has = stage.contract.name, stage.precision
        if has not in ("fp32", plan[name]):
            raise InputError(
                f"stage {name} is {has} already and {plan[name]} is wanted; quantise a bundle that was exported with "
                f"--precision fp32, or keep it with --stage {name}={has}"
            )
