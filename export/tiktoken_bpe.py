"""A tokenizer of tiktoken's kind (a file of ranks) as a `tokenizer.json`, and the same encoding in plain Python.

The file has a line for each token: its bytes in base64, and its rank, which is its id. A text is cut by a pattern;
in a piece, the neighbours whose union has the lowest rank are joined until no union has a rank.
"""

from __future__ import annotations

import base64
import binascii
from collections.abc import Mapping, Sequence
from itertools import pairwise
from pathlib import Path
from typing import TYPE_CHECKING

from ..errors import CheckpointError

if TYPE_CHECKING:
    from tokenizers import Tokenizer

Ranks = Mapping[bytes, int]


def read_ranks(file: Path) -> dict[bytes, int]:
    """Token -> rank. Raises CheckpointError for a file that is missing, cut off or not of this kind."""
    try:
        lines = [line.split() for line in file.read_bytes().splitlines() if line]
        ranks = {base64.b64decode(token, validate=True): int(rank) for token, rank in lines}
    except (OSError, ValueError, binascii.Error) as error:
        raise CheckpointError(f"{file} holds no ranks of tokens ({' '.join(str(error).split())}); copy it") from error
    bytes_left = sorted(set(range(256)) - {token[0] for token in ranks if len(token) == 1})
    if sorted(ranks.values()) != list(range(len(lines))) or bytes_left:
        raise CheckpointError(
            f"{file}: {len(lines)} tokens without the ranks 0 to {len(lines) - 1}, each once, or without every single "
            "byte; copy the file again"
        )
    return ranks


def tokenizer_from_ranks(ranks: Ranks, pattern: str, special: Sequence[tuple[str, bool]]) -> Tokenizer:
    """The tokenizer of `ranks`, NFC first. `special`: tokens behind them, in order, and whether decoding skips them."""
    from tokenizers import AddedToken, Regex, Tokenizer, decoders, models, normalizers, pre_tokenizers

    letters = _letters()
    spelled = {token: "".join(letters[byte] for byte in token) for token in ranks}
    vocabulary = {spelled[token]: rank for token, rank in ranks.items()}
    merges = [(spelled[left], spelled[right]) for left, right in _merges(ranks)]
    # A piece that is a token by itself is that token, whatever its parts join to.
    tokenizer = Tokenizer(models.BPE(vocab=vocabulary, merges=merges, fuse_unk=False, ignore_merges=True))
    tokenizer.normalizer = normalizers.NFC()
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
        [
            pre_tokenizers.Split(Regex(pattern), behavior="isolated"),
            pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False),
        ]
    )
    tokenizer.decoder = decoders.ByteLevel()
    tokenizer.add_tokens([AddedToken(text, special=skipped, normalized=False) for text, skipped in special])
    return tokenizer


def encode_by_ranks(ranks: Ranks, pattern: str, text: str) -> list[int]:
    """Ids of `text`, in which no special token is looked for."""
    import unicodedata

    import regex  # type: ignore[import-untyped]

    ids = []
    for piece in regex.findall(pattern, unicodedata.normalize("NFC", text)):
        ids += _join(ranks, piece.encode())
    return ids


def _join(ranks: Ranks, piece: bytes) -> list[int]:
    parts = [piece] if piece in ranks else [bytes([byte]) for byte in piece]
    while True:
        unions = [left + right for left, right in pairwise(parts)]
        found = [(ranks[union], place) for place, union in enumerate(unions) if union in ranks]
        if not found:
            break
        _, place = min(found)
        parts[place : place + 2] = [unions[place]]
    return [ranks[part] for part in parts]


def _merges(ranks: Ranks) -> list[tuple[bytes, bytes]]:
    """Pairs of tokens that join to a token, the lowest rank first."""
    found = []
    for token, rank in ranks.items():
        for cut in range(1, len(token)):
            left, right = token[:cut], token[cut:]
            if left in ranks and right in ranks:
                found.append((rank, ranks[left], ranks[right], left, right))
    return [(left, right) for *_, left, right in sorted(found)]


def _letters() -> list[str]:
    """The printable letter that stands for each byte in a byte-level vocabulary (GPT-2's table)."""
    plain = [*range(ord("!"), ord("~") + 1), *range(0xA1, 0xAD), *range(0xAE, 0x100)]
    others = (byte for byte in range(256) if byte not in plain)
    table = {byte: chr(byte) for byte in plain} | {byte: chr(256 + place) for place, byte in enumerate(others)}
    return [table[byte] for byte in range(256)]
