"""Chooses the next token from logits, and holds the settings of an answer.

The order is that of the transformers library: repetition penalty, temperature, top-k, top-p.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import TypedDict

import numpy as np

from edge_safe.errors import GateError, UsageError
from edge_safe.runtime.session import Array


@dataclass(frozen=True, slots=True)
class Sampling:
    """How an answer is decoded.

    Attributes:
        max_tokens: Longest answer, in tokens.
        temperature: 0 always takes the likeliest token.
        top_k: Only the k likeliest tokens; 0 keeps all.
        top_p: Only the likeliest tokens that together reach this probability.
        repetition_penalty: Above 1 makes tokens of the prompt and the answer less likely.
        seed: Makes sampling repeatable.
        stop: Texts that end the answer; they are not part of it.
    """

    max_tokens: int = 256
    temperature: float = 0.0
    top_k: int = 0
    top_p: float = 1.0
    repetition_penalty: float = 1.0
    seed: int | None = None
    stop: tuple[str, ...] = ()

    def __post_init__(self) -> None:
        checks = (
            ("max_tokens", self.max_tokens, self.max_tokens >= 1, "1 or more"),
            ("temperature", self.temperature, 0 <= self.temperature < math.inf, "0 or more"),
            ("top_k", self.top_k, self.top_k >= 0, "0 or more"),
            ("top_p", self.top_p, 0 < self.top_p <= 1, "above 0 and at most 1"),
            (
                "repetition_penalty",
                self.repetition_penalty,
                0 < self.repetition_penalty < math.inf,
                "above 0",
            ),
            ("seed", self.seed, self.seed is None or self.seed >= 0, "0 or more"),
            ("stop", self.stop, "" not in self.stop, "texts that are not empty"),
        )
        for name, value, good, wanted in checks:
            if not good:
                raise UsageError(f"{name} is {value!r}; give {wanted}.")


_NUCLEUS = 1024


class SamplingSettings(TypedDict, total=False):
    """The fields of ``Sampling`` as keyword arguments."""

    max_tokens: int
    temperature: float
    top_k: int
    top_p: float
    repetition_penalty: float
    seed: int | None
    stop: tuple[str, ...]


class Sampler:
    """Chooses the tokens of one answer."""

    def __init__(
        self, settings: Sampling, masked: Sequence[int], prompt_ids: Array, vocab_size: int
    ) -> None:
        """Prepares for one answer.

        Args:
            settings: How to sample.
            masked: Ids that are never chosen: after slot T these are the control tokens.
            prompt_ids: (n,) ids of the prompt, for the repetition penalty.
            vocab_size: Length of the logits.
        """
        self._settings = settings
        self._never = frozenset(masked)
        self._masked = np.array(sorted(self._never), np.int64)
        self._seen = np.zeros(vocab_size, bool)
        self._seen[prompt_ids] = True
        self._random = np.random.default_rng(settings.seed)
        # Made once: new memory of this size is zeroed page by page at every token.
        self._scores = np.empty(vocab_size, np.float64)

    def choose(self, logits: Array) -> int:
        """Chooses from (V,) logits, which are left as they are.

        Raises:
            GateError: The logits are not all finite numbers.
        """
        # A NaN is both of them, for numpy.
        highest, lowest = int(logits.argmax()), float(logits.min())
        if not (math.isfinite(logits[highest]) and math.isfinite(lowest)):
            raise GateError("the decoder gave logits that are not finite; the answer ends here")
        penalty = self._settings.repetition_penalty
        greedy = self._settings.temperature == 0
        if greedy and penalty == 1.0 and highest not in self._never:
            return highest
        scores = self._scores
        scores[:] = logits
        if penalty != 1.0:
            seen = scores[self._seen]
            scores[self._seen] = np.where(seen > 0, seen / penalty, seen * penalty)
        scores[self._masked] = -np.inf
        if greedy:
            token = int(scores.argmax())
        else:
            token = self._draw(scores / self._settings.temperature)
        self._seen[token] = True
        return token

    def _draw(self, scores: Array) -> int:
        """Draws one token from scaled scores (V,)."""
        chances = np.exp(scores - scores.max())
        kept = np.arange(len(scores))
        if self._settings.top_k:
            kept = _likeliest(scores, self._settings.top_k)
        if self._settings.top_p < 1:
            kept = self._nucleus(scores, chances, kept)
        heights = np.cumsum(chances[kept])
        drawn = np.searchsorted(heights, self._random.random() * heights[-1], side="right")
        return int(kept[min(int(drawn), len(kept) - 1)])

    def _nucleus(self, scores: Array, chances: Array, kept: Array) -> Array:
        """The likeliest tokens among ``kept`` (n,) that together reach ``top_p``."""
        goal = self._settings.top_p * chances[kept].sum()
        # Few tokens carry almost all of the mass, and sorting the others takes milliseconds.
        for size in (_NUCLEUS, len(kept)):
            ordered = kept[_likeliest(scores[kept], size)]
            heights = np.cumsum(chances[ordered])
            if heights[-1] >= goal:
                break
        # A token stays while those before it have not reached the mass; the first one always.
        nucleus: Array = ordered[heights - chances[ordered] < goal]
        return nucleus


def _likeliest(scores: Array, count: int) -> Array:
    """Indices of the highest ``count`` scores, highest first, lower indices first among equals."""
    if count >= len(scores):
        return np.argsort(-scores, kind="stable")
    found = np.sort(np.argpartition(-scores, count - 1)[:count])
    ordered: Array = found[np.argsort(-scores[found], kind="stable")]
    return ordered
