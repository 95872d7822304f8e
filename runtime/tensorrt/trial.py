"""A process that loads a plan, so that one which crashes TensorRT takes nothing else with it.

``python -m bridgeport.runtime.tensorrt.trial PLAN SHA256 host-code|plain``: prints a line and exits with 0 when the
engine loaded, else with 2 and why on stderr.
"""

from __future__ import annotations

import hashlib
import sys
from pathlib import Path

from ...errors import BridgeportError, BundleIntegrityError, EngineError
from .api import load_api

ANSWER = "bridgeport: the engine loads"


def main(file: str, sha256: str, mode: str) -> None:
    """Hash, deserialise, look at the tensors."""
    plan = Path(file).read_bytes()
    if hashlib.sha256(plan).hexdigest() != sha256:
        raise BundleIntegrityError("the file was changed since the bundle was verified")
    api = load_api()
    runtime = api.create_runtime(engine_host_code_allowed=mode == "host-code")
    engine = api.deserialize(runtime, plan)
    if not api.tensors(engine):
        raise EngineError("the engine has neither inputs nor outputs")
    print(ANSWER)


if __name__ == "__main__":
    try:
        main(*sys.argv[1:])
    except BridgeportError as error:
        print(error, file=sys.stderr)
        sys.exit(2)
