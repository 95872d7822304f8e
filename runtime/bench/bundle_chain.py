"""One benchmark pass of a bundle: the chain of `Pipeline`, with the stop tokens left out so that passes are equal."""

from __future__ import annotations

from typing import Any

import numpy as np

from ..pipeline import Pipeline, Prepared
from .peers import Job, Outputs, Stopwatch


def prepare_job(pipeline: Pipeline, picture: Any, prompt: str, new_tokens: int) -> Job:
    """The tensors of one picture and one prompt, which every peer is given."""
    prepared = pipeline.prepare(picture, prompt)
    return Job(prepared.pictures[0][0], prepared.input_ids[0][None], prepared.image_positions[0], new_tokens)


def run_chain(pipeline: Pipeline, job: Job, watch: Stopwatch) -> Outputs:
    """Encoder, connector, prefill and `job.new_tokens` greedy tokens, each timed by `watch`."""
    image_embeds = pipeline.vision.encode([job.picture], resident=pipeline.resident)
    watch.lap("encoder")
    connected = pipeline.vision.connect([job.picture], image_embeds, resident=pipeline.resident)
    features = pipeline.vision.arrange(job.picture, connected[0])
    watch.lap("connector")
    prepared = Prepared(((job.picture,),), (job.input_ids[0],), (job.image_positions,))
    inputs_embeds, lengths = pipeline.merge(prepared, [features])
    more = pipeline.step_inputs(prepared, lengths, [features])
    decoding = pipeline.decoder.start(inputs_embeds, lengths, job.new_tokens, more)
    token_ids = [int(np.argmax(decoding.logits[0]))]
    watch.lap("prefill")
    while len(token_ids) < job.new_tokens:
        decoding.step([token_ids[-1]], [True])
        token_ids.append(int(np.argmax(decoding.logits[0])))
    decoding.close()
    watch.lap("decode")
    return Outputs(watch.seconds, np.asarray(features)[None], token_ids)


def device_latency(pipeline: Pipeline, job: Job, rounds: int) -> dict[str, Any]:
    """Milliseconds on the GPU: stage (prefill and decode for llm) -> part -> statistics, of `rounds` passes.

    Empty unless the stages are TensorRT engines. Each run waits for the device here, so passes take longer than usual.
    """
    from ..tensorrt.latency import summarise
    from ..tensorrt.runner import TensorRtEngine

    engines = {name: engine for name, engine in pipeline.engines.items() if isinstance(engine, TensorRtEngine)}
    found: dict[str, list[Any]] = {}
    for engine in engines.values():
        engine.time_runs()
    for _ in range(rounds if engines else 0):
        run_chain(pipeline, job, Stopwatch())
        for name, engine in engines.items():
            runs = engine.latencies()
            parts = {"prefill": runs[:1], "decode": runs[1:]} if name == "llm" else {name: runs}
            for part, some in parts.items():
                found.setdefault(part, []).extend(some)
    for engine in engines.values():
        engine.time_runs(wanted=False)
    return {name: summarise(runs) for name, runs in found.items()}
