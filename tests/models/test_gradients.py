"""Which loss trains what."""

from __future__ import annotations

import pytest
import torch

from edge_safe.models.base_model import BaseModel
from edge_safe.models.control_tokens import ControlTokens
from edge_safe.models.examples import Encoded
from edge_safe.models.lm_training import GatedLanguageModel, add_lora
from edge_safe.models.losses import LossWeights
from edge_safe.models.recipe import LoraSection
from edge_safe.models.safety_head import SafetyConfig, SafetyModule
from edge_safe.models.token_rows import TokenRows

LAYER = 2
EXAMPLES = [
    Encoded(((5, 9, 11, 30),), False, "a", (40, 41, 2)),
    Encoded(((6, 8), (12, 13, 14)), True, "b", (50, 2)),
]
NONE = dict.fromkeys(("attention", "token", "final", "answer", "retain"), 0.0)


def gradients(gated: tuple[BaseModel, ControlTokens], loss: str) -> dict[str, float]:
    """Largest gradient of every trainable parameter under one loss alone."""
    base, tokens = gated
    torch.manual_seed(0)
    safety = SafetyModule(SafetyConfig(32, (LAYER,), 2, 4, 4))
    rows = TokenRows(base.model, tokens.ids)
    model = add_lora(base.model, LoraSection(rank=2, alpha=4))
    with torch.no_grad():
        for parameter in [*model.parameters(), *safety.parameters()]:
            if parameter.requires_grad:
                parameter.normal_(0.0, 0.3)
    module = GatedLanguageModel(model, tokens, LossWeights(**(NONE | {loss: 1.0})), rows, safety)
    module(EXAMPLES)["loss"].backward()
    return {
        name: 0.0 if p.grad is None else float(p.grad.abs().max())
        for name, p in module.named_parameters()
        if p.requires_grad
    }


def moved(found: dict[str, float], part: str) -> set[bool]:
    chosen = {value > 0.0 for name, value in found.items() if part in name}
    assert chosen
    return chosen


def lora_layers(found: dict[str, float]) -> set[int]:
    return {
        int(name.split(".layers.")[1].split(".")[0])
        for name, value in found.items()
        if "lora_" in name and value > 0.0
    }


def test_the_attention_loss_gives_no_gradient_to_the_language_model(
    gated: tuple[BaseModel, ControlTokens],
) -> None:
    found = gradients(gated, "attention")
    assert lora_layers(found) == set()
    assert moved(found, "rows.rows") == {False}
    assert moved(found, f"safety.heads.{LAYER}.attention.") == {True}
    assert moved(found, ".token.") == {False}


def test_the_token_loss_at_k_trains_layers_below_k_alone(
    gated: tuple[BaseModel, ControlTokens],
) -> None:
    found = gradients(gated, "token")
    assert lora_layers(found) == {0, 1}
    assert moved(found, ".token.") == {True}
    assert moved(found, ".attention.") == {False}
    assert moved(found, "safety.final") == {False}


@pytest.mark.parametrize("loss", ["final", "answer", "retain"])
def test_losses_at_full_depth_train_every_layer(
    loss: str, gated: tuple[BaseModel, ControlTokens]
) -> None:
    found = gradients(gated, loss)
    assert lora_layers(found) == {0, 1, 2, 3}
    assert moved(found, "safety.heads") == {False}
    assert moved(found, "safety.final") == {loss == "final"}


@pytest.mark.parametrize("loss", ["token", "final", "attention"])
def test_what_is_asked_of_the_prompt_never_trains_the_control_tokens_rows(
    loss: str, gated: tuple[BaseModel, ControlTokens]
) -> None:
    assert moved(gradients(gated, loss), "rows.rows") == {False}


def test_only_the_chosen_rows_of_the_embedding_train(base: BaseModel) -> None:
    rows = TokenRows(base.model, (7,))
    before = base.model.get_input_embeddings().weight.clone()
    output = base.model(input_ids=torch.tensor([[5, 7, 9]])).logits
    output.sum().backward()
    assert base.model.get_input_embeddings().weight.grad is None
    assert float(rows.rows.grad.abs().max()) > 0.0
    with torch.no_grad():
        rows.rows += 1.0
    rows.merge()
    changed = (base.model.get_input_embeddings().weight != before).any(-1).nonzero()
    assert changed[:, 0].tolist() == [7]


def test_a_prompt_in_a_longer_sequence_has_the_states_of_the_prompt_alone(
    gated: tuple[BaseModel, ControlTokens],
) -> None:
    base, tokens = gated
    safety = SafetyModule(SafetyConfig(32, (LAYER,), 2, 4, 4))
    module = GatedLanguageModel(base.model, tokens, LossWeights(), None, safety)
    batch, _ = module.run(EXAMPLES)
    for row, example in enumerate(EXAMPLES):
        states = torch.cat(
            [
                base.model(torch.tensor([p]), output_hidden_states=True).hidden_states[LAYER][0]
                for p in example.prompts
            ]
        )
        assert int(batch.mask[row].sum()) == len(states)
        torch.testing.assert_close(
            batch.states[LAYER][row, : len(states)], states, atol=1e-5, rtol=0
        )
        last = base.model(torch.tensor([example.prompts[-1]]), output_hidden_states=True)
        torch.testing.assert_close(
            batch.final[row], last.hidden_states[-1][0, -1], atol=1e-5, rtol=0
        )
