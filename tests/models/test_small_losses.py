"""The losses of the recipe on tiny shapes, each with the fault that it must catch."""

from __future__ import annotations

import random
from collections import Counter
from collections.abc import Iterator
from dataclasses import replace
from typing import Any

import pytest
import torch
from torch import Tensor
from transformers import LlamaForCausalLM

from bridgeport.models.qformer import SelfAttentionMask
from bridgeport.models.small import packing, stage1
from bridgeport.models.small.data import pad
from bridgeport.models.small.language import completion_loss, context_loss, text_config
from bridgeport.models.small.recipe import Sizes
from bridgeport.models.small.scenes import CELLS, sample_scene
from bridgeport.models.small.stage1 import Stage1, contrast_loss, hard_negatives, match_loss
from bridgeport.models.small.text import BAG, BOS_ID, EOS_ID, TextCodec, train_tokenizer, training_text

TINY = Sizes(vision_width=32, vision_layers=1, queries=16, qformer_width=32, qformer_layers=2)
VOCAB = 32


@pytest.fixture(scope="module", autouse=True)
def one_thread() -> Iterator[None]:
    """Tensors this small take longer to share out among threads than to compute."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


@pytest.fixture(scope="module")
def codec() -> TextCodec:
    return TextCodec(train_tokenizer(scenes=300))


@pytest.fixture
def model() -> Stage1:
    torch.manual_seed(0)
    return Stage1(TINY, VOCAB).eval()


def inputs() -> tuple[Tensor, Tensor, Tensor]:
    """Three pictures (tokens of a frozen encoder) and three texts, the last two padded."""
    torch.manual_seed(1)
    ids = pad([[1, 5, 6, 7, 8, 2], [1, 9, 10, 2], [1, 11, 2]])
    return torch.randn(3, 10, 32), ids, ids != 0


def test_contrast_loss_by_hand() -> None:
    """Two pairs with logits 2 on and 0 off the diagonal: log(1 + e^-2) both ways."""
    similarities = 2.0 * torch.eye(2)
    assert contrast_loss(similarities, torch.eye(2, dtype=torch.bool)).item() == pytest.approx(0.126928, abs=1e-6)
    # The planted fault: pairs crossed over must cost more.
    crossed = contrast_loss(similarities.flip(0), torch.eye(2, dtype=torch.bool))
    assert crossed.item() == pytest.approx(2.126928, abs=1e-6)


def test_contrast_loss_shares_the_target_among_equal_captions() -> None:
    same = torch.tensor([[True, True, False], [True, True, False], [False, False, True]])
    torch.manual_seed(0)
    similarities = torch.randn(3, 3)
    swapped = similarities[[1, 0, 2]][:, [1, 0, 2]]
    assert contrast_loss(similarities, same) == pytest.approx(contrast_loss(swapped, same).item())
    blind = 20.0 * same.float()
    assert contrast_loss(blind, same).item() == pytest.approx((2 * torch.tensor(2.0).log().item()) / 3, abs=1e-5)


@torch.no_grad()
def test_similarity_is_the_best_query_and_unimodal(model: Stage1) -> None:
    images, ids, keep = inputs()
    out = model.qformer(images, ids, keep, mask=SelfAttentionMask.UNIMODAL)
    assert out.query_embeds is not None
    assert out.text_embeds is not None
    queries, words = model.vision_projection(out.query_embeds), model.text_projection(out.text_embeds[:, 0])
    want = torch.empty(3, 3)
    for i in range(3):
        for j in range(3):
            cosines = torch.nn.functional.cosine_similarity(queries[i], words[j][None], dim=-1)
            want[i, j] = cosines.max() / 0.07
    torch.testing.assert_close(model.similarities(images, ids, keep), want, atol=1e-4, rtol=1e-4)


def test_hard_negatives_are_never_the_positive() -> None:
    captions = ["a", "b", "c", "b", "d", "e"]
    same = torch.tensor([[x == y for y in captions] for x in captions])
    # The positives score highest by far: without the exclusion they would be drawn nearly always.
    similarities = torch.randn(6, 6, generator=torch.Generator().manual_seed(0)) + 30.0 * same
    generator = torch.Generator().manual_seed(0)
    for _ in range(60):
        wrong_text, wrong_image = hard_negatives(similarities, same, generator)
        for row in range(6):
            assert captions[int(wrong_text[row])] != captions[row]
            assert captions[int(wrong_image[row])] != captions[row]


def test_hard_negatives_are_hard() -> None:
    same = torch.eye(4, dtype=torch.bool)
    similarities = torch.zeros(4, 4)
    similarities[0, 2] = 4.0
    similarities[3, 1] = 4.0
    drawn: Counter[tuple[str, int]] = Counter()
    generator = torch.Generator().manual_seed(0)
    for _ in range(100):
        wrong_text, wrong_image = hard_negatives(similarities, same, generator)
        drawn["text of picture 0", int(wrong_text[0])] += 1
        drawn["picture of text 1", int(wrong_image[1])] += 1
    # e^4 against two times e^0: 96 % of the 100 draws.
    assert drawn["text of picture 0", 2] > 85
    assert drawn["picture of text 1", 3] > 85


@torch.no_grad()
def test_match_loss_pairs_and_labels(model: Stage1, monkeypatch: pytest.MonkeyPatch) -> None:
    """A head that always says `match` at logit 10 pays 10 for each of the two thirds that do not match."""
    images, ids, keep = inputs()
    seen: list[tuple[Tensor, Tensor]] = []

    def always(image_embeds: Tensor, ids: Tensor, keep: Tensor) -> Tensor:
        seen.append((image_embeds, ids))
        return torch.tensor([0.0, 10.0]).expand(len(ids), 2)

    monkeypatch.setattr(model, "matching", always)
    negatives = (torch.tensor([1, 2, 0]), torch.tensor([2, 0, 1]))
    assert match_loss(model, images, ids, keep, negatives).item() == pytest.approx(20 / 3, abs=1e-3)
    got_images, got_ids = seen[0]
    assert torch.equal(got_images, torch.cat([images, images, images[[2, 0, 1]]]))
    assert torch.equal(got_ids, torch.cat([ids, ids[[1, 2, 0]], ids]))


def leaks(model: Stage1) -> bool:
    """Whether a later token changes the prediction for an earlier one."""
    images, ids, _ = inputs()
    changed = ids.clone()
    changed[:, -1] = 20
    before, after = model.generation(images, ids), model.generation(images, changed)
    return bool((before[:, :-1] - after[:, :-1]).abs().max() > 1e-6)


@torch.no_grad()
def test_generation_never_sees_the_future(model: Stage1, monkeypatch: pytest.MonkeyPatch) -> None:
    assert not leaks(model)

    class Leaky:
        MULTIMODAL_CAUSAL = SelfAttentionMask.BIDIRECTIONAL

    monkeypatch.setattr(stage1, "SelfAttentionMask", Leaky)
    assert leaks(model), "a leaking mask goes unseen"


def test_completion_loss_by_hand() -> None:
    """Uniform logits over 4 tokens cost log 4; a label is compared with the logits one position before it."""
    labels = torch.tensor([[-100, -100, 3, 1]])
    assert completion_loss(torch.zeros(1, 4, 4), labels).item() == pytest.approx(1.386294, abs=1e-6)
    sure = torch.zeros(1, 4, 4)
    sure[0, 1, 3] = sure[0, 2, 1] = 50.0
    assert completion_loss(sure, labels).item() == pytest.approx(0.0, abs=1e-6)
    assert completion_loss(sure.roll(1, dims=1), labels).item() > 1, "logits off by one go unseen"


def test_facts_fill_the_slots_and_say_everything(codec: TextCodec) -> None:
    rng = random.Random(0)
    tokenizer: Any = codec._tokenizer
    for _ in range(200):
        scene = sample_scene(rng)
        facts = codec.facts(scene, rng, 16)
        assert len(facts) == 16
        assert {len(bag) for bag in facts} == {BAG}
        told = {" ".join(tokenizer.decode(bag).split()) for bag in facts}
        assert told == {f"{s.name} {CELLS[s.cell]}" for s in scene.shapes} | {scene.background, ","}


def test_sentences_are_those_of_inference(codec: TextCodec) -> None:
    tokenizer: Any = codec._tokenizer
    ids, labels = codec.sentence("question: what is red? answer:", "the star")
    prompt = tokenizer.encode("question: what is red? answer:").ids
    assert ids[: len(prompt)] == prompt
    assert prompt[0] == BOS_ID
    assert labels == [-100] * len(prompt) + ids[len(prompt) :]
    assert tokenizer.decode(ids[len(prompt) :]) == " the star"
    assert ids[-1] == EOS_ID
    expected = tokenizer.encode("a red star", add_special_tokens=False).ids
    assert codec.sentence("", "a red star")[0][1:-1] == expected


def test_training_text_labels_only_completions(codec: TextCodec) -> None:
    facts, sentences = training_text(codec, random.Random(3), 16)
    assert len(facts) == 16
    assert len(sentences) > 3
    for ids, labels in sentences:
        prompt = labels.count(-100)
        assert ids[0] == BOS_ID
        assert ids[-1] == EOS_ID
        assert labels == [-100] * prompt + ids[prompt:]
        assert 0 < prompt < len(ids)


@torch.no_grad()
def test_packed_sentences_are_as_if_alone(codec: TextCodec) -> None:
    """Loss of four sentences in one row is that of four rows; a mask that leaks between them is caught."""
    torch.manual_seed(0)
    model: Any = LlamaForCausalLM(text_config(replace(TINY, text_width=32, text_layers=2, text_heads=2), 416))
    facts, sentences = training_text(codec, random.Random(3), 16)
    context = model.get_parameter("model.embed_tokens.weight")[torch.tensor([facts])].sum(dim=2)
    alone = []
    for ids, labels in sentences:
        logits = model(inputs_embeds=torch.cat([context, model.model.embed_tokens(torch.tensor([ids]))], 1)).logits
        alone.append(completion_loss(logits[:, 16:], torch.tensor([labels])) * (len(ids) - labels.count(-100)))
    counted = sum(len(ids) - labels.count(-100) for ids, labels in sentences)
    want = torch.stack(alone).sum() / counted
    packed = packing.pack([sentences], 16)
    assert context_loss(model, context, packed).item() == pytest.approx(want.item(), abs=1e-5)
    leaking = replace(packed, mask=torch.where(torch.ones_like(packed.mask).tril() > 0, 0.0, packed.mask))
    assert abs(context_loss(model, context, leaking).item() - want.item()) > 1e-4
    shifted = replace(packed, positions=torch.arange(packed.positions.shape[1])[None])
    assert abs(context_loss(model, context, shifted).item() - want.item()) > 1e-4
