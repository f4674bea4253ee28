"""What the graphs read of new positions: their rows, and where a picture's rows stand.

Most models count positions one by one. With M-RoPE (Wang et al., Qwen2-VL, arXiv 2409.12191) a
position has a time, a row and a column; a picture's features stand side by side in two of them, so
that it takes fewer places than it has features. With DeepStack (Meng et al., arXiv 2406.04334)
features of other depths of the tower are added to hidden states of the first layers.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace

import numpy as np

from edge_safe.runtime.session import Array


@dataclass(frozen=True, slots=True)
class Inputs:
    """A run of new positions.

    Attributes:
        rows: (n, d) float32 embeddings, or hidden states at layer k.
        places: (A, n) int64 for the rotary embedding, counted from where the run begins; A is 1,
            or 3 for time, row and column.
        deepstack: (D, n, d) float32, what is added behind each of the first D layers.
    """

    rows: Array
    places: Array
    deepstack: Array

    def __len__(self) -> int:
        return len(self.rows)

    @property
    def span(self) -> int:
        """How far the rotary embedding's places reach; n where they are counted one by one."""
        return int(self.places.max()) + 1 if self.places.size else 0

    def behind(self, count: int) -> Inputs:
        """The positions from ``count`` on; those before it were counted one by one."""
        return Inputs(self.rows[count:], self.places[:, count:] - count, self.deepstack[:, count:])

    def with_rows(self, rows: Array) -> Inputs:
        """The same positions with other rows, hidden states say."""
        return replace(self, rows=rows)


def in_a_row(rows: Array, axes: int, deepstack: int) -> Inputs:
    """Rows (n, d) whose places are counted one by one and that deeper layers get nothing for.

    Args:
        rows: The rows.
        axes: The model's number A of rows of places.
        deepstack: Its number D of layers that take features.
    """
    count, width = rows.shape
    places = np.broadcast_to(np.arange(count, dtype=np.int64), (axes, count))
    return Inputs(rows, places, np.zeros((deepstack, count, width), np.float32))


def on_a_grid(rows: Array, height: int, width: int, deepstack: Array) -> Inputs:
    """Features (height * width, d) of a picture, row by row, all at one time."""
    row, column = np.divmod(np.arange(height * width, dtype=np.int64), width)
    return Inputs(rows, np.stack([np.zeros_like(row), row, column]), deepstack)


def join(runs: Sequence[Inputs]) -> Inputs:
    """Runs one behind the other; a place follows the farthest of all before."""
    places, start = [], 0
    for run in runs:
        places.append(run.places + start)
        start += run.span
    return Inputs(
        np.concatenate([run.rows for run in runs]),
        np.concatenate(places, axis=1),
        np.concatenate([run.deepstack for run in runs], axis=1),
    )
