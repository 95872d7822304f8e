"""Python code that comes with a checkpoint (`auto_map` in its files): refused, unless the caller allows it.

Where it is allowed, transformers runs it for config, tokenizer and processor. No model code is run: stages are built by
the readers here, whatever a checkpoint brings.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from contextvars import ContextVar
from pathlib import Path
from typing import Any

from ..errors import CheckpointError, UnsupportedError

_allowed: ContextVar[bool] = ContextVar("remote_code_allowed", default=False)


@contextmanager
def remote_code(*, allowed: bool) -> Iterator[None]:
    """Inside, code of checkpoints that are read runs if `allowed`, with the rights of this process."""
    token = _allowed.set(allowed)
    try:
        yield
    finally:
        _allowed.reset(token)


def loader_options() -> dict[str, Any]:
    """For every `from_pretrained`: no network, and `trust_remote_code` never left open.

    Without it transformers asks on the terminal whether to run a checkpoint's own Python.
    """
    return {"local_files_only": True, "trust_remote_code": _allowed.get()}


def refuse_remote_code(where: str, raw: Mapping[str, Any]) -> None:
    """UnsupportedError for a config or processor file that asks for Python code, unless that is allowed.

    Code of another repository (`owner/name--module.Class`) is refused always: it is not in the directory.
    """
    references = [str(one) for part in _parts(raw) for one in _classes(part.get("auto_map"))]
    elsewhere = next((one for one in references if "--" in one), None)
    if elsewhere is not None and _allowed.get():
        raise UnsupportedError(
            f"{where}: auto_map names {elsewhere}, code of another repository; accepted is code in the checkpoint's "
            "own directory, so copy it there and name it module.Class"
        )
    if references and not _allowed.get():
        raise UnsupportedError(
            f"{where}: auto_map asks to run Python code that comes with the checkpoint, which is refused; "
            "--trust-remote-code (trust_remote_code=True) of export and parity runs it for config, tokenizer and "
            "processor, with your rights, so pass it only for a checkpoint that you trust; or remove auto_map if "
            "transformers knows the model itself"
        )


def read_config_with_code(directory: Path, raw: dict[str, Any]) -> dict[str, Any]:
    """`raw`, the content of config.json; where it names a config class of the checkpoint's own, what that makes of it.

    `refuse_remote_code` comes first. Raises CheckpointError when the code fails.
    """
    if "AutoConfig" not in (raw.get("auto_map") or {}):
        return raw
    from transformers import AutoConfig

    make: Any = AutoConfig
    try:
        made: dict[str, Any] = make.from_pretrained(directory, **loader_options()).to_dict()
    except Exception as error:
        # Code that is not ours raises what it likes.
        reason = " ".join(str(error).split())[:200]
        raise CheckpointError(
            f"{directory / 'config.json'}: the code that auto_map names failed ({type(error).__name__}: {reason}); "
            "correct it, or remove auto_map"
        ) from error
    return {name: value for name, value in made.items() if name != "auto_map"} | {
        name: raw[name] for name in ("model_type", "architectures") if name in raw
    }


def _parts(raw: Mapping[str, Any]) -> list[Mapping[str, Any]]:
    return [raw, *(part for part in raw.values() if isinstance(part, dict))]


def _classes(auto_map: Any) -> list[Any]:
    """The classes that an `auto_map` names: one each, or for a tokenizer a slow and a fast one."""
    if not isinstance(auto_map, dict):
        return [auto_map] if auto_map else []
    found = [one for value in auto_map.values() for one in (value if isinstance(value, list) else [value])]
    return [one for one in found if one]
