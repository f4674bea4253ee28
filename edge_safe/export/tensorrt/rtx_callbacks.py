"""What the builder calls while it works: its log, its progress, and the file it writes to."""

from __future__ import annotations

import gc
import re
import signal
import threading
import traceback
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from types import FrameType
from typing import Any, BinaryIO


@contextmanager
def undisturbed() -> Iterator[list[BaseException]]:
    """Keeps garbage from being collected and Ctrl-C from being lost; gives what ended the work.

    The builder calls its logger under a lock that the end of any other builder waits for. A
    collection in that call which finds a builder, for example in the traceback of a build that
    failed, would wait for ever; so none is left in a traceback either. And an exception that is
    raised in a callback goes no further, while Ctrl-C is raised in whatever Python runs first.
    """
    halted: list[BaseException] = []
    collecting = gc.isenabled()
    gc.disable()
    handler = signal.getsignal(signal.SIGINT)
    handled = callable(handler) and threading.current_thread() is threading.main_thread()

    def hold(number: int, frame: FrameType | None) -> None:
        if callable(handler):
            try:
                handler(number, frame)
            except BaseException as error:
                halted.append(error)

    if handled:
        signal.signal(signal.SIGINT, hold)
    try:
        yield halted
        if halted:
            raise halted[0]
    except BaseException as error:
        traceback.clear_frames(error.__traceback__)
        raise
    finally:
        if handled:
            signal.signal(signal.SIGINT, handler)
        if collecting:
            gc.enable()


_MEMORY = re.compile(r"Total (Activation|Weights) Memory: (\d+) bytes")


@dataclass(slots=True)
class Log:
    """What is kept of the builder's messages."""

    errors: list[str] = field(default_factory=list)
    activations: list[int] = field(default_factory=list)
    weights: list[int] = field(default_factory=list)


def make_logger(log: Log) -> Any:
    """Keeps errors and figures of memory."""
    import tensorrt_rtx as trt

    class Logger(trt.ILogger):  # type: ignore[misc]
        def __init__(self) -> None:
            trt.ILogger.__init__(self)

        def log(self, severity: Any, message: str) -> None:
            # Where there is no GPU it also misses the driver, whatever the reason is.
            if severity == trt.ILogger.ERROR and "CUDA driver" not in message:
                log.errors.append(message)
            if found := _MEMORY.match(message):
                kept = log.activations if found[1] == "Activation" else log.weights
                kept.append(int(found[2]))

    return Logger()


def make_monitor(progress: Callable[[float], None], halted: list[BaseException]) -> Any:
    """Tells the share done: phases have steps, and a step may be a phase of its own."""
    import tensorrt_rtx as trt

    class Monitor(trt.IProgressMonitor):  # type: ignore[misc]
        def __init__(self) -> None:
            trt.IProgressMonitor.__init__(self)
            self.phases: dict[str, tuple[str | None, int]] = {}
            self.done: dict[str, int] = {}
            self.told = 0.0

        def phase_start(self, name: str, parent: str | None, steps: int) -> None:
            self.phases[name] = (parent, steps)
            self.done[name] = 0

        def phase_finish(self, name: str) -> None:
            pass

        def step_complete(self, name: str, step: int) -> bool:
            self.done[name] = step + 1
            share, phase = 0.0, name
            while phase in self.phases:
                parent, steps = self.phases[phase]
                share = (self.done[phase] + share) / max(steps, 1)
                phase = parent or ""
            self.told = max(self.told, min(share, 1.0))
            try:
                progress(self.told)
            except BaseException as error:  # raised again when the builder has ended
                halted.append(error)
            return not halted

    return Monitor()


def make_writer(file: BinaryIO, halted: list[BaseException]) -> Any:
    """Writes as the builder hands over: a whole engine in memory would be one copy more."""
    import tensorrt_rtx as trt

    class Writer(trt.IStreamWriter):  # type: ignore[misc]
        def __init__(self) -> None:
            trt.IStreamWriter.__init__(self)

        def write(self, data: bytes) -> int:
            try:
                return 0 if halted else file.write(data)
            except BaseException as error:  # the builder would go on
                halted.append(error)
                return 0

    return Writer()
