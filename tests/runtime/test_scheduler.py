"""Several conversations at once: the answers of each alone, in turn, within bounded memory."""

from __future__ import annotations

import gc
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from edge_safe.errors import PromptError, UsageError
from edge_safe.runtime.deadline import Deadline
from edge_safe.runtime.families.base import Media
from edge_safe.runtime.model import SafeModel
from edge_safe.runtime.policy import Policy
from edge_safe.runtime.reply import Reply
from edge_safe.runtime.request import Event
from edge_safe.runtime.verdict import Decision
from tests.runtime.conftest import allow_all

PICTURE = np.zeros((8, 8, 3), np.uint8)
ASKED = ["Tell me of boats.", "And of the tide?"]


class Seeing:
    """Embeddings for every picture, in place of towers."""

    def __init__(self, positions: int = 20) -> None:
        self.positions = positions
        self.seen = 0

    def media(self, images: Sequence[object], audio: object, deadline: Deadline) -> Media:
        deadline.check()
        self.seen += len(images)
        rows = np.full((self.positions, 64), 0.1, np.float32)
        return Media([rows for _ in images], self.positions * len(images))


@pytest.fixture
def seeing(model: SafeModel, monkeypatch: pytest.MonkeyPatch) -> Seeing:
    family = Seeing()
    monkeypatch.setattr(model._requests, "_family", family)
    return family


def wait_for(enough: Callable[[], bool]) -> None:
    """Waits until something is so, for seconds at most."""
    for _ in range(5000):
        if enough():
            return
        time.sleep(0.001)
    raise AssertionError("it never came")


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
    under_way = {0, 1, 2}

    def talk(number: int) -> None:
        chat = scheduler.chat()
        steps = chat.steps

        def recorded(*arguments: Any) -> Iterator[Event]:
            # This runs while it is this conversation's turn, which lasts until all others wait.
            for step in steps(*arguments):
                order.append(number)
                wait_for(lambda: len(scheduler._turns._queue) == len(under_way))
                yield step
            under_way.remove(number)

        chat.steps = recorded
        # All of its text is held back, so that no token has any to show.
        scheduler.send(chat, ASKED[0], max_tokens=4 + 3 * number, stop=("\0",))

    threads = [threading.Thread(target=talk, args=(n,)) for n in range(3)]
    with scheduler._turns.take(Deadline(None)):
        for asked, thread in enumerate(threads, 2):
            thread.start()
            wait_for(lambda count=asked: len(scheduler._turns._queue) == count)
    for thread in threads:
        thread.join()
    counts = [order.count(number) for number in range(3)]
    assert min(counts) > 3
    assert order == [n for place in range(max(counts)) for n in range(3) if place < counts[n]]


def test_a_turn_decodes_one_token_at_most(model: SafeModel) -> None:
    scheduler = model.scheduler(memory_mb=8)
    alone = scheduler.send(scheduler.chat(), ASKED[0], max_tokens=12)
    runs: list[int] = []
    take = scheduler._turns.take

    @contextmanager
    def counted(deadline: Deadline) -> Iterator[None]:
        with take(deadline):
            before = model.run_counts()["decoder"]
            yield
            runs.append(model.run_counts()["decoder"] - before)

    scheduler._turns.take = counted
    # As long as it may become this text, the answer is held back.
    held = (alone.text or "") + "x"
    reply = scheduler.send(scheduler.chat(), ASKED[0], max_tokens=12, stop=(held,))
    assert reply.text == alone.text
    assert max(runs) == 1
    assert len(runs) > reply.usage.completion_tokens


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
    with pytest.raises(UsageError, match="at least 1"):
        model.scheduler(memory_mb=0)


def test_a_picture_takes_as_much_room_as_it_has_positions(model: SafeModel, seeing: Seeing) -> None:
    scheduler = model.scheduler(memory_mb=1)
    scheduler._budget = 400_000  # a quarter of the context
    reply = scheduler.send(scheduler.chat(), ASKED[0], images=[PICTURE], max_tokens=2)
    assert reply.verdict.decision is Decision.ALLOW
    assert reply.usage.image_tokens == seeing.positions
    seeing.positions = 300
    with pytest.raises(PromptError, match="MB of keys and values"):
        scheduler.send(scheduler.chat(), ASKED[0], images=[PICTURE], max_tokens=2)


def test_one_picture_at_a_time_waits_for_room(model: SafeModel, seeing: Seeing) -> None:
    scheduler = model.scheduler(memory_mb=1)
    scheduler._budget = 400_000  # room for one
    first = scheduler.stream(scheduler.chat(), ASKED[0], max_tokens=20)
    next(first)
    said: list[Reply] = []

    def talk() -> None:
        said.append(scheduler.send(scheduler.chat(), ASKED[0], images=[PICTURE], max_tokens=2))

    threads = [threading.Thread(target=talk) for _ in range(3)]
    for thread in threads:
        thread.start()
    wait_for(lambda: len(scheduler._waiting) == 3 and seeing.seen > 0)
    time.sleep(0.1)
    assert seeing.seen == 1
    assert isinstance(list(first)[-1], Reply)
    for thread in threads:
        thread.join()
    assert seeing.seen == 3
    assert [reply.verdict.decision for reply in said] == [Decision.ALLOW] * 3


def test_a_tower_that_breaks_lets_nothing_pass(model: SafeModel, seeing: Seeing) -> None:
    def broken(images: Sequence[object], *_: object) -> Media:
        if images:
            raise RuntimeError("the tower broke")
        return Media()

    seeing.media = broken
    scheduler = model.scheduler(memory_mb=1)
    chat = scheduler.chat()
    reply = scheduler.send(chat, ASKED[0], images=[PICTURE], max_tokens=2)
    assert (reply.verdict.decision, reply.text) == (Decision.ERROR, None)
    assert reply.verdict.reason == "the tower broke"
    assert scheduler.send(chat, ASKED[0], max_tokens=2).verdict.decision is Decision.ALLOW


def test_time_for_a_picture_counts(model: SafeModel, seeing: Seeing) -> None:
    media = seeing.media

    def slow(images: Sequence[object], audio: object, deadline: Deadline) -> Media:
        time.sleep(0.3)
        return media(images, audio, deadline)

    seeing.media = slow
    scheduler = model.scheduler(memory_mb=1)
    reply = scheduler.send(scheduler.chat(), ASKED[0], images=[PICTURE], timeout=0.2)
    assert reply.verdict.reason == "the time for a verdict is over"
    assert reply.timing.verdict_ms > 200.0


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


@pytest.mark.parametrize("way", ["timeout", "cancel"])
def test_who_waits_for_a_turn_ends_in_time(model: SafeModel, way: str) -> None:
    scheduler = model.scheduler(memory_mb=8)
    cancel = threading.Event()
    timeout = 0.2 if way == "timeout" else None
    found: list[Reply] = []

    def talk() -> None:
        chat = scheduler.chat()
        found.append(scheduler.send(chat, ASKED[0], timeout=timeout, cancel=cancel))

    thread = threading.Thread(target=talk)
    with scheduler._turns.take(Deadline(None)):
        thread.start()
        wait_for(lambda: len(scheduler._turns._queue) == 2)
        if way == "cancel":
            cancel.set()
        # The turn that it waits for is not over yet.
        thread.join(timeout=20.0)
        assert not thread.is_alive()
    assert found[0].verdict.decision is Decision.ERROR
