"""Exporters talk on stdout, stderr, through `warnings` and through `logging`; a verb's output must not hold any of it.

Only what is known is silenced: prints go to this module's logger at DEBUG, and each warning below is named with its
category and text. Anything new still shows (and fails a test).
"""

from __future__ import annotations

import contextlib
import io
import logging
import warnings
from collections.abc import Iterator

logger = logging.getLogger(__name__)

# (category, start of the text, as a regular expression)
_KNOWN_WARNINGS: tuple[tuple[type[Warning], str], ...] = (
    # torch.export copies its own pytree specs, whose class torch itself deprecates.
    (FutureWarning, r"`isinstance\(treespec, LeafSpec\)` is deprecated"),
    # Two inputs that share an axis, which is meant: the graph's axes are asserted after the export.
    (UserWarning, r"# The axis name: [\w*]+ will not be used, since it shares the same shape constraints"),
)
# Loggers that write notes about optional packages that are not installed, one per operator, or about versions.
_NOISY_LOGGERS = (
    "torch.onnx._internal.exporter._registration",
    "transformers.exporters.utils",
)


@contextlib.contextmanager
def quiet_exporters(*, stderr: bool = False) -> Iterator[None]:
    """Silence the known noise of torch.onnx, transformers.exporters and onnxruntime-genai inside the block.

    ``stderr`` also catches what is written there (the progress bars of other libraries).
    """
    captured = io.StringIO()
    levels = {name: logging.getLogger(name).level for name in _NOISY_LOGGERS}
    root = logging.getLogger()
    # onnxruntime's quantizer calls logging.basicConfig when it is imported; the caller's logging is not its business.
    handlers, level = list(root.handlers), root.level
    try:
        for name in levels:
            logging.getLogger(name).setLevel(logging.ERROR)
        with contextlib.ExitStack() as stack:
            stack.enter_context(warnings.catch_warnings())
            stack.enter_context(contextlib.redirect_stdout(captured))
            if stderr:
                stack.enter_context(contextlib.redirect_stderr(captured))
            for category, message in _KNOWN_WARNINGS:
                warnings.filterwarnings("ignore", message=message, category=category)
            yield
    finally:
        root.handlers[:] = handlers
        root.setLevel(level)
        for name, before in levels.items():
            logging.getLogger(name).setLevel(before)
        for line in captured.getvalue().splitlines():
            logger.debug("%s", line.rsplit("\r", 1)[-1])
