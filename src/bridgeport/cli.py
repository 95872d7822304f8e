"""The `bridgeport` command: finds the verb, and turns every outcome into an exit status and one line.

0 done; 1 a check failed; 2 bad usage or input. Verbs live one per file in `export/cli` (make artefacts) and
`runtime/cli` (run artefacts) and import what is heavy inside their function, so `--help` stays fast.
"""

from __future__ import annotations

import sys
from importlib import import_module
from typing import Any

import typer
from typer.main import get_command

from ._version import __version__
from .errors import BridgeportError, CheckFailed

# typer brings its own copy of click since 0.26 and used the installed one before: take the classes from typer.
_UsageError: Any = typer.BadParameter.__mro__[1]
_ClickException: Any = typer.BadParameter.__mro__[2]

_STOPPED = "stopped before the end; nothing was written"
# Verb -> module with a function of that name, in the order in which `--help` lists them.
VERBS = {
    "demo": "bridgeport.runtime.cli.demo",
    "export": "bridgeport.export.cli.export",
    "quantize": "bridgeport.calibration.cli.quantize",
    "preflight": "bridgeport.export.cli.preflight",
    "build": "bridgeport.export.cli.build",
    "pack": "bridgeport.export.cli.pack",
    "run": "bridgeport.runtime.cli.run",
    "score": "bridgeport.runtime.cli.score",
    "embed": "bridgeport.runtime.cli.embed",
    "parity": "bridgeport.runtime.cli.parity",
    "bench": "bridgeport.runtime.cli.bench",
    "inspect": "bridgeport.runtime.cli.inspect",
    "tokens": "bridgeport.export.cli.tokens",
    "doctor": "bridgeport.runtime.cli.doctor",
}


def build_app() -> typer.Typer:
    """The typer application with every verb registered."""
    app = typer.Typer(
        name="bridgeport",
        help="Take a trained vision-language model to ONNX, run it as a chain, and prove it equal to PyTorch.",
        epilog="Every verb takes --debug, which shows the traceback of an error.",
        no_args_is_help=True,
        add_completion=False,
        pretty_exceptions_enable=False,
        context_settings={"help_option_names": ["-h", "--help"]},
    )
    app.callback()(_root)
    for verb, home in VERBS.items():
        app.command(verb)(getattr(import_module(home), verb))
    return app


def _print_version(asked: bool) -> None:
    if asked:
        typer.echo(__version__)
        raise typer.Exit


def _root(
    version: bool = typer.Option(
        False, "--version", help="Print the version and leave.", is_eager=True, callback=_print_version
    ),
) -> None:
    pass


def main(arguments: list[str] | None = None) -> int:
    """Run the command line; returns the exit status. `arguments` defaults to those of the process."""
    words = list(sys.argv[1:] if arguments is None else arguments)
    debug = "--debug" in words
    words = [word for word in words if word != "--debug"]
    try:
        result = get_command(build_app()).main(words, prog_name="bridgeport", standalone_mode=False)
    except CheckFailed as failure:
        return _fail(str(failure), CheckFailed.exit_code, debug)
    except BridgeportError as error:
        return _fail(str(error), error.exit_code, debug)
    except _ClickException as error:
        hint = f" (see `{error.ctx.command_path} --help`)" if isinstance(error, _UsageError) and error.ctx else ""
        return _fail(error.format_message() + hint, 2, debug)
    except (typer.Abort, KeyboardInterrupt):
        return _fail(_STOPPED, 130, debug)
    except BrokenPipeError:
        return 0
    except Exception as error:  # noqa: BLE001 - the last resort: one line, the traceback with --debug
        return _fail(f"unexpected {type(error).__name__}: {error} (run again with --debug for the traceback)", 2, debug)
    # Newer versions of typer turn Ctrl-C into this status and say nothing.
    if result == 130:
        return _fail(_STOPPED, 130, debug=False)
    return result if isinstance(result, int) else 0


def _fail(message: str, status: int, debug: bool) -> int:
    if debug:
        import traceback

        traceback.print_exc()
    if message:
        print("bridgeport: " + " ".join(message.split()), file=sys.stderr)
    return status


def entry_point() -> None:
    """What the installed `bridgeport` script calls."""
    sys.exit(main())
