"""Connectors of your own: an `nn.Module` from outside this package, in the place of a checkpoint's connector.

A checkpoint names one in config.json ("bridgeport_connector": "my-connector"). It is looked up among those that
`register_connector` was called for, then among this package's own (the one-layer Q-Former), then among the entry points
of the group `bridgeport.connectors`, which are imported only when a checkpoint asks for them.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from importlib.metadata import EntryPoint, entry_points
from typing import TYPE_CHECKING, Any, TypeVar

from ..errors import BridgeportError, CheckpointError, InputError

if TYPE_CHECKING:
    from torch import nn

    from .contract import StageContract
    from .stages import Layout

KEY = "bridgeport_connector"
GROUP = "bridgeport.connectors"
# Classes whose connector can be replaced: one picture is one tile there, so any number of tokens is possible.
ARCHITECTURES = ("LlavaForConditionalGeneration", "Blip2ForConditionalGeneration")
PREFIX = "connector."

# Tokens for a picture: a number, or a function of the transformers config.
Tokens = int | Callable[[Any], int]
_Factory = TypeVar("_Factory", bound="Callable[[Any], nn.Module]")


@dataclass(frozen=True)
class CustomConnector:
    """What `register_connector` was given."""

    name: str
    factory: Callable[[Any], nn.Module]
    architectures: tuple[str, ...]
    tokens: Tokens
    stored_name: Callable[[str], str]

    def __str__(self) -> str:
        where = f"{self.factory.__module__}.{getattr(self.factory, '__qualname__', type(self.factory).__name__)}"
        return f"connector {self.name!r} ({where})"


_REGISTERED: dict[str, CustomConnector] = {}


def register_connector(
    name: str,
    *,
    architectures: Sequence[str],
    tokens: Tokens,
    stored_name: Callable[[str], str] | str = PREFIX,
) -> Callable[[_Factory], _Factory]:
    """A decorator for the `nn.Module` class, or a function, that takes the transformers config and gives the module.

    The module's `forward` takes `image_embeds` `[B, N, Dv]`, FP32, as the checkpoint's encoder gives them, and returns
    `[B, tokens, D]`, `D` the width of the language model. `name`: what config.json calls it. `architectures`: the
    transformers classes whose connector it can replace. `tokens`: for one picture, or a function of the config.
    `stored_name`: the prefix under which the checkpoint stores the module's tensors, or a function from a name of its
    `state_dict` to the stored one.

    Raises InputError for a name that is taken, or an architecture whose connector cannot be replaced.
    """
    unknown = [one for one in architectures if one not in ARCHITECTURES]
    if unknown or not architectures or isinstance(architectures, str):
        raise InputError(
            f"connector {name!r}: architectures are {architectures!r}; accepted is a list of {', '.join(ARCHITECTURES)}"
        )

    def register(factory: _Factory) -> _Factory:
        stored = (lambda key: f"{stored_name}{key}") if isinstance(stored_name, str) else stored_name
        connector = CustomConnector(name, factory, tuple(architectures), tokens, stored)
        if (other := (_built_in() | _REGISTERED).get(name)) is not None:
            raise InputError(f"{connector}: the name is taken by {other}; give it another one")
        _REGISTERED[name] = connector
        return factory

    return register


def find_connector(name: Any) -> CustomConnector:
    """The connector called `name`; the one installed package that has it is imported.

    Raises CheckpointError for an unknown name, one that two packages have, or a package that does not import.
    """
    here = _built_in() | _REGISTERED
    if isinstance(name, str) and name in here:
        return here[name]
    points = list(entry_points(group=GROUP))
    found = [point for point in points if point.name == name]
    if not found:
        known = sorted({*here, *(point.name for point in points)})
        raise CheckpointError(
            f"{KEY} is {name!r}; known are {', '.join(known) or 'none'}; install the package that has it (an entry "
            f"point of the group {GROUP}) or import the module that registers it"
        )
    if len({point.value for point in found}) > 1:
        raise CheckpointError(
            f"{KEY} is {name!r}, which the entry points {', '.join(point.value for point in found)} all are; uninstall "
            "one of them"
        )
    _load(found[0])
    if name not in _REGISTERED:
        raise CheckpointError(
            f"the entry point {found[0].name} = {found[0].value} was imported and registered no connector {name!r}; "
            f'decorate its module with @register_connector("{name}", ...)'
        )
    return _REGISTERED[name]


def _built_in() -> dict[str, CustomConnector]:
    """Connectors of this package that no class of transformers has."""
    from .simplified_qformer import SimplifiedQFormerConnector, num_queries

    name = "simplified-qformer"
    return {
        name: CustomConnector(name, SimplifiedQFormerConnector, ARCHITECTURES, num_queries, lambda key: PREFIX + key)
    }


def _load(point: EntryPoint) -> None:
    try:
        point.load()
    except Exception as error:
        # Code that is not ours raises what it likes.
        raise CheckpointError(
            f"the entry point {point.name} = {point.value} of the group {GROUP} does not import ({_reason(error)}); "
            "correct or uninstall its package"
        ) from error


def replace_connector(layout: Layout, name: Any, architecture: str, config: Any) -> Layout:
    """`layout` with the connector that config.json names in the place of its own, its contract and its tensors.

    The module is built and run once, on noise, so that one that breaks its contract is found here. Raises
    CheckpointError for a connector that is unknown, for another architecture, or not what it says.
    """
    from .stages import Stage

    custom = find_connector(name)
    if architecture not in custom.architectures:
        raise CheckpointError(f"{custom} is for {', '.join(custom.architectures)}; config.json says {architecture}")
    contract = _contract(layout, custom, config)
    _check(custom, _build(custom, config), contract)
    stage = Stage(lambda: _build(custom, config), lambda key: layout.canonical_name(custom.stored_name(key)))
    # Tensors of the connector that is replaced may still be stored; none of them is read.
    own = layout.stages["connector"]
    left_over = {own.checkpoint_name(key) for key in own.on_meta().state_dict()}
    return replace(
        layout,
        stages={**layout.stages, "connector": stage},
        contracts={**layout.contracts, "connector": contract},
        ignored=layout.ignored | left_over,
        custom_connector=custom.name,
    )


def _contract(layout: Layout, custom: CustomConnector, config: Any) -> StageContract:
    from .contract import StageContract
    from .language import batch_axis, float_spec

    try:
        tokens = custom.tokens(config) if callable(custom.tokens) else custom.tokens
    except BridgeportError as error:
        raise CheckpointError(f"{custom}: {error}") from error
    except Exception as error:
        raise CheckpointError(f"{custom}: tokens(config) raised {_reason(error)}; correct it") from error
    if not isinstance(tokens, int) or isinstance(tokens, bool) or tokens < 1:
        raise CheckpointError(f"{custom}: tokens is {tokens!r}; accepted is a whole number from 1")
    return StageContract(
        name="connector",
        inputs=layout.contracts["encoder"].outputs,
        outputs=(float_spec("image_features", "batch", tokens, layout.text_config.hidden_size),),
        axes=(batch_axis(),),
    )


def _build(custom: CustomConnector, config: Any) -> nn.Module:
    """The module with its initial weights. On the CPU even inside `torch.device("meta")`, because tables that a module
    computes for itself are not stored in a checkpoint."""
    import torch
    from torch import nn

    try:
        with torch.device("cpu"):
            module: Any = custom.factory(config)
    except BridgeportError as error:
        raise CheckpointError(f"{custom}: {error}") from error
    except Exception as error:
        raise CheckpointError(f"{custom} cannot be built: it raised {_reason(error)}; correct it") from error
    if not isinstance(module, nn.Module):
        raise CheckpointError(f"{custom} gave a {type(module).__name__}; it must give a torch.nn.Module")
    return module.float()


def _check(custom: CustomConnector, module: nn.Module, contract: StageContract) -> None:
    """Two sizes of the batch, so that one that is baked in shows."""
    import torch

    _, tokens, width = contract.inputs[0].shape
    for batch in (1, 3):
        shape = (batch, int(tokens), int(width))
        due = (batch, *contract.outputs[0].shape[1:])
        try:
            with torch.inference_mode():
                made: Any = module.eval()(torch.randn(shape, generator=torch.Generator().manual_seed(0)))
        except Exception as error:
            raise CheckpointError(
                f"{custom} fails on image_embeds {list(shape)}: it raised {_reason(error)}; its forward must take what "
                "this checkpoint's encoder gives"
            ) from error
        came = f"{made.dtype} {list(made.shape)}" if isinstance(made, torch.Tensor) else f"a {type(made).__name__}"
        if came != f"torch.float32 {list(due)}":
            raise CheckpointError(
                f"{custom} makes {came} of image_embeds {list(shape)}; its contract is torch.float32 {list(due)}: "
                "correct the module or its `tokens`"
            )


def _reason(error: Exception) -> str:
    text = " ".join(str(error).split())[:200]
    return f"{type(error).__name__}: {text}" if text else type(error).__name__
