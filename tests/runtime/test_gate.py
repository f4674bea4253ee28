"""From two logits to a verdict."""

from __future__ import annotations

import math

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from edge_safe.errors import GateError
from edge_safe.runtime.gate import Verdicts, judge
from edge_safe.runtime.manifest import StageCalibration
from edge_safe.runtime.prefill import attention_ends, chunks
from edge_safe.runtime.verdict import Decision


def logits(unsafe: float, safe: float) -> np.ndarray:
    return np.array([[unsafe, safe]], np.float32)


def test_calibration_is_applied_to_the_difference() -> None:
    verdict = judge(logits(3.0, 1.0), StageCalibration(scale=0.5, bias=-0.25), 0.5, "gate")
    assert verdict.p_unsafe == pytest.approx(1 / (1 + math.exp(-0.75)))


@pytest.mark.parametrize(
    ("threshold", "decision"), [(0.5, Decision.REFUSE), (0.50001, Decision.ALLOW)]
)
def test_the_threshold_itself_refuses(threshold: float, decision: Decision) -> None:
    verdict = judge(logits(1.0, 1.0), StageCalibration(), threshold, "gate")
    assert verdict.decision is decision


@pytest.mark.parametrize("bad", [np.nan, np.inf, -np.inf])
@pytest.mark.parametrize("place", [0, 1])
def test_what_is_no_number_is_a_gate_error(bad: float, place: int) -> None:
    values = logits(0.0, 0.0)
    values[0, place] = bad
    with pytest.raises(GateError, match="verdict logits"):
        judge(values, StageCalibration(), 0.5, "gate")


def test_both_infinite_is_a_gate_error() -> None:
    with pytest.raises(GateError):
        judge(logits(np.inf, np.inf), StageCalibration(), 0.5, "gate")


@pytest.mark.parametrize("shape", [(2,), (1, 1), (2, 2), (1, 3), (0, 2)])
def test_another_shape_is_a_gate_error(shape: tuple[int, ...]) -> None:
    with pytest.raises(GateError, match="shape"):
        judge(np.zeros(shape, np.float32), StageCalibration(), 0.5, "gate")


def test_extreme_logits_do_not_overflow() -> None:
    assert judge(logits(3e38, -3e38), StageCalibration(), 0.5, "gate").p_unsafe == 1.0
    assert judge(logits(-3e38, 3e38), StageCalibration(), 0.5, "gate").p_unsafe == 0.0


@given(st.integers(2, 3000), st.integers(2, 600))
def test_chunks_cover_everything_and_end_with_two(total: int, size: int) -> None:
    pieces = chunks(total, size)
    assert [i for start, end in pieces for i in range(start, end)] == list(range(total))
    assert all(end - start <= size for start, end in pieces)
    assert pieces[-1][1] - pieces[-1][0] >= 2


def spans_of(lengths: list[tuple[int, int]]) -> list[tuple[int, int]]:
    """Spans from the lengths of gaps and of spans."""
    spans, at = [], 0
    for gap, length in lengths:
        spans.append((at + gap, at + gap + length))
        at += gap + length
    return spans


LENGTHS = st.lists(st.tuples(st.integers(0, 90), st.integers(1, 120)), min_size=1, max_size=6)


@given(LENGTHS, st.integers(1, 40), st.integers(2, 100))
def test_no_chunk_cuts_a_span(lengths: list[tuple[int, int]], rest: int, size: int) -> None:
    spans = spans_of(lengths)
    total = spans[-1][1] + rest
    pieces = chunks(total, size, spans)
    assert [i for start, end in pieces for i in range(start, end)] == list(range(total))
    edges = {end for _, end in pieces}
    assert not any(first < edge < stop for first, stop in spans for edge in edges)
    assert total == 1 or pieces[-1][1] - pieces[-1][0] >= 2


@given(LENGTHS, st.integers(1, 40), st.integers(0, 300), st.integers(2, 100))
def test_every_position_of_a_span_sees_its_last_one(
    lengths: list[tuple[int, int]], rest: int, past: int, size: int
) -> None:
    spans = spans_of(lengths)
    total = spans[-1][1] + rest
    found = np.concatenate(
        [attention_ends(past, *piece, spans)[0] for piece in chunks(total, size, spans)]
    )
    last = {i: stop - 1 for first, stop in spans for i in range(first, stop)}
    assert found.tolist() == [past + last.get(i, i) for i in range(total)]


@pytest.mark.parametrize("odds", [0.0, 50.0, np.inf, np.nan])
def test_without_a_bound_nothing_is_clear(odds: float) -> None:
    verdicts = Verdicts(has_early=True)
    assert verdicts.early is not None
    verdicts.early[:] = [[odds, 0.0]]
    assert not verdicts.clear(math.inf)


@pytest.mark.parametrize(("odds", "clear"), [(2.0, True), (1.9, False), (np.nan, False)])
def test_what_reaches_the_bound_is_clear(odds: float, clear: bool) -> None:
    verdicts = Verdicts(has_early=True)
    assert verdicts.early is not None
    verdicts.early[:] = [[odds, 0.0]]
    assert verdicts.clear(2.0) is clear
