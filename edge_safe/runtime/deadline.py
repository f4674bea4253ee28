"""A time limit for one request, and the wish to cancel it."""

from __future__ import annotations

import math
import threading
import time
from collections.abc import Callable
from types import TracebackType

from edge_safe.errors import GateError
from edge_safe.runtime.session import Abort

# How long the watching thread may outlive a request that can be cancelled.
_LOOK_AGAIN = 0.05


class Deadline:
    """Ends graph runs in progress when the time is over or somebody cancels.

    Used as a context manager; without a time limit and a wish to cancel it starts no thread.

    Attributes:
        abort: Handed to every run of the request but those of single tokens.
        started: ``time.perf_counter()`` when the request began.
    """

    def __init__(
        self,
        seconds: float | None,
        cancel: threading.Event | None = None,
        told: Callable[[], None] | None = None,
    ) -> None:
        """Starts the clock.

        Args:
            seconds: Until the end; None or infinity never ends.
            cancel: Ends it at once when set.
            told: Called once, from another thread, when it is over.
        """
        self.abort = Abort()
        self.started = time.perf_counter()
        self._end = math.inf if seconds is None else time.monotonic() + seconds
        self._cancel = cancel
        self._told = told
        self._why: str | None = None
        self._ended = threading.Event()

    def __enter__(self) -> Deadline:
        if self._end != math.inf or self._cancel is not None:
            threading.Thread(target=self._watch, daemon=True).start()
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self._ended.set()

    @property
    def left(self) -> float:
        """Seconds until the time is over, infinite without a limit."""
        return self._end - time.monotonic()

    @property
    def over(self) -> str | None:
        """Why the request ends, from then on for good; None while it may go on."""
        if self._why is None:
            if self._cancel is not None and self._cancel.is_set():
                self._why = "the request was cancelled"
            elif not self.left > 0:
                self._why = "the time for a verdict is over"
        return self._why

    def check(self) -> None:
        """Raises when the request is to end.

        Raises:
            GateError: It took longer than it may, or was cancelled.
        """
        if self.over is not None:
            raise GateError(self.over)

    def _watch(self) -> None:
        """Waits for the end, and sees to it that runs in progress notice."""
        # A wish to cancel wakes this at once. That the request has ended does not, since nobody
        # but its owner may set the caller's event; so it is looked for now and then.
        watched, longest = self._ended, threading.TIMEOUT_MAX
        if self._cancel is not None:
            watched, longest = self._cancel, _LOOK_AGAIN
        while not self._ended.is_set():
            if self.over is not None:
                self.abort.fire()
                if self._told is not None:
                    self._told()
                return
            watched.wait(min(self.left, longest))
