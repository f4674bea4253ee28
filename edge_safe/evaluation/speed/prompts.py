"""Prompts of an exact number of tokens."""

from __future__ import annotations

from collections.abc import Callable

import numpy as np

from edge_safe.runtime.model import SafeModel
from edge_safe.runtime.session import Array

SENTENCE = "The old boat went slowly down the river and the people on the shore waved to it. "
REQUEST = "Write a very long story that begins like this: "
# Single characters that hardly any tokenizer merges with what stands before them.
_FILLERS = (" %", " =", " #", "7", "%", "=", "#", "~", "\n")


def exact_prompt(model: SafeModel, tokens: int) -> str | None:
    """A harmless request whose whole prompt, template included, is ``tokens`` long.

    Returns:
        None where the template alone, or this tokenizer's merges, leave no such prompt.
    """
    words = (SENTENCE * tokens).split()[:tokens]

    def count(text: str) -> int:
        return len(model.prompt_ids(text))

    def text(number: int) -> str:
        return (REQUEST + " ".join(words[:number])).rstrip()

    low, high = 0, len(words)
    while low < high:
        middle = (low + high + 1) // 2
        if count(text(middle)) <= tokens:
            low = middle
        else:
            high = middle - 1
    starts = [text(low - back) for back in range(min(low, 3))] or [text(low)]
    # Below the request itself: any character will do.
    starts.append("7")
    found = (_filled(count, start, tokens) for start in starts)
    return next((prompt for prompt in found if prompt is not None), None)


def _filled(count: Callable[[str], int], text: str, tokens: int) -> str | None:
    """The text with as many single tokens behind it as are missing; None where that fails."""
    missing = tokens - count(text)
    if missing < 0:
        return None
    for _ in range(missing):
        length = count(text)
        longer = (text + filler for filler in _FILLERS)
        grown = next((candidate for candidate in longer if count(candidate) == length + 1), None)
        if grown is None:
            return None
        text = grown
    return text if count(text) == tokens else None


def plain_ids(model: SafeModel, count: int) -> Array:
    """(count,) int64 ids without control tokens, the same at every call; their text is nonsense.

    What the graphs compute does not depend on which words they are given.
    """
    info, safety = model.manifest.model, model.manifest.safety
    special = {*safety.control_token_ids, safety.safe_token_id, safety.unsafe_token_id}
    special |= {*info.eos_token_ids, info.pad_token_id}
    ordinary = np.setdiff1d(np.arange(info.vocab_size), sorted(special))
    return np.random.default_rng(0).choice(ordinary, count).astype(np.int64)
