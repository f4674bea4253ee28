"""Columns of the gate: taken over where they stand, and written over once nothing needs them."""

from __future__ import annotations

import numpy as np

from edge_safe.runtime.cache import STEP, GateColumns
from edge_safe.runtime.session import Array
from edge_safe.runtime.spare_memory import SpareMemory


def filled(count: int, number: float) -> tuple[GateColumns, Array]:
    columns = GateColumns(2, 3, SpareMemory(0))
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
    assert room.shape == (1, 2, 8, 3)
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
    assert columns.room(1).shape[2] == 5
    columns.truncate(0)
    assert np.shares_memory(columns.room(5), data)


def test_memory_that_is_freed_is_gone() -> None:
    columns, _ = filled(5, 1.0)
    columns.free()
    assert (columns.length, columns.size) == (0, 0)


def test_decoded_tokens_follow_what_was_taken_over() -> None:
    columns, _ = filled(STEP, 1.0)
    columns.append_single(np.full((1, 2, 1, 3), 3.0, np.float32))
    assert columns.length == STEP + 1
    assert np.all(columns.view()[:, :, :STEP] == 1.0)
    assert np.all(columns.view()[:, :, STEP] == 3.0)


def test_what_is_cut_off_does_not_come_back() -> None:
    columns, _ = filled(5, 1.0)
    columns.truncate(3)
    columns.append(np.full((1, 2, 1, 3), 2.0, np.float32))
    assert columns.view().shape[2] == 4
    assert np.all(columns.view()[:, :, 3] == 2.0)


def test_a_column_that_was_appended_may_be_written_over() -> None:
    columns, _ = filled(5, 1.0)
    one = np.full((1, 2, 1, 3), 3.0, np.float32)
    columns.append_single(one)
    one[:] = 4.0
    columns.append_single(one)
    assert columns.view()[0, 0, 4:, 0].tolist() == [1.0, 3.0, 4.0]


def test_columns_that_were_appended_one_by_one_are_cut_off_too() -> None:
    columns, _ = filled(5, 1.0)
    for number in (2.0, 3.0):
        columns.append_single(np.full((1, 2, 1, 3), number, np.float32))
    columns.truncate(6)
    assert columns.view()[0, 0, 4:, 0].tolist() == [1.0, 2.0]
