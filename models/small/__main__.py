"""``python -m bridgeport.models.small --out DIR``: train the small model again, then measure it."""

from __future__ import annotations

import argparse
import json
import sys
import time
from pathlib import Path

from .pictures import held_out


def main(arguments: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="python -m bridgeport.models.small", description=__doc__)
    parser.add_argument("--out", type=Path, required=True, help="directory for checkpoint, states and loss curves")
    parser.add_argument("--threads", type=int, default=2, help="CPU threads (default 2)")
    parser.add_argument("--held-out", type=int, default=500, help="held-out pictures to measure on (default 500)")
    parser.add_argument("--measure", type=Path, metavar="CHECKPOINT", help="train nothing, measure this checkpoint")
    options = parser.parse_args(arguments)
    # torch and transformers take seconds to import: --help must not wait for them.
    import torch

    from .recipe import Recipe
    from .train import reproduce

    torch.set_num_threads(options.threads)
    started = time.monotonic()
    checkpoint = options.measure or reproduce(Recipe(), options.out)
    trained = time.monotonic() - started
    # CPU seconds too: they tell the cost on a machine that was busy with other things. A resumed run counts its part.
    spent = {"training_seconds": round(trained), "training_cpu_seconds": round(time.process_time())}
    figures = measure(checkpoint, options.held_out) | ({} if options.measure else spent)
    options.out.mkdir(parents=True, exist_ok=True)
    (options.out / "figures.json").write_text(json.dumps(figures, indent=2) + "\n")
    print(json.dumps(figures))
    return 0


def measure(checkpoint: Path, pictures: int) -> dict[str, float | int]:
    """Exact match, attention and size of a checkpoint, on the first ``pictures`` held-out pictures."""
    from .evaluate import load, measure_accuracy, measure_attention

    model, processor = load(checkpoint)
    examples = held_out(pictures)
    accuracy = measure_accuracy(model, processor, examples)
    for prompt, expected, got in accuracy.misses[:20]:
        print(f"miss: {prompt or 'caption'} | expected {expected!r} | got {got!r}", file=sys.stderr)
    attention = measure_attention(model, processor, examples)
    return {
        "caption_exact_match": round(accuracy.captions, 4),
        "captions": accuracy.num_captions,
        "answer_exact_match": round(accuracy.answers, 4),
        "answers": accuracy.num_answers,
        "attention_on_shapes": round(attention.mass, 4),
        "area_of_shapes": round(attention.area, 4),
        "attention_ratio": round(attention.ratio, 3),
        "parameters": model.num_parameters(),
        "checkpoint_bytes": sum(file.stat().st_size for file in checkpoint.iterdir()),
    }


if __name__ == "__main__":
    sys.exit(main())
