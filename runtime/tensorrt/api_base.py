"""What the build side and the run side of the adapter share: version, enums by name, messages, errors."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from types import ModuleType
from typing import TYPE_CHECKING, TextIO

from ...errors import EngineError
from .versions import Version, check_member, has

if TYPE_CHECKING:
    import tensorrt as trt  # type: ignore

# Member of tensorrt.DataType -> the name that numpy (with ml_dtypes) and the stage contracts give it.
DTYPE_NAMES = {
    "FLOAT": "float32",
    "HALF": "float16",
    "BF16": "bfloat16",
    "INT8": "int8",
    "UINT8": "uint8",
    "INT32": "int32",
    "INT64": "int64",
    "BOOL": "bool",
    "FP8": "float8_e4m3fn",
    "INT4": "int4",
    "FP4": "float4_e2m1fn",
    "E8M0": "float8_e8m0fnu",
}
# ILogger.Severity by value, the same from 8 to 11.
SEVERITIES = ("internal error", "error", "warning", "info", "verbose")


@dataclass
class MessageLog:
    """What TensorRT said: the errors of the call that runs, and every message into `sink`.

    `sink` takes (severity, text), severity one of `SEVERITIES`. `warnings` holds the newest 200.
    """

    sink: Callable[[str, str], None] | None = None
    errors: list[str] = field(default_factory=list)
    warnings: list[str] = field(default_factory=list)

    @classmethod
    def to_stream(cls, stream: TextIO) -> MessageLog:
        """A log that writes every message, verbose ones too, to an open text file, one line each."""

        def write(severity: str, text: str) -> None:
            stream.write(f"[{severity}] {text}\n")
            stream.flush()  # a build that dies leaves its last message

        return cls(write)

    def add(self, severity: str, text: str) -> None:
        """Take one message."""
        if severity in ("internal error", "error"):
            self.errors.append(" ".join(text.split()))
        elif severity == "warning":
            self.warnings = [*self.warnings[-199:], " ".join(text.split())]
        if self.sink is not None:
            self.sink(severity, text)


@dataclass(frozen=True)
class TensorInfo:
    """An input or output of a network or an engine.

    `dtype` is the contracts' name ("float32"); `shape` has -1 for a dynamic axis; `mode` is "input" or "output";
    `location` is "device", or "host" for a shape tensor, whose address is host memory.
    """

    name: str
    mode: str
    dtype: str
    shape: tuple[int, ...]
    location: str = "device"


class BaseApi:
    """The module `tensorrt`, its version and a logger. `log` keeps what TensorRT says to this adapter."""

    def __init__(self, module: ModuleType, version: Version, log: MessageLog | None = None) -> None:
        self.trt = module
        self.version = version
        self.log = log or MessageLog()
        # TensorRT holds no reference to its logger: the adapter must outlive what was made with it.
        self.logger = self._create_logger(self.log)

    def has(self, feature: str) -> bool:
        """Whether this version has a feature of `versions.FEATURES`; KeyError for an unknown one."""
        return has(self.version, feature)

    def _create_logger(self, log: MessageLog) -> trt.ILogger:
        module = self.trt

        class Logger(module.ILogger):  # type: ignore[misc, name-defined]
            def __init__(self) -> None:
                module.ILogger.__init__(self)  # pybind11 wants it named, not super()

            def log(self, severity: trt.ILogger.Severity, msg: str) -> None:
                log.add(SEVERITIES[int(severity)], msg)

        return Logger()

    def _check(self, done: object, what: str, fix: str = "see the messages above it in the log") -> None:
        """EngineError unless TensorRT said that it is done (True, or an object rather than None)."""
        if done is None or done is False:
            raise self._failed(what, fix)

    def _failed(self, what: str, fix: str) -> EngineError:
        reason = self.log.errors[0] if self.log.errors else "TensorRT gave no reason"
        self.log.errors.clear()
        return EngineError(f"{what}: {reason}; {fix}")

    def _failed_because(self, what: str, why: str, fix: str = "see `bridgeport preflight`") -> EngineError:
        self.log.errors.clear()
        return EngineError(f"{what}: {why}; {fix}")

    def _builder_flag(self, name: str) -> trt.BuilderFlag:
        check_member(self.version, "BuilderFlag", name)
        return getattr(self.trt.BuilderFlag, name)


def dtype_name(dtype: trt.DataType) -> str:
    """The contracts' name of a member of tensorrt.DataType."""
    return DTYPE_NAMES[dtype.name]
