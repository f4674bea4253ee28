"""The trained bridges from a tower's states to word embeddings of the language model.

Pure torch, no file access, and no operation that lacks a plain ONNX equivalent, since export
traces these classes as they stand.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from torch import Tensor, nn
from torch.nn import functional

# Finite, so that a row of padding with nothing visible stays a number instead of NaN.
HIDDEN_SCORE = -1e9


@dataclass(frozen=True, slots=True)
class SequenceProjectorConfig:
    """Shape of a :class:`SequenceProjector`.

    Attributes:
        state_size: Width c of the tower's states (text recognizer 120, speech encoder 384).
        hidden_size: Width d of the language model's embeddings.
        width: Width of the projector's own layers.
        layers: Number of convolution + attention blocks.
        heads: Attention heads of each block.
        kernel: Length of the depthwise convolutions, odd.
        window: Steps that attention sees to either side.
        candidates: Rows of the tied embedding that one read-out mixes.
        pieces: Word pieces to spell with, chosen by a layer of the projector's own; 0 spells with
            the whole tied embedding.
    """

    state_size: int
    hidden_size: int = 576
    width: int = 256
    layers: int = 3
    heads: int = 4
    kernel: int = 9
    window: int = 32
    candidates: int = 8
    pieces: int = 0


class ConvolutionBlock(nn.Module):
    """Pre-norm depthwise convolution over time, then a pointwise MLP, both residual."""

    def __init__(self, config: SequenceProjectorConfig) -> None:
        super().__init__()
        width = config.width
        self.mix_norm = nn.LayerNorm(width)
        self.mix = nn.Conv1d(width, width, config.kernel, padding=config.kernel // 2, groups=width)
        self.norm = nn.LayerNorm(width)
        self.up = nn.Linear(width, 4 * width)
        self.down = nn.Linear(4 * width, width)

    def forward(self, states: Tensor, keep: Tensor) -> Tensor:
        """Mixes neighbours.

        Args:
            states: (N, T, w).
            keep: (N, T, 1) float, 1 at real steps and 0 at padding, which must not leak in.

        Returns:
            (N, T, w).
        """
        mixed = self.mix((self.mix_norm(states) * keep).transpose(1, 2)).transpose(1, 2)
        states = states + mixed
        hidden: Tensor = states + self.down(functional.gelu(self.up(self.norm(states))))
        return hidden


class LocalAttention(nn.Module):
    """Pre-norm residual self-attention over a window, with a learned bias per relative offset.

    The products are written out: exporters turn them into plain MatMul and Softmax.
    """

    def __init__(self, config: SequenceProjectorConfig) -> None:
        super().__init__()
        self.heads = config.heads
        self.window = config.window
        self.head_dim = config.width // config.heads
        self.norm = nn.LayerNorm(config.width)
        self.query = nn.Linear(config.width, config.width)
        self.key = nn.Linear(config.width, config.width)
        self.value = nn.Linear(config.width, config.width)
        self.out = nn.Linear(config.width, config.width)
        self.offset_bias = nn.Parameter(torch.zeros(2 * config.window + 1, config.heads))

    def forward(self, states: Tensor, keep: Tensor) -> Tensor:
        """Attends to the real steps around each step.

        Args:
            states: (N, T, w).
            keep: (N, T, 1) float, 1 at real steps and 0 at padding.

        Returns:
            (N, T, w).
        """
        batch, length, width = states.shape
        shape = (batch, length, self.heads, self.head_dim)
        normalized = self.norm(states)
        query = self.query(normalized).view(shape).transpose(1, 2)
        key = self.key(normalized).view(shape).permute(0, 2, 3, 1)
        value = self.value(normalized).view(shape).transpose(1, 2)
        score = query @ key / math.sqrt(self.head_dim)

        step = torch.arange(length, device=states.device)
        offset = step[None, :] - step[:, None]
        row = offset.clamp(-self.window, self.window) + self.window
        score = score + self.offset_bias[row].permute(2, 0, 1)[None]
        near = (offset.abs() <= self.window)[None, None]
        real = keep[:, None, None, :, 0] > 0
        score = score.masked_fill(~(near & real), HIDDEN_SCORE)
        pooled = (score.softmax(-1) @ value).transpose(1, 2).reshape(batch, length, width)
        attended: Tensor = states + self.out(pooled)
        return attended


class ProjectorBlock(nn.Module):
    """One layer of the projector: a convolution block, then local attention."""

    def __init__(self, config: SequenceProjectorConfig) -> None:
        super().__init__()
        self.convolution = ConvolutionBlock(config)
        self.attention = LocalAttention(config)

    def forward(self, states: Tensor, keep: Tensor) -> Tensor:
        """(N, T, w) states and (N, T, 1) mask -> (N, T, w)."""
        hidden: Tensor = self.attention(self.convolution(states, keep), keep)
        return hidden


class SequenceProjector(nn.Module):
    """Turns a sequence of tower states into the word-piece embeddings that it spells.

    Every step says whether a word piece ends there (``emission``) and which (``query``). A query
    is read against the tied embedding E of the language model: the piece's distribution is
    softmax(query E^T), and what enters the prompt is the mean of the best few rows under it. An
    embedding of this kind lies among those that the language model knows, so nothing behind it
    has to learn anything about the tower.

    With ``pieces`` in its configuration the choice is a layer's own, among the pieces whose ids
    stand in ``piece_ids``, and what enters the prompt is the best one's row. Such a layer learns
    from fewer examples than a query that has to find its way among all rows.
    """

    def __init__(self, config: SequenceProjectorConfig) -> None:
        super().__init__()
        self.config = config
        self.input_norm = nn.LayerNorm(config.state_size)
        self.input = nn.Linear(config.state_size, config.width)
        self.blocks = nn.ModuleList(ProjectorBlock(config) for _ in range(config.layers))
        self.norm = nn.LayerNorm(config.width)
        self.emission = nn.Linear(config.width, 1)
        self.piece_ids: Tensor
        if config.pieces:
            self.classes = nn.Linear(config.width, config.pieces)
            self.register_buffer("piece_ids", torch.zeros(config.pieces, dtype=torch.int64))
        else:
            self.query = nn.Linear(config.width, config.hidden_size)

    def forward(self, states: Tensor, lengths: Tensor) -> tuple[Tensor, Tensor]:
        """Reads every step. Padding cannot change what real steps say.

        Args:
            states: (N, T, c) float tower states, padded on the right.
            lengths: (N,) int64 number of real states of each row.

        Returns:
            emission: (N, T) logit, > 0 where a word piece is emitted; padding is not cut out.
            query: (N, T, d) to be multiplied with the tied embedding, or with ``pieces`` (N, T, w)
                the input of ``classes``.
        """
        keep = real_steps(states, lengths).to(states.dtype)[..., None]
        hidden = self.input(self.input_norm(states)) * keep
        for block in self.blocks:
            hidden = block(hidden, keep)
        hidden = self.norm(hidden)
        query = hidden if self.config.pieces else self.query(hidden)
        return self.emission(hidden)[..., 0], query

    def select(self, emission: Tensor, lengths: Tensor) -> tuple[Tensor, Tensor]:
        """Finds the steps that emit a word piece, line by line and in order of time.

        Args:
            emission: (N, T) logits of ``forward``.
            lengths: (N,) int64.

        Returns:
            line: (M,) int64 row of each emitted piece.
            step: (M,) int64 its step.
        """
        emitted = ((emission > 0) & real_steps(emission, lengths)).nonzero()
        return emitted[:, 0], emitted[:, 1]

    def certainty(self, emission: Tensor, query: Tensor) -> Tensor:
        """(N, T) logit of the best of the own pieces against none at all.

        > 0 where that piece is likelier than silence, as CTC's best path has it; where emitting is
        likely but two pieces share it, nothing is emitted rather than both one after the other.
        """
        best: Tensor = self.classes(query).log_softmax(-1).amax(-1)
        return emission + best

    def read_out(self, query: Tensor, embedding: Tensor) -> tuple[Tensor, Tensor]:
        """Mixes the tied embedding's best rows for each query, or takes the best piece's.

        Args:
            query: (M, d) or (M, w) rows of ``forward``'s second output.
            embedding: (V, d) tied embedding of the language model.

        Returns:
            features: (M, d) mean of the best ``candidates`` rows, weighted by the softmax of
                their logits.
            pieces: (M,) int64 the best row of each.
        """
        if self.config.pieces:
            pieces = self.piece_ids[self.classes(query).argmax(-1)]
            return embedding[pieces], pieces
        best, rows = torch.topk(query @ embedding.T, self.config.candidates, dim=-1)
        return (best.softmax(-1)[:, None, :] @ embedding[rows])[:, 0], rows[:, 0]

    def read(
        self, states: Tensor, lengths: Tensor, embedding: Tensor
    ) -> tuple[Tensor, Tensor, Tensor]:
        """Reads lines; the same piece at neighbouring steps is one piece, as CTC has it.

        Args:
            states: (N, T, c) float, padded on the right.
            lengths: (N,) int64.
            embedding: (V, d).

        Returns:
            features: (M, d) one embedding per emitted word piece, in reading order.
            line: (M,) int64 row of ``states`` that each comes from.
            pieces: (M,) int64 its best row of the embedding.
        """
        emission, query = self(states, lengths)
        if self.config.pieces:
            emission = self.certainty(emission, query)
        line, step = self.select(emission, lengths)
        features, pieces = self.read_out(query[line, step], embedding)
        again = (line[1:] == line[:-1]) & (step[1:] == step[:-1] + 1) & (pieces[1:] == pieces[:-1])
        kept = torch.cat([torch.ones_like(line[:1], dtype=torch.bool), ~again])
        return features[kept], line[kept], pieces[kept]

    def project(self, states: Tensor, lengths: Tensor, embedding: Tensor) -> tuple[Tensor, Tensor]:
        """The whole way from tower states to embeddings for the prompt.

        Args:
            states: (N, T, c) float, padded on the right.
            lengths: (N,) int64.
            embedding: (V, d).

        Returns:
            features: (M, d) one embedding per emitted word piece, in reading order.
            line: (M,) int64 row of ``states`` that each comes from.
        """
        features, line, _ = self.read(states, lengths, embedding)
        return features, line


def real_steps(steps: Tensor, lengths: Tensor) -> Tensor:
    """(N, T, ...) and (N,) lengths -> (N, T) bool, True at the steps that are not padding."""
    return torch.arange(steps.shape[1], device=steps.device)[None, :] < lengths[:, None]
