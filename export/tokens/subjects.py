"""What `bridgeport tokens` is asked about: a checkpoint directory, a bundle, or a model known by name."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from importlib import util
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ...bundle import Bundle, is_bundle
from ...errors import CheckpointError, DependencyError, InputError, UnsupportedError
from ...image_contract import ImageContract, Whole
from ...manifest import CONFIG_FILE
from ...models.contract import StageContract
from .known import KNOWN, KnownModel

if TYPE_CHECKING:
    from ...models.reduction_contract import Reduction
    from ...models.stages import Layout


@dataclass(frozen=True)
class Subject:
    """One model, as far as it can be read here.

    `architecture`: transformers' class. `source`: a path, or whose config it is. `context`: tokens of the language
    model, None where there is none. `contracts`: by stage; empty for a known model without torch. `layout`: its
    modules, None without torch. `graphs`: exported graphs by stage. `tokenizer`: a tokenizer.json, if there is one.
    """

    name: str
    architecture: str
    source: str
    image: ImageContract
    context: int | None
    contracts: Mapping[str, StageContract] = field(default_factory=dict)
    layout: Layout | None = None
    graphs: Mapping[str, Path] = field(default_factory=dict)
    tokenizer: Path | None = None


def open_subject(name: str) -> Subject:
    """The known model `name`, else the bundle or checkpoint in the directory `name`.

    No weight is read. Raises InputError, listing the known models, for what is neither; CheckpointError, BundleError
    and UnsupportedError for a directory that does not hold what it should; DependencyError for a checkpoint directory
    without torch.
    """
    if name in KNOWN:
        return _known(name, KNOWN[name])
    path = Path(name)
    if not path.exists():
        raise InputError(
            f"{name!r} is neither a directory nor a model known by name; known are {', '.join(KNOWN)}; "
            "or give a checkpoint directory or a bundle"
        )
    return _bundle(path) if is_bundle(path) else _checkpoint(path)


def has_torch() -> bool:
    """Whether modules can be built."""
    try:
        return all(util.find_spec(name) is not None for name in ("torch", "transformers"))
    except ImportError:
        return False


def _known(name: str, known: KnownModel) -> Subject:
    layout = lay_out_known(known) if has_torch() else None
    return Subject(
        name=name,
        architecture=known.architecture,
        source=known.source,
        image=known.image,
        context=known.context,
        contracts=layout.contracts if layout else {},
        layout=layout,
    )


def lay_out_known(known: KnownModel) -> Layout:
    """The stages of `known`, by the code that reads checkpoints."""
    from ...models.families import FAMILIES

    family = FAMILIES[known.config["model_type"]]
    return family.layout(known.architecture)(family.config_type().from_dict(known.config))


def _bundle(path: Path) -> Subject:
    bundle = Bundle.load(path)
    manifest = bundle.manifest
    contracts = {stage.contract.name: stage.contract for stage in manifest.stages}
    return Subject(
        name=path.name,
        architecture=manifest.checkpoint.architecture,
        source=str(path),
        image=manifest.image,
        context=manifest.generation.context_length if manifest.generation else None,
        contracts=contracts,
        layout=_bundle_layout(path, contracts, manifest.reduction),
        graphs={name: bundle.graph(name) for name in contracts},
        tokenizer=bundle.file(manifest.tokenizer),
    )


def _bundle_layout(path: Path, contracts: Mapping[str, StageContract], reduction: Reduction | None) -> Layout | None:
    """The modules that the bundle was made of, by the config that it keeps and the `reduction` of its manifest.

    None where they cannot be built here, or are not what was exported: what the manifest says holds then.
    """
    if not has_torch():
        return None
    from ...models.checkpoint import read_layout
    from ...models.reduction import reduce_layout

    try:
        _, layout = read_layout((path / CONFIG_FILE).parent)
        layout = layout if reduction is None else reduce_layout(layout, reduction)
    except (CheckpointError, InputError, UnsupportedError):
        return None
    same = all(layout.contracts[name].outputs == contracts[name].outputs for name in ("encoder", "connector"))
    return layout if same else None


def _checkpoint(path: Path) -> Subject:
    if not has_torch():
        raise DependencyError(
            f"{path}: reading a checkpoint needs torch and transformers; install them with "
            "`pip install 'bridgeport[export]'`, or give a bundle, which needs neither"
        )
    from ...models.checkpoint import read_layout
    from ..reduction import fit_layout

    config, layout = read_layout(path)
    tokenizer = path / "tokenizer.json"
    return Subject(
        name=path.name,
        architecture=config.architectures[0],
        source=str(path),
        image=_in_prompt(fit_layout(_freeze_image(path, config), layout), layout),
        context=layout.contracts["embed_tokens"].axis("sequence").max if "embed_tokens" in layout.contracts else None,
        contracts=layout.contracts,
        layout=layout,
        tokenizer=tokenizer if tokenizer.is_file() else None,
    )


def _freeze_image(path: Path, config: Any) -> ImageContract:
    """The directories of MiniGPT-4 and Qwen-VL have no processor; their pictures are always treated alike."""
    from ...models.foreign import project
    from ..foreign import clip_image
    from ..processor import freeze_image_processor

    return clip_image(config) if project(path) in ("minigpt4", "qwen_vl") else freeze_image_processor(path, config)


def _in_prompt(image: ImageContract, layout: Layout) -> ImageContract:
    """Flamingo's features are read beside the prompt, in which one token stands for a picture."""
    if "cross_kv" not in layout.contracts or not isinstance(image.tiling, Whole):
        return image
    return image.model_copy(update={"tiling": image.tiling.model_copy(update={"words": 1})})
