"""The safety module: safety attention and token read-outs at several depths of one model.

The read-outs and the way they are combined follow CASA (arXiv 2604.00310), with log-odds in place
of the paper's product of logits, whose effect flips its sign on negative logits.

Nothing here knows which language model the hidden states come from.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace

import torch
from torch import Tensor, nn
from torch.nn import functional

from edge_safe.errors import CheckpointError

FINAL = "final"


@dataclass(frozen=True, slots=True)
class SafetyConfig:
    """Shape of a safety module.

    Attributes:
        hidden_size: Width d of the model's hidden states.
        layers: Depths k that have a head. A head at k reads the states that enter layer k.
        attention_heads: Heads H of each safety attention.
        attention_head_dim: Width dk of each of those heads.
        attention_hidden: Width of the layer between the pooled heads and v.
        eps: Epsilon of every RMSNorm of the module.
        joined: Layers whose heads decide together at the last of them; empty where every head
            decides alone.
    """

    hidden_size: int
    layers: tuple[int, ...]
    attention_heads: int = 8
    attention_head_dim: int = 32
    attention_hidden: int = 64
    eps: float = 1e-5
    joined: tuple[int, ...] = ()


@dataclass(slots=True)
class Readout:
    """What one stage says of a batch of prompts.

    Attributes:
        verdict_logits: (B, 2), unsafe first, with the safety attention added where there is one.
        token_logits: (B, 2), the two rows alone: z_unsafe, z_safe.
        attention_logit: (B,), a with v = sigmoid(a), or None for a stage without attention.
    """

    verdict_logits: Tensor
    token_logits: Tensor
    attention_logit: Tensor | None


def combine(token_logits: Tensor, attention_logit: Tensor) -> Tensor:
    """Adds log v to z_unsafe and log (1 - v) to z_safe.

    Args:
        token_logits: (B, 2), unsafe first.
        attention_logit: (B,), a with v = sigmoid(a).

    Returns:
        (B, 2) verdict logits, unsafe first.
    """
    log_v = functional.logsigmoid(attention_logit)
    log_not_v = functional.logsigmoid(-attention_logit)
    return token_logits + torch.stack([log_v, log_not_v], dim=-1)


class RMSNorm(nn.Module):
    """Root-mean-square normalization with a learned weight (arXiv 1910.07467)."""

    def __init__(self, size: int, eps: float) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.ones(size))
        self.eps = eps

    def forward(self, states: Tensor) -> Tensor:
        """Normalizes the last axis of (..., size) and scales it."""
        variance = states.float().pow(2).mean(-1, keepdim=True)
        return states.float() * torch.rsqrt(variance + self.eps) * self.weight


class TokenReadout(nn.Module):
    """Two rows of lm_head read the normalized state at T-1."""

    def __init__(self, config: SafetyConfig) -> None:
        super().__init__()
        self.norm = RMSNorm(config.hidden_size, config.eps)
        self.rows = nn.Parameter(torch.zeros(2, config.hidden_size))

    def forward(self, state: Tensor) -> Tensor:
        """Reads (B, d) states at T-1 into (B, 2) logits, unsafe first."""
        return functional.linear(self.norm(state), self.rows)


class SafetyAttention(nn.Module):
    """Pools the prompt's states into v, the probability that the prompt asks for harm.

    Keys and values come from all prompt positions, the query is learned and starts from the base
    model's own state of a question about safety (``start_query``). The states are cut off from the
    gradient, so this part of the loss never moves the prompt's representations (CASA). Each head
    may weigh late positions more: its score falls by ``slope * log1p(distance to the last one)``.
    """

    def __init__(self, config: SafetyConfig) -> None:
        super().__init__()
        self.heads = config.attention_heads
        self.head_dim = config.attention_head_dim
        inner = self.heads * self.head_dim
        self.norm = RMSNorm(config.hidden_size, config.eps)
        self.key = nn.Linear(config.hidden_size, inner, bias=False)
        self.value = nn.Linear(config.hidden_size, inner, bias=False)
        self.query = nn.Parameter(torch.randn(self.heads, self.head_dim))
        self.slope_logit = nn.Parameter(torch.linspace(-4.0, 0.5, self.heads))
        self.up = nn.Linear(inner, config.attention_hidden)
        self.down = nn.Linear(config.attention_hidden, 1)

    @property
    def slope(self) -> Tensor:
        """(H,) non-negative decay of each head's score with log distance."""
        return functional.softplus(self.slope_logit)

    def start_query(self, state: Tensor) -> None:
        """Sets the query to the key projection of one (d,) state of the frozen base model."""
        with torch.no_grad():
            projected = self.key(self.norm(state)).view(self.heads, self.head_dim)
            length = projected.norm(dim=-1, keepdim=True).clamp_min(1e-6)
            self.query.copy_(projected / length * math.sqrt(self.head_dim))

    def forward(self, states: Tensor, mask: Tensor) -> Tensor:
        """Reads a batch of prompts.

        Args:
            states: (B, T, d) hidden states at layer k.
            mask: (B, T) bool, True at the positions the gate may see, which are contiguous from 0.

        Returns:
            (B,) logit a, v = sigmoid(a).
        """
        batch, length, _ = states.shape
        normalized = self.norm(states.detach())
        shape = (batch, length, self.heads, self.head_dim)
        keys = self.key(normalized).view(shape)
        values = self.value(normalized).view(shape)
        score = torch.einsum("bthd,hd->bht", keys, self.query) / math.sqrt(self.head_dim)
        last = mask.sum(-1, keepdim=True) - 1
        distance = (last - torch.arange(length, device=states.device)).clamp_min(0)
        score = score - self.slope[None, :, None] * torch.log1p(distance.float())[:, None, :]
        score = score.masked_fill(~mask[:, None, :], -torch.inf)
        pooled = torch.einsum("bht,bthd->bhd", score.softmax(-1), values)
        hidden = functional.gelu(self.up(pooled.reshape(batch, -1)))
        logit: Tensor = self.down(hidden)[:, 0]
        return logit


class SafetyHead(nn.Module):
    """The gate at one layer: token read-out and safety attention together."""

    def __init__(self, config: SafetyConfig) -> None:
        super().__init__()
        self.token = TokenReadout(config)
        self.attention = SafetyAttention(config)

    def forward(self, states: Tensor, mask: Tensor) -> Readout:
        """Decides from the prompt's states.

        Args:
            states: (B, T, d) hidden states entering layer k.
            mask: (B, T) bool, True at 0 .. T-1 of each prompt; padding and slot T are False.

        Returns:
            The stage's read-out.
        """
        token_logits = self.token(last_state(states, mask))
        attention_logit = self.attention(states, mask)
        return Readout(combine(token_logits, attention_logit), token_logits, attention_logit)


class SafetyModule(nn.Module):
    """All stages of one model: heads at several layers and the ``final`` rows at full depth."""

    def __init__(self, config: SafetyConfig) -> None:
        super().__init__()
        self.config = config
        self.heads = nn.ModuleDict({str(k): SafetyHead(config) for k in config.layers})
        self.final = TokenReadout(config)

    def head(self, layer: int) -> SafetyHead:
        """The head at one layer.

        Raises:
            CheckpointError: No head was trained there; the message lists those there are.
        """
        if str(layer) not in self.heads:
            known = ", ".join(self.heads) or "none"
            raise CheckpointError(
                f"There is no safety head at layer {layer}; layers with a head: {known}. "
                "Choose one of these, or train a head there."
            )
        head = self.heads[str(layer)]
        if not isinstance(head, SafetyHead):
            raise CheckpointError(f"The module at layer {layer} is not a safety head.")
        return head

    def join(self, layers: tuple[int, ...]) -> None:
        """Lets the heads of these layers decide together from now on; see ``read``.

        Raises:
            CheckpointError: One of them has no head, or they do not rise.
        """
        for layer in layers:
            self.head(layer)
        if list(layers) != sorted(set(layers)):
            raise CheckpointError(
                f"The heads of layers {list(layers)} cannot decide together at the last of them: "
                "name each layer once, by rising depth."
            )
        self.config = replace(self.config, joined=layers)

    def layers_at(self, layer: int) -> tuple[int, ...]:
        """The layers whose heads decide at a layer."""
        joined = self.config.joined
        return joined if joined and layer == joined[-1] else (layer,)

    def read(
        self, layer: int, states: Mapping[int, Tensor] | Sequence[Tensor], mask: Tensor
    ) -> Readout:
        """What the gate at a layer says: the mean over the heads that decide there.

        Heads of different depths err differently, as members of different seeds do, and the states
        of a lower layer are there anyway when those of a higher one are.

        Args:
            layer: Where the gate ends.
            states: By layer, (B, T, d) hidden states entering it.
            mask: See ``SafetyHead.forward``.

        Raises:
            CheckpointError: No head was trained there.
        """
        read = [self.head(k)(states[k], mask) for k in self.layers_at(layer)]
        if len(read) == 1:
            only: Readout = read[0]
            return only
        token_logits = torch.stack([part.token_logits for part in read]).mean(0)
        attention_logit = torch.stack([part.attention_logit for part in read]).mean(0)
        return Readout(combine(token_logits, attention_logit), token_logits, attention_logit)

    def read_final(self, states: Tensor, mask: Tensor) -> Readout:
        """Reads the final-normed states (B, T, d) at T-1 through the two lm_head rows."""
        logits = self.final(last_state(states, mask))
        return Readout(logits, logits, None)


def last_state(states: Tensor, mask: Tensor) -> Tensor:
    """Picks the state at the last visible position, (B, T, d) -> (B, d)."""
    last = mask.sum(-1) - 1
    return states[torch.arange(len(states), device=states.device), last]
