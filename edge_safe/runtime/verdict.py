"""What the gate says of one request."""

from __future__ import annotations

import enum
from dataclasses import dataclass


class Decision(str, enum.Enum):
    """The three ways a request can be judged. ``ERROR`` never answers and is counted apart."""

    ALLOW = "allow"
    REFUSE = "refuse"
    ERROR = "error"


@dataclass(frozen=True, slots=True)
class Verdict:
    """The gate's judgement of a whole prompt.

    Attributes:
        decision: What happens to the request.
        p_unsafe: Calibrated probability that the prompt asks for harm, NaN on ``ERROR``.
        stage: The stage that decided, ``gate`` or ``final``.
        category: Kind of harm, for bundles that tell kinds apart.
        reason: On ``ERROR``, why the gate could not decide.
        layer: Where the model was left when that was decided: the gate's layer, or that of its
            early exit; None at full depth and on ``ERROR``.
    """

    decision: Decision
    p_unsafe: float
    stage: str
    category: str | None = None
    reason: str | None = None
    layer: int | None = None
