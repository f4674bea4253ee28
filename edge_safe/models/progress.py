"""How far a long job is: a callback, and one that draws bars on stderr."""

from __future__ import annotations

import sys
from collections.abc import Callable

from tqdm import tqdm

# Called with the name of the job, the steps done and the steps there are.
Progress = Callable[[str, int, int], None]


def silent(job: str, done: int, total: int) -> None:
    """Shows nothing."""


class Bars:
    """Draws one bar a job on stderr."""

    def __init__(self) -> None:
        self._bars: dict[str, tqdm] = {}

    def __call__(self, job: str, done: int, total: int) -> None:
        """Moves the bar of a job, and ends it when all steps are done."""
        bar = self._bars.get(job)
        if bar is None:
            bar = self._bars[job] = tqdm(desc=job, total=total, initial=done, file=sys.stderr)
        bar.total = total
        bar.update(done - bar.n)
        if done >= total:
            self._bars.pop(job).close()
