"""Changes of weights: each kind comes back, in the form meant for it."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from edge_safe.models.pebble.weight_changes import apply_changes, find_changes


def pair() -> tuple[nn.Linear, nn.Linear, dict[str, Tensor]]:
    torch.manual_seed(0)
    base = nn.Linear(100, 200)
    tuned = nn.Linear(100, 200)
    tuned.load_state_dict(base.state_dict())
    return base, tuned, {k: v.clone() for k, v in base.state_dict().items()}


def test_an_unchanged_model_has_no_changes() -> None:
    _, tuned, state = pair()
    assert find_changes(tuned, state) == {}


def test_a_merged_adapter_is_two_small_factors() -> None:
    base, tuned, state = pair()
    with torch.no_grad():
        tuned.weight += 0.1 * torch.randn(200, 4) @ torch.randn(4, 100)
    changes = find_changes(tuned, state)
    assert {k: tuple(v.shape) for k, v in changes.items()} == {
        "weight.up": (200, 4),
        "weight.down": (4, 100),
    }
    apply_changes(base, changes)
    torch.testing.assert_close(base.weight, tuned.weight, rtol=0, atol=1e-6)


def test_a_few_trained_rows_come_back_exactly() -> None:
    base, tuned, state = pair()
    with torch.no_grad():
        tuned.weight[[15, 3]] = torch.randn(2, 100)
    changes = find_changes(tuned, state)
    assert changes["weight.rows"].tolist() == [3, 15]
    apply_changes(base, changes)
    assert torch.equal(base.weight, tuned.weight)


def test_what_is_neither_is_kept_whole() -> None:
    base, tuned, state = pair()
    with torch.no_grad():
        tuned.weight += torch.randn(200, 100)
        tuned.bias += 1.0
    changes = find_changes(tuned, state)
    assert set(changes) == {"weight.whole", "bias.whole"}
    apply_changes(base, changes)
    assert torch.equal(base.weight, tuned.weight)
    assert torch.equal(base.bias, tuned.bias)
