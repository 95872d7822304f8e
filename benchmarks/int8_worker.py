"""One contestant of `benchmarks/int8.py` in a process of its own. Needs numpy and the engine that it is asked for.

Nothing of Bridgeport is imported: an isolated environment with OpenVINO and NNCF runs this file too. Started as
``python int8_worker.py ENGINE GRAPH INPUT.npz THREADS PRECISION``; each line on stdin asks for one pass, each line on
stdout is JSON.
"""

from __future__ import annotations

import json
import os
import sys
import time
from collections.abc import Callable
from typing import Any

import numpy as np

# As runtime/onnxruntime/loader.py has it.
SLOW_FUSIONS = "BiasGeluFusion;SkipLayerNormFusion"


def open_onnxruntime(graph: str, feed: dict[str, Any], threads: int, _: str) -> Callable[[], Any]:
    """A session with the run time's settings."""
    import onnxruntime

    options = onnxruntime.SessionOptions()
    options.log_severity_level = 3
    options.intra_op_num_threads = threads
    options.add_session_config_entry("session.force_spinning_stop", "1")
    options.add_session_config_entry("optimization.disable_specified_optimizers", SLOW_FUSIONS)
    session = onnxruntime.InferenceSession(graph, options, providers=["CPUExecutionProvider"])
    return lambda: session.run(None, feed)[0]


def open_openvino(graph: str, feed: dict[str, Any], threads: int, precision: str) -> Callable[[], Any]:
    """A compiled model with `INFERENCE_PRECISION_HINT` `precision` ("f32", "bf16")."""
    import openvino

    settings = {"INFERENCE_PRECISION_HINT": precision, "PERFORMANCE_HINT": "LATENCY", "NUM_STREAMS": "1"}
    compiled = openvino.Core().compile_model(graph, "CPU", {**settings, "INFERENCE_NUM_THREADS": threads})
    request = compiled.create_infer_request()
    tensors = {name: openvino.Tensor(array) for name, array in feed.items()}

    def run() -> Any:
        request.infer(tensors)
        return request.get_output_tensor(0).data

    return run


def quantize_nncf(graph: str, samples: str, out: str) -> None:
    """`graph` by NNCF's post-training quantisation for transformers, on the samples of an .npz, to OpenVINO's IR."""
    import nncf
    import openvino

    with np.load(samples) as data:
        feeds = [{name.split(":", 1)[1]: data[name]} for name in data.files]
    model = openvino.Core().read_model(graph)
    quantized = nncf.quantize(model, nncf.Dataset(feeds), model_type=nncf.ModelType.TRANSFORMER, subset_size=len(feeds))
    openvino.save_model(quantized, out, compress_to_fp16=False)


def serve(engine: str, graph: str, inputs: str, threads: str, precision: str) -> None:
    """Answer every line on stdin with the seconds of one pass; `{"save": file}` writes the output too."""
    answers = os.fdopen(os.dup(sys.stdout.fileno()), "w")
    os.dup2(sys.stderr.fileno(), sys.stdout.fileno())
    with np.load(inputs) as data:
        feed = {name: data[name] for name in data.files}
    opener = {"onnxruntime": open_onnxruntime, "openvino": open_openvino}[engine]
    run = opener(graph, feed, int(threads), precision)
    run()
    print(json.dumps({"ready": True}), file=answers, flush=True)
    for line in sys.stdin:
        request = json.loads(line)
        run()  # weights and threads are awake then
        begin = time.perf_counter()
        output = run()
        seconds = time.perf_counter() - begin
        if "save" in request:
            np.save(request["save"], output)
        print(json.dumps({"seconds": seconds}), file=answers, flush=True)


if __name__ == "__main__":
    if sys.argv[1] == "nncf":
        quantize_nncf(*sys.argv[2:])
    else:
        serve(*sys.argv[1:])
