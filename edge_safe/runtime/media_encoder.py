"""Encodes the media of a turn, one after the other in the order of the prompt.

While towers run on one of them, the next one is read and decoded.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from functools import partial

from edge_safe.errors import MediaError, PromptError
from edge_safe.runtime.ahead import ahead
from edge_safe.runtime.deadline import Deadline
from edge_safe.runtime.families.base import Media, Prepared, Towers, joined
from edge_safe.runtime.media import AudioInput, ImageInput


class MediaEncoder:
    """A family made of towers that encode one medium at a time. Shared between threads.

    Args:
        towers: What encodes.
        context_length: Positions that a prompt may have.
    """

    def __init__(self, towers: Towers, context_length: int) -> None:
        self.placeholders: Mapping[str, str] = towers.placeholders
        self._towers = towers
        self._context_length = context_length

    def media(
        self,
        images: Sequence[ImageInput],
        audio: AudioInput | None,
        deadline: Deadline | None = None,
    ) -> Media:
        """See ``Family.media``."""
        if isinstance(images, str | bytes):
            raise MediaError("Give the pictures as a list, even a single one.")
        towers = self._towers
        waiting: list[Callable[[], Prepared]] = []
        if len(images):
            variant = towers.variant("image", len(images))
            waiting += [partial(towers.image, image, variant) for image in images]
        if audio is not None:
            waiting.append(partial(towers.sound, audio, towers.variant("audio", len(images))))
        found: list[Media] = []
        for prepared in ahead(lambda prepare: prepare(), waiting):
            if deadline is not None:
                deadline.check()
            before = sum(one.tokens for one in found)
            self._check_room(before, prepared.tokens, is_sound=len(found) == len(images))
            found.append(prepared.encode(deadline))
        return joined(found)

    def _check_room(self, before: int, tokens: int, *, is_sound: bool) -> None:
        """Turns too much away before the towers have seen all of it.

        Raises:
            PromptError: The media alone do not fit the context.
        """
        limit = self._context_length
        seen = before if is_sound else before + tokens
        if seen > limit:
            raise PromptError(
                f"The pictures take {seen} positions or more; this model's context has {limit}. "
                "Leave some out."
            )
        if before + tokens > limit:
            raise PromptError(
                f"The sound takes {tokens} positions; this model's context has {limit}. Cut it."
            )
