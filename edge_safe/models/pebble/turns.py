"""The turns of a conversation: texts, and the pictures and recordings that come before them."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
from numpy.typing import NDArray
from PIL import Image

from edge_safe.errors import PromptError

Recording = tuple[NDArray[np.float32], int]
"""Samples (T,) in [-1, 1] and their rate in Hz."""


@dataclass(slots=True)
class Turn:
    """One message: its text and what comes before it."""

    role: str
    text: str
    images: list[Image.Image] = field(default_factory=list)
    audio: list[Recording] = field(default_factory=list)


def read_turns(conversation: str | Sequence[Mapping[str, Any]]) -> list[Turn]:
    """Reads text or messages.

    Raises:
        PromptError: A message is malformed, or there is none.
    """
    if isinstance(conversation, str):
        return [Turn("user", conversation)]
    turns = []
    for index, message in enumerate(conversation):
        try:
            turn = Turn(str(message["role"]), "")
            content = message["content"]
            parts: Sequence[Mapping[str, Any]]
            parts = [{"type": "text", "text": content}] if isinstance(content, str) else content
            for part in parts:
                kind = part["type"]
                if kind == "text":
                    turn.text += part["text"]
                elif kind == "image":
                    turn.images.append(part["image"])
                elif kind == "audio":
                    turn.audio.append(part["audio"])
                else:
                    raise PromptError(f"Message {index} has a part of unknown type {kind!r}.")
        except (KeyError, TypeError) as error:
            raise PromptError(
                f"Message {index} is malformed ({error!r}); give 'role' and 'content'."
            ) from error
        if turn.role != "user" and (turn.images or turn.audio):
            raise PromptError(f"Message {index} has media, but only user turns may.")
        turns.append(turn)
    if not turns:
        raise PromptError("The conversation is empty.")
    return turns
