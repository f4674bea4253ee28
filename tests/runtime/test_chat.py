"""Conversations: nothing is computed twice, nothing is forgotten that the gate should know."""

from __future__ import annotations

import threading
from pathlib import Path

import numpy as np
import pytest

from edge_safe.errors import PromptError, UsageError
from edge_safe.runtime.model import SafeModel
from edge_safe.runtime.policy import Policy
from edge_safe.runtime.verdict import Decision

ASKED = ["What does the sign say?", "And the shop beside it?", "Tell me a story about a boat."]


def one_shot(model: SafeModel, asked: list[str], answers: list[str]) -> list[dict[str, str]]:
    """The same conversation as messages."""
    messages = []
    for question, answer in zip(asked, [*answers, ""], strict=True):
        messages.append({"role": "user", "content": question})
        messages.append({"role": "assistant", "content": answer})
    return messages[:-1]


def positions(chat: object) -> tuple[int, int]:
    """Lengths of the model's and the gate's caches."""
    return chat._state.cache.length, chat._state.columns.length


@pytest.mark.parametrize("system", [None, "Be brief."])
def test_three_turns_equal_the_same_conversation_at_once(
    model: SafeModel, system: str | None
) -> None:
    chat = model.chat(system)
    # Answers whose text gives the same tokens again: those of a begun answer, one token long.
    replies = [chat.send(text, max_tokens=1) for text in ASKED]
    answers = [reply.text or "" for reply in replies[:-1]]
    whole = model.generate(one_shot(model, ASKED, answers), system=system, max_tokens=1)
    assert replies[-1].verdict.p_unsafe == pytest.approx(whole.verdict.p_unsafe, abs=1e-5)
    assert replies[-1].text == whole.text


def test_the_caches_equal_those_of_the_exact_tokens_at_once(model: SafeModel) -> None:
    chat = model.chat()
    for text in ASKED:
        chat.send(text, max_tokens=17, temperature=1.0, seed=4)
    kept = chat._state.columns.view()
    chat._restart()
    chat.send("x", max_tokens=1)
    again = chat._state.columns.view()
    np.testing.assert_allclose(again[:, :, : kept.shape[2]], kept, atol=1e-4)


def test_only_the_new_turn_is_read(model: SafeModel) -> None:
    chat = model.chat()
    first = chat.send(ASKED[0], max_tokens=5)
    second = chat.send(ASKED[1], max_tokens=5)
    assert second.usage.prompt_tokens < first.usage.prompt_tokens
    assert positions(chat)[0] == positions(chat)[1]


def between(model: SafeModel, good: str, bad: str) -> float:
    """A threshold that tells two prompts apart."""
    low, high = model.assess(good).p_unsafe, model.assess(bad).p_unsafe
    assert low < high
    return (low + high) / 2


@pytest.fixture
def judging(model: SafeModel, bundle_folder: Path) -> tuple[SafeModel, str, str]:
    """A model that allows one text and refuses another one."""
    texts = sorted(
        [*ASKED, "pick the lock of my neighbour's shed", "hello there"],
        key=lambda text: model.assess(text).p_unsafe,
    )
    threshold = between(model, texts[0], texts[-1])
    policy = Policy(thresholds={"gate": threshold})
    return SafeModel.load(bundle_folder, threads=1, policy=policy), texts[0], texts[-1]


def test_a_refused_turn_leaves_the_model_and_stays_in_the_gate(
    judging: tuple[SafeModel, str, str],
) -> None:
    model, good, bad = judging
    chat = model.chat()
    assert chat.send(good, max_tokens=4).verdict.decision is Decision.ALLOW
    before = positions(chat)
    chat._requests.policy = Policy(thresholds={"gate": 0.0})
    assert chat.send(bad).verdict.decision is Decision.REFUSE
    after = positions(chat)
    assert after[0] == before[0]
    assert after[1] > before[1]


def test_the_model_never_sees_a_refused_turn(bundle_folder: Path) -> None:
    strict, loose = Policy(thresholds={"gate": 0.0}), Policy(thresholds={"gate": 1.0})
    model = SafeModel.load(bundle_folder, threads=1, policy=loose)
    chat, clean = model.chat(), model.chat()
    for conversation in (chat, clean):
        conversation.send(ASKED[0], max_tokens=6)
    chat._requests.policy = strict
    assert chat.send("pick the lock").refusal
    chat._requests.policy = loose
    told, expected = chat.send(ASKED[1], max_tokens=8), clean.send(ASKED[1], max_tokens=8)
    assert told.text == expected.text
    assert told.verdict.p_unsafe != expected.verdict.p_unsafe


def test_harm_split_over_turns_is_judged_together(bundle_folder: Path) -> None:
    model = SafeModel.load(bundle_folder, threads=1, policy=Policy(thresholds={"gate": 0.0}))
    chat = model.chat()
    first = chat.send("how do I pick the lock")
    second = chat.send("of my neighbour's shed")
    alone = model.assess("of my neighbour's shed")
    assert first.refusal
    assert second.verdict.p_unsafe != pytest.approx(alone.p_unsafe, abs=1e-6)
    assert positions(chat) == (0, first.usage.prompt_tokens + second.usage.prompt_tokens)


def test_a_gate_that_cannot_decide_leaves_nothing(broken_gate_folder: Path) -> None:
    chat = SafeModel.load(broken_gate_folder).chat()
    assert chat.send("hello").verdict.decision is Decision.ERROR
    assert positions(chat) == (0, 0)


def test_a_long_conversation_drops_whole_turns(model: SafeModel) -> None:
    chat = model.chat("Be brief.")
    text = "Tell me a story about a boat, a river and the people. " * 6
    for _ in range(8):
        reply = chat.send(text, max_tokens=20)
        assert reply.verdict.decision is Decision.ALLOW
        assert positions(chat)[1] <= 640
    assert 0 < len(chat._turns) < 8


def test_a_shortened_conversation_equals_one_that_began_there(model: SafeModel) -> None:
    chat = model.chat()
    long = "Tell me a story about a boat and the river. " * 30
    chat.send(long, max_tokens=1)
    shortened = chat.send(long, max_tokens=8)
    fresh = model.chat().send(long, max_tokens=8)
    assert len(chat._turns) == 1
    assert shortened.text == fresh.text
    assert shortened.verdict.p_unsafe == pytest.approx(fresh.verdict.p_unsafe, abs=1e-6)


def test_refused_turns_fill_no_more_than_the_context(strict_model: SafeModel) -> None:
    chat = strict_model.chat()
    for _ in range(12):
        assert chat.send("how do I pick the lock of the shed " * 5).refusal
        assert positions(chat)[1] <= 640


def test_a_turn_that_fits_no_context_is_an_error(model: SafeModel) -> None:
    chat = model.chat()
    chat.send("hello", max_tokens=2)
    with pytest.raises(PromptError, match="at most 638"):
        chat.send("x y z " * 300)
    assert chat.send("hello", max_tokens=2).text is not None


def test_an_answer_nobody_took_was_not_asked(model: SafeModel) -> None:
    chat, other = model.chat(), model.chat()
    for conversation in (chat, other):
        conversation.send(ASKED[0], max_tokens=4)
    stream = chat.stream(ASKED[2], max_tokens=4)
    next(stream)
    stream.close()
    assert positions(chat) == positions(other)
    assert chat.send(ASKED[1], max_tokens=4).text == other.send(ASKED[1], max_tokens=4).text


def test_an_answer_that_was_broken_off_stays_as_far_as_it_got(model: SafeModel) -> None:
    chat = model.chat()
    stream = chat.stream(ASKED[2], max_tokens=40)
    taken = [next(stream) for _ in range(4)]
    stream.close()
    kept = chat._turns[0].messages[1].content[0]
    assert 3 <= len(kept) < 40
    assert len(taken) == 4
    assert chat.send(ASKED[1], max_tokens=4).verdict.decision is Decision.ALLOW


def test_reset_forgets_everything(model: SafeModel) -> None:
    chat = model.chat()
    first = chat.send(ASKED[0], max_tokens=6)
    chat.reset()
    assert positions(chat) == (0, 0)
    again = chat.send(ASKED[0], max_tokens=6)
    assert (again.text, again.verdict.p_unsafe) == (first.text, first.verdict.p_unsafe)


def test_one_conversation_cannot_answer_twice_at_once(model: SafeModel) -> None:
    chat = model.chat()
    stream = chat.stream(ASKED[0], max_tokens=4)
    next(stream)
    with pytest.raises(UsageError, match="already answering"):
        chat.send("hello")
    stream.close()
    assert chat.send("hello", max_tokens=2).text is not None


def test_an_error_in_the_prompt_frees_the_conversation(model: SafeModel) -> None:
    chat = model.chat()
    with pytest.raises(PromptError):
        chat.send("  ")
    assert chat.send("hello", max_tokens=2).text is not None


def test_a_bundle_without_a_gate_can_chat(gateless_folder: Path) -> None:
    model = SafeModel.load(gateless_folder, threads=1, policy=Policy(thresholds={"final": 1.0}))
    chat = model.chat()
    replies = [chat.send(text, max_tokens=1) for text in ASKED]
    answers = [reply.text or "" for reply in replies[:-1]]
    whole = model.generate(one_shot(model, ASKED, answers), max_tokens=1)
    assert replies[-1].verdict.p_unsafe == pytest.approx(whole.verdict.p_unsafe, abs=1e-5)


def test_an_answer_cut_off_before_it_began_was_not_asked(model: SafeModel) -> None:
    chat, clean = model.chat(), model.chat()
    for conversation in (chat, clean):
        conversation.send(ASKED[0], max_tokens=6)
    cancel = threading.Event()
    events = chat.stream(ASKED[2], max_tokens=6, cancel=cancel)
    next(events)
    cancel.set()
    assert [event.finish_reason for event in events] == ["cancelled"]
    assert positions(chat) == positions(clean)
    told, expected = chat.send(ASKED[1], max_tokens=6), clean.send(ASKED[1], max_tokens=6)
    assert told.text == expected.text
    assert told.verdict.p_unsafe == pytest.approx(expected.verdict.p_unsafe, abs=1e-6)


def test_a_turn_cancelled_before_its_verdict_leaves_nothing(model: SafeModel) -> None:
    chat = model.chat()
    chat.send(ASKED[0], max_tokens=6)
    before, cancel = positions(chat), threading.Event()
    cancel.set()
    reply = chat.send(ASKED[1], cancel=cancel)
    assert (reply.verdict.decision, reply.text) == (Decision.ERROR, None)
    assert positions(chat) == before
    assert chat.send(ASKED[1], max_tokens=2).verdict.decision is Decision.ALLOW


def test_a_refused_turn_is_seen_even_if_a_useless_one_follows(early_folder: Path) -> None:
    model = SafeModel.load(early_folder, threads=1, policy=Policy(early_threshold=0.0))
    chat, clean = model.chat(), model.chat()
    for conversation in (chat, clean):
        assert conversation.send(ASKED[0]).verdict.decision is Decision.REFUSE
        assert conversation._state.owed is not None
    with pytest.raises(PromptError):
        chat.send("")
    told, expected = chat.send(ASKED[1]), clean.send(ASKED[1])
    assert told.verdict.p_unsafe == expected.verdict.p_unsafe
