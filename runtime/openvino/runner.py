"""A stage as a compiled OpenVINO model, which reads and writes the caller's arrays where they lie."""

from __future__ import annotations

from typing import Any

from ...errors import EngineError
from ...models.contract import StageContract
from ..engine import Arrays, Call, Engine
from ..kv_cache import KvCache
from .loader import import_openvino, reason_of


class OpenVinoEngine(Engine):
    """A compiled model on the CPU, whose tensors are those of `contract`. Not for a stage with a key/value cache."""

    def __init__(self, contract: StageContract, compiled: Any) -> None:
        super().__init__(contract)
        self._compiled = compiled
        self._check_names()

    def close(self) -> None:
        self._compiled = None

    def _bind(self, inputs: Arrays, outputs: Arrays, cache: KvCache | None) -> Call:
        if self._compiled is None:
            raise EngineError(f"{self.contract.name}: the engine is closed; load the bundle again")
        openvino, stage = import_openvino(), self.contract.name
        request = self._compiled.create_infer_request()
        for name, array in inputs.items():
            request.set_tensor(name, openvino.Tensor(array, shared_memory=True))
        for spec in self.contract.outputs:
            request.set_tensor(spec.name, openvino.Tensor(outputs[spec.name], shared_memory=True))
        keep = (inputs, outputs)  # shared by address: the arrays must live as long as the call

        def call(_keep: object = keep) -> None:
            try:
                request.infer()
            except RuntimeError as error:
                raise EngineError(f"{stage}: OpenVINO failed: {reason_of(error)}") from error

        return call

    def _check_names(self) -> None:
        """The graph's tensors must be the contract's: a manifest beside a foreign graph is caught here."""
        for kind, specs, ports in (
            ("inputs", self.contract.inputs, self._compiled.inputs),
            ("outputs", self.contract.outputs, self._compiled.outputs),
        ):
            want, have = {spec.name for spec in specs}, {port.get_any_name() for port in ports}
            if want != have:
                raise EngineError(
                    f"{self.contract.name}: the graph's {kind} are not those of the manifest "
                    f"({', '.join(sorted(want ^ have))}); export the bundle again"
                )
