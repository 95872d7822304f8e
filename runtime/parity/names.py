"""Which modules of transformers' model a stage's graph was made from, and so which of its values can be compared."""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

from ...manifest import Manifest
from .probes import NAME_SCOPES, Probe, builder_probes, output_probe, scope_probes
from .taps import TAPS

if TYPE_CHECKING:
    from ...models.checkpoint import VisionLanguageModel
    from .reference import Reference


def find_probes(stage: str, graph: Any, manifest: Manifest, reference: Reference) -> list[Probe]:
    """Probes of the graph (an ONNX GraphProto) of a bundle's stage, their modules named as in `reference.model`."""
    if stage == "embed_tokens":
        return [output_probe(graph, reference.embedding_name())]
    if any(entry.key == NAME_SCOPES for node in graph.node for entry in node.metadata_props):
        return scope_probes(graph, module_names(reference.checkpoint, stage, reference.model))
    if manifest.seq2seq is not None:  # its graph is traced without module names
        return []
    stored = reference.checkpoint.layout.stages["llm"].checkpoint_name
    layers = 0 if manifest.kv_cache is None else manifest.kv_cache.num_layers
    return builder_probes(graph, layers, lambda module: stored(f"{module}.weight").removesuffix(".weight"))


def module_names(checkpoint: VisionLanguageModel, stage: str, model: Any) -> dict[str, str]:
    """Exported module -> module of transformers' `model`, from the table that fills the stage's weights.

    Where the stage is transformers' own module, every module of it is named. Where it is ours (a connector),
    only those that hold weights are: between them the two may be cut differently.
    """
    if stage == "connector" and checkpoint.layout.custom_connector is not None:
        return _custom_names(checkpoint, model)
    table = checkpoint.layout.stages[stage]
    weights = {name: table.checkpoint_name(name) for name in table.on_meta().state_dict()}
    pairs = {ours.rpartition(".")[0]: theirs.rpartition(".")[0] for ours, theirs in weights.items()}
    known = {name for name, _ in model.named_modules()}
    names = {ours: theirs for ours, theirs in pairs.items() if ours and theirs in known and theirs}
    if (root := _common_root(names)) is not None:
        ours, theirs = root
        inside = [name for name in known if name == theirs or name.startswith(f"{theirs}.")]
        names |= {_join(ours, name[len(theirs) + 1 :]): name for name in inside if _join(ours, name[len(theirs) + 1 :])}
    return names


def _custom_names(checkpoint: VisionLanguageModel, model: Any) -> dict[str, str]:
    """A custom connector stands in `model` where transformers' stood, behind no reducer: see `alter`."""
    root = TAPS[checkpoint.kind].image_features.module
    inner = (
        "" if checkpoint.layout.reduction is None or checkpoint.layout.reduction.method == "queries" else "connector"
    )
    return {_join(inner, name): _join(root, name) for name, _ in model.get_submodule(root).named_modules() if name}


def _common_root(names: Mapping[str, str]) -> tuple[str, str] | None:
    """(ours, theirs) when every pair of names is that pair with the same tail behind it; else None."""
    roots = {_without_common_tail(ours.split("."), theirs.split(".")) for ours, theirs in names.items()}
    return roots.pop() if len(roots) == 1 else None


def _without_common_tail(ours: list[str], theirs: list[str]) -> tuple[str, str]:
    while ours and len(theirs) > 1 and ours[-1] == theirs[-1]:
        ours, theirs = ours[:-1], theirs[:-1]
    return ".".join(ours), ".".join(theirs)


def _join(root: str, rest: str) -> str:
    return ".".join(part for part in (root, rest) if part)
