"""A process that answers a line of JSON with a line of JSON, until its input ends."""

from __future__ import annotations

import json
import subprocess
import tempfile
from collections.abc import Sequence
from typing import IO, Any

from ...errors import EngineError


class Child:
    """A worker process and the two pipes to it. It writes one line when it is ready.

    Raises EngineError with the last line of its stderr where it stops.
    """

    def __init__(self, label: str, command: Sequence[str]) -> None:
        self._label = label
        self._errors: IO[str] = tempfile.TemporaryFile("w+")  # noqa: SIM115 - closed in close()
        self._process = subprocess.Popen(
            command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=self._errors, text=True
        )
        try:
            self._read()
        except BaseException:
            self.close()
            raise

    def ask(self, request: dict[str, Any]) -> dict[str, Any]:
        """What the process answers."""
        if self._process.stdin is None:
            raise RuntimeError(f"{self._label} has no input")
        self._process.stdin.write(json.dumps(request) + "\n")
        self._process.stdin.flush()
        return self._read()

    def _read(self) -> dict[str, Any]:
        line = "" if self._process.stdout is None else self._process.stdout.readline()
        if not line:
            self._process.wait()
            self._errors.seek(0)
            lines = self._errors.read().strip().splitlines() or ["no message"]
            raise EngineError(f"the peer {self._label!r} stopped: {lines[-1]}")
        answer: dict[str, Any] = json.loads(line)
        return answer

    def close(self) -> None:
        """End the process; never waits longer than five seconds."""
        for pipe in (self._process.stdin, self._process.stdout):
            if pipe is not None:
                pipe.close()
        try:
            self._process.wait(timeout=5)
        except subprocess.TimeoutExpired:
            self._process.kill()
            self._process.wait()
        self._errors.close()
