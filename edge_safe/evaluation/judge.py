"""Asks a model for the verdict on one row and times it.

What goes wrong with one row (a picture that cannot be read, an empty prompt) is that row's own
``error``: it never answers, it is counted, and it does not end the others.
"""

from __future__ import annotations

import math
import time
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from edge_safe.errors import GateError, MediaError, PromptError
from edge_safe.evaluation.rows import Row

if TYPE_CHECKING:
    from PIL.Image import Image

    from edge_safe.runtime.model import SafeModel

PICTURE_PROMPT = "Answer the request in the picture."
"""The words that go with every rendered picture; the same for harmless and harmful ones."""


@dataclass(frozen=True, slots=True)
class Judgement:
    """The verdict on one row.

    Attributes:
        id: The row's id.
        decision: ``allow``, ``refuse`` or ``error``.
        p_unsafe: Calibrated probability, None on ``error``.
        stage: The stage that decided; ``input`` for a row that never reached one.
        verdict_ms: From the call to the verdict, media included.
        reason: Why it is an ``error``, None otherwise.
    """

    id: str | int
    decision: str
    p_unsafe: float | None
    stage: str
    verdict_ms: float
    reason: str | None = None

    def to_dict(self) -> dict[str, Any]:
        """The row that `classify` writes."""
        return {
            "id": self.id,
            "decision": self.decision,
            "p_unsafe": self.p_unsafe,
            "stage": self.stage,
            "verdict_ms": round(self.verdict_ms, 3),
        }


def judge(model: SafeModel, row: Row, rendered: Image | None = None) -> Judgement:
    """The gate's verdict on one row.

    Args:
        model: A loaded bundle.
        row: The request.
        rendered: The row's words as a picture. It goes before the row's own pictures, and in
            place of the words goes the same short sentence for every row.

    Returns:
        The judgement; ``error`` if the row's media or prompt cannot be judged.
    """
    images: list[Any] = [*([] if rendered is None else [rendered]), *row.images]
    prompt = row.prompt if rendered is None else PICTURE_PROMPT
    start = time.perf_counter()
    try:
        verdict = model.assess(prompt, images=images, audio=row.audio)
    except (MediaError, PromptError, GateError) as error:
        elapsed = (time.perf_counter() - start) * 1000.0
        return Judgement(row.id, "error", None, "input", elapsed, str(error))
    elapsed = (time.perf_counter() - start) * 1000.0
    p_unsafe = verdict.p_unsafe if math.isfinite(verdict.p_unsafe) else None
    return Judgement(
        row.id, verdict.decision.value, p_unsafe, verdict.stage, elapsed, verdict.reason
    )
