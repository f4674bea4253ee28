"""Verdicts on many requests: those of like length in one run, several runs side by side.

One run of many short prompts computes more a second than many runs, and threads that work on
different runs more than threads that share one. Words and media of the next requests are read while
these are judged. Memory is bounded by how many positions are looked ahead, not by how many requests
there are.
"""

from __future__ import annotations

import itertools
import math
import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass

from edge_safe.errors import EdgeSafeError
from edge_safe.runtime.deadline import Deadline
from edge_safe.runtime.engine import failed
from edge_safe.runtime.heap import give_back_unused
from edge_safe.runtime.media import AudioInput, ImageInput
from edge_safe.runtime.prefill import CHUNK
from edge_safe.runtime.prompt import ChatMessage
from edge_safe.runtime.request import Prompt, Requests
from edge_safe.runtime.verdict import Decision, Verdict

INPUT = "input"
"""Stage of a request that could not even be read."""

# Positions of one run, the filling of shorter prompts included.
_POSITIONS = 256
# What is read ahead and sorted by length.
_WINDOW_REQUESTS = 256
_WINDOW_POSITIONS = 8192


@dataclass(frozen=True, slots=True)
class AssessRequest:
    """One of many requests; the fields are the arguments of ``SafeModel.assess``."""

    prompt: str | Sequence[ChatMessage]
    images: Sequence[ImageInput] = ()
    audio: AudioInput | None = None
    system: str | None = None


@dataclass(frozen=True, slots=True)
class Assessment:
    """The verdict on one of many requests.

    Attributes:
        verdict: The verdict; ``error`` at stage ``input`` where the request could not be read.
        milliseconds: Its own reading, and its share of the run it was judged in.
    """

    verdict: Verdict
    milliseconds: float


@dataclass(frozen=True, slots=True)
class _Read:
    """A request that was read, or what kept it from that, and the seconds left to judge it."""

    prompt: Prompt | None
    failure: Verdict | None
    milliseconds: float
    left: float


Encode = Callable[[AssessRequest, Deadline], Prompt]
JudgeAlone = Callable[[Prompt, Deadline], Verdict]


class Batches:
    """Reads and judges requests on several threads.

    Args:
        requests: The loaded bundle.
        encode: Turns a request into a prompt.
        alone: Judges one prompt by itself.
        workers: Threads.
        timeout: Seconds of work on one request: reading it, the run it is judged in, and the one
            of its own where that fails. What it waits for others does not count. None for no limit.
    """

    def __init__(
        self,
        requests: Requests,
        encode: Encode,
        alone: JudgeAlone,
        workers: int,
        timeout: float | None,
    ) -> None:
        self._requests = requests
        self._encode = encode
        self._alone = alone
        self._workers = workers
        self._timeout = timeout

    def assess(self, requests: Iterable[AssessRequest]) -> Iterator[Assessment]:
        """Yields what ``SafeModel.assess`` says of each request, in order."""
        waiting = iter(requests)
        with (
            ThreadPoolExecutor(self._workers) as readers,
            ThreadPoolExecutor(self._workers) as pool,
        ):
            window = self._look_ahead(waiting, readers)
            while window:
                groups = self._groups(window)
                judging = [
                    pool.submit(self._judge, [window[index] for index in group]) for group in groups
                ]
                # Meanwhile the next ones are read; what their source raises comes after these.
                failure: Exception | None = None
                coming: list[_Read] = []
                try:
                    coming = self._look_ahead(waiting, readers)
                except Exception as error:
                    failure = error
                found: list[Assessment | None] = [None] * len(window)
                for group, judged in zip(groups, judging, strict=True):
                    for index, assessment in zip(group, judged.result(), strict=True):
                        found[index] = assessment
                yield from (assessment for assessment in found if assessment is not None)
                give_back_unused()
                if failure is not None:
                    raise failure
                window = coming

    def _look_ahead(
        self, waiting: Iterator[AssessRequest], readers: ThreadPoolExecutor
    ) -> list[_Read]:
        """Reads requests until there are enough to sort."""
        window: list[_Read] = []
        total = 0
        while len(window) < _WINDOW_REQUESTS and total < _WINDOW_POSITIONS:
            several = list(itertools.islice(waiting, 4 * self._workers))
            if not several:
                break
            read = list(readers.map(self._read, several))
            window += read
            total += sum(_length(one) for one in read)
        return window

    def _read(self, request: AssessRequest) -> _Read:
        """Template, tokens and towers of one request."""
        start = time.perf_counter()
        prompt = failure = None
        with Deadline(self._timeout) as deadline:
            try:
                prompt = self._encode(request, deadline)
                deadline.check()
            except Exception as error:
                # Whatever it was, this request is not answered, and the others go on.
                prompt, failure = None, failed(error, INPUT, deadline)
        return _Read(prompt, failure, (time.perf_counter() - start) * 1000.0, deadline.left)

    def _groups(self, window: Sequence[_Read]) -> list[list[int]]:
        """Places in the window that are judged together, the longest prompts first."""
        batched = self._requests.engine.judges_together(self._requests.policy)
        groups: list[list[int]] = []
        room = 0
        for index in sorted(range(len(window)), key=lambda i: _length(window[i]), reverse=True):
            read = window[index]
            fits = batched and read.prompt is not None and _fits(read.prompt)
            # The first of a group is its longest, which the others are filled up to.
            longest = _length(window[groups[-1][0]]) if groups else 0
            if fits and room >= longest > 0:
                groups[-1].append(index)
                room -= longest
            else:
                groups.append([index])
                room = _POSITIONS - _length(read) if fits else 0
        return groups

    def _judge(self, group: Sequence[_Read]) -> list[Assessment]:
        """Judges what was grouped, and one by one if that fails.

        A run ends when the time of any of its requests is over; the others have theirs left.
        """
        start = time.perf_counter()
        prompts = [read.prompt for read in group if read.prompt is not None]
        verdicts: list[Verdict] = []
        if len(prompts) > 1:
            try:
                with Deadline(min(read.left for read in group)) as deadline:
                    verdicts = self._requests.engine.judge_together(
                        [(prompt.embeds, prompt.modality) for prompt in prompts],
                        self._requests.policy,
                        deadline,
                    )
            except EdgeSafeError:
                verdicts = []  # one of them may be at fault, or its time is over
        if not verdicts:
            taken = time.perf_counter() - start
            verdicts = [self._judge_alone(read, taken) for read in group]
        each = (time.perf_counter() - start) * 1000.0 / len(group)
        return [
            Assessment(verdict, read.milliseconds + each)
            for verdict, read in zip(verdicts, group, strict=True)
        ]

    def _judge_alone(self, read: _Read, taken: float) -> Verdict:
        """Judges one request, after a run that was in vain took seconds of its time."""
        if read.prompt is None:
            return read.failure or Verdict(Decision.ERROR, math.nan, INPUT)
        with Deadline(read.left - taken) as deadline:
            return self._alone(read.prompt, deadline)


def _length(read: _Read) -> int:
    """Positions of a prompt, slot T included; 0 of none."""
    return 0 if read.prompt is None else len(read.prompt.embeds) + 1


def _fits(prompt: Prompt) -> bool:
    """Whether a prompt can be judged with others in one run.

    Not one that is cut into chunks, whose positions see each other, or with an answer begun.
    """
    short = len(prompt.embeds) + 1 <= CHUNK
    return short and not prompt.spans and prompt.question is None
