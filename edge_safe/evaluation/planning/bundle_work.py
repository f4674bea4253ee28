"""What a bundle's language model reads and computes, step by step, by its graphs."""

from __future__ import annotations

import math
from dataclasses import dataclass

from edge_safe.errors import BundleError
from edge_safe.evaluation.planning.step import Step
from edge_safe.evaluation.speed.graph_work import Work, work_of
from edge_safe.evaluation.speed.limits import cache_bytes
from edge_safe.runtime.bundle import Bundle
from edge_safe.runtime.manifest import Manifest
from edge_safe.runtime.prefill import CHUNK


@dataclass(frozen=True, slots=True)
class BundleWork:
    """The work of one position, while prompts are read and while tokens are decoded."""

    manifest: Manifest
    reading: Work
    decoding: Work

    def decode(self, past: int) -> Step:
        """One token behind ``past`` positions."""
        read = self.decoding.weight_bytes + cache_bytes(self.manifest, past)
        return _step(self.decoding, read, self.decoding.multiplications, self._attention(1, past))

    def prefill(self, tokens: int, layers: int | None = None) -> Step:
        """A prompt through the first ``layers``, or through all of them and lm_head.

        The runtime cuts prompts into chunks, each of which reads the weights again.
        """
        work, share = self.reading, 1.0
        head = work.head_multiplications
        body = (work.multiplications - head) * tokens
        read = float(work.weight_bytes)
        if layers is not None:
            share = layers / self.manifest.model.layers
            read *= share * (1.0 - head / work.multiplications)
            head = 0
        attention = self._attention(tokens, tokens / 2) * share
        return _step(work, read * math.ceil(tokens / CHUNK), body * share + head, attention)

    def _attention(self, positions: int, looked_at: float) -> float:
        """Scores and weighted sums; the heads together are taken as d wide."""
        model = self.manifest.model
        return 4.0 * model.layers * model.hidden_size * positions * looked_at


def bundle_work(bundle: Bundle) -> BundleWork:
    """Reads the graphs.

    Raises:
        BundleError: A graph is missing or damaged, or multiplies by nothing that is known here.
    """
    work = BundleWork(bundle.manifest, work_of(bundle, prefill=True), work_of(bundle))
    if not min(work.reading.multiplications, work.decoding.multiplications):
        raise BundleError(
            f"In the graphs of {bundle.folder} no product with a weight was found, so nothing can "
            "be predicted. Measure it with `edge-safe bench`."
        )
    return work


def _step(work: Work, read: float, multiplications: float, attention: float) -> Step:
    """The share that integer kernels have of a position they have of all."""
    share = work.integer_multiplications / work.multiplications
    operations = 2.0 * multiplications
    return Step(read, operations * (1.0 - share) + attention, operations * share)
