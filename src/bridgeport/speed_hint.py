"""Which processor a CPU graph was chosen for, and whether this one can run it as fast.

Needs neither ONNX Runtime nor torch: it is checked when a bundle is loaded.
"""

from __future__ import annotations

import logging
import platform
from functools import lru_cache
from pathlib import Path
from typing import TYPE_CHECKING

from pydantic import Field

from .models.contract import Record

if TYPE_CHECKING:
    from .manifest import Manifest

# What INT8 products are fast with, the fastest first: name in a hint -> the flags of /proc/cpuinfo, any of which will
# do. MLAS and oneDNN have a kernel for each. Below them U8S8 products saturate in 16 bits, so weights get 7 bits.
INSTRUCTION_SETS: dict[str, frozenset[str]] = {
    "amx-int8": frozenset({"amx_int8"}),
    "avx512-vnni": frozenset({"avx512_vnni"}),
    "avx-vnni": frozenset({"avx_vnni"}),
    "i8mm": frozenset({"i8mm"}),
    "dotprod": frozenset({"asimddp"}),
    "avx512": frozenset({"avx512bw"}),
    "avx2": frozenset({"avx2"}),
}
NONE = "none"
_logger = logging.getLogger(__name__)
# x86 without VNNI: the sum of two products of a U8 and an S8 is kept in 16 bits, and saturates.
SATURATING = frozenset({"avx512", "avx2", NONE})


class SpeedHint(Record):
    """What was measured when a stage was quantised for a CPU.

    `instruction_set`: a key of `INSTRUCTION_SETS` or "none". `engine`, `version`: what ran it. `milliseconds`:
    scheme -> median of one call, "fp32" is the graph before. `ratio`: median over the rounds of FP32's time over the
    chosen scheme's.
    """

    instruction_set: str
    processor: str
    scheme: str
    engine: str = "onnxruntime"
    version: str
    ratio: float = Field(gt=0)
    milliseconds: dict[str, float] = Field(default_factory=dict)


@lru_cache(maxsize=1)
def processor() -> str:
    """The processor's own name, "unknown" where the system does not tell."""
    return _fields().get("model name") or platform.processor() or "unknown"


@lru_cache(maxsize=1)
def instruction_sets() -> tuple[str, ...]:
    """Names in `INSTRUCTION_SETS` that this machine has, the fastest first; empty where the system does not tell."""
    fields = _fields()
    flags = frozenset(fields.get("flags", fields.get("Features", "")).split())
    return tuple(name for name, wanted in INSTRUCTION_SETS.items() if wanted & flags)


def best_instruction_set() -> str:
    """The fastest that this machine has, else "none"."""
    return next(iter(instruction_sets()), NONE)


def check_speed_hint(hint: SpeedHint) -> str | None:
    """One line when this machine lacks the instruction set that `hint` was measured with, else None."""
    has = instruction_sets()
    if hint.instruction_set == NONE or hint.instruction_set in has:
        return None
    return (
        f"made for {hint.instruction_set} ({hint.processor}), where {hint.scheme} ran {hint.ratio:.1f} x as fast as "
        f"FP32; this processor ({processor()}) has {', '.join(has) or 'none of the instruction sets for INT8'}, so it "
        "may be slower here, and less exact: quantise the FP32 bundle again on this machine"
    )


def speed_warnings(manifest: Manifest) -> list[str]:
    """One line for each stage that was made for another processor than this one."""
    found = []
    for stage in manifest.stages:
        written = None if stage.quantization is None else stage.quantization.details.get("speed_hint")
        if written is not None and (warning := check_speed_hint(SpeedHint.model_validate(written))) is not None:
            found.append(f"{stage.contract.name}: {warning}")
    return found


def log_speed_warnings(manifest: Manifest) -> None:
    """`speed_warnings` as warnings of this module's logger: on stderr where nobody has set up logging."""
    for line in speed_warnings(manifest):
        _logger.warning(line)


def _fields() -> dict[str, str]:
    """`name: value` lines of /proc/cpuinfo, the first of each name; empty where there is no such file (not Linux)."""
    file = Path("/proc/cpuinfo")
    fields: dict[str, str] = {}
    if file.is_file():
        for line in file.read_text(encoding="utf-8", errors="replace").splitlines():
            name, _, value = line.partition(":")
            fields.setdefault(name.strip(), value.strip())
    return fields
