"""Several conversations at once: the answers of each alone, in turn, within bounded memory."""

from __future__ import annotations

import gc
import threading
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from edge_safe.errors import PromptError, UsageError
from edge_safe.runtime.model import SafeModel
from edge_safe.runtime.policy import Policy
from edge_safe.runtime.reply import Reply
from edge_safe.runtime.request import Event
from edge_safe.runtime.verdict import Decision
from tests.runtime.conftest import allow_all

ASKED = ["Tell me of boats.", "And of the tide?"]


def texts_alone(model: SafeModel, count: int) -> list[list[str | None]]:
    """What ``count`` conversations say when each is alone."""
    found = []
    for number in range(count):
        chat = model.chat(system=f"You are number {number}.")
        found.append([chat.send(text, max_tokens=6).text for text in ASKED])
    return found


def test_answers_are_those_of_each_conversation_alone(model: SafeModel) -> None:
    scheduler = model.scheduler(memory_mb=8)
    said: dict[int, list[str | None]] = {}

    def talk(number: int) -> None:
        chat = scheduler.chat(system=f"You are number {number}.")
        said[number] = [scheduler.send(chat, text, max_tokens=6).text for text in ASKED]

    threads = [threading.Thread(target=talk, args=(n,)) for n in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert [said[n] for n in range(4)] == texts_alone(model, 4)


def test_who_asked_first_is_first_and_nobody_twice_before_the_others(model: SafeModel) -> None:
    scheduler = model.scheduler(memory_mb=8)
    order: list[int] = []

    def talk(number: int) -> None:
        chat = scheduler.chat()
        stream = chat.stream

        def recorded(*args: Any, **options: Any) -> Iterator[Event]:
            # This runs while it is this conversation's turn.
            for event in stream(*args, **options):
                order.append(number)
                yield event

        chat.stream = recorded
        for _ in scheduler.stream(chat, ASKED[0], max_tokens=10):
            pass

    threads = [threading.Thread(target=talk, args=(n,)) for n in range(3)]
    with scheduler._turns.take():
        for asked, thread in enumerate(threads, 1):
            thread.start()
            while len(scheduler._turns._queue) <= asked:
                time.sleep(0.001)
    for thread in threads:
        thread.join()
    assert order[:3] == [0, 1, 2]


def test_idle_conversations_give_up_their_memory_and_go_on_all_the_same(model: SafeModel) -> None:
    scheduler = model.scheduler(memory_mb=1)
    chats = [scheduler.chat(system=f"You are number {n}.") for n in range(5)]
    said: list[list[str | None]] = [[] for _ in chats]
    for text in ASKED:
        for number, chat in enumerate(chats):
            said[number].append(scheduler.send(chat, text, max_tokens=6).text)
            assert scheduler.memory_mb <= 1
    assert any(chat.memory == 0 for chat in chats)
    assert said == texts_alone(model, 5)


def test_a_refused_turn_is_still_seen_after_the_memory_was_given_up(bundle_folder: Path) -> None:
    strict = SafeModel.load(bundle_folder, threads=1, policy=Policy(thresholds={"gate": 0.0}))
    chats = [strict.chat(), strict.chat()]
    for chat in chats:
        assert chat.send(ASKED[0]).verdict.decision is Decision.REFUSE
    assert chats[0].release()
    kept, released = (chat.send(ASKED[1]).verdict.p_unsafe for chat in reversed(chats))
    assert released == pytest.approx(kept, abs=1e-5)


def test_what_can_never_fit_is_refused_at_once(model: SafeModel) -> None:
    scheduler = model.scheduler(memory_mb=1)
    scheduler._budget = 400_000
    with pytest.raises(PromptError, match="MB of keys and values"):
        scheduler.send(scheduler.chat(), "boat " * 60, max_tokens=500)
    with pytest.raises(PromptError, match="MB of keys and values"):
        # Nobody knows how many positions a picture takes.
        scheduler.send(scheduler.chat(), ASKED[0], images=["a.png"])
    with pytest.raises(UsageError, match="at least 1"):
        model.scheduler(memory_mb=0)


@pytest.mark.parametrize("way", ["timeout", "cancel"])
def test_without_room_in_time_the_decision_is_error(model: SafeModel, way: str) -> None:
    scheduler = model.scheduler(memory_mb=1)
    scheduler._budget = 500_000  # room for one
    first = scheduler.stream(scheduler.chat(), ASKED[0], max_tokens=20)
    assert next(first).decision is Decision.ALLOW
    cancel = threading.Event()
    if way == "cancel":
        cancel.set()
    timeout = 0.1 if way == "timeout" else None
    reply = scheduler.send(
        scheduler.chat(), ASKED[0], max_tokens=20, timeout=timeout, cancel=cancel
    )
    assert (reply.verdict.decision, reply.text) == (Decision.ERROR, None)
    # The one that was let in is none the worse for it.
    last = list(first)[-1]
    assert isinstance(last, Reply)
    assert last.text


def test_an_answer_nobody_follows_any_more_gives_its_room_back(model: SafeModel) -> None:
    scheduler = model.scheduler(memory_mb=1)
    scheduler._budget = 500_000
    events = scheduler.stream(scheduler.chat(), ASKED[0], max_tokens=20)
    next(events)
    held = scheduler.memory_mb
    events.close()
    del events
    gc.collect()
    assert scheduler.memory_mb < held
    reply = scheduler.send(scheduler.chat(), ASKED[0], max_tokens=2, timeout=20.0)
    assert reply.verdict.decision is Decision.ALLOW


def test_a_cancelled_answer_ends_and_gives_its_room_back(model: SafeModel) -> None:
    scheduler = model.scheduler(memory_mb=8)
    chat, cancel = scheduler.chat(), threading.Event()
    events = scheduler.stream(chat, ASKED[0], max_tokens=200, cancel=cancel)
    next(events)
    cancel.set()
    last = list(events)[-1]
    assert isinstance(last, Reply)
    assert last.finish_reason == "cancelled"
    assert scheduler.memory_mb <= chat.memory / 2**20 + 1e-6


def test_the_policy_of_a_bundle_holds(bundle_folder: Path) -> None:
    model = SafeModel.load(bundle_folder, threads=1, policy=allow_all(refusals={"en": "No."}))
    scheduler = model.scheduler()
    strict = model.with_policy(Policy(thresholds={"gate": 0.0}, refusals={"en": "No."}))
    assert strict.scheduler().send(strict.chat(), ASKED[0]).refusal == "No."
    assert scheduler.send(scheduler.chat(), ASKED[0], max_tokens=2).refusal is None


def test_a_conversation_that_is_answering_takes_no_second_turn(model: SafeModel) -> None:
    scheduler = model.scheduler(memory_mb=8)
    chat = scheduler.chat()
    first = scheduler.stream(chat, ASKED[0], max_tokens=5)
    next(first)
    with pytest.raises(UsageError, match="already answering"):
        scheduler.send(chat, ASKED[1], max_tokens=5)
    assert isinstance(list(first)[-1], Reply)


def test_who_is_interrupted_while_waiting_stands_in_nobody_s_way(
    model: SafeModel, monkeypatch: pytest.MonkeyPatch
) -> None:
    scheduler = model.scheduler(memory_mb=8)

    def interrupted(*_: object) -> None:
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(scheduler._turns._changed, "wait_for", interrupted)
        with pytest.raises(KeyboardInterrupt):
            scheduler.send(scheduler.chat(), ASKED[0], max_tokens=2)
    reply = scheduler.send(scheduler.chat(), ASKED[0], max_tokens=2)
    assert reply.verdict.decision is Decision.ALLOW


def test_time_that_is_waited_for_a_turn_counts(model: SafeModel) -> None:
    scheduler = model.scheduler(memory_mb=8)
    found: list[Reply] = []

    def talk() -> None:
        found.append(scheduler.send(scheduler.chat(), ASKED[0], max_tokens=2, timeout=0.05))

    with scheduler._turns.take():
        thread = threading.Thread(target=talk)
        thread.start()
        time.sleep(0.2)
    thread.join()
    assert found[0].verdict.decision is Decision.ERROR
