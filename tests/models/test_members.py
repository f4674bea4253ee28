"""Averaging safety modules into one."""

from __future__ import annotations

import pytest
import torch

from edge_safe.errors import CheckpointError
from edge_safe.models.members import merge_members
from edge_safe.models.safety_head import SafetyConfig, SafetyModule

CONFIG = SafetyConfig(16, (1, 3), attention_heads=2, attention_head_dim=4, attention_hidden=6)


def random_module(seed: int) -> SafetyModule:
    torch.manual_seed(seed)
    module = SafetyModule(CONFIG)
    with torch.no_grad():
        for parameter in module.parameters():
            parameter.add_(0.5 * torch.randn_like(parameter))
    return module


def test_the_merged_log_odds_are_the_mean_of_the_members() -> None:
    members = [random_module(seed) for seed in range(3)]
    merged = merge_members(members)
    states = torch.randn(2, 7, 16)
    mask = torch.arange(7)[None] < torch.tensor([[7], [4]])

    def log_odds(module: SafetyModule) -> torch.Tensor:
        readouts = [module.head(k)(states, mask) for k in CONFIG.layers]
        readouts.append(module.read_final(states, mask))
        return torch.stack([r.verdict_logits[:, 0] - r.verdict_logits[:, 1] for r in readouts])

    expected = torch.stack([log_odds(member) for member in members]).mean(0)
    torch.testing.assert_close(log_odds(merged), expected, atol=1e-5, rtol=1e-5)
    assert merged.config.attention_heads == 6


def test_joined_heads_decide_at_the_last_of_them_and_say_their_mean() -> None:
    module = random_module(0)
    states = {k: torch.randn(2, 7, 16) for k in CONFIG.layers}
    mask = torch.arange(7)[None] < torch.tensor([[7], [4]])
    alone = {k: module.read(k, states, mask).verdict_logits for k in CONFIG.layers}
    module.join((1, 3))
    together = {k: module.read(k, states, mask).verdict_logits for k in CONFIG.layers}
    odds, expected = (
        logits[:, 0] - logits[:, 1] for logits in (together[3], (alone[1] + alone[3]) / 2)
    )
    torch.testing.assert_close(together[1], alone[1])
    torch.testing.assert_close(odds, expected, atol=1e-5, rtol=1e-5)
    assert not torch.allclose(together[3], alone[3])


def test_a_layer_without_a_head_cannot_be_joined() -> None:
    with pytest.raises(CheckpointError, match="no safety head at layer 2"):
        random_module(0).join((1, 2))


def test_joined_layers_have_to_rise() -> None:
    with pytest.raises(CheckpointError, match="by rising depth"):
        random_module(0).join((3, 1))
