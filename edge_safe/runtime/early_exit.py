"""What the gate's early exit is asked: it may refuse, and leaves all else to the gate."""

from __future__ import annotations

import math
from dataclasses import dataclass

from edge_safe.errors import GateError
from edge_safe.runtime.calibration import Fitted
from edge_safe.runtime.gate import early_bound, judge
from edge_safe.runtime.session import Array
from edge_safe.runtime.verdict import Decision, Verdict


@dataclass(frozen=True, slots=True)
class EarlyThreshold:
    """What the early exit refuses; nothing without a calibration.

    Attributes:
        layer: Where it reads.
        calibration: What turns its log-odds into p_unsafe.
        threshold: Lowest p_unsafe that is refused there.
    """

    layer: int = 0
    calibration: Fitted | None = None
    threshold: float = 1.0

    @property
    def bound(self) -> float:
        """Log-odds from which on a run ends there."""
        if self.calibration is None:
            return math.inf
        return early_bound(self.calibration, self.threshold)

    def verdict(self, logits: Array | None) -> Verdict | None:
        """The refusal of (1, 2) logits; None where the gate decides.

        Raises:
            GateError: They are missing or not finite.
        """
        if self.calibration is None:
            return None
        if logits is None:
            raise GateError("the gate's graph gave no verdict of its early exit")
        verdict = judge(logits, self.calibration, self.threshold, "gate", self.layer)
        return verdict if verdict.decision is Decision.REFUSE else None
