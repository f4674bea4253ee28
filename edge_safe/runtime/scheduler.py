"""Several conversations on one device: a token each in turn, within bounded memory.

Keys and values are what a conversation costs. A turn is begun when there is room for all that it
may need; conversations that are not answering give theirs up when others need it, the one that has
been idle for longest first, and compute it anew at their next turn.
"""

from __future__ import annotations

import math
import threading
import time
import weakref
from collections import deque
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import TYPE_CHECKING

from edge_safe.errors import PromptError, UsageError
from edge_safe.runtime.chat import Chat
from edge_safe.runtime.media import AudioInput, ImageInput
from edge_safe.runtime.reply import Reply
from edge_safe.runtime.request import Event, Requests, last_reply
from edge_safe.runtime.sampler import Sampling, SamplingSettings

if TYPE_CHECKING:
    from typing_extensions import Unpack

MEGABYTE = 2**20


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
        self._waiting: deque[object] = deque()
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

        The time that is waited counts. Without room by ``timeout``, or by the time ``cancel`` is
        set, the decision is ``error``. What it reserved is free for others as soon as the answer
        ends, is cancelled, or nobody asks for more of it.

        Raises:
            UsageError: The conversation is already answering.
            PromptError: The turn needs more memory than all conversations may take.
        """
        settings = Sampling(**sampling)
        pictured = bool(len(images)) or audio is not None
        needed = chat.bytes_needed(text, settings.max_tokens, pictured=pictured)
        if needed > self._budget:
            raise PromptError(
                f"This turn may need {needed / MEGABYTE:.1f} MB of keys and values; all "
                f"conversations together may take {self._budget / MEGABYTE:.1f} MB. Lower "
                "max_tokens, shorten the conversation, or give the scheduler more memory."
            )
        return self._stream(chat, text, images, audio, timeout, cancel, needed, sampling)

    def _stream(
        self,
        chat: Chat,
        text: str,
        images: Sequence[ImageInput],
        audio: AudioInput | None,
        timeout: float | None,
        cancel: threading.Event | None,
        needed: int,
        sampling: SamplingSettings,
    ) -> Iterator[Event]:
        """The generator behind ``stream``."""
        end = math.inf if timeout is None else time.monotonic() + timeout
        admitted = self._wait(chat, needed, end, cancel)
        events: Iterator[Event] | None = None
        try:
            while True:
                with self._turns.take():
                    if events is None:
                        left = None if timeout is None else max(0.0, end - time.monotonic())
                        stopped = cancel is not None and cancel.is_set()
                        events = chat.stream(
                            text,
                            images=images,
                            audio=audio,
                            # Without room there is no time for a verdict, which fails closed.
                            timeout=left if admitted and not stopped else 0.0,
                            cancel=cancel,
                            **sampling,
                        )
                    event = next(events, None)
                if event is None:
                    return
                yield event
        finally:
            try:
                if events is not None:
                    events.close()  # type: ignore[attr-defined]  # it is a generator
            finally:
                if admitted:
                    self._leave(chat)

    def _wait(self, chat: Chat, needed: int, end: float, cancel: threading.Event | None) -> bool:
        """Reserves memory, first come, first served; False if it did not come in time."""
        ticket = object()
        with self._room:
            if chat in self._reserved:
                raise UsageError("This conversation is already answering; begin another one.")
            self._waiting.append(ticket)
            try:
                while True:
                    if cancel is not None and cancel.is_set():
                        return False
                    if self._waiting[0] is ticket and self._make_room(chat, needed):
                        self._reserved[chat] = needed
                        return True
                    left = end - time.monotonic()
                    if left <= 0:
                        return False
                    # Nobody tells of a cancel that is set.
                    self._room.wait(min(left, 0.05))
            finally:
                self._waiting.remove(ticket)
                self._room.notify_all()

    def _make_room(self, chat: Chat, needed: int) -> bool:
        """Whether a turn fits, after idle conversations gave up what it lacks."""
        if chat in self._reserved or needed + sum(self._reserved.values()) > self._budget:
            return False
        others = [one for one in self._idle if one is not chat and one not in self._reserved]
        for other in sorted(others, key=lambda one: self._idle[one]):
            if self._held(without=chat) + needed <= self._budget:
                break
            other.release()
        return self._held(without=chat) + needed <= self._budget

    def _held(self, without: Chat | None = None) -> int:
        """Bytes of all conversations but one: reserved by those under way, held by the others."""
        held = sum(size for chat, size in self._reserved.items() if chat is not without)
        return held + sum(
            chat.memory for chat in self._idle if chat is not without and chat not in self._reserved
        )

    def _leave(self, chat: Chat) -> None:
        """Gives back what a turn reserved."""
        with self._room:
            del self._reserved[chat]
            self._idle[chat] = time.monotonic()
            self._room.notify_all()


class _Turns:
    """Lets threads compute one after the other, in the order in which they asked."""

    def __init__(self) -> None:
        self._changed = threading.Condition()
        self._queue: deque[object] = deque()

    @contextmanager
    def take(self) -> Iterator[None]:
        """Waits for its turn; the next one's begins when the block ends."""
        ticket = object()
        try:
            with self._changed:
                self._queue.append(ticket)
                self._changed.wait_for(lambda: self._queue[0] is ticket)
            yield
        finally:
            # Whoever is interrupted while waiting must not stand in the way of the others.
            with self._changed:
                if ticket in self._queue:
                    self._queue.remove(ticket)
                self._changed.notify_all()
