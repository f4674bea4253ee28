"""CASA's attention, verdict and losses against a plain re-derivation in numpy."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch
from numpy.typing import NDArray

from edge_safe.models.losses import (
    LossWeights,
    answer_loss,
    gate_losses,
    retain_loss,
    weighted_sum,
)
from edge_safe.models.safety_head import (
    Readout,
    SafetyAttention,
    SafetyConfig,
    SafetyModule,
    combine,
)

Array = NDArray[np.float64]
CONFIG = SafetyConfig(12, (2, 5), attention_heads=3, attention_head_dim=4, attention_hidden=6)


def random_module(seed: int = 0) -> SafetyModule:
    torch.manual_seed(seed)
    module = SafetyModule(CONFIG)
    with torch.no_grad():
        for parameter in module.parameters():
            parameter.normal_(0.0, 0.7)
    return module


def numbers(module: torch.nn.Module) -> dict[str, Array]:
    return {name: value.double().numpy() for name, value in module.state_dict().items()}


def rms(states: Array, weight: Array, eps: float = 1e-5) -> Array:
    return states / np.sqrt((states**2).mean(-1, keepdims=True) + eps) * weight


def plain_attention(w: dict[str, Array], states: Array) -> float:
    """One prompt of n positions, position by position and head by head."""
    n, heads, width = len(states), 3, 4
    m = rms(states, w["norm.weight"])
    pooled = []
    for h in range(heads):
        rows = slice(h * width, (h + 1) * width)
        slope = math.log1p(math.exp(w["slope_logit"][h]))
        scores = []
        for t in range(n):
            key = w["key.weight"][rows] @ m[t]
            distance = n - 1 - t
            scores.append(key @ w["query"][h] / math.sqrt(width) - slope * math.log1p(distance))
        weights = np.exp(np.array(scores) - max(scores))
        weights /= weights.sum()
        pooled.append(sum(weights[t] * (w["value.weight"][rows] @ m[t]) for t in range(n)))
    x = w["up.weight"] @ np.concatenate(pooled) + w["up.bias"]
    gelu = np.array([0.5 * v * (1 + math.erf(v / math.sqrt(2))) for v in x])
    return float(w["down.weight"][0] @ gelu + w["down.bias"][0])


def plain_verdict(w: dict[str, Array], states: Array) -> Array:
    token = {n.removeprefix("token."): v for n, v in w.items() if n.startswith("token.")}
    attention = {n.removeprefix("attention."): v for n, v in w.items() if "attention." in n}
    z = token["rows"] @ rms(states[-1], token["norm.weight"])
    v = 1 / (1 + math.exp(-plain_attention(attention, states)))
    return z + np.log([v, 1 - v])


def test_attention_equals_the_plain_derivation() -> None:
    attention = random_module().head(2).attention
    states = torch.randn(1, 7, 12)
    got = attention(states, torch.ones(1, 7, dtype=torch.bool)).detach()
    expected = plain_attention(numbers(attention), states[0].double().numpy())
    assert float(got) == pytest.approx(expected, abs=1e-5)


def test_the_combined_verdict_equals_the_plain_derivation_in_a_padded_batch() -> None:
    head = random_module().head(5)
    states, sizes = torch.randn(3, 9, 12), [9, 4, 1]
    mask = torch.arange(9)[None] < torch.tensor(sizes)[:, None]
    got = head(states, mask).verdict_logits.detach().numpy()
    for row, size in enumerate(sizes):
        expected = plain_verdict(numbers(head), states[row, :size].double().numpy())
        np.testing.assert_allclose(got[row], expected, atol=1e-5)


def test_p_unsafe_is_the_softmax_of_the_log_odds_form() -> None:
    z, a = torch.tensor([[-2.0, -1.0]]), torch.tensor([0.4])
    v = 1 / (1 + math.exp(-0.4))
    odds_unsafe, odds_safe = math.exp(-2.0) * v, math.exp(-1.0) * (1 - v)
    p_unsafe = float(combine(z, a).softmax(-1)[0, 0])
    assert p_unsafe == pytest.approx(odds_unsafe / (odds_unsafe + odds_safe), abs=1e-6)


def test_what_stands_behind_the_mask_cannot_change_the_verdict() -> None:
    head = random_module().head(2)
    states = torch.randn(2, 6, 12)
    mask = torch.arange(6)[None] < torch.tensor([[4], [5]])
    other = torch.where(mask[..., None], states, torch.randn(2, 6, 12) * 50)
    with torch.no_grad():
        assert torch.equal(head(states, mask).verdict_logits, head(other, mask).verdict_logits)


def test_the_slope_weighs_late_positions_more() -> None:
    attention = SafetyAttention(CONFIG)
    with torch.no_grad():
        attention.query.zero_()
        attention.slope_logit.fill_(3.0)
    states = torch.randn(1, 5, 12)
    seen = []
    for t in (0, 4):
        changed = states.clone()
        changed[0, t] += 1.0
        mask = torch.ones(1, 5, dtype=torch.bool)
        with torch.no_grad():
            seen.append(float((attention(changed, mask) - attention(states, mask)).abs()))
    assert seen[1] > 10 * seen[0]


def test_gate_losses_equal_the_plain_derivation() -> None:
    torch.manual_seed(1)
    z, f, a = torch.randn(4, 2), torch.randn(4, 2), torch.randn(4)
    unsafe = torch.tensor([True, False, False, True])
    readouts = {"gate.7": Readout(z, z, a), "final": Readout(f, f, None)}
    got = gate_losses(readouts, unsafe, LossWeights(unsafe=3.0))
    w = np.where(unsafe.numpy(), 3.0, 1.0)

    def plain_token(logits: Array) -> float:
        p = np.exp(logits) / np.exp(logits).sum(-1, keepdims=True)
        return float(-(w * np.log(np.where(unsafe.numpy(), p[:, 0], p[:, 1]))).mean())

    v = 1 / (1 + np.exp(-a.double().numpy()))
    attention = float(-(w * np.log(np.where(unsafe.numpy(), v, 1 - v))).mean())
    assert set(got) == {"token.7", "attention.7", "final"}
    assert float(got["token.7"]) == pytest.approx(plain_token(z.double().numpy()), abs=1e-5)
    assert float(got["final"]) == pytest.approx(plain_token(f.double().numpy()), abs=1e-5)
    assert float(got["attention.7"]) == pytest.approx(attention, abs=1e-5)


def test_the_verdict_loss_is_that_of_the_combined_logits() -> None:
    torch.manual_seed(5)
    z, a = torch.randn(3, 2), torch.randn(3)
    unsafe = torch.tensor([True, False, True])
    logits = combine(z, a)
    got = gate_losses({"gate.4": Readout(logits, z, a)}, unsafe, LossWeights(verdict=1.0))
    p = torch.sigmoid(z[:, 0] - z[:, 1] + a).double().numpy()  # log-odds of v are a
    expected = -np.log(np.where(unsafe.numpy(), p, 1 - p)).mean()
    assert float(got["verdict.4"]) == pytest.approx(expected, abs=1e-5)


def plain_log_softmax(logits: Array) -> Array:
    shifted: Array = logits - logits.max()
    return shifted - math.log(np.exp(shifted).sum())


def test_answer_loss_weighs_refusals_by_beta() -> None:
    torch.manual_seed(2)
    logits, targets = torch.randn(3, 4, 9), torch.randint(0, 9, (3, 4))
    sizes, unsafe = [4, 2, 0], torch.tensor([False, True, False])
    mask = torch.arange(4)[None] < torch.tensor(sizes)[:, None]
    total = 0.0
    for row, size in enumerate(sizes):
        nll = [
            -plain_log_softmax(logits[row, t].double().numpy())[targets[row, t]]
            for t in range(size)
        ]
        total += (0.2 if unsafe[row] else 0.8) * (sum(nll) / size if size else 0.0)
    got = answer_loss(logits, targets, mask, unsafe, beta=0.2)
    assert float(got) == pytest.approx(total / 3, abs=1e-5)


def test_retain_loss_is_the_divergence_from_the_base_on_benign_rows() -> None:
    torch.manual_seed(3)
    logits, base = torch.randn(2, 3, 6), torch.randn(2, 3, 6)
    mask = torch.tensor([[True, True, False], [True, True, True]])
    kept = torch.tensor([True, False])
    total = 0.0
    for t in range(2):
        p, q = (plain_log_softmax(x[0, t].double().numpy()) for x in (base, logits))
        total += float((np.exp(p) * (p - q)).sum())
    got = retain_loss(logits, base, mask, kept)
    assert float(got) == pytest.approx(total / 2 / 2, abs=1e-5)


def test_losses_of_equal_halves_average_to_the_loss_of_the_batch() -> None:
    torch.manual_seed(4)
    logits, targets = torch.randn(4, 5, 7), torch.randint(0, 7, (4, 5))
    mask = torch.arange(5)[None] < torch.tensor([[5], [1], [3], [2]])
    unsafe = torch.tensor([True, False, False, False])
    whole = answer_loss(logits, targets, mask, unsafe, 0.3)
    halves = [
        answer_loss(logits[s], targets[s], mask[s], unsafe[s], 0.3)
        for s in (slice(0, 2), slice(2, 4))
    ]
    assert float(whole) == pytest.approx(float(sum(halves)) / 2, abs=1e-6)


def test_the_sum_is_weighted_by_the_kind_of_loss() -> None:
    parts = {
        "attention.3": torch.tensor(1.0),
        "token.3": torch.tensor(10.0),
        "retain": torch.tensor(100.0),
    }
    got = weighted_sum(parts, LossWeights(attention=2.0, token=0.5, retain=0.0))
    assert float(got) == 7.0
