"""A time limit for one request, and the wish to cancel it."""

from __future__ import annotations

import threading
import time
from types import TracebackType

from edge_safe.errors import GateError
from edge_safe.runtime.session import Abort


class Deadline:
    """Ends graph runs in progress when the time is over; used as a context manager.

    Attributes:
        abort: Handed to every run before the verdict.
    """

    def __init__(self, seconds: float | None) -> None:
        """Starts the clock; None never ends."""
        self.abort = Abort()
        self._seconds = seconds
        self._end = None if seconds is None else time.monotonic() + seconds
        self._timer: threading.Timer | None = None

    def __enter__(self) -> Deadline:
        if self._end is not None:
            remaining = max(0.0, self._end - time.monotonic())
            self._timer = threading.Timer(remaining, self.abort.fire)
            self._timer.daemon = True
            self._timer.start()
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        if self._timer is not None:
            self._timer.cancel()

    @property
    def passed(self) -> bool:
        """Whether the time is over."""
        return self._end is not None and time.monotonic() >= self._end

    def check(self) -> None:
        """Raises when the time is over.

        Raises:
            GateError: The request took longer than it may.
        """
        if self.passed:
            raise GateError(f"no verdict within {self._seconds} s; allow more time")
