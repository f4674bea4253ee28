"""What a Llama-type decoder looks like, told without the name of any family."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal, Protocol

import numpy as np
import numpy.typing as npt

from edge_safe.export.packing import Lattice
from edge_safe.runtime.manifest import Bidirectional

FloatArray = npt.NDArray[np.float32]

# gelu_tanh is GELU by its approximation with a hyperbolic tangent.
Activation = Literal["silu", "gelu_tanh"]


class TensorSource(Protocol):
    """Gives the weights of a model by name, one at a time, as float32."""

    def __call__(self, name: str) -> FloatArray:
        """Reads one tensor; linear weights are (out, in)."""


class LatticeSource(Protocol):
    """Gives linear weights that were rounded before."""

    def __call__(self, name: str) -> Lattice | None:
        """The values of one (out, in) weight; None where it comes as plain numbers."""


@dataclass(frozen=True, slots=True)
class Rope:
    """Rotary embedding, halves rotated (not interleaved).

    Attributes:
        inverse_frequencies: (rotary_dim / 2,) float64.
        scale: Factor of cosine and sine (1 unless the scaling method asks for another).
        first: Angle number of the first position.
        axes: Row of position_ids that each frequency follows (0 time, 1 row, 2 column), with
            M-RoPE; empty where positions have one number.
    """

    inverse_frequencies: npt.NDArray[np.float64]
    scale: float = 1.0
    first: int = 0
    axes: tuple[int, ...] = ()

    def tables(self, length: int) -> tuple[FloatArray, FloatArray]:
        """Cosine and sine of positions 0 .. length-1, each (length, rotary_dim / 2)."""
        # float32 angles, as the torch models compute them: at position 8000 the rounding shows.
        positions = np.arange(self.first, self.first + length, dtype=np.float32)
        angles = positions[:, None] * self.inverse_frequencies.astype(np.float32)[None, :]
        cosine = (np.cos(angles) * self.scale).astype(np.float32)
        sine = (np.sin(angles) * self.scale).astype(np.float32)
        return cosine, sine


@dataclass(frozen=True, slots=True)
class LayerAttention:
    """What the attention of one layer does differently from that of the others.

    Attributes:
        rope: Which of the decoder's rotary embeddings turns queries and keys; None turns nothing.
        window: Positions that a position sees, itself the last of them; None for all before it.
    """

    rope: int | None = 0
    window: int | None = None


@dataclass(frozen=True, slots=True)
class DecoderSpec:
    """A decoder of pre-norm layers with grouped-query attention and a gated MLP.

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
        ropes: Rotary embeddings that layers choose from.
        tied: Whether lm_head is the embedding.
        qkv_bias: Whether the query, key and value projections have a bias.
        output_bias: Whether the attention's output projection has one.
        mlp_bias: Whether the MLP's projections have one.
        qk_norm: Whether queries and keys are normalized per head before rotation.
        post_norms: Whether the outputs of attention and MLP are normalized before they are added
            to the residual.
        activation: Of the MLP's gate.
        attention: One entry a layer; empty where all layers see everything through the first
            rotary embedding.
        attention_scale: Factor of the attention scores; None for head_dim ** -0.5.
        embedding_scale: Factor of the embedding's rows on their way in; lm_head has none.
        bidirectional: Which positions also see later ones, those of their span.
        logit_softcap: Bound c of the logits, c * tanh(logits / c); None without one.
        deepstack: Layers behind which features of pictures are added to the hidden states.
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
    ropes: tuple[Rope, ...]
    tied: bool
    qkv_bias: bool = False
    output_bias: bool = False
    mlp_bias: bool = False
    qk_norm: bool = False
    post_norms: bool = False
    activation: Activation = "silu"
    attention: tuple[LayerAttention, ...] = ()
    attention_scale: float | None = None
    embedding_scale: float = 1.0
    logit_softcap: float | None = None
    bidirectional: Bidirectional = "none"
    deepstack: int = 0

    @property
    def parameters(self) -> int:
        """Number of weights in all matrices."""
        return self.layers * self.layer_parameters + (1 if self.tied else 2) * self.table_parameters

    @property
    def layer_parameters(self) -> int:
        """Number of weights in the matrices of one layer."""
        heads = 2 * self.heads + 2 * self.kv_heads
        return self.hidden_size * (heads * self.head_dim + 3 * self.intermediate_size)

    @property
    def table_parameters(self) -> int:
        """Number of weights in the embedding, and in lm_head."""
        return self.vocab_size * self.hidden_size

    @property
    def position_axes(self) -> int:
        """Rows of position_ids."""
        return 3 if any(rope.axes for rope in self.ropes) else 1

    def attention_of(self, layer: int) -> LayerAttention:
        """What is particular to a layer."""
        return self.attention[layer] if self.attention else LayerAttention()
