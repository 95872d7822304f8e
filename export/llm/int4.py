"""Weight-only INT4 for decoders that were traced: ONNX Runtime's quantizer, with the settings of the model builder."""

from __future__ import annotations

import onnx_ir as ir

from ..passes.modules import SCOPES
from ..quiet import quiet_exporters
from .genai import ACCURACY_LEVEL, BLOCK_SIZE


def quantize_matmuls(model: ir.Model) -> ir.Model:
    """Every MatMul with a weight becomes MatMulNBits (com.microsoft) of 4 bits in symmetric blocks.

    The quantizer works on a protobuf in memory; module stacks, which it drops, are put back.
    """
    scopes = {node.name: node.metadata_props[SCOPES] for node in model.graph if SCOPES in node.metadata_props}
    with quiet_exporters(stderr=True):
        # Inside the block, because the import itself sets up logging.
        from onnxruntime.quantization.matmul_nbits_quantizer import (
            MatMulNBitsQuantizer,
        )

        quantizer = MatMulNBitsQuantizer(
            ir.to_proto(model), block_size=BLOCK_SIZE, is_symmetric=True, accuracy_level=ACCURACY_LEVEL
        )
        quantizer.process()
    quantized: ir.Model = ir.from_proto(quantizer.model.model)
    for node in quantized.graph:
        written = scopes.get((node.name or "").removesuffix("_Q4"))
        if written is not None:
            node.metadata_props[SCOPES] = written
    return quantized
