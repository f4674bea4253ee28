"""What a request comes back with."""

from __future__ import annotations

import math
from dataclasses import asdict, dataclass
from typing import Any, Literal

from edge_safe.runtime.verdict import Verdict

FinishReason = Literal["stop", "length", "content_filter", "error", "cancelled"]


@dataclass(frozen=True, slots=True)
class Usage:
    """Positions used: ``prompt_tokens`` counts all of them, pictures and sound included."""

    prompt_tokens: int = 0
    image_tokens: int = 0
    audio_tokens: int = 0
    completion_tokens: int = 0


@dataclass(frozen=True, slots=True)
class Timing:
    """Wall-clock times; None for what did not happen.

    Attributes:
        encode_ms: Template, tokens, towers and embeddings; with a scheduler also what the request
            waited for memory.
        verdict_ms: From the request to the verdict, encoding included.
        first_token_ms: From the request to the first answer token.
        decode_tokens_per_second: Rate of the tokens after the first one.
        total_ms: From the request to its end.
    """

    encode_ms: float
    verdict_ms: float
    first_token_ms: float | None
    decode_tokens_per_second: float | None
    total_ms: float


@dataclass(frozen=True, slots=True)
class Reply:
    """The end of a request.

    Attributes:
        verdict: What the gate said.
        text: The answer; None unless the verdict is ``allow``.
        refusal: The policy's text; None unless the verdict is ``refuse``.
        finish_reason: Why it ended; ``content_filter`` for a refusal, ``error`` for a gate that
            could not decide.
        usage: Positions used.
        timing: Times.
    """

    verdict: Verdict
    text: str | None
    refusal: str | None
    finish_reason: FinishReason
    usage: Usage
    timing: Timing

    def to_dict(self) -> dict[str, Any]:
        """The document ``run --json`` prints; p_unsafe is null when there is none."""
        p_unsafe = self.verdict.p_unsafe
        return {
            "decision": self.verdict.decision.value,
            "p_unsafe": p_unsafe if math.isfinite(p_unsafe) else None,
            "stage": self.verdict.stage,
            "category": self.verdict.category,
            "text": self.text,
            "refusal": self.refusal,
            "finish_reason": self.finish_reason,
            "usage": asdict(self.usage),
            "timing": asdict(self.timing),
        }
