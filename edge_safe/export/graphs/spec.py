"""What a Llama-type decoder looks like, told without the name of any family."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Protocol

import numpy as np
import numpy.typing as npt

FloatArray = npt.NDArray[np.float32]


class TensorSource(Protocol):
    """Gives the weights of a model by name, one at a time, as float32."""

    def __call__(self, name: str) -> FloatArray:
        """Reads one tensor; linear weights are (out, in)."""


@dataclass(frozen=True, slots=True)
class Rope:
    """Rotary embedding, halves rotated (not interleaved).

    Attributes:
        inverse_frequencies: (rotary_dim / 2,) float64.
        scale: Factor of cosine and sine (1 unless the scaling method asks for another).
    """

    inverse_frequencies: npt.NDArray[np.float64]
    scale: float = 1.0

    def tables(self, length: int) -> tuple[FloatArray, FloatArray]:
        """Cosine and sine of positions 0 .. length-1, each (length, rotary_dim / 2)."""
        # float32 angles, as the torch models compute them: at position 8000 the rounding shows.
        positions = np.arange(length, dtype=np.float32)
        angles = positions[:, None] * self.inverse_frequencies.astype(np.float32)[None, :]
        cosine = (np.cos(angles) * self.scale).astype(np.float32)
        sine = (np.sin(angles) * self.scale).astype(np.float32)
        return cosine, sine


@dataclass(frozen=True, slots=True)
class DecoderSpec:
    """A decoder of pre-norm layers with grouped-query attention and a SiLU-gated MLP.

    Attributes:
        layers: Number L of layers.
        hidden_size: Width d.
        heads: Query heads.
        kv_heads: Key and value heads.
        head_dim: Width of a head.
        intermediate_size: Width of the MLP.
        vocab_size: Rows of the embedding.
        context_length: Longest sequence; the rotary tables have this many rows.
        eps: Epsilon of every RMSNorm.
        rope: Rotary embedding.
        tied: Whether lm_head is the embedding.
        qkv_bias: Whether the query, key and value projections have a bias.
        output_bias: Whether the attention's output projection has one.
        mlp_bias: Whether the MLP's projections have one.
        qk_norm: Whether queries and keys are normalized per head before rotation.
    """

    layers: int
    hidden_size: int
    heads: int
    kv_heads: int
    head_dim: int
    intermediate_size: int
    vocab_size: int
    context_length: int
    eps: float
    rope: Rope
    tied: bool
    qkv_bias: bool = False
    output_bias: bool = False
    mlp_bias: bool = False
    qk_norm: bool = False
