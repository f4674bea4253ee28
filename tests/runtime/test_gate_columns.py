"""Columns of the gate: taken over where they stand, and written over once nothing needs them."""

from __future__ import annotations

import numpy as np
import pytest

from edge_safe.runtime.cache import STEP, GateColumns
from edge_safe.runtime.session import Array
from edge_safe.runtime.spare_memory import SpareMemory


def columns_of(states: dict[str, Array]) -> Array:
    """Columns (1, 2, 1, n, 2) whose numbers are those of the states."""
    return np.broadcast_to(states["hidden_states"][:, None, None], (1, 2, 1, 1, 2)).copy()


def filled(count: int, number: float) -> tuple[GateColumns, Array]:
    columns = GateColumns(1, 2, columns_of, SpareMemory(0))
    data = columns.room(count)
    data[:] = number
    columns.take(data)
    return columns, data


def test_what_the_gate_wrote_is_not_copied() -> None:
    columns, data = filled(5, 1.0)
    assert columns.length == 5
    assert np.shares_memory(columns.view(), data)
    assert columns.size == data.nbytes


def test_there_is_room_for_past_and_new_ones() -> None:
    columns, data = filled(5, 1.0)
    room = columns.room(3)
    assert room.shape == (1, 2, 1, 8, 2)
    assert not np.shares_memory(room, data)


def test_memory_that_nothing_needs_serves_the_next_prompt() -> None:
    columns, data = filled(5, 1.0)
    columns.truncate(0)
    assert columns.size == data.nbytes
    assert np.shares_memory(columns.room(4), data)
    assert not np.shares_memory(columns.room(6), data)
    room = columns.room(4)
    room[:] = 2.0
    columns.take(room)
    assert columns.room(1).shape[3] == 5
    columns.truncate(0)
    assert np.shares_memory(columns.room(5), data)


def test_memory_that_is_freed_is_gone() -> None:
    columns, _ = filled(5, 1.0)
    columns.free()
    assert (columns.length, columns.size) == (0, 0)


def test_decoded_tokens_follow_what_was_taken_over() -> None:
    columns, _ = filled(STEP, 1.0)
    columns.defer(["hidden_states"], np.full((1, 1, 2), 3.0, np.float32))
    assert columns.length == STEP + 1
    assert np.all(columns.view()[:, :, :, :STEP] == 1.0)
    assert np.all(columns.view()[:, :, :, STEP] == 3.0)


def test_what_is_cut_off_does_not_come_back() -> None:
    columns, _ = filled(5, 1.0)
    columns.truncate(3)
    columns.append(np.full((1, 2, 1, 1, 2), 2.0, np.float32))
    assert columns.view().shape[3] == 4
    assert np.all(columns.view()[:, :, :, 3] == 2.0)


def test_states_of_other_names_are_not_taken_for_those_before() -> None:
    columns = GateColumns(1, 2, lambda states: states["a"], SpareMemory(0))
    columns.defer(["a", "b"], np.zeros((2, 1, 2), np.float32))
    with pytest.raises(ValueError, match="follow"):
        columns.defer(["b", "a"], np.zeros((2, 1, 2), np.float32))
