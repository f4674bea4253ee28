"""Several conversations on one device: a token each in turn, within bounded memory.

Keys and values are what a conversation costs. A turn is judged when there is room for all that it
may need; conversations that are not answering give theirs up when others need it, the one that has
been idle for longest first, and compute it anew at their next turn.

What computes in one go is a turn's pictures and sound, its verdict, its first token with what is
left of reading the prompt, and then every token.
"""

from __future__ import annotations

import threading
import time
import weakref
from collections import deque
from collections.abc import Callable, Iterator, Sequence
from contextlib import closing, contextmanager, nullcontext
from typing import TYPE_CHECKING

from edge_safe.errors import PromptError, UsageError
from edge_safe.runtime.chat import Chat, TurnUnderWay
from edge_safe.runtime.deadline import Deadline
from edge_safe.runtime.media import AudioInput, ImageInput
from edge_safe.runtime.reply import Reply
from edge_safe.runtime.request import Event, Requests, last_reply
from edge_safe.runtime.sampler import Sampling, SamplingSettings

if TYPE_CHECKING:
    from typing_extensions import Unpack

MEGABYTE = 2**20

# Nobody tells of a conversation that is forgotten, which gives its memory back.
_LOOK_AGAIN = 0.05


class Scheduler:
    """Shared between threads, each of which follows its own answers. See ``SafeModel.scheduler``.

    Args:
        requests: The loaded bundle.
        memory_mb: What keys and values of all its conversations may take, in MB of 2**20 bytes.
    """

    def __init__(self, requests: Requests, memory_mb: int) -> None:
        self._requests = requests
        self._budget = memory_mb * MEGABYTE
        self._room = threading.Condition()
        self._waiting: deque[Chat] = deque()  # the first one has read its turn, or reads it
        self._reserved: dict[Chat, int] = {}  # of turns under way
        self._idle: weakref.WeakKeyDictionary[Chat, float] = weakref.WeakKeyDictionary()
        self._turns = _Turns()

    @property
    def memory_mb(self) -> float:
        """What conversations hold or have reserved now."""
        with self._room:
            return self._held() / MEGABYTE

    def chat(self, system: str | None = None) -> Chat:
        """Begins a conversation that counts here; let it speak by ``send`` and ``stream`` below."""
        chat = Chat(self._requests, system)
        with self._room:
            self._idle[chat] = time.monotonic()
        return chat

    def send(
        self,
        chat: Chat,
        text: str,
        *,
        images: Sequence[ImageInput] = (),
        audio: AudioInput | None = None,
        timeout: float | None = None,
        cancel: threading.Event | None = None,
        **sampling: Unpack[SamplingSettings],
    ) -> Reply:
        """Says something and waits for the reply; see ``stream``."""
        events = self.stream(
            chat, text, images=images, audio=audio, timeout=timeout, cancel=cancel, **sampling
        )
        return last_reply(events)

    def stream(
        self,
        chat: Chat,
        text: str,
        *,
        images: Sequence[ImageInput] = (),
        audio: AudioInput | None = None,
        timeout: float | None = None,
        cancel: threading.Event | None = None,
        **sampling: Unpack[SamplingSettings],
    ) -> Iterator[Event]:
        """Like ``Chat.stream``, when there is room, and a token at a time in turn with others.

        The time that is waited counts, and so does that for pictures and sound. Without room by
        ``timeout``, or by the time ``cancel`` is set, the decision is ``error``. What it reserved
        is free for others as soon as the answer ends, is cancelled, or nobody asks for more of it.

        Raises:
            UsageError: The conversation is already answering.
            PromptError: The turn needs more memory than all conversations may take.
        """
        return self._stream(chat, text, images, audio, timeout, cancel, Sampling(**sampling))

    def _stream(
        self,
        chat: Chat,
        text: str,
        images: Sequence[ImageInput],
        audio: AudioInput | None,
        timeout: float | None,
        cancel: threading.Event | None,
        sampling: Sampling,
    ) -> Iterator[Event]:
        """The generator behind ``stream``."""
        with Deadline(timeout, cancel, self._turns.wake) as deadline:
            turn = self._begin(chat, text, images, audio, sampling.max_tokens, deadline)
            try:
                with closing(chat.steps(turn, sampling, deadline)) as steps:
                    while True:
                        with self._turns.take(deadline):
                            step = next(steps, None)
                        if step is None:
                            return
                        if step != "":
                            yield step
            finally:
                self._leave(chat)

    def _begin(
        self,
        chat: Chat,
        text: str,
        images: Sequence[ImageInput],
        audio: AudioInput | None,
        max_tokens: int,
        deadline: Deadline,
    ) -> TurnUnderWay:
        """Reads a turn and reserves its memory, first come, first served.

        Only the first in line reads, so that no more than one turn's embeddings wait for memory.
        Where the deadline comes first nothing is reserved, and it sees to it that nothing is
        judged.

        Raises:
            UsageError: The conversation is already answering.
            PromptError: The turn needs more memory than all conversations may take.
        """
        with self._room:
            if chat in self._reserved or chat in self._waiting:
                raise UsageError("This conversation is already answering; begin another one.")
            self._waiting.append(chat)
        try:
            self._wait(lambda: self._waiting[0] is chat, deadline)
            # Words alone are nothing to compute.
            pictured = bool(len(images)) or audio is not None
            with self._turns.take(deadline) if pictured else nullcontext():
                turn = chat.read(text, images, audio, deadline)
            if turn.failure is None:
                needed = chat.bytes_needed(turn.user, max_tokens)
                self._check_budget(needed)
                self._wait(lambda: self._make_room(chat, needed), deadline)
            return turn
        finally:
            with self._room:
                self._waiting.remove(chat)
                self._room.notify_all()

    def _check_budget(self, needed: int) -> None:
        """Turns away what can never fit.

        Raises:
            PromptError: It needs more than all conversations may take.
        """
        if needed > self._budget:
            raise PromptError(
                f"This turn may need {needed / MEGABYTE:.1f} MB of keys and values; all "
                f"conversations together may take {self._budget / MEGABYTE:.1f} MB. Lower "
                "max_tokens, shorten the conversation, or give the scheduler more memory."
            )

    def _wait(self, ready: Callable[[], bool], deadline: Deadline) -> None:
        """Waits until something is so, or the deadline comes."""
        with self._room:
            while deadline.over is None and not ready():
                self._room.wait(_LOOK_AGAIN)

    def _make_room(self, chat: Chat, needed: int) -> bool:
        """Reserves what a turn needs if it fits, after idle conversations gave up what it lacks."""
        if needed + sum(self._reserved.values()) > self._budget:
            return False
        others = [one for one in self._idle if one is not chat and one not in self._reserved]
        for other in sorted(others, key=lambda one: self._idle[one]):
            if self._held(without=chat) + needed <= self._budget:
                break
            other.release()
        fits = self._held(without=chat) + needed <= self._budget
        if fits:
            self._reserved[chat] = needed
        return fits

    def _held(self, without: Chat | None = None) -> int:
        """Bytes of all conversations but one: reserved by those under way, held by the others."""
        held = sum(size for chat, size in self._reserved.items() if chat is not without)
        return held + sum(
            chat.memory for chat in self._idle if chat is not without and chat not in self._reserved
        )

    def _leave(self, chat: Chat) -> None:
        """Gives back what a turn reserved, if it did."""
        with self._room:
            if self._reserved.pop(chat, None) is None:
                return
            self._idle[chat] = time.monotonic()
            self._room.notify_all()


class _Turns:
    """Lets threads compute one after the other, in the order in which they asked."""

    def __init__(self) -> None:
        self._changed = threading.Condition()
        self._queue: deque[object] = deque()

    @contextmanager
    def take(self, deadline: Deadline) -> Iterator[None]:
        """Waits for its turn; the next one's begins when the block ends.

        Whose deadline has come goes on at once, since nothing is computed for it any more.
        """
        ticket = object()
        try:
            with self._changed:
                self._queue.append(ticket)
                self._changed.wait_for(
                    lambda: self._queue[0] is ticket or deadline.over is not None
                )
            yield
        finally:
            # Whoever is interrupted while waiting must not stand in the way of the others.
            with self._changed:
                if ticket in self._queue:
                    self._queue.remove(ticket)
                self._changed.notify_all()

    def wake(self) -> None:
        """Lets those who wait look at their deadlines."""
        with self._changed:
            self._changed.notify_all()
