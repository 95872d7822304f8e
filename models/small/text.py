"""Text of the small world: the tokenizer, and the context-then-question texts that the language model learns.

The language model learns to read a scene off a *context* that stands where the image tokens will stand,
before the beginning of the sentence. On text alone this context is made of bags of words, one vector each
(the sum of the words' embeddings); stage 2 of BLIP-2 then only has to put vectors there that read like such
bags (Tsimpoukelli et al. 2021, arXiv 2106.13884, "Frozen"; BLIP-2 section 3.3). A bag holds what one query
finds in one place.
"""

from __future__ import annotations

import random
from collections.abc import Iterator, Sequence
from typing import Any, TypeAlias

from tokenizers import Tokenizer, decoders, models, pre_tokenizers, processors, trainers

from .scenes import CELLS, Question, Scene, sample_questions, sample_scene

PAD, BOS, EOS, IMAGE = "<pad>", "<s>", "</s>", "<image>"
SPECIAL = (PAD, BOS, EOS, IMAGE)
PAD_ID, BOS_ID, EOS_ID, IMAGE_ID = range(4)
# Wider than the corpus needs (its words are single tokens); the rest are bytes, so any text can be encoded.
VOCAB_SIZE = 448
MAX_TEXT_TOKENS = 48
QUESTIONS_PER_TEXT = 6
BAG = 4


# ``(ids, labels)``; a label is -100 where the loss does not count.
Sentence: TypeAlias = tuple[list[int], list[int]]


def corpus(seed: int, scenes: int) -> Iterator[str]:
    """Captions, questions and answers, for the tokenizer to learn its words from."""
    rng = random.Random(f"corpus:{seed}")
    for _ in range(scenes):
        scene = sample_scene(rng)
        yield scene.caption
        for question in sample_questions(scene, rng, 3):
            yield f"{question.prompt} {question.answer}"


def train_tokenizer(seed: int = 0, scenes: int = 3000) -> Tokenizer:
    """A byte-level BPE whose sequences start with ``<s>``."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=VOCAB_SIZE,
        special_tokens=list(SPECIAL),
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    tokenizer.train_from_iterator(corpus(seed, scenes), trainer)
    tokenizer.post_processor = processors.TemplateProcessing(
        single=f"{BOS} $A", pair=f"{BOS} $A $B", special_tokens=[(BOS, BOS_ID)]
    )
    return tokenizer


def hugging_face_tokenizer(tokenizer: Tokenizer) -> Any:
    """As transformers wants it; padded on the left, because it generates to the right."""
    import transformers

    untyped: Any = transformers.PreTrainedTokenizerFast
    return untyped(
        tokenizer_object=tokenizer,
        bos_token=BOS,
        eos_token=EOS,
        pad_token=PAD,
        padding_side="left",
        model_max_length=128,
    )


class TextCodec:
    """Scenes and questions to token ids, word by word from a cache."""

    def __init__(self, tokenizer: Tokenizer) -> None:
        self._tokenizer = tokenizer
        self._cache: dict[str, list[int]] = {}

    def ids(self, text: str) -> list[int]:
        """Token ids without ``<s>``."""
        if text not in self._cache:
            self._cache[text] = self._tokenizer.encode(text, add_special_tokens=False).ids
        return self._cache[text]

    def sentence(self, prompt: str, completion: str) -> Sentence:
        """``(ids, labels)`` of ``<s> prompt completion </s>``; labels are -100 for the prompt."""
        head = [BOS_ID, *self.ids(prompt)] if prompt else [BOS_ID]
        tail = [*(self.ids(f" {completion}") if prompt else self.ids(completion)), EOS_ID]
        return head + tail, [-100] * len(head) + tail

    def facts(self, scene: Scene, rng: random.Random, slots: int) -> list[list[int]]:
        """What the scene shows, as ``slots`` bags of at most :data:`BAG` words each (padded with ``<pad>``).

        One bag per shape, e.g. ``{red, circle, top, left}``, one for the background, each in one to three
        slots drawn at random; a comma fills the others. As the order tells nothing, the reader learns to go
        by places.
        """
        bags = [self.ids(f" {shape.name} {CELLS[shape.cell]}") for shape in scene.shapes]
        bags.append(self.ids(f" {scene.background}"))
        comma = self.ids(",")
        filled = [bag for bag in bags for _ in range(rng.randint(1, 3))][:slots]
        filled += [comma] * (slots - len(filled))
        rng.shuffle(filled)
        return [[*bag, *[PAD_ID] * (BAG - len(bag))] for bag in filled]


def sentences(codec: TextCodec, scene: Scene, questions: Sequence[Question]) -> list[Sentence]:
    """The caption, and questions with their answers."""
    return [codec.sentence("", scene.caption), *(codec.sentence(q.prompt, q.answer) for q in questions)]


def training_text(codec: TextCodec, rng: random.Random, slots: int) -> tuple[list[list[int]], list[Sentence]]:
    """Facts and the sentences to be read off them, for the language model."""
    scene = sample_scene(rng)
    asked = sample_questions(scene, rng, QUESTIONS_PER_TEXT)
    return codec.facts(scene, rng, slots), sentences(codec, scene, asked)
