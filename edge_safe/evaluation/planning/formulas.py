"""From work to time: the roofline (Williams, Waterman & Patterson, 2009) with shares of it reached.

Decoding reads: bytes / (bandwidth x efficiency). Prefill and encoding read their weights once,
like a token does, and multiply: operations / (peak x efficiency). The two are added, not
overlapped: that is what published rows from 57 to 2,048 tokens fit.
"""

from __future__ import annotations

from dataclasses import dataclass

from edge_safe.evaluation.planning.devices import Mode
from edge_safe.evaluation.planning.published import Phase
from edge_safe.evaluation.planning.step import Step


@dataclass(frozen=True, slots=True)
class Constants:
    """Share of a peak that a phase reaches: of the bandwidth for decode, else of the operations."""

    encode: float
    prefill: float
    decode: float


def seconds(phase: Phase, step: Step, mode: Mode, constants: Constants) -> float:
    """Time of one run."""
    reading = read_seconds(step, mode, constants)
    if phase == "decode":
        return reading
    share = constants.encode if phase == "encode" else constants.prefill
    return reading + compute_seconds(step, mode) / share


def read_seconds(step: Step, mode: Mode, constants: Constants) -> float:
    """Time of reading alone."""
    return step.read_bytes / (mode.gb_per_second * 1e9 * constants.decode)


def compute_seconds(step: Step, mode: Mode) -> float:
    """Time of the operations at the device's peak."""
    floating = step.operations / (mode.tflops * 1e12)
    return floating + step.integer_operations / (mode.int8_tops * 1e12)
