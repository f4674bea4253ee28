"""Trains the text tower's projector to spell word pieces from the recognizer's states.

The language model is never run: the target is its tied embedding. First every word piece is tied to
the state at which its last character ends (cross-entropy per step), then the alignment is left free
(connectionist temporal classification, Graves et al. 2006, with 1 - emission as the blank). The
softmax runs over the batch's own pieces and randomly drawn others, which are drawn anew each step,
so that it comes to cover the vocabulary.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor
from torch.nn import functional

from edge_safe.models.pebble.line_states import LineStates
from edge_safe.models.pebble.projector_training import train_projector
from edge_safe.models.pebble.projectors import SequenceProjector


@dataclass(frozen=True, slots=True)
class ProjectorTraining:
    """How the projector is trained.

    Attributes:
        steps: Optimizer steps in all.
        aligned_steps: Of these, the first ones, trained with known alignments.
        lines_per_step: Lines of one step.
        negatives: Word pieces drawn at random for the softmax of one step.
        learning_rate: Peak of a cosine schedule with a short linear start.
        weight_decay: AdamW's.
        noise: Standard deviation of what is added to the states.
        seed: Seed of order, negatives and noise.
    """

    steps: int = 3000
    aligned_steps: int = 1500
    lines_per_step: int = 32
    negatives: int = 2048
    learning_rate: float = 1.5e-3
    weight_decay: float = 0.02
    noise: float = 0.1
    seed: int = 0


@dataclass(frozen=True, slots=True)
class LineBatch:
    """Lines padded to one length.

    Attributes:
        states: (N, T, c) float32.
        lengths: (N,) int64.
        pieces: One int64 tensor (P,) of word-piece ids per line.
        frames: One int64 tensor (P,) per line, the state each piece ends at.
    """

    states: Tensor
    lengths: Tensor
    pieces: list[Tensor]
    frames: list[Tensor]


def collate(data: LineStates, rows: NDArray[np.int64] | list[int]) -> LineBatch:
    """Pads the chosen lines into one batch."""
    lines = [data.line(int(i)) for i in rows]
    longest = max(len(states) for states, _, _ in lines)
    states = torch.zeros(len(lines), longest, data.states.shape[1])
    for row, (line, _, _) in zip(states, lines, strict=True):
        row[: len(line)] = torch.from_numpy(line.astype(np.float32))
    return LineBatch(
        states,
        torch.tensor([len(line) for line, _, _ in lines]),
        [torch.from_numpy(pieces) for _, pieces, _ in lines],
        [torch.from_numpy(frames) for _, _, frames in lines],
    )


def batches(
    lengths: NDArray[np.int64], rows_per_step: int, rng: np.random.Generator
) -> Iterator[NDArray[np.int64]]:
    """Endless batches of rows of similar length, in random order."""
    while True:
        order = np.argsort(lengths * rng.uniform(0.85, 1.15, len(lengths)), kind="stable")
        groups = [order[i : i + rows_per_step] for i in range(0, len(order), rows_per_step)]
        for i in rng.permutation(len(groups)):
            yield groups[i]


def candidates(
    batch: LineBatch, vocabulary: int, count: int, generator: torch.Generator
) -> tuple[Tensor, list[Tensor]]:
    """Draws the pieces that one step's softmax runs over.

    Returns:
        ids: (C,) int64 the batch's own pieces and `count` random ones, sorted.
        targets: per line (P,) int64, each piece's place in `ids`.
    """
    drawn = torch.randint(vocabulary, (count,), generator=generator)
    ids = torch.unique(torch.cat([*batch.pieces, drawn]))
    return ids, [torch.searchsorted(ids, pieces) for pieces in batch.pieces]


def aligned_loss(
    emission: Tensor, query: Tensor, batch: LineBatch, rows: Tensor, targets: list[Tensor]
) -> Tensor:
    """Cross-entropy of emitting at each step, and of the right piece at the steps that emit.

    Args:
        emission: (N, T) logits.
        query: (N, T, d).
        batch: The lines.
        rows: (C, d) embeddings of the candidate pieces.
        targets: Per line (P,) place of each piece among the candidates.

    Returns:
        Scalar loss.
    """
    wanted = torch.zeros_like(emission)
    for row, frames in zip(wanted, batch.frames, strict=True):
        row[frames] = 1.0
    real = torch.arange(emission.shape[1])[None] < batch.lengths[:, None]
    emit = functional.binary_cross_entropy_with_logits(emission[real], wanted[real])
    line = torch.cat([torch.full_like(f, i) for i, f in enumerate(batch.frames)])
    step = torch.cat(batch.frames)
    pieces = functional.cross_entropy(query[line, step] @ rows.T, torch.cat(targets))
    return 3.0 * emit + pieces


def free_loss(
    emission: Tensor, query: Tensor, batch: LineBatch, rows: Tensor, targets: list[Tensor]
) -> Tensor:
    """CTC per word piece; the blank's probability is 1 - sigmoid(emission). Arguments as above."""
    pieces = (query @ rows.T).log_softmax(-1) + functional.logsigmoid(emission)[..., None]
    blank = functional.logsigmoid(-emission)[..., None]
    log_probabilities = torch.cat([blank, pieces], -1).transpose(0, 1)
    lengths = torch.tensor([len(t) for t in targets])
    loss = functional.ctc_loss(
        log_probabilities,
        torch.cat(targets) + 1,
        batch.lengths,
        lengths,
        blank=0,
        reduction="sum",
        zero_infinity=True,
    )
    return loss / lengths.sum()


def word_piece_accuracy(
    projector: SequenceProjector, embedding: Tensor, data: LineStates, lines: int
) -> float:
    """Share of word pieces read right, 1 - edit distance / length, over the first lines."""
    projector.eval()
    wrong = total = 0
    with torch.no_grad():
        for start in range(0, min(lines, len(data)), 32):
            batch = collate(data, list(range(start, min(start + 32, lines, len(data)))))
            _, line, read = projector.read(batch.states, batch.lengths, embedding)
            for i, pieces in enumerate(batch.pieces):
                wrong += edit_distance(read[line == i].tolist(), pieces.tolist())
                total += len(pieces)
    projector.train()
    return 1.0 - wrong / max(total, 1)


def edit_distance(a: list[int], b: list[int]) -> int:
    """Levenshtein distance between two sequences of ids."""
    previous = list(range(len(b) + 1))
    for i, x in enumerate(a, 1):
        current = [i]
        for j, y in enumerate(b, 1):
            current.append(min(previous[j] + 1, current[j - 1] + 1, previous[j - 1] + (x != y)))
        previous = current
    return previous[-1]


def train_text_projector(
    projector: SequenceProjector,
    embedding: Tensor,
    data: LineStates,
    settings: ProjectorTraining,
    on_step: Callable[[int, float], None],
    start: dict[str, object] | None = None,
) -> Iterator[dict[str, object]]:
    """Trains in place and yields a resumable state every 100 steps and at the end.

    Args:
        projector: Trained in place.
        embedding: (V, d) tied embedding, not trained.
        data: Rendered lines.
        settings: Hyperparameters.
        on_step: Called with the step's number and its loss.
        start: A state yielded by an earlier run, to go on from.

    Returns:
        States for ``torch.save``: step, projector, optimizer.
    """

    def losses(first: int) -> Iterator[Tensor]:
        rng = np.random.default_rng([settings.seed, first])
        generator = torch.Generator().manual_seed(settings.seed + first)
        lengths = np.diff(data.offsets)
        for step, rows in enumerate(batches(lengths, settings.lines_per_step, rng), first):
            batch = collate(data, rows)
            noise = torch.randn(batch.states.shape, generator=generator) * settings.noise
            emission, query = projector(batch.states + noise, batch.lengths)
            ids, targets = candidates(batch, len(embedding), settings.negatives, generator)
            loss_of = aligned_loss if step < settings.aligned_steps else free_loss
            yield loss_of(emission, query, batch, embedding[ids], targets)

    return train_projector(projector, settings, losses, on_step, start)
