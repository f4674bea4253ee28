"""Asks a model for the verdict on one row and times it.

What goes wrong with one row (a picture that cannot be read, an empty prompt) is that row's own
``error``: it never answers, it is counted, and it does not end the others.
"""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from edge_safe.errors import GateError, MediaError, PromptError
from edge_safe.evaluation.rows import Row
from edge_safe.runtime.policy import STAGES

if TYPE_CHECKING:
    from edge_safe.evaluation.forms import Rendered
    from edge_safe.runtime.media import AudioInput
    from edge_safe.runtime.model import SafeModel
    from edge_safe.runtime.verdict import Verdict


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
        layer: See ``Verdict``.
    """

    id: str | int
    decision: str
    p_unsafe: float | None
    stage: str
    verdict_ms: float
    reason: str | None = None
    layer: int | None = None

    def to_dict(self) -> dict[str, Any]:
        """The row that `classify` writes."""
        return {
            "id": self.id,
            "decision": self.decision,
            "p_unsafe": self.p_unsafe,
            "stage": self.stage,
            "verdict_ms": round(self.verdict_ms, 3),
        }


@dataclass(frozen=True, slots=True)
class Request:
    """What the model gets of one row: words, pictures and sound."""

    prompt: str
    images: tuple[Any, ...]
    audio: AudioInput | None

    @classmethod
    def of(cls, row: Row, render: Callable[[Row], Rendered] | None) -> Request:
        """Draws or speaks the row's words, if they are to be drawn or spoken.

        Raises:
            MediaError: The row cannot be rendered.
        """
        if render is None:
            return cls(row.prompt, row.images, row.audio)
        rendered = render(row)
        drawn = () if rendered.picture is None else (rendered.picture,)
        return cls(rendered.prompt, (*drawn, *row.images), rendered.sound or row.audio)


def judge(model: SafeModel, row: Row, render: Callable[[Row], Rendered] | None = None) -> Judgement:
    """The gate's verdict on one row.

    Args:
        model: A loaded bundle.
        row: The request.
        render: Draws or speaks the row's words. A picture goes before the row's own pictures, and
            in place of the words goes what stands beside picture or sound.

    Returns:
        The judgement; ``error`` if the row's media or prompt cannot be judged.
    """
    start = time.perf_counter()
    try:
        request = Request.of(row, render)
        start = time.perf_counter()
        verdict = model.assess(request.prompt, images=request.images, audio=request.audio)
    except (MediaError, PromptError, GateError) as error:
        elapsed = (time.perf_counter() - start) * 1000.0
        return Judgement(row.id, "error", None, "input", elapsed, str(error))
    return _judgement(row, verdict, (time.perf_counter() - start) * 1000.0)


def judge_many(
    model: SafeModel,
    rows: Sequence[Row],
    workers: int | None = None,
    timeout: float | None = None,
) -> Iterator[Judgement]:
    """The gate's verdicts on many rows, in order, several at once.

    Args:
        model: A loaded bundle.
        rows: The requests.
        workers: Threads; None takes one a core.
        timeout: Seconds of work on one row; see ``SafeModel.assess_many``.
    """
    from edge_safe.runtime.batch import AssessRequest

    requests = (AssessRequest(row.prompt, row.images, row.audio) for row in rows)
    found = model.assess_many(requests, workers=workers, timeout=timeout)
    for row, assessment in zip(rows, found, strict=True):
        yield _judgement(row, assessment.verdict, assessment.milliseconds)


def _judgement(row: Row, verdict: Verdict, milliseconds: float) -> Judgement:
    """A row's verdict as it is written down."""
    p_unsafe = verdict.p_unsafe if math.isfinite(verdict.p_unsafe) else None
    return Judgement(
        row.id,
        verdict.decision.value,
        p_unsafe,
        verdict.stage,
        milliseconds,
        verdict.reason,
        verdict.layer,
    )


def thresholds(model: SafeModel) -> dict[str, float]:
    """From which p_unsafe on the last stage asked refuses, by way in.

    Pictures and sound stand there only where they have their own threshold; a policy's is one for
    all.
    """
    stages, policy = model.manifest.safety.stages, model.policy
    stage = (policy.stages or [name for name in STAGES if name in stages][:1])[-1]
    if stage in policy.thresholds:
        return {"text": policy.thresholds[stage]}
    own = stages[stage]
    return {"text": own.threshold} | {
        name: fitted.threshold for name, fitted in own.modalities.items()
    }
