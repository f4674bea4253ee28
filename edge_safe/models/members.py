"""Several safety modules, trained from different seeds, averaged into one of the same kind.

The verdict's log-odds are z_unsafe - z_safe + a, linear in the read-outs, so the mean over members
is itself a safety module: its attention has all members' heads side by side, its inner layer is
block-diagonal. Nothing behind training has to know.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

import torch

from edge_safe.models.safety_head import SafetyAttention, SafetyModule, TokenReadout


def merge_members(members: Sequence[SafetyModule]) -> SafetyModule:
    """Averages members of one shape.

    Args:
        members: At least one; all of one config.

    Returns:
        A module whose every log-odds are the mean of the members'.
    """
    first = members[0].config
    count = len(members)
    merged = SafetyModule(
        replace(
            first,
            attention_heads=first.attention_heads * count,
            attention_hidden=first.attention_hidden * count,
        )
    )
    with torch.no_grad():
        for layer in first.layers:
            heads = [member.head(layer) for member in members]
            _merge_rows(merged.head(layer).token, [head.token for head in heads])
            _merge_attention(merged.head(layer).attention, [head.attention for head in heads])
        _merge_rows(merged.final, [member.final for member in members])
    return merged


def _merge_rows(merged: TokenReadout, parts: Sequence[TokenReadout]) -> None:
    """The norm's weights go into the rows, so that members can share one norm."""
    merged.norm.weight.fill_(1.0)
    merged.rows.copy_(torch.stack([p.rows * p.norm.weight for p in parts]).mean(0))


def _merge_attention(merged: SafetyAttention, parts: Sequence[SafetyAttention]) -> None:
    merged.norm.weight.fill_(1.0)
    merged.key.weight.copy_(torch.cat([p.key.weight * p.norm.weight for p in parts]))
    merged.value.weight.copy_(torch.cat([p.value.weight * p.norm.weight for p in parts]))
    merged.query.copy_(torch.cat([p.query for p in parts]))
    merged.slope_logit.copy_(torch.cat([p.slope_logit for p in parts]))
    merged.up.weight.copy_(torch.block_diag(*[p.up.weight for p in parts]))
    merged.up.bias.copy_(torch.cat([p.up.bias for p in parts]))
    merged.down.weight.copy_(torch.cat([p.down.weight for p in parts], 1) / len(parts))
    merged.down.bias.copy_(torch.stack([p.down.bias for p in parts]).mean(0))
