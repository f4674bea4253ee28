"""Head training as the study needs it: not watched, and with one verdict for one request."""

from __future__ import annotations

import random
from collections import defaultdict
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from edge_safe.models.examples import Encoded, GateBatch
from edge_safe.models.features import FeatureCache, Ids
from edge_safe.models.head_training import HeadLosses, HeadTask
from edge_safe.models.losses import LossWeights
from edge_safe.models.safety_head import SafetyModule

Twins = Mapping[int, Sequence[int]]


class StudyTask(HeadTask):
    """Heads whose validation is not watched while they train."""

    def evaluate(self) -> dict[str, float]:
        """Nothing: the questions test what was trained."""
        return {}


@dataclass(slots=True)
class PairedBatch(GateBatch):
    """A batch with those of its examples that have a twin, and with one twin of each."""

    pairs: tuple[GateBatch, GateBatch] | None = None


class ConsistentLosses(nn.Module):
    """The losses, and the squared difference between the log-odds of twins.

    Args:
        safety: What is trained.
        weights: Of the other losses.
        weight: Of the difference, which is a mean over all rows, 0 for those without a twin.
    """

    def __init__(self, safety: SafetyModule, weights: LossWeights, weight: float) -> None:
        super().__init__()
        self.losses = HeadLosses(safety, weights)
        self.weight = weight

    def forward(self, batch: PairedBatch) -> dict[str, Tensor]:
        """As ``HeadLosses``'s, with "consistency" where there are twins."""
        losses: dict[str, Tensor] = self.losses(batch)
        if batch.pairs is not None:
            ours, others = (self._odds(side) for side in batch.pairs)
            difference = (ours - others).square().sum() / len(batch.unsafe)
            losses["consistency"] = difference
            losses["loss"] = losses["loss"] + self.weight * difference
        return losses

    def _odds(self, batch: GateBatch) -> Tensor:
        """(heads, B) log-odds of the combined verdicts."""
        safety = self.losses.safety
        verdicts = [
            safety.head(k)(batch.states[k], batch.mask).verdict_logits for k in safety.config.layers
        ]
        return torch.stack([logits[:, 0] - logits[:, 1] for logits in verdicts])


class ConsistentTask(StudyTask):
    """Heads that should say the same of one request as text, as a picture and as speech.

    Args:
        safety: What is trained.
        weights: Of the other losses.
        cache: Has the states of the examples.
        train: The examples.
        learning_rate: Of everything.
        dropout: See ``HeadTask``; twins are compared without it.
        name: For progress.
        twins: See ``find_twins``.
        weight: Of the squared difference.
    """

    def __init__(
        self,
        safety: SafetyModule,
        weights: LossWeights,
        cache: FeatureCache,
        train: Sequence[Encoded],
        learning_rate: float,
        dropout: float,
        name: str,
        twins: Twins,
        weight: float,
    ) -> None:
        super().__init__(safety, weights, cache, train, (), learning_rate, dropout, name)
        self.module = ConsistentLosses(safety, weights, weight)
        self._twins = twins

    def batch(self, indices: Sequence[int], seed: int) -> PairedBatch:
        """As ``HeadTask``'s, each example with a twin drawn by its index and the seed."""
        own = super().batch(indices, seed)
        paired = PairedBatch(own.states, own.mask, own.final, own.unsafe)
        ours = [i for i in indices if i in self._twins]
        if ours:
            others = [random.Random(f"{seed}:{i}").choice(self._twins[i]) for i in ours]
            first, second = (self.gate_batch([self.train[i] for i in s]) for s in (ours, others))
            paired.pairs = first, second
        return paired


def find_twins(
    examples: Sequence[Encoded], requests: Mapping[tuple[Ids, ...], str]
) -> dict[int, list[int]]:
    """By index, the examples made of the same row that came in another way; most have none.

    Args:
        examples: Training examples.
        requests: By prompts, the row they were made from.
    """
    made: defaultdict[str, list[int]] = defaultdict(list)
    for index, example in enumerate(examples):
        made[requests[example.prompts]].append(index)
    found = {
        i: [j for j in made[requests[e.prompts]] if examples[j].modality != e.modality]
        for i, e in enumerate(examples)
    }
    return {i: others for i, others in found.items() if others}
