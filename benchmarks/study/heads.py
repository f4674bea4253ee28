"""The read-outs that are compared: the project's own head with one of its parts exchanged."""

from __future__ import annotations

from abc import abstractmethod
from dataclasses import dataclass

import msgspec
import torch
from torch import Tensor
from torch.nn import functional

from edge_safe.models.losses import LossWeights
from edge_safe.models.recipe import Recipe
from edge_safe.models.safety_head import (
    Readout,
    SafetyAttention,
    SafetyConfig,
    SafetyHead,
    SafetyModule,
    last_state,
)


class Pooling(SafetyAttention):
    """The safety attention without its scores: the same values and the same layers behind them."""

    def forward(self, states: Tensor, mask: Tensor) -> Tensor:
        """(B, T, d) states and their (B, T) mask -> (B,) logit."""
        values = self.value(self.norm(states.detach()))
        hidden = functional.gelu(self.up(self.pool(values, mask[..., None])))
        logit: Tensor = self.down(hidden)[:, 0]
        return logit

    @abstractmethod
    def pool(self, values: Tensor, mask: Tensor) -> Tensor:
        """(B, T, c) values and (B, T, 1) mask -> (B, c)."""


class MeanPooling(Pooling):
    """Every position counts alike."""

    def pool(self, values: Tensor, mask: Tensor) -> Tensor:
        """The mean over visible positions."""
        return (values * mask).sum(1) / mask.sum(1)


class MaxPooling(Pooling):
    """The largest value of each channel counts, wherever it stands."""

    def pool(self, values: Tensor, mask: Tensor) -> Tensor:
        """The maximum over visible positions."""
        return values.masked_fill(~mask, -torch.inf).amax(1)


def multiplied(token_logits: Tensor, attention_logit: Tensor) -> Tensor:
    """The paper's combination: v scales the unsafe logit, 1 - v the safe one.

    Args:
        token_logits: (B, 2), unsafe first.
        attention_logit: (B,), a with v = sigmoid(a).

    Returns:
        (B, 2) verdict logits, unsafe first.
    """
    v = attention_logit.sigmoid()
    return token_logits * torch.stack([v, 1.0 - v], dim=-1)


class MultipliedHead(SafetyHead):
    """The gate with the paper's combination in place of ours."""

    def forward(self, states: Tensor, mask: Tensor) -> Readout:
        """As ``SafetyHead``'s."""
        token_logits = self.token(last_state(states, mask))
        attention_logit = self.attention(states, mask)
        verdict = multiplied(token_logits, attention_logit)
        return Readout(verdict, token_logits, attention_logit)


@dataclass(frozen=True, slots=True)
class Variant:
    """How heads are built and what of them is trained.

    Attributes:
        attention: What pools the prompt's states.
        head: What puts the pooled states and the last one together.
        losses: Weights by name that are not the recipe's.
        from_vocabulary: Whether the verdict rows start as lm_head's rows of the control tokens,
            and not as zeros.
        recipe: Table, key and value of what else is not the recipe's.
        consistency: Weight of the squared difference between ways in of one request.
    """

    attention: type[SafetyAttention] = SafetyAttention
    head: type[SafetyHead] = SafetyHead
    losses: tuple[tuple[str, float], ...] = ()
    from_vocabulary: bool = False
    recipe: tuple[tuple[str, str, float], ...] = ()
    consistency: float = 0.0

    def adapted(self, recipe: Recipe) -> Recipe:
        """The recipe with this variant's own values."""
        for table, key, value in self.recipe:
            section = msgspec.structs.replace(getattr(recipe, table), **{key: value})
            recipe = msgspec.structs.replace(recipe, **{table: section})
        return recipe

    def weights(self, recipe: LossWeights) -> LossWeights:
        """The recipe's weights but for this variant's own; nothing is read at full depth.

        A recipe may leave the loss of the combined verdict out, a comparison of combinations not.
        """
        own = {"final": 0.0, "verdict": recipe.verdict or 1.0, **dict(self.losses)}
        return msgspec.structs.replace(recipe, **own)

    def build(self, module: SafetyModule, rows: Tensor) -> SafetyModule:
        """Exchanges the parts of a fresh module.

        Args:
            module: As training starts from it.
            rows: (2, d) lm_head's rows of the control tokens, unsafe first.
        """
        for layer, old in list(module.heads.items()):
            head = self.head(module.config)
            head.load_state_dict(old.state_dict())
            if self.attention is not SafetyAttention:
                head.attention = self._pooling(module.config, head.attention)
            if self.from_vocabulary:
                with torch.no_grad():
                    head.token.rows.copy_(rows)
            module.heads[layer] = head
        return module

    def _pooling(self, config: SafetyConfig, attention: SafetyAttention) -> SafetyAttention:
        pooling = self.attention(config)
        pooling.load_state_dict(attention.state_dict())
        for unused in (pooling.key.weight, pooling.query, pooling.slope_logit):
            unused.requires_grad_(False)
        return pooling


APART = (("attention", 1.0), ("token", 1.0), ("verdict", 0.0))
POOLED = (("attention", 1.0), ("token", 0.0), ("verdict", 0.0))

# Training choices, one changed at a time.
CHOICES = {
    "harmful rows weigh 1": Variant(recipe=(("losses", "unsafe", 1.0),)),
    "harmful rows weigh 2": Variant(recipe=(("losses", "unsafe", 2.0),)),
    "harmful rows weigh 8": Variant(recipe=(("losses", "unsafe", 8.0),)),
    "4 attention heads": Variant(recipe=(("heads", "attention_heads", 4),)),
    "16 attention heads": Variant(recipe=(("heads", "attention_heads", 16),)),
    "no label smoothing": Variant(recipe=(("losses", "smoothing", 0.0),)),
    "label smoothing 0.2": Variant(recipe=(("losses", "smoothing", 0.2),)),
    "no feature dropout": Variant(recipe=(("training", "feature_dropout", 0.0),)),
    "feature dropout 0.5": Variant(recipe=(("training", "feature_dropout", 0.5),)),
    "weight decay 0.01": Variant(recipe=(("optimizer", "weight_decay", 0.01),)),
    "no loss of the token rows alone": Variant(recipe=(("losses", "token", 0.0),)),
    "ways in made consistent": Variant(consistency=0.1),
}

VARIANTS = {
    # Their losses share no parameter, so one run trains both by themselves.
    "apart": Variant(losses=APART),
    "mean": Variant(attention=MeanPooling, losses=POOLED),
    "max": Variant(attention=MaxPooling, losses=POOLED),
    "together": Variant(),
    "multiplied": Variant(head=MultipliedHead),
    # At every depth, the last included, which has rows alone.
    "depths": Variant(losses=(("final", 1.0),)),
    "together, lm_head": Variant(from_vocabulary=True),
    "multiplied, lm_head": Variant(head=MultipliedHead, from_vocabulary=True),
    "one epoch": Variant(recipe=(("training", "epochs", 1),)),
    **CHOICES,
}
