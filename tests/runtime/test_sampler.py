"""Choosing tokens: properties for all logits, golden values from transformers."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra import numpy as arrays

from edge_safe.errors import GateError, UsageError
from edge_safe.runtime.sampler import Sampler, Sampling

NONE = np.zeros(0, np.int64)
LOGITS = arrays.arrays(np.float32, 12, elements=st.floats(-30, 30, width=32))
SETTINGS = st.builds(
    Sampling,
    temperature=st.sampled_from([0.0, 0.1, 1.0, 5.0]),
    top_k=st.integers(0, 12),
    top_p=st.floats(0.05, 1.0),
    repetition_penalty=st.floats(0.5, 2.0),
    seed=st.integers(0, 100),
)


def sampler(sampling: Sampling, masked: tuple[int, ...] = ()) -> Sampler:
    return Sampler(sampling, masked, NONE, 12)


@settings(deadline=None)
@given(LOGITS, SETTINGS, st.sets(st.integers(0, 11), max_size=11))
def test_masked_tokens_are_never_chosen(
    logits: np.ndarray, sampling: Sampling, masked: set[int]
) -> None:
    chooser = sampler(sampling, tuple(masked))
    assert {chooser.choose(logits) for _ in range(4)}.isdisjoint(masked)


@settings(deadline=None)
@given(LOGITS, SETTINGS)
def test_the_same_seed_gives_the_same_tokens(logits: np.ndarray, sampling: Sampling) -> None:
    first, second = sampler(sampling), sampler(sampling)
    assert [first.choose(logits) for _ in range(5)] == [second.choose(logits) for _ in range(5)]


@settings(deadline=None)
@given(LOGITS, st.integers(1, 12), st.integers(0, 50))
def test_top_k_keeps_to_the_likeliest(logits: np.ndarray, top_k: int, seed: int) -> None:
    chosen = sampler(Sampling(temperature=2.0, top_k=top_k, seed=seed)).choose(logits)
    assert (logits > logits[chosen]).sum() < top_k


@settings(deadline=None)
@given(LOGITS, st.floats(0.05, 0.99), st.integers(0, 50))
def test_top_p_keeps_to_the_mass(logits: np.ndarray, top_p: float, seed: int) -> None:
    chosen = sampler(Sampling(temperature=1.0, top_p=top_p, seed=seed)).choose(logits)
    chances = np.exp(logits.astype(np.float64) - logits.max())
    chances /= chances.sum()
    assert chances[logits > logits[chosen]].sum() < top_p + 1e-9


@settings(deadline=None)
@given(LOGITS)
def test_greedy_takes_the_likeliest(logits: np.ndarray) -> None:
    assert sampler(Sampling()).choose(logits) == int(logits.argmax())


@settings(deadline=None)
@given(LOGITS)
def test_logits_are_left_as_they_are(logits: np.ndarray) -> None:
    before = logits.copy()
    sampler(Sampling(repetition_penalty=1.5, temperature=1.0, seed=0), (1,)).choose(logits)
    np.testing.assert_array_equal(logits, before)


def test_sampling_follows_the_distribution() -> None:
    logits = np.log(np.array([0.5, 0.3, 0.2] + [1e-9] * 9, np.float32))
    chooser = sampler(Sampling(temperature=1.0, seed=1))
    counts = np.bincount([chooser.choose(logits) for _ in range(4000)], minlength=12) / 4000
    np.testing.assert_allclose(counts[:3], [0.5, 0.3, 0.2], atol=0.03)


def test_a_penalty_reaches_tokens_of_prompt_and_answer() -> None:
    logits = np.array([1.0, 0.9, 0.8] + [-5.0] * 9, np.float32)
    chooser = Sampler(Sampling(repetition_penalty=2.0), (), np.array([0]), 12)
    assert [chooser.choose(logits) for _ in range(3)] == [1, 2, 0]


def test_filters_equal_those_of_transformers() -> None:
    torch = pytest.importorskip("torch")
    process = pytest.importorskip("transformers.generation.logits_process")
    logits = np.random.default_rng(2).standard_normal(12).astype(np.float32) * 3
    seen = [1, 5, 7]
    scores = torch.tensor(logits[None])
    ids = torch.tensor([seen])
    for step in (
        process.RepetitionPenaltyLogitsProcessor(1.3),
        process.TemperatureLogitsWarper(0.7),
        process.TopKLogitsWarper(6),
        process.TopPLogitsWarper(0.8),
    ):
        scores = step(ids, scores)
    allowed = set(np.flatnonzero(np.isfinite(scores[0].numpy())).tolist())
    settings = {"temperature": 0.7, "top_k": 6, "top_p": 0.8, "repetition_penalty": 1.3}
    drawn = {
        Sampler(Sampling(seed=seed, **settings), (), np.array(seen), 12).choose(logits)
        for seed in range(300)
    }
    assert drawn <= allowed
    assert scores[0].argmax().item() in drawn


@pytest.mark.parametrize("sampling", [Sampling(), Sampling(temperature=0.7)])
@pytest.mark.parametrize("value", [np.nan, np.inf, -np.inf])
def test_logits_that_are_no_numbers_end_the_answer(value: float, sampling: Sampling) -> None:
    logits = np.zeros(12, np.float32)
    logits[3] = value
    with pytest.raises(GateError, match="not finite"):
        sampler(sampling).choose(logits)


@pytest.mark.parametrize(
    "field",
    [
        {"max_tokens": 0},
        {"temperature": -1.0},
        {"temperature": float("nan")},
        {"top_k": -1},
        {"top_p": 0.0},
        {"top_p": 1.5},
        {"repetition_penalty": 0.0},
        {"seed": -1},
        {"stop": ("",)},
    ],
)
def test_settings_out_of_range_are_named(field: dict[str, object]) -> None:
    with pytest.raises(UsageError, match=next(iter(field))):
        Sampling(**field)
