"""Encoded examples, and the stages' read-outs of a batch of gate sequences."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from edge_safe.errors import DataError
from edge_safe.evaluation.metrics import auroc
from edge_safe.models.data import Example
from edge_safe.models.features import Ids
from edge_safe.models.media import Picture, Recording
from edge_safe.models.prompts import PromptEncoder
from edge_safe.models.safety_file import Modality, stage_name
from edge_safe.models.safety_head import FINAL, Readout, SafetyModule


@dataclass(frozen=True, slots=True)
class Encoded:
    """An example as token ids.

    Attributes:
        prompts: Ids of the prompts of its gate sequence.
        unsafe: The label.
        source: See ``data.Example``.
        answer: Ids of what follows the control token: an answer, or a refusal where harmful.
        modality: The way in, over all prompts.
    """

    prompts: tuple[Ids, ...]
    unsafe: bool
    source: str
    answer: Ids = ()
    modality: Modality = "text"

    @property
    def length(self) -> int:
        """Tokens of all prompts and of the answer."""
        return sum(len(ids) for ids in self.prompts) + len(self.answer)


@dataclass(slots=True)
class GateBatch:
    """Gate sequences of B examples, right-padded.

    Attributes:
        states: By layer, (B, T, d).
        mask: (B, T) bool.
        final: (B, d) final-normed states at T-1.
        unsafe: (B,) bool labels.
    """

    states: dict[int, Tensor]
    mask: Tensor
    final: Tensor
    unsafe: Tensor


@dataclass(slots=True)
class LogOdds:
    """What every stage says of a set of examples.

    Attributes:
        stages: By stage, (n,) verdict logit unsafe - safe.
        unsafe: (n,) labels.
        sources: n sources.
        modalities: n ways in; all text when left empty.
    """

    stages: dict[str, NDArray[np.float64]]
    unsafe: NDArray[np.bool_]
    sources: list[str]
    modalities: list[Modality] = field(default_factory=list)

    def __post_init__(self) -> None:
        """Fills ``modalities`` in."""
        if not self.modalities:
            self.modalities = ["text"] * len(self.unsafe)

    def of_modality(self, modality: Modality) -> LogOdds:
        """The rows of one way in."""
        return self._where([name == modality for name in self.modalities])

    def as_they_came(self) -> LogOdds:
        """The rows of files and of our own prompts whose request stands alone."""
        return self._where([":" not in source for source in self.sources])

    def without_contrasts(self) -> LogOdds:
        """The rows made of files and of our own prompts, in whatever way in."""
        return self._where(["contrast" not in source.split(":") for source in self.sources])

    def _where(self, wanted: Sequence[bool]) -> LogOdds:
        rows = np.flatnonzero(wanted)
        return LogOdds(
            {stage: values[rows] for stage, values in self.stages.items()},
            self.unsafe[rows],
            [self.sources[i] for i in rows.tolist()],
            [self.modalities[i] for i in rows.tolist()],
        )

    def aurocs(self) -> dict[str, float]:
        """AUROC of each stage, for the log."""
        return {
            f"validation.{stage}": round(auroc(self.unsafe, odds), 5)
            for stage, odds in self.stages.items()
        }


def encode(encoder: PromptEncoder, examples: Sequence[Example]) -> list[Encoded]:
    """Token ids of every example's prompts."""
    return [
        Encoded(
            tuple(tuple(encoder.encode(p)) for p in e.prompts),
            e.unsafe,
            e.source,
            modality=_modality(e),
        )
        for e in examples
    ]


def _modality(example: Example) -> Modality:
    """The way in over all prompts: sound before pictures before text alone."""
    media = [type(m.medium) for prompt in example.prompts for m in prompt]
    if Recording in media:
        return "audio"
    return "image" if Picture in media else "text"


def read_stages(safety: SafetyModule, batch: GateBatch) -> dict[str, Readout]:
    """Read-outs of every head and of ``final``, by stage name."""
    readouts = {
        stage_name(k): safety.read(k, batch.states, batch.mask) for k in safety.config.layers
    }
    logits = safety.final(batch.final)
    return readouts | {FINAL: Readout(logits, logits, None)}


def collect_log_odds(
    batches: Sequence[tuple[dict[str, Readout], Tensor]], examples: Sequence[Encoded]
) -> LogOdds:
    """Puts the read-outs of several batches of examples, and their labels, into arrays.

    Raises:
        DataError: A verdict is not a finite number; training has gone wrong.
    """
    stages: dict[str, list[NDArray[np.float64]]] = {}
    for readouts, _ in batches:
        for stage, readout in readouts.items():
            logits = readout.verdict_logits.double().cpu()
            stages.setdefault(stage, []).append((logits[:, 0] - logits[:, 1]).numpy())
    columns = {stage: np.concatenate(parts) for stage, parts in stages.items()}
    wrong = [stage for stage, odds in columns.items() if not np.isfinite(odds).all()]
    if wrong:
        raise DataError(
            f"The verdicts of {', '.join(wrong)} are not finite. Lower optimizer.learning_rate."
        )
    unsafe = torch.cat([labels for _, labels in batches]).cpu().numpy()
    return LogOdds(columns, unsafe, [e.source for e in examples], [e.modality for e in examples])
