"""The loop of projectors and the speech decoder: AdamW, short rise, cosine, resumable states."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any, Protocol, TypeVar, cast

import torch
from torch import Tensor, nn

from edge_safe.models.recipe import Section

if TYPE_CHECKING:
    from _typeshed import DataclassInstance

    Chosen = TypeVar("Chosen", bound=DataclassInstance)

Begin = Callable[[int], Iterator[Tensor]]
"""From the number of the first step to the loss of each step, made with the weights as they are."""


class Settings(Protocol):
    """What the loop wants of a projector's hyperparameters: steps, peak rate, AdamW's decay."""

    @property
    def steps(self) -> int: ...  # noqa: D102 - the class says it

    @property
    def learning_rate(self) -> float: ...  # noqa: D102 - the class says it

    @property
    def weight_decay(self) -> float: ...  # noqa: D102 - the class says it


def train_projector(
    projector: nn.Module,
    settings: Settings,
    begin: Begin,
    on_step: Callable[[int, float], None],
    start: dict[str, object] | None = None,
    every: int = 100,
) -> Iterator[dict[str, object]]:
    """Trains in place and yields a resumable state every ``every`` steps and at the end.

    Args:
        projector: Trained in place.
        settings: Hyperparameters.
        begin: Gives the losses.
        on_step: Called with the step's number and its loss.
        start: A state yielded by an earlier run, to go on from.
        every: Steps between two states.

    Yields:
        A dictionary for ``torch.save``: step, projector, optimizer.
    """
    optimizer = torch.optim.AdamW(
        projector.parameters(), settings.learning_rate, weight_decay=settings.weight_decay
    )
    first = 0
    if start is not None:
        state = cast(dict[str, Any], start)
        projector.load_state_dict(state["projector"])
        optimizer.load_state_dict(state["optimizer"])
        first = int(state["step"])
    projector.train()
    for step, loss in zip(range(first, settings.steps), begin(first), strict=False):
        for group in optimizer.param_groups:
            group["lr"] = settings.learning_rate * schedule(step, settings.steps)
        optimizer.zero_grad()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(projector.parameters(), 1.0)
        optimizer.step()
        on_step(step, loss.item())
        if (step + 1) % every == 0 or step + 1 == settings.steps:
            yield {
                "step": step + 1,
                "projector": projector.state_dict(),
                "optimizer": optimizer.state_dict(),
            }


def train_resumably(
    train: Callable[[dict[str, object] | None], Iterator[dict[str, object]]], stored: Path
) -> None:
    """Trains to the end; a killed run goes on from the last state.

    Args:
        train: From the state to go on from, or None, to the states on the way.
        stored: File of the last state.
    """
    stored.parent.mkdir(parents=True, exist_ok=True)
    start = torch.load(stored, weights_only=True) if stored.exists() else None
    for state in train(start):
        temporary = stored.with_suffix(".part")
        torch.save(state, temporary)
        temporary.replace(stored)


def settings_of(section: Section, kind: type[Chosen]) -> Chosen:
    """The hyperparameters in a recipe's section; both name them alike."""
    return kind(**{field.name: getattr(section, field.name) for field in dataclasses.fields(kind)})


def schedule(step: int, steps: int) -> float:
    """Cosine from 1 to 0 after a linear start over 3 % of the steps."""
    warm = max(1, int(0.03 * steps))
    if step < warm:
        return (step + 1) / warm
    return 0.5 * (1 + math.cos(math.pi * (step - warm) / max(1, steps - warm)))
