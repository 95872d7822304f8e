"""Freeze the second tokenizer of InstructBLIP, through which its Q-Former reads the prompt."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from tokenizers import Tokenizer

from ..manifest import InstructionContract
from .checkpoint_processor import load_processor, quiet_transformers

FILE = "qformer_tokenizer.json"
# Longer than what any of the tokenizers is told to cut texts to.
_LONG_TEXT = "a " * 4096


def freeze_instruction(checkpoint: str | Path, config: Any, tokenizer: Path) -> InstructionContract:
    """Write `qformer_tokenizer.json` beside the frozen `tokenizer`.

    Where the checkpoint's processor cuts long texts, as it does for a tokenizer that was saved with a longest length,
    both frozen tokenizers cut them too. Raises CheckpointError for a processor that does not load.
    """
    processor = load_processor(Path(checkpoint))
    with quiet_transformers():
        cut = processor(text=_LONG_TEXT)
    target = tokenizer.with_name(FILE)
    document = json.loads(processor.qformer_tokenizer.backend_tokenizer.to_str())
    document["padding"] = None
    _write(document, target, _truncation(processor.qformer_tokenizer, cut["qformer_input_ids"][0]))
    if (truncation := _truncation(processor.tokenizer, cut["input_ids"][0])) is not None:
        _write(json.loads(tokenizer.read_bytes()), tokenizer, truncation)
    return InstructionContract(
        tokenizer=f"{target.parent.name}/{target.name}",
        max_length=config.qformer_config.max_position_embeddings,
        vocab_size=config.qformer_config.vocab_size,
    )


def _truncation(tokenizer: Any, ids: Sequence[int]) -> dict[str, Any] | None:
    """The entry of `tokenizer.json` that makes `ids` of the long text; None where nothing is cut off."""
    whole = Tokenizer.from_str(tokenizer.backend_tokenizer.to_str())
    whole.no_truncation()
    whole.no_padding()
    if len(whole.encode(_LONG_TEXT).ids) == len(ids):
        return None
    side = str(tokenizer.truncation_side).capitalize()
    return {"direction": side, "max_length": len(ids), "strategy": "LongestFirst", "stride": 0}


def _write(document: dict[str, Any], file: Path, truncation: dict[str, Any] | None) -> None:
    document["truncation"] = truncation
    file.write_text(json.dumps(document, ensure_ascii=False, indent=1) + "\n", encoding="utf-8")
