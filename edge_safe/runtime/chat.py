"""A conversation: every turn is judged over all that was said, and nothing is computed twice.

A refused user turn leaves the model's caches, so the model never sees it, and stays in the
gate's, so that harm split over several turns is still seen.
"""

from __future__ import annotations

import threading
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field, replace
from os import PathLike
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np

from edge_safe.errors import UsageError
from edge_safe.runtime import saved_chat
from edge_safe.runtime.answer import Answer
from edge_safe.runtime.calibration import way_in
from edge_safe.runtime.deadline import Deadline
from edge_safe.runtime.engine import mendable
from edge_safe.runtime.media import AudioInput, ImageInput
from edge_safe.runtime.prompt import Message, check_not_empty, positions
from edge_safe.runtime.reply import Reply
from edge_safe.runtime.request import Event, Prompt, Requests, Steps, last_reply, shown
from edge_safe.runtime.sampler import Sampling, SamplingSettings
from edge_safe.runtime.saved_chat import Conversation, Turn
from edge_safe.runtime.state import Owed
from edge_safe.runtime.tokens import Untrusted
from edge_safe.runtime.verdict import Decision, Verdict

if TYPE_CHECKING:
    from typing_extensions import Unpack


@dataclass(slots=True)
class TurnUnderWay:
    """A turn until it ends.

    Attributes:
        user: What was said, its media encoded.
        failure: What kept it from being read, so that it cannot be judged.
        answer: What is answered.
        verdict: The verdict, once somebody has seen it.
        before: Lengths of the cache and of the columns in front of it.
        owed: What an earlier turn owed when it began.
        ended: Whether the next one may begin.
    """

    user: Message
    failure: Exception | None = None
    answer: Answer = field(default_factory=Answer)
    verdict: Verdict | None = None
    before: tuple[int, int] = (0, 0)
    owed: Owed | None = None
    ended: bool = False


class Chat:
    """One conversation. For one thread at a time."""

    def __init__(
        self, requests: Requests, system: str | None, saved: str | PathLike[str] | None = None
    ) -> None:
        """Begins a conversation, or goes on with one that ``save`` put away."""
        state = requests.engine.new_state()
        if saved is None:
            first = [] if system is None else [Message("system", [Untrusted(system)])]
            found = Conversation(first, state)
        else:
            found = saved_chat.load(Path(saved), state, requests.bundle.manifest)
        self._requests = requests
        self._system = found.system
        self._state = found.state
        self._turns = found.turns
        self._pending = found.pending
        self._busy = threading.Lock()
        self._released = False

    def send(
        self,
        text: str,
        *,
        images: Sequence[ImageInput] = (),
        audio: AudioInput | None = None,
        timeout: float | None = None,
        cancel: threading.Event | None = None,
        **sampling: Unpack[SamplingSettings],
    ) -> Reply:
        """Says something and waits for the reply; arguments and errors as ``SafeModel.generate``.

        Raises:
            UsageError: Another thread is using this conversation.
        """
        events = self.stream(
            text, images=images, audio=audio, timeout=timeout, cancel=cancel, **sampling
        )
        return last_reply(events)

    def stream(
        self,
        text: str,
        *,
        images: Sequence[ImageInput] = (),
        audio: AudioInput | None = None,
        timeout: float | None = None,
        cancel: threading.Event | None = None,
        **sampling: Unpack[SamplingSettings],
    ) -> Iterator[Event]:
        """Like ``send``, but yields the verdict, then text as it comes, then the reply."""
        return self._stream(text, images, audio, Sampling(**sampling), timeout, cancel)

    def save(self, path: str | PathLike[str]) -> None:
        """Puts the conversation into a file, for ``SafeModel.load_chat`` of the same bundle.

        It takes as many bytes as the caches of what was said: some 53 KB a token for pebble.

        Raises:
            UsageError: It is answering.
            OSError: The file cannot be written; one that was there stays.
        """
        if not self._busy.acquire(blocking=False):
            raise UsageError("This conversation is answering; save it when the answer has ended.")
        try:
            with Deadline(None) as deadline:
                self._settle(deadline)
            conversation = Conversation(self._system, self._state, self._turns, self._pending)
            saved_chat.save(Path(path), conversation, self._requests.bundle.manifest)
        finally:
            self._busy.release()

    @property
    def memory(self) -> int:
        """Bytes of keys and values that it holds."""
        kept = sum(t.columns.nbytes for t in self._turns if t.columns is not None)
        return self._state.size + kept

    def bytes_needed(self, user: Message, max_tokens: int) -> int:
        """Bytes of keys and values that it holds after another turn, at most.

        Args:
            user: What is said, its media encoded.
            max_tokens: Of the answer.
        """
        messages = [*self._system, *(m for turn in self._turns for m in turn.messages), user]
        whole = positions(self._requests.builder.build(messages))
        refused = sum(t.columns.shape[2] for t in self._turns if t.columns is not None)
        if self._state.owed is not None:
            refused += len(self._state.owed.inputs)
        most = max(whole, self._seen()) + whole + refused + 1 + max_tokens
        return self._state.size_of(min(self._requests.context_length, most))

    def release(self) -> bool:
        """Gives up keys and values; the next turn computes and judges all of it anew.

        Returns:
            Whether it did: a conversation that is answering keeps them, and so does one whose last
            turn ended early and was not yet read to its end.
        """
        if not self._busy.acquire(blocking=False):
            return False
        try:
            if self._state.owed is not None:
                return False
            self._state.free()
            self._pending = []
            self._released = True
        finally:
            self._busy.release()
        return True

    def reset(self) -> None:
        """Forgets everything but the system text."""
        self._turns = []
        self._restart()

    def read(
        self,
        text: str,
        images: Sequence[ImageInput],
        audio: AudioInput | None,
        deadline: Deadline,
    ) -> TurnUnderWay:
        """Encodes the media of a turn; ``steps`` answers it. The conversation stays as it is.

        Raises:
            PromptError: It is empty.
            MediaError: A picture or sound cannot be used.
        """
        said = Message("user", [Untrusted(text)])
        try:
            deadline.check()
            turn = TurnUnderWay(self._requests.attach_media(said, images, audio, deadline))
        except Exception as error:
            if mendable(error):
                raise
            return TurnUnderWay(said, failure=error)
        check_not_empty(turn.user)
        return turn

    def steps(self, turn: TurnUnderWay, sampling: Sampling, deadline: Deadline) -> Steps:
        """Judges and answers a turn that was read.

        Raises:
            UsageError: The conversation is answering another one.
        """
        if not self._busy.acquire(blocking=False):
            raise UsageError("This conversation is already answering; begin another one for that.")
        turn.owed = self._state.owed

        def encode(limit: Deadline) -> Prompt:
            if turn.failure is not None:
                raise turn.failure
            self._settle(limit)
            prompt = self._prompt(turn.user)
            turn.before = (self._state.cache.length, self._seen())
            return prompt

        try:
            for step in self._requests.steps(encode, self._state, sampling, turn.answer, deadline):
                if isinstance(step, Verdict):
                    turn.verdict = step
                elif isinstance(step, Reply):
                    # Before the reply goes out: a caller may never ask for what comes after it.
                    self._end(turn)
                yield step
        finally:
            self._end(turn)

    def _stream(
        self,
        text: str,
        images: Sequence[ImageInput],
        audio: AudioInput | None,
        sampling: Sampling,
        timeout: float | None,
        cancel: threading.Event | None,
    ) -> Iterator[Event]:
        """The generator behind ``stream``."""
        with Deadline(timeout, cancel) as deadline:
            turn = self.read(text, images, audio, deadline)
            yield from shown(self.steps(turn, sampling, deadline))

    def _end(self, turn: TurnUnderWay) -> None:
        """Keeps what a turn left behind, once, and lets the next one begin."""
        if turn.ended:
            return
        turn.ended = True
        try:
            self._keep(turn)
        finally:
            self._busy.release()

    def _keep(self, turn: TurnUnderWay) -> None:
        """What a turn leaves behind."""
        columns = self._state.columns
        decision = None if turn.verdict is None else turn.verdict.decision
        if turn.answer.opened:
            ids = np.array(turn.answer.ids, np.int64)
            messages = [turn.user, Message("assistant", [ids])]
            self._turns.append(Turn(messages, turn.user.modality))
            self._pending = turn.answer.ids[turn.answer.fed :]
        elif decision is Decision.REFUSE and columns is not None:
            # What ended at the early exit has no columns before it is settled.
            past = None if self._state.owed is not None else columns.since(turn.before[1])
            self._turns.append(Turn([], turn.user.modality, past))
        elif decision is Decision.ALLOW:
            # Nobody took the answer, it was cut off before it began, or the decoder broke: as if
            # it had not been asked.
            self._state.cache.truncate(turn.before[0])
            if columns is not None:
                columns.truncate(turn.before[1])
        elif decision is None and self._state.owed is not turn.owed:
            # Interrupted before anybody saw a verdict: nothing of it is owed.
            self._state.owed = None

    def _settle(self, deadline: Deadline) -> None:
        """Gives the gate what it has to see of earlier turns.

        That is the rest of the last one, where it was refused at the early exit, and the refused
        ones of a conversation that had given its memory up.
        """
        if self._released:
            self._restart()
            self._released = False
        columns = self._state.columns
        if self._state.owed is not None and columns is not None:
            seen = columns.length
            self._requests.engine.settle(self._state, deadline)
            self._turns[-1].columns = columns.since(seen)

    def _prompt(self, user: Message) -> Prompt:
        """What the caches lack of the conversation with this message at its end.

        Oldest turns are dropped as a whole until the rest fits; then all of it is computed and
        judged anew.
        """
        while True:
            messages = [*self._system, *(m for turn in self._turns for m in turn.messages), user]
            cached = self._state.cache.length > 0
            arrays = self._requests.builder.build(messages, len(messages) - 2 if cached else None)
            if cached and self._pending:
                arrays.insert(0, np.array(self._pending, np.int64))
            needed = self._seen() + positions(arrays)
            if needed + 2 <= self._requests.context_length or not self._turns:
                break
            self._turns.pop(0)
            self._restart()
        self._requests.check_room(needed)
        prompt = self._requests.prompt(arrays, messages)
        # Refused turns have no messages left, but the gate still sees them.
        past = (turn.modality for turn in self._turns)
        return replace(prompt, modality=way_in([prompt.modality, *past]))

    def _seen(self) -> int:
        """Positions the gate has seen; never fewer than the model has."""
        columns = self._state.columns
        return self._state.cache.length if columns is None else columns.length

    def _restart(self) -> None:
        """Empties the caches; only refused turns that are not dropped stay, in the gate's."""
        self._state.clear()
        self._pending = []
        if self._state.columns is not None:
            for turn in self._turns:
                if turn.columns is not None:
                    self._state.columns.append(turn.columns)
