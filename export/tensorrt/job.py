"""What the parent tells the process that builds a stage, and what that answers: JSON, one object a line."""

from __future__ import annotations

import json
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from ...engine_record import BuildOptions, EngineProfile, ShapeRange

MIB = 1 << 20


@dataclass(frozen=True)
class StageJob:
    """One engine to build.

    `graph`: ONNX file. `plan`: where the engine goes. `inputs`: names that the graph must have. `options`: as
    `BuildOptions.model_dump()`. `timing_cache`: file, None for none; `strict_cache`: one that cannot be read is an
    error. `log`: file that every message is added to. `staging`: the unfinished bundle, which the child removes when
    the parent dies.
    """

    stage: str
    graph: str
    plan: str
    inputs: tuple[str, ...]
    profiles: tuple[dict[str, Any], ...]
    options: dict[str, Any] = field(default_factory=dict)
    timing_cache: str | None = None
    strict_cache: bool = False
    log: str | None = None
    staging: str | None = None

    def to_line(self) -> str:
        """The job as one line."""
        return json.dumps(asdict(self)) + "\n"

    @classmethod
    def from_line(cls, line: str) -> StageJob:
        """What `to_line` wrote."""
        values = json.loads(line)
        return cls(**{**values, "inputs": tuple(values["inputs"]), "profiles": tuple(values["profiles"])})

    def build_options(self) -> BuildOptions:
        """The options as a record."""
        return BuildOptions.model_validate(self.options)

    def profile_shapes(self) -> list[tuple[str, dict[str, ShapeRange]]]:
        """(name, input -> shapes) of each profile."""
        records = [EngineProfile.model_validate(one) for one in self.profiles]
        return [(record.name, record.shapes) for record in records]


@dataclass(frozen=True)
class StageResult:
    """What was built: flags by name as the builder held them, bytes of the plan, seconds, warnings of TensorRT."""

    flags: tuple[str, ...]
    size: int
    seconds: float
    warnings: tuple[str, ...] = ()


@dataclass(frozen=True)
class BuildEvent:
    """Progress of a build.

    `kind`: "stage" (one begins: number `step` of `steps`), "phase" (one of TensorRT's begins, inside `parent`, with
    `steps` steps), "step" (so many steps of `phase` are done), "finish" (of `phase`), "note" (`text`), "status"
    (`text`, until the next stage or status).
    """

    kind: str
    stage: str = ""
    phase: str = ""
    parent: str = ""
    step: int = 0
    steps: int = 0
    text: str = ""


def memory_limits(options: BuildOptions) -> dict[str, int]:
    """Member of tensorrt.MemoryPoolType -> bytes."""
    pools = {"WORKSPACE": options.workspace_mib, "TACTIC_DRAM": options.tactic_dram_mib}
    return {name: size * MIB for name, size in pools.items() if size is not None}


def read_cache(file: str | None) -> bytes:
    """The timing cache's bytes; nothing for a file that is not there yet."""
    return Path(file).read_bytes() if file is not None and Path(file).is_file() else b""
