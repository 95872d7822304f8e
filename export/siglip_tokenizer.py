"""SigLIP's sentencepiece tokenizer as a `tokenizers.Tokenizer`, which runs without sentencepiece.

transformers keeps `SiglipTokenizer` in Python: it lowers the case, removes punctuation and then asks sentencepiece.
Here the same steps are normalisers before a Unigram model of the same pieces. Special tokens that a user types are text
and lose their punctuation, as in the original (big_vision, `canonicalize_text`); transformers makes tokens of them.
"""

from __future__ import annotations

import string
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ..errors import UnsupportedError

if TYPE_CHECKING:
    from tokenizers import Tokenizer

_UNIGRAM = 1
_SPACE = "\u2581"


def convert_siglip_tokenizer(path: Path, tokenizer: Any) -> Tokenizer:
    """A new tokenizer with the ids of `tokenizer`, a `SiglipTokenizer` of the checkpoint `path`.

    Raises UnsupportedError when its sentencepiece model is not a Unigram model.
    """
    from sentencepiece import sentencepiece_model_pb2
    from tokenizers import Tokenizer
    from tokenizers.models import Unigram

    make: Any = getattr(sentencepiece_model_pb2, "ModelProto")  # noqa: B009 - generated, so a type checker sees nothing
    model = make()
    model.ParseFromString(tokenizer.sp_model.serialized_model_proto())
    trained = model.trainer_spec
    if trained.model_type != _UNIGRAM:
        raise UnsupportedError(
            f"{path}: the sentencepiece model is of type {trained.model_type}; SigLIP's is {_UNIGRAM}, a Unigram model"
        )
    pieces = [(piece.piece, piece.score) for piece in model.pieces]
    converted = Tokenizer(Unigram(pieces, unk_id=trained.unk_id, byte_fallback=trained.byte_fallback))
    converted.normalizer = _normalizer(tokenizer.do_lower_case, model.normalizer_spec)
    return converted


def _normalizer(do_lower_case: bool, spec: Any) -> Any:
    from tokenizers import Regex, normalizers

    punctuation = "".join(f"\\x{ord(char):02x}" for char in string.punctuation)
    steps: list[Any] = [normalizers.Replace(_SPACE, " ")]
    if do_lower_case:
        steps.append(normalizers.Lowercase())
    steps += [
        normalizers.Replace(Regex(f"[{punctuation}]"), ""),
        normalizers.Replace(Regex(r"\s+"), " "),
        normalizers.Strip(),
    ]
    if spec.precompiled_charsmap:
        steps.append(normalizers.Precompiled(spec.precompiled_charsmap))
    if spec.remove_extra_whitespaces:
        steps += [normalizers.Replace(Regex(" {2,}"), " "), normalizers.Strip()]
    return normalizers.Sequence([*steps, normalizers.Prepend(_SPACE), normalizers.Replace(" ", _SPACE)])
