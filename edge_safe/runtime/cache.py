"""What a request remembers: keys and values of the model, and the gate's own columns.

Both grow in steps and are never copied per token. Rolling back is forgetting a length: nothing
beyond it is ever read.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence

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
    """Keys and values of the safety attention for every position the gate has seen.

    Kept apart from the model's cache, since a refused turn leaves that one and stays here. Of
    decoded tokens it keeps the states alone until somebody asks: nobody does before the next turn,
    and then one run makes the columns of all of them.

    Args:
        heads: Heads H.
        head_dim: Their width dk.
        columns_of: Makes (1, 2, H, n, dk) columns of states by name, each (1, n, d).
        memory: Where those of whole prompts are kept.

    Attributes:
        length: Columns that are valid, those not made yet included.
    """

    def __init__(
        self,
        heads: int,
        head_dim: int,
        columns_of: Callable[[dict[str, Array]], Array],
        memory: SpareMemory,
    ) -> None:
        self.length = 0
        self._spare = memory
        self._data = np.zeros((1, 2, heads, 0, head_dim), np.float32)
        self._memory = self._data.reshape(-1)
        self._columns_of = columns_of
        self._names: Sequence[str] = ()
        self._unmade: list[Array] = []

    def size_of(self, length: int) -> int:
        """Bytes that columns of so many positions take."""
        row = math.prod((*self._data.shape[:3], self._data.shape[4])) * self._data.itemsize
        return -(-length // STEP) * STEP * row

    @property
    def size(self) -> int:
        """Bytes that they take now."""
        states = sum(one.nbytes for one in self._unmade)
        return self._memory.nbytes + states

    def free(self) -> None:
        """Forgets everything, the memory included."""
        self.length, self._unmade = 0, []
        self._hold(self._data[:, :, :, :0].copy())

    def room(self, count: int) -> Array:
        """Uninitialized (1, 2, H, G + count, dk), for ``take``."""
        shape = (*self._data.shape[:3], self.length + count, self._data.shape[4])
        size = math.prod(shape)
        if self.length == 0 and size <= self._memory.size:
            return self._memory[:size].reshape(shape)
        return self._spare.empty(shape)

    def take(self, columns: Array) -> None:
        """Replaces all columns by contiguous (1, 2, H, n, dk), which are not copied."""
        self._hold(columns)
        self._unmade, self.length = [], columns.shape[3]

    def view(self) -> Array:
        """(1, 2, H, G, dk) the valid columns, contiguous; they may change with this object."""
        self._make()
        return np.ascontiguousarray(self._data[:, :, :, : self.length])

    def empty(self) -> Array:
        """(1, 2, H, 0, dk), what the gate is given while decoding."""
        return np.ascontiguousarray(self._data[:, :, :, :0])

    def defer(self, names: Sequence[str], states: Array) -> None:
        """Appends one position by a copy of its states (K, 1, d).

        Raises:
            ValueError: Positions that are still kept so have states of other names.
        """
        if self._unmade and names != self._names:
            raise ValueError(f"states {list(names)} follow states {list(self._names)}")
        self._names = names
        self._unmade.append(states.copy())
        self.length += 1

    def append(self, columns: Array) -> None:
        """Appends (1, 2, H, S, dk) columns."""
        self._make()
        self._write(columns)

    def _write(self, columns: Array) -> None:
        """Appends behind ``length``."""
        end = self.length + columns.shape[3]
        if end > self._data.shape[3]:
            grown = np.zeros(
                (*self._data.shape[:3], -(-end // STEP) * STEP, self._data.shape[4]), np.float32
            )
            grown[:, :, :, : self.length] = self._data[:, :, :, : self.length]
            self._hold(grown)
        self._data[:, :, :, self.length : end] = columns
        self.length = end

    def first(self, count: int) -> Array:
        """A copy of the first ``count`` columns."""
        self._make()
        columns: Array = self._data[:, :, :, :count].copy()
        return columns

    def since(self, length: int) -> Array:
        """A copy of the columns from ``length`` on."""
        self._make()
        columns: Array = self._data[:, :, :, length : self.length].copy()
        return columns

    def truncate(self, length: int) -> None:
        """Forgets all columns from ``length`` on."""
        forgotten = max(0, self.length - length)
        self._unmade = self._unmade[: max(0, len(self._unmade) - forgotten)]
        self.length -= forgotten

    def _hold(self, data: Array) -> None:
        """Keeps columns in memory of their own, or in that which there was."""
        if not np.may_share_memory(data, self._memory):
            self._memory = data.reshape(-1)
        self._data = data

    def _make(self) -> None:
        """Makes the columns of positions of which only the states are kept."""
        if not self._unmade:
            return
        states = np.concatenate(self._unmade, axis=1)[:, None]
        made = self._columns_of(dict(zip(self._names, states, strict=True)))
        if made.shape[3] != len(self._unmade):
            raise ValueError(f"{len(self._unmade)} positions got {made.shape[3]} columns")
        end, self.length = self.length, self.length - len(self._unmade)
        try:
            self._write(made)
        finally:
            # What could not be kept is still to be made.
            self.length = end
        self._unmade = []
