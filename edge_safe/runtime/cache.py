"""What a request remembers: keys and values of the model, and the columns of its gate.

Both grow in steps and are never copied per token. Rolling back is forgetting a length: nothing
beyond it is ever read.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

import numpy as np

from edge_safe.errors import PromptError
from edge_safe.runtime.lazy_memory import lazy_zeros
from edge_safe.runtime.manifest import Manifest
from edge_safe.runtime.session import Array, Binding, Buffer
from edge_safe.runtime.spare_memory import SpareMemory

STEP = 256
"""Positions that caches grow by."""


class KeyValueCache:
    """Keys and values of all layers for one sequence.

    Each is one buffer (1, kv_heads, capacity, head_dim) that graphs read as past and write as
    present in place.

    Attributes:
        length: Positions that are valid.
        capacity: Positions that fit without growing.
    """

    def __init__(self, manifest: Manifest, dtype: np.dtype[np.generic], device: str) -> None:
        self.length = 0
        self.capacity = 0
        # From which length on the rotary embedding's places lag behind, and by how much: forgetting
        # positions forgets that too.
        self._lags: list[tuple[int, int]] = []
        self._limit = manifest.model.context_length
        self._whole = manifest.whole_caches
        self._layers = manifest.model.layers
        self._shape = (manifest.model.kv_heads, manifest.model.head_dim)
        self._dtype = dtype
        self._device = device
        self._buffers: list[Buffer] = []

    def size_of(self, length: int) -> int:
        """Bytes that a cache of so many positions takes."""
        positions = min(self._limit, -(-length // STEP) * STEP)
        heads, width = self._shape
        return 2 * self._layers * heads * width * self._dtype.itemsize * positions

    def free(self) -> None:
        """Forgets everything, the memory included."""
        self.length = self.capacity = 0
        self._lags, self._buffers = [], []

    def nothing(self, length: int) -> Array:
        """A cache without positions: (1, kv_heads, 0, head_dim), or with places for ``length``."""
        heads, width = self._shape
        return np.zeros((1, heads, length if self._whole else 0, width), self._dtype)

    def reserve(self, length: int) -> bool:
        """Makes room for ``length`` positions.

        Returns:
            Whether the buffers moved, so that they have to be bound again.

        Raises:
            PromptError: The model's context is shorter than that.
        """
        if length <= self.capacity:
            return False
        if length > self._limit:
            raise PromptError(
                f"The conversation needs {length} positions; this model holds {self._limit}."
            )
        kept = self.length
        capacity = min(self._limit, -(-length // STEP) * STEP)
        buffers = []
        heads, width = self._shape
        places = lazy_zeros(2 * self._layers, (1, heads, capacity, width), self._dtype)
        for index, grown in enumerate(places):
            if kept:
                grown[:, :, :kept] = self._buffers[index].numpy()[:, :, :kept]
            buffers.append(Buffer(grown, self._device))
        # Only now: where memory ran out on the way, all is as it was.
        self._buffers, self.capacity = buffers, capacity
        return True

    def bind(self, binding: Binding, layers: range) -> None:
        """Binds the given layers as past and, in place, as present."""
        for layer in layers:
            for offset, kind in enumerate(("key", "value")):
                buffer = self._buffers[2 * layer + offset]
                binding.input(f"past_key_values.{layer}.{kind}", buffer)
                binding.output(f"present.{layer}.{kind}", buffer)

    @property
    def lags(self) -> tuple[tuple[int, int], ...]:
        """From which lengths on places lag behind positions, and by how much."""
        return tuple(self._lags)

    def restore(
        self, caches: Sequence[Array], length: int, lags: Sequence[tuple[int, int]]
    ) -> None:
        """Fills an empty cache with what another one of the same bundle held.

        Args:
            caches: What ``copy`` gave of all layers.
            length: Positions.
            lags: Of that cache.

        Raises:
            ValueError: Number, shape or type of the arrays are not this cache's.
            PromptError: The model's context is shorter than that.
        """
        if not length:
            return
        heads, width = self._shape
        wanted = ((1, heads, length, width), self._dtype)
        if len(caches) != 2 * self._layers or any((a.shape, a.dtype) != wanted for a in caches):
            raise ValueError(f"the cache wants {2 * self._layers} arrays of {wanted}")
        self.reserve(length)
        self.load(caches, length)
        self.length, self._lags = length, list(lags)

    def copy(self, layers: range, count: int) -> list[Array]:
        """Copies of the first ``count`` positions: keys, then values, of each of some layers."""
        chosen = self._buffers[2 * layers.start : 2 * layers.stop]
        return [buffer.numpy()[:, :, :count].copy() for buffer in chosen]

    def load(self, caches: Sequence[Array], count: int) -> None:
        """Writes what ``copy`` gave of the first layers; room for it was reserved."""
        for buffer, kept in zip(self._buffers, caches, strict=False):
            whole = buffer.numpy()
            whole[:, :, :count] = kept[:, :, :count]
            buffer.write(whole)

    @property
    def place(self) -> int:
        """Place of the next position in the rotary embedding."""
        return self.length - (self._lags[-1][1] if self._lags else 0)

    def extend(self, count: int, span: int) -> None:
        """Moves on by positions that every layer has seen and that take ``span`` places."""
        lag = self.length - self.place + count - span
        self.length += count
        if count != span:
            self._lags.append((self.length, lag))

    def truncate(self, length: int) -> None:
        """Forgets all positions from ``length`` on."""
        self.length = min(self.length, length)
        self._lags = [entry for entry in self._lags if entry[0] <= self.length]


class GateColumns:
    """The states that safety attention reads of every position the gate has seen, a column each.

    Kept apart from the model's cache, since a refused turn leaves that one and stays here. Columns
    of decoded tokens are put behind the others when somebody asks: nobody does before the next
    turn.

    Args:
        layers: Layers K whose entering states the gate reads.
        width: Of a state, d.
        memory: Where those of whole prompts are kept.

    Attributes:
        length: Columns that are valid.
    """

    def __init__(self, layers: int, width: int, memory: SpareMemory) -> None:
        self.length = 0
        self._spare = memory
        self._data = np.zeros((1, layers, 0, width), np.float32)
        self._memory = self._data.reshape(-1)
        self._single: list[Array] = []

    def size_of(self, length: int) -> int:
        """Bytes that columns of so many positions take."""
        return -(-length // STEP) * STEP * self._column_bytes

    @property
    def size(self) -> int:
        """Bytes that they take now."""
        return self._memory.nbytes + len(self._single) * self._column_bytes

    @property
    def _column_bytes(self) -> int:
        _, layers, _, width = self._data.shape
        return layers * width * self._data.itemsize

    def free(self) -> None:
        """Forgets everything, the memory included."""
        self.length, self._single = 0, []
        self._hold(self._data[:, :, :0].copy())

    def room(self, count: int) -> Array:
        """Uninitialized (1, K, G + count, d), for ``take``."""
        _, layers, _, width = self._data.shape
        shape = (1, layers, self.length + count, width)
        size = math.prod(shape)
        if self.length == 0 and size <= self._memory.size:
            return self._memory[:size].reshape(shape)
        return self._spare.empty(shape)

    def take(self, columns: Array) -> None:
        """Replaces all columns by contiguous (1, K, n, d), which are not copied."""
        self._hold(columns)
        self._single, self.length = [], columns.shape[2]

    def view(self) -> Array:
        """(1, K, G, d) the valid columns, contiguous; they may change with this object."""
        self._join()
        return np.ascontiguousarray(self._data[:, :, : self.length])

    def empty(self) -> Array:
        """(1, K, 0, d), what the gate is given while decoding."""
        return np.ascontiguousarray(self._data[:, :, :0])

    def append_single(self, column: Array) -> None:
        """Appends a copy of one (1, K, 1, d) column, at the cost of little more than that."""
        self._single.append(column.copy())
        self.length += 1

    def append(self, columns: Array) -> None:
        """Appends (1, K, S, d) columns."""
        self._join()
        self._write(columns)

    def _write(self, columns: Array) -> None:
        """Appends behind ``length``."""
        end = self.length + columns.shape[2]
        if end > self._data.shape[2]:
            _, layers, _, width = self._data.shape
            grown = np.zeros((1, layers, -(-end // STEP) * STEP, width), np.float32)
            grown[:, :, : self.length] = self._data[:, :, : self.length]
            self._hold(grown)
        self._data[:, :, self.length : end] = columns
        self.length = end

    def first(self, count: int) -> Array:
        """A copy of the first ``count`` columns."""
        self._join()
        columns: Array = self._data[:, :, :count].copy()
        return columns

    def since(self, length: int) -> Array:
        """A copy of the columns from ``length`` on."""
        self._join()
        columns: Array = self._data[:, :, length : self.length].copy()
        return columns

    def truncate(self, length: int) -> None:
        """Forgets all columns from ``length`` on."""
        forgotten = max(0, self.length - length)
        self._single = self._single[: max(0, len(self._single) - forgotten)]
        self.length -= forgotten

    def _hold(self, data: Array) -> None:
        """Keeps columns in memory of their own, or in that which there was."""
        if not np.may_share_memory(data, self._memory):
            self._memory = data.reshape(-1)
        self._data = data

    def _join(self) -> None:
        """Puts columns that were appended one by one behind the others."""
        if not self._single:
            return
        columns = np.concatenate(self._single, axis=2)
        end, self.length = self.length, self.length - len(self._single)
        try:
            self._write(columns)
        finally:
            # What could not be kept is still to be put there.
            self.length = end
        self._single = []
