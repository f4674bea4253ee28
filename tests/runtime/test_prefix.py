"""Beginnings that prompts share are computed once, and nothing is decided by what is kept."""

from __future__ import annotations

from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from edge_safe.errors import UsageError
from edge_safe.runtime.model import SafeModel
from edge_safe.runtime.policy import Policy
from edge_safe.runtime.prefix import LEAST, Prefix, PrefixCache, common_length
from edge_safe.runtime.verdict import Decision
from tests.runtime.conftest import allow_all

SYSTEM = "You are the voice of a small ferry and know the timetable by heart."
QUESTIONS = (
    "When does the last one leave?",
    "Is there a bar on board?",
    "Where do I leave my bicycle?",
    "How long does it take?",
)
REFUSING = Policy(thresholds={"gate": 0.0})


@pytest.fixture(params=["gate", "final"])
def policy(request: pytest.FixtureRequest) -> Policy:
    """Allows everything, by one stage or by two."""
    return allow_all(stages=("gate", "final") if request.param == "final" else ("gate",))


def opened(folder: Path, megabytes: float, policy: Policy | None = None) -> SafeModel:
    return SafeModel.load(
        folder, threads=1, policy=policy or allow_all(), prefix_cache_mb=megabytes
    )


def kept(model: SafeModel) -> list[Prefix]:
    return model.engine._prefixes._kept


def test_answers_are_those_of_a_model_that_keeps_nothing(
    bundle_folder: Path, policy: Policy
) -> None:
    plain, keeping = opened(bundle_folder, 0, policy), opened(bundle_folder, 8, policy)
    for question in QUESTIONS:
        expected = plain.generate(question, system=SYSTEM, max_tokens=12)
        found = keeping.generate(question, system=SYSTEM, max_tokens=12)
        assert found.text == expected.text
        assert abs(found.verdict.p_unsafe - expected.verdict.p_unsafe) < 1e-5
    assert not kept(plain)
    assert [len(prefix.ids) for prefix in kept(keeping)] >= [LEAST]


def test_from_the_third_request_on_the_beginning_is_not_computed_again(bundle_folder: Path) -> None:
    model = opened(bundle_folder, 8)
    for question in QUESTIONS[:2]:
        assert model.generate(question, system=SYSTEM, max_tokens=2).text is not None
    for prefix in kept(model):
        for array in (*prefix.caches, prefix.columns):
            array[:] = np.nan
    # Read, it spoils the verdict, and a spoilt verdict answers nothing.
    assert model.assess(QUESTIONS[2], system=SYSTEM).decision is Decision.ERROR


def test_the_decoder_catches_up_on_a_beginning_that_only_the_gate_has_read(
    bundle_folder: Path, policy: Policy
) -> None:
    plain, keeping = opened(bundle_folder, 0, policy), opened(bundle_folder, 8, policy)
    refusing = keeping.with_policy(REFUSING)
    for question in QUESTIONS[:3]:
        assert refusing.assess(question, system=SYSTEM).decision is Decision.REFUSE
    assert [prefix.states is None for prefix in kept(keeping)] == [False]
    for _ in range(2):
        found = keeping.generate(QUESTIONS[3], system=SYSTEM, max_tokens=12)
        assert found.text == plain.generate(QUESTIONS[3], system=SYSTEM, max_tokens=12).text
    assert True in [prefix.states is None for prefix in kept(keeping)]


def test_a_model_without_a_gate_keeps_beginnings_too(gateless_folder: Path) -> None:
    policy = Policy(thresholds={"final": 1.0})
    plain, keeping = (opened(gateless_folder, size, policy) for size in (0, 8))
    for question in QUESTIONS:
        found = keeping.generate(question, system=SYSTEM, max_tokens=12)
        assert found.text == plain.generate(question, system=SYSTEM, max_tokens=12).text
    assert kept(keeping)


def test_another_policy_judges_anew(bundle_folder: Path) -> None:
    model = opened(bundle_folder, 8)
    for _ in range(3):
        assert model.assess(QUESTIONS[0], system=SYSTEM).decision is Decision.ALLOW
    refusing = model.with_policy(REFUSING)
    assert refusing.assess(QUESTIONS[0], system=SYSTEM).decision is Decision.REFUSE


def test_a_begun_answer_is_judged_the_same(bundle_folder: Path) -> None:
    plain, keeping = opened(bundle_folder, 0), opened(bundle_folder, 8)
    for question in QUESTIONS:
        begun = [
            {"role": "user", "content": question},
            {"role": "assistant", "content": "It is"},
        ]
        expected, found = (model.generate(begun, max_tokens=8) for model in (plain, keeping))
        assert found.text == expected.text
        assert abs(found.verdict.p_unsafe - expected.verdict.p_unsafe) < 1e-5


def test_a_conversation_begins_with_what_others_have_left(bundle_folder: Path) -> None:
    plain, keeping = opened(bundle_folder, 0), opened(bundle_folder, 8)
    for question in QUESTIONS:
        chats = [model.chat(SYSTEM) for model in (plain, keeping)]
        for text in (question, "And tomorrow?"):
            expected, found = (chat.send(text, max_tokens=8) for chat in chats)
            assert found.text == expected.text
            assert abs(found.verdict.p_unsafe - expected.verdict.p_unsafe) < 1e-5


def test_threads_share_it(bundle_folder: Path) -> None:
    expected = [opened(bundle_folder, 0).assess(q, system=SYSTEM).p_unsafe for q in QUESTIONS]
    model = opened(bundle_folder, 8)
    with ThreadPoolExecutor(4) as pool:
        found = list(pool.map(lambda q: model.assess(q, system=SYSTEM).p_unsafe, QUESTIONS * 8))
    np.testing.assert_allclose(found, expected * 8, atol=1e-5)


def prefix_of(ids: list[int]) -> Prefix:
    caches = [np.zeros((1, 1, len(ids), 4), np.float32)]
    return Prefix(np.array(ids, np.int64), caches, None, None)


@given(
    st.lists(st.lists(st.integers(0, 2), min_size=1, max_size=40), max_size=20),
    st.lists(st.integers(0, 2), max_size=40),
)
def test_it_never_holds_more_than_it_may_and_finds_the_longest(
    all_ids: list[list[int]], wanted: list[int]
) -> None:
    cache = PrefixCache(limit=1500)
    for ids in all_ids:
        cache.keep(prefix_of(ids))
        assert cache.size <= 1500
    ids = np.array(wanted, np.int64)
    found, count = cache.find(ids)
    lengths = [common_length(prefix.ids, ids) for prefix in cache._kept]
    longest = max(lengths, default=0)
    assert count == (longest if longest >= LEAST else 0)
    assert (found is None) == (count == 0)


def test_the_least_recently_used_goes_first() -> None:
    ours, theirs, third = ([first, *range(20)] for first in (50, 51, 52))
    cache = PrefixCache(limit=2 * prefix_of(ours).size)
    cache.keep(prefix_of(ours))
    cache.keep(prefix_of(theirs))
    assert cache.find(np.array(ours))[1] == 21
    cache.keep(prefix_of(third))
    assert [cache.find(np.array(ids))[1] for ids in (ours, theirs, third)] == [21, 0, 21]


@pytest.mark.parametrize("size", [-1.0, float("nan"), float("inf")])
def test_an_impossible_size_is_refused(bundle_folder: Path, size: float) -> None:
    with pytest.raises(UsageError, match="prefix_cache_mb"):
        opened(bundle_folder, size)


def test_what_gave_no_verdict_is_not_kept(broken_gate_folder: Path) -> None:
    model = opened(broken_gate_folder, 8)
    for question in QUESTIONS:
        assert model.assess(question, system=SYSTEM).decision is Decision.ERROR
    assert not kept(model)
