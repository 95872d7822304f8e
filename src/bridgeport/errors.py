"""Every error that Bridgeport raises on purpose.

::

    BridgeportError                 exit 2: what came cannot be used
    ├── CheckpointError             a checkpoint directory, its config or its weights
    ├── BundleError                 a bundle directory
    │   ├── BundleIntegrityError    a hash, a size or a path that does not hold
    │   └── BundleSchemaError       a manifest that this version does not read
    ├── InputError                  a picture, a prompt, an option
    ├── UnsupportedError            a model, precision, target or device that is not built yet
    ├── DependencyError             a library that this verb needs is missing or too old
    ├── ExportError                 a graph that did not come out as it must
    ├── CalibrationError            calibration data, or an activation that no range can be made of
    ├── EngineError                 an engine that does not load or run
    └── OutputError                 a result that could not be written
    CheckFailed                     exit 1: everything ran, and a check (parity, preflight, gate) did not pass

A message is one line and says which thing, what came, what is accepted and what to do next.
"""

from __future__ import annotations


class BridgeportError(Exception):
    """Base of all errors caused by what the caller passed in or by the machine; the CLI exits with 2."""

    exit_code = 2


class CheckpointError(BridgeportError):
    """A checkpoint directory that cannot be read: missing, incomplete, corrupt or of an unknown kind."""


class BundleError(BridgeportError):
    """A bundle directory that cannot be read or written."""


class BundleIntegrityError(BundleError):
    """A bundle whose files are not those that its manifest names."""


class BundleSchemaError(BundleError):
    """A manifest of a newer schema, or one with unknown or missing keys."""


class InputError(BridgeportError):
    """A picture, prompt or option that cannot be used."""


class UnsupportedError(BridgeportError):
    """A known kind of thing that this version does not build or run."""


class DependencyError(BridgeportError):
    """A library that the call needs is missing or too old."""


class ExportError(BridgeportError):
    """An exported graph that misses one of its assertions (axes, operators, constants, parity)."""


class CalibrationError(BridgeportError):
    """Calibration data that is too little or unreadable, or activations (NaN, infinite) that have no range."""


class EngineError(BridgeportError):
    """An engine that does not load, or inputs that its contract does not allow."""


class OutputError(BridgeportError):
    """A result that could not be written: the place is taken, not writable, or the disk is full."""


class CheckFailed(Exception):  # noqa: N818 - an outcome, not a fault: exit status 1
    """A check ran to its end and did not pass; the report has been written or printed before."""

    exit_code = 1
