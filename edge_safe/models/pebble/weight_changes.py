"""How a fine-tuned model differs from its base, written as compactly as it can be said.

For a tensor ``name`` that changed: ``name.rows`` and ``name.values`` where few rows of a matrix
did, ``name.up`` and ``name.down`` where the change is their product (a merged adapter), else
``name.whole``.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn

FEW_ROWS = 64
LARGEST_RANK = 64


def find_changes(model: nn.Module, base: dict[str, Tensor]) -> dict[str, Tensor]:
    """Compares a model with its base.

    Args:
        model: The fine-tuned model.
        base: State dict of the base; tensors it lacks (a tied head) are passed over.

    Returns:
        The changes, float32 (``rows`` int64); empty where there are none.
    """
    found: dict[str, Tensor] = {}
    for name, weight in model.state_dict().items():
        if name not in base:
            continue
        new, old = weight.detach().float(), base[name].float()
        if torch.equal(new, old):
            continue
        if new.dim() == 2:
            rows = (new != old).any(1).nonzero()[:, 0]
            if len(rows) <= FEW_ROWS:
                found[f"{name}.rows"], found[f"{name}.values"] = rows, new[rows].contiguous()
                continue
            factors = _factors(new, old)
            if factors is not None:
                found[f"{name}.up"], found[f"{name}.down"] = factors
                continue
        found[f"{name}.whole"] = new.contiguous()
    return found


def apply_changes(model: nn.Module, changes: dict[str, Tensor]) -> None:
    """Turns a base model into the fine-tuned one.

    Raises:
        KeyError: The model has no tensor of a name that changed, or a change is incomplete.
        RuntimeError: A shape does not fit.
    """
    weights = model.state_dict()
    with torch.no_grad():
        for key, value in changes.items():
            name, _, kind = key.rpartition(".")
            weight = weights[name]
            if kind == "whole":
                weight.copy_(value)
            elif kind == "values":
                weight[changes[f"{name}.rows"]] = value.to(weight.dtype)
            elif kind == "up":
                weight.add_(value @ changes[f"{name}.down"])


def _factors(new: Tensor, old: Tensor) -> tuple[Tensor, Tensor] | None:
    """(out, r) and (r, in) whose product is the change, or None where it is not of low rank."""
    u, sizes, v = torch.linalg.svd(new.double() - old.double(), full_matrices=False)
    # Merging an adapter rounds every entry to float32: faint noise of full rank, of this size.
    spread = sum(side**0.5 for side in new.shape)
    noise = torch.finfo(torch.float32).eps * float(new.abs().max()) * spread
    rank = int((sizes > max(noise, 1e-6 * float(sizes[0]))).sum())
    if rank > LARGEST_RANK:
        return None
    root = sizes[:rank].sqrt()
    up, down = u[:, :rank] * root, root[:, None] * v[:rank]
    return up.float().contiguous(), down.float().contiguous()
