"""What a pass is and how a list of them is applied."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Sequence
from dataclasses import dataclass
from typing import ClassVar

import onnx_ir as ir

from ...errors import ExportError


class GraphPass(ABC):
    """One rewrite of a graph, in place or not."""

    name: ClassVar[str]
    # A pass that a graph cannot do without: declining is then an error and not a note.
    mandatory: ClassVar[bool] = False

    def requires(self, model: ir.Model) -> str | None:
        """None when the pass applies to `model`, else the reason why it declines."""
        return None

    @abstractmethod
    def run(self, model: ir.Model) -> tuple[ir.Model, bool]:
        """The rewritten model and whether anything changed."""

    def ensures(self, model: ir.Model) -> str | None:
        """None when `model` is as the pass promises, else what is not."""
        return None


@dataclass(frozen=True)
class PassResult:
    """What one pass did: changed the graph, left it, or declined with a reason."""

    name: str
    changed: bool
    declined: str | None = None

    def as_text(self) -> str:
        """For the manifest: "changed", "unchanged" or "declined: why"."""
        if self.declined is not None:
            return f"declined: {self.declined}"
        return "changed" if self.changed else "unchanged"


def apply_passes(
    model: ir.Model, passes: Sequence[GraphPass], *, stage: str
) -> tuple[ir.Model, tuple[PassResult, ...]]:
    """Run `passes` in order on the graph of `stage`.

    Raises ExportError when a mandatory pass declines, or when a pass does not leave what it promises.
    """
    results: list[PassResult] = []
    for one in passes:
        reason = one.requires(model)
        if reason is not None:
            if one.mandatory:
                raise ExportError(f"stage {stage}: pass {one.name} cannot run: {reason}; please report this model")
            results.append(PassResult(one.name, changed=False, declined=reason))
            continue
        model, changed = one.run(model)
        broken = one.ensures(model)
        if broken is not None:
            raise ExportError(f"stage {stage}: pass {one.name} left a wrong graph: {broken}; please report this model")
        results.append(PassResult(one.name, changed))
    return model, tuple(results)
