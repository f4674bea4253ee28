"""CASA's losses, and the weights of their sum.

Which loss trains what ("attention", "token" and "verdict" stand once for every layer
k with a head; "verdict" is an addition to the published losses, off unless a recipe asks for it):

| loss | trains | how the rest is kept out |
| --- | --- | --- |
| attention | the safety attention at k | its input states are detached |
| token | verdict rows and norm at k, LoRA in layers < k | states at k come before later layers |
| verdict | what attention and token train at k, together | as above |
| final | the final verdict rows and norm, LoRA everywhere | |
| answer | LoRA everywhere, the control tokens' input rows | |
| retain | LoRA everywhere, the control tokens' input rows | the base runs without gradients |

Every loss is a mean over the rows of the batch, and a row's own loss a mean over its tokens, so the
mean of the losses of equal parts of a batch is the loss of the batch: processes can share it.
"""

from __future__ import annotations

from collections.abc import Mapping

import msgspec
import torch
from torch import Tensor
from torch.nn import functional

from edge_safe.models.safety_head import Readout


class LossWeights(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """Weights of the sum.

    Attributes:
        attention: Binary cross-entropy of the safety attention, each layer.
        token: Cross-entropy of the two verdict rows, each layer.
        verdict: Cross-entropy of the combined verdict, each layer: lets both parts share the work.
        final: Cross-entropy of the two verdict rows at full depth.
        answer: Language-model loss of the target after slot T.
        retain: KL from the base model's distribution on benign answers.
        beta: Share of the answer loss that malicious-refusal pairs have; the benign-answer pairs
            have 1 - beta.
        unsafe: Factor on the loss of harmful rows in attention, token, verdict and final, against a
            set with fewer harmful rows than harmless ones.
        smoothing: Label smoothing of attention, token, verdict and final (arXiv 1512.00567): some
            labels are wrong, and a small model is easily too sure.
    """

    attention: float = 1.0
    token: float = 1.0
    verdict: float = 0.0
    final: float = 1.0
    answer: float = 1.0
    retain: float = 1.0
    beta: float = 0.5
    unsafe: float = 1.0
    smoothing: float = 0.0


def gate_losses(
    readouts: Mapping[str, Readout], unsafe: Tensor, weights: LossWeights
) -> dict[str, Tensor]:
    """Losses of the read-outs of a batch, unweighted, one entry per stage and part.

    Args:
        readouts: By stage, ``gate.<k>`` or ``final``.
        unsafe: (B,) bool labels.
        weights: For the factor on harmful rows.

    Returns:
        Scalars: ``attention.<k>`` and ``token.<k>`` of each gate, ``verdict.<k>`` where it has a
        weight, and ``final``.
    """
    row = torch.where(unsafe, weights.unsafe, 1.0)
    target = (~unsafe).long()  # column 0 of the verdict is unsafe
    losses: dict[str, Tensor] = {}
    for stage, readout in readouts.items():
        token = _label_loss(readout.token_logits, target, weights.smoothing)
        name = stage if readout.attention_logit is None else stage.replace("gate", "token")
        losses[name] = (row * token).mean()
        if readout.attention_logit is not None:
            attention = functional.binary_cross_entropy_with_logits(
                readout.attention_logit,
                unsafe.float() * (1.0 - weights.smoothing) + weights.smoothing / 2,
                reduction="none",
            )
            losses[stage.replace("gate", "attention")] = (row * attention).mean()
            if weights.verdict > 0.0:
                verdict = _label_loss(readout.verdict_logits, target, weights.smoothing)
                losses[stage.replace("gate", "verdict")] = (row * verdict).mean()
    return losses


def _label_loss(logits: Tensor, target: Tensor, smoothing: float) -> Tensor:
    return functional.cross_entropy(logits, target, reduction="none", label_smoothing=smoothing)


def answer_loss(
    logits: Tensor, targets: Tensor, mask: Tensor, unsafe: Tensor, beta: float
) -> Tensor:
    """Language-model loss of {safe token, answer} and {unsafe token, refusal} targets.

    Args:
        logits: (B, A, V) predictions of the answer's tokens, slot T being the first predictor.
        targets: (B, A) ids of the answer.
        mask: (B, A) bool, True at answer tokens; a row without an answer has none and adds 0.
        unsafe: (B,) bool, True where the target is a refusal.
        beta: Share of the malicious-refusal pairs.
    """
    token = functional.cross_entropy(logits.transpose(1, 2).float(), targets, reduction="none")
    side = torch.where(unsafe, beta, 1.0 - beta)
    return (side * _row_mean(token, mask)).mean()


def retain_loss(logits: Tensor, base_logits: Tensor, mask: Tensor, kept: Tensor) -> Tensor:
    """KL(base || model) on the tokens of benign answers.

    Args:
        logits: (B, A, V) predictions after the safe token.
        base_logits: (B, A, V) the base model's, without any control token before the answer.
        mask: (B, A) bool, True at answer tokens.
        kept: (B,) bool, True for the benign rows that are to stay the base model's.
    """
    base = functional.log_softmax(base_logits.float(), dim=-1)
    model = functional.log_softmax(logits.float(), dim=-1)
    token = (base.exp() * (base - model)).sum(-1)
    return (kept * _row_mean(token, mask)).mean()


def weighted_sum(losses: Mapping[str, Tensor], weights: LossWeights) -> Tensor:
    """The loss to minimize: each part times the weight of its kind."""
    return torch.stack(
        [getattr(weights, name.split(".")[0]) * loss for name, loss in losses.items()]
    ).sum()


def _row_mean(token_losses: Tensor, mask: Tensor) -> Tensor:
    """Mean of (B, A) over each row's masked-in tokens, 0 for a row without any."""
    kept = token_losses.masked_fill(~mask, 0.0)
    return kept.sum(-1) / mask.sum(-1).clamp_min(1)
