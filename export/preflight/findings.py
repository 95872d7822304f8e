"""What preflight reports: one record per thing that would stop or hurt a TensorRT build."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import asdict, dataclass
from typing import Literal

Severity = Literal["error", "warning", "note"]
SEVERITIES: tuple[Severity, ...] = ("error", "warning", "note")


@dataclass(frozen=True)
class Finding:
    """One finding.

    `check` names the test that found it ("operator", "opset", "mask", ...). "error" stops the build or makes wrong
    numbers, "warning" costs speed or accuracy or could not be verified, "note" is worth knowing. `node` is the
    node's or value's name, the file's name for what concerns the whole graph. `why` is what is wrong, with the
    numbers; `fix` what to do. `fixable`: `preflight --fix` can do it.
    """

    check: str
    severity: Severity
    stage: str
    node: str
    why: str
    fix: str
    fixable: bool = False

    def to_json(self) -> dict[str, str | bool]:
        """The record as JSON values, keys as the fields are named."""
        return asdict(self)


def sort_findings(findings: Iterable[Finding]) -> list[Finding]:
    """Errors first, then warnings, then notes; within one severity by stage and check, else in the order found."""
    return sorted(findings, key=lambda one: (SEVERITIES.index(one.severity), one.stage, one.check))
