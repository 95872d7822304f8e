"""Our Q-Former equals transformers' on the same weights, and its masks are those of BLIP-2's figure 2."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from transformers import Blip2QFormerConfig
from transformers.models.blip_2.modeling_blip_2 import Blip2QFormerModel, Blip2TextEmbeddings

from bridgeport.errors import CheckpointError, InputError
from bridgeport.models.qformer import QFormer, QFormerConfig, SelfAttentionMask, transformers_names

# FP32 sums of up to 384 terms through up to 12 layers, LayerNorm'ed to order 1. Observed: at most 3.7e-6.
TOLERANCE = 2e-5
# What a wrong weight, mask or query must at least do to the output to count as caught: 50 x the tolerance.
CAUGHT = 1e-3


@dataclass(frozen=True)
class Case:
    """One random configuration, and what is fed."""

    layers: int
    heads: int
    width: int
    encoder_width: int
    frequency: int
    queries: int
    text: int = 0
    padded: bool = False
    activation: str = "gelu"

    @property
    def config(self) -> QFormerConfig:
        return QFormerConfig(
            num_query_tokens=self.queries,
            hidden_size=self.width,
            num_layers=self.layers,
            num_heads=self.heads,
            intermediate_size=3 * self.width,
            encoder_hidden_size=self.encoder_width,
            cross_attention_frequency=self.frequency,
            activation=self.activation,
            text=self.text > 0,
            vocab_size=50,
            max_position_embeddings=24,
        )


CASES = [
    Case(1, 1, 16, 16, 1, 1),
    Case(2, 4, 32, 48, 2, 8),
    Case(4, 2, 32, 20, 2, 32),
    Case(6, 8, 64, 96, 3, 5),
    Case(3, 3, 48, 33, 1, 16, activation="relu"),
    Case(5, 4, 64, 64, 4, 7, padded=True),
    Case(2, 2, 32, 24, 1, 3, text=1),
    Case(4, 4, 64, 40, 2, 12, text=9),
    Case(3, 6, 96, 128, 2, 9, text=17, padded=True),
    Case(6, 2, 32, 64, 3, 16, text=6, padded=True),
    Case(5, 5, 80, 72, 5, 32, text=24, padded=True),
    Case(2, 1, 64, 256, 2, 4, text=11),
    Case(4, 16, 128, 88, 1, 6, text=5, padded=True, activation="gelu_pytorch_tanh"),
    Case(12, 4, 64, 96, 2, 32, text=8, padded=True),
]


class Reference(nn.Module):
    """The parts of transformers' retrieval model that make up a Q-Former, under the names it gives them."""

    def __init__(self, config: QFormerConfig) -> None:
        super().__init__()
        theirs = Blip2QFormerConfig(
            vocab_size=config.vocab_size,
            hidden_size=config.hidden_size,
            num_hidden_layers=config.num_layers,
            num_attention_heads=config.num_heads,
            intermediate_size=config.intermediate_size,
            hidden_act=config.activation,
            max_position_embeddings=config.max_position_embeddings,
            cross_attention_frequency=config.cross_attention_frequency,
            encoder_hidden_size=config.encoder_hidden_size,
            use_qformer_text_input=config.text,
        )
        self.query_tokens = nn.Parameter(torch.randn(1, config.num_query_tokens, config.hidden_size))
        self.qformer = Blip2QFormerModel(theirs)
        if config.text:
            embeddings: Any = Blip2TextEmbeddings
            self.embeddings = embeddings(theirs)

    def forward(
        self, image_embeds: Tensor, ids: Tensor | None, text_mask: Tensor | None, image_mask: Tensor | None
    ) -> Tensor:
        queries = self.query_tokens.expand(len(image_embeds), -1, -1)
        attention_mask = None
        embeds = queries
        if ids is not None:
            embeds = self.embeddings(input_ids=ids, query_embeds=queries)
            if text_mask is not None:
                attention_mask = torch.cat([torch.ones(queries.shape[:2]), text_mask], dim=1)
        out: Tensor = self.qformer(
            query_embeds=embeds,
            query_length=queries.shape[1],
            attention_mask=attention_mask,
            encoder_hidden_states=image_embeds,
            encoder_attention_mask=image_mask,
        ).last_hidden_state
        return out


def build(case: Case) -> tuple[QFormer, Reference, dict[str, Any]]:
    """Our module and the reference with the same random weights (also norms and biases), and one input."""
    torch.manual_seed(CASES.index(case))
    reference = Reference(case.config).eval()
    with torch.no_grad():
        for parameter in reference.parameters():
            parameter.add_(torch.randn_like(parameter) * 0.1)
    names = transformers_names(case.config)
    weights = reference.state_dict()
    assert sorted(names.values()) == sorted(weights), "the name map does not use every weight exactly once"
    ours = QFormer(case.config).eval()
    ours.load_state_dict({mine: weights[theirs] for mine, theirs in names.items()})
    B, N = 3, 13
    inputs: dict[str, Any] = {"image_embeds": torch.randn(B, N, case.encoder_width)}
    inputs["image_attention_mask"] = None
    if case.text:
        inputs["input_ids"] = torch.randint(1, 50, (B, case.text))
    if case.padded:
        inputs["image_attention_mask"] = torch.arange(N) < torch.tensor([[N], [4], [9]])
        if case.text:
            lengths = torch.tensor([[case.text], [1], [case.text // 2]])
            inputs["text_attention_mask"] = (torch.arange(case.text) < lengths).long()
    return ours, reference, inputs


def ours_out(model: QFormer, inputs: dict[str, Any]) -> Tensor:
    out = model(**inputs)
    return torch.cat([x for x in (out.query_embeds, out.text_embeds) if x is not None], dim=1)


def reference_out(model: Reference, inputs: dict[str, Any]) -> Tensor:
    images, image_mask = inputs["image_embeds"], inputs["image_attention_mask"]
    ids, text_mask = inputs.get("input_ids"), inputs.get("text_attention_mask")
    if image_mask is None or ids is None or text_mask is None:
        return model(images, ids, text_mask, image_mask)  # type: ignore[no-any-return]
    # transformers 5.23 fails on text with a padded image (its cross mask has a row per text token too):
    # cut the padding off and run row by row, which is the same by definition.
    rows = [
        model(images[i : i + 1, image_mask[i]], ids[i : i + 1], text_mask[i : i + 1], None) for i in range(len(images))
    ]
    return torch.cat(rows)


@pytest.mark.parametrize("case", CASES, ids=str)
@torch.no_grad()
def test_equals_transformers(case: Case) -> None:
    ours, reference, inputs = build(case)
    difference = (ours_out(ours, inputs) - reference_out(reference, inputs)).abs()
    where = tuple(int(i) for i in torch.unravel_index(difference.argmax(), difference.shape))
    report = f"max {difference.max():.2e} at {where}, mean {difference.mean():.2e}"
    assert difference.max() <= TOLERANCE, report


@pytest.mark.parametrize("case", CASES, ids=str)
@torch.no_grad()
def test_planted_fault_is_caught(case: Case) -> None:
    """One changed weight in the last layer that reads the image, a forgotten mask, a swapped query."""
    ours, reference, inputs = build(case)
    want = reference_out(reference, inputs)

    last = max(i for i in range(case.layers) if case.config.has_cross_attention(i))
    weight = ours.get_parameter(f"layers.{last}.cross_attention.value.weight")
    saved = weight.clone()
    weight[0] += 0.5
    assert (ours_out(ours, inputs) - want).abs().max() > CAUGHT, "a changed weight goes unseen"
    weight.copy_(saved)

    if case.padded:
        forgotten = inputs | {"image_attention_mask": None}
        assert (ours_out(ours, forgotten) - want).abs().max() > CAUGHT, "a forgotten mask goes unseen"
    if case.queries > 1:
        ours.query_tokens.copy_(ours.query_tokens.roll(1, dims=1))
        assert (ours_out(ours, inputs) - want).abs().max() > CAUGHT, "swapped queries go unseen"


@torch.no_grad()
def test_text_alone_equals_transformers() -> None:
    """As ``Blip2ForImageTextRetrieval`` runs the text side of its contrast."""
    ours, reference, inputs = build(CASES[9])
    ids, mask = inputs["input_ids"], inputs["text_attention_mask"]
    embeds = reference.embeddings(input_ids=ids)
    want = reference.qformer(query_embeds=embeds, query_length=0, attention_mask=mask).last_hidden_state
    out = ours(input_ids=ids, text_attention_mask=mask)
    assert out.query_embeds is None
    assert (out.text_embeds - want).abs().max() <= TOLERANCE


def sees(mask: SelfAttentionMask) -> list[str]:
    return ["".join("x" if seen else "." for seen in row) for row in mask.keep(2, 3).tolist()]


def test_masks_are_those_of_the_paper() -> None:
    """BLIP-2 figure 2, written out for two queries and three text tokens."""
    assert sees(SelfAttentionMask.BIDIRECTIONAL) == ["xxxxx"] * 5
    assert sees(SelfAttentionMask.UNIMODAL) == ["xx...", "xx...", "..xxx", "..xxx", "..xxx"]
    assert sees(SelfAttentionMask.MULTIMODAL_CAUSAL) == ["xx...", "xx...", "xxx..", "xxxx.", "xxxxx"]


@torch.no_grad()
def test_masks_reach_the_output() -> None:
    ours, _, inputs = build(CASES[7])
    ids = inputs["input_ids"]
    changed = inputs | {"input_ids": torch.cat([ids[:, :-1], (ids[:, -1:] + 1) % 50], dim=1)}
    other_image = inputs | {"image_embeds": inputs["image_embeds"] + 1.0}
    alone = ours(inputs["image_embeds"])
    for mask in SelfAttentionMask:
        before, after = ours(**inputs, mask=mask), ours(**changed, mask=mask)
        queries_see_text = (before.query_embeds - after.query_embeds).abs().max() > CAUGHT
        past_sees_future = (before.text_embeds[:, :-1] - after.text_embeds[:, :-1]).abs().max() > CAUGHT
        moved = ours(**other_image, mask=mask)
        text_sees_image = (before.text_embeds - moved.text_embeds).abs().max() > CAUGHT
        assert queries_see_text == (mask is SelfAttentionMask.BIDIRECTIONAL)
        assert past_sees_future == (mask is not SelfAttentionMask.MULTIMODAL_CAUSAL)
        assert text_sees_image == (mask is not SelfAttentionMask.UNIMODAL)
        if mask is not SelfAttentionMask.BIDIRECTIONAL:
            assert (before.query_embeds - alone.query_embeds).abs().max() <= TOLERANCE


@torch.no_grad()
def test_attention_maps_on_request() -> None:
    ours, _, inputs = build(CASES[8])
    quiet, loud = ours(**inputs), ours(**inputs, with_attention=True)
    assert quiet.self_attention == quiet.cross_attention == ()
    assert [tuple(m.shape) for m in loud.self_attention] == [(3, 6, 26, 26)] * 3
    assert [tuple(m.shape) for m in loud.cross_attention] == [(3, 6, 9, 13)] * 2
    for weights in (*loud.self_attention, *loud.cross_attention):
        assert (weights.sum(-1) - 1).abs().max() < 1e-5
    assert torch.equal(quiet.query_embeds, loud.query_embeds)


def test_reads_a_transformers_config() -> None:
    theirs = Blip2QFormerConfig(num_hidden_layers=3, use_qformer_text_input=True).to_dict()
    config = QFormerConfig.from_transformers(theirs, num_query_tokens=4)
    assert config == QFormerConfig(num_query_tokens=4, num_layers=3, text=True)
    assert QFormerConfig.from_transformers({}, num_query_tokens=32) == QFormerConfig()


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"num_heads": 5}, "hidden_size 768 is no multiple of num_heads 5"),
        ({"num_layers": 0}, "num_layers is 0"),
        ({"cross_attention_frequency": 0}, "cross_attention_frequency is 0"),
        ({"hidden_size": 7.5}, "hidden_size is 7.5"),
        ({"num_query_tokens": True}, "num_query_tokens is True"),
        ({"activation": "swoosh"}, "activation 'swoosh' is unknown; known are gelu"),
        ({"layer_norm_eps": 0.0}, "layer_norm_eps is 0.0"),
    ],
)
def test_config_refuses(change: dict[str, Any], message: str) -> None:
    with pytest.raises(CheckpointError, match=message):
        replace(QFormerConfig(), **change)


def test_forward_refuses() -> None:
    model = QFormer(CASES[0].config)
    with pytest.raises(InputError, match="neither image_embeds nor input_ids"):
        model()
    with pytest.raises(InputError, match="17 wide; this Q-Former reads an encoder of width 16"):
        model(torch.zeros(1, 2, 17))
    with pytest.raises(InputError, match="no text branch"):
        model(torch.zeros(1, 2, 16), torch.zeros(1, 2, dtype=torch.long))
    with pytest.raises(InputError, match="25 tokens is longer than the Q-Former's 24"):
        QFormer(CASES[6].config)(input_ids=torch.zeros(1, 25, dtype=torch.long))
