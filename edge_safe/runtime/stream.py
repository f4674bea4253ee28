"""Turns ids into text piece by piece: no character is split and no stop text gets out."""

from __future__ import annotations

from collections.abc import Callable, Sequence

REPLACEMENT = "\ufffd"

# Only the last three bytes can belong to an unfinished UTF-8 character, and a decoder writes at
# most one of these for each of them.
_MAX_UNFINISHED = 3


class Detokenizer:
    """Decodes a growing row of ids and hands out each finished character once."""

    def __init__(self, decode: Callable[[Sequence[int]], str]) -> None:
        """``decode`` turns ids into text and writes U+FFFD for bytes that form no character."""
        self._decode = decode
        self._ids: list[int] = []
        self._context = 0
        self._done = 0
        self._given = 0

    def push(self, token: int) -> str:
        """Adds an id and returns the text that became final."""
        self._ids.append(token)
        text = self._new_text()
        unfinished = min(len(text) - len(text.rstrip(REPLACEMENT)), _MAX_UNFINISHED)
        piece = text[self._given : len(text) - unfinished]
        self._given += len(piece)
        # Ids may be cut only behind a whole character: behind U+FFFD the next id can still turn
        # bytes on both sides of the cut into one. Ids without text are no use as a context.
        if text and not unfinished:
            self._settle()
        return piece

    def flush(self) -> str:
        """The rest, with U+FFFD for a character that was never finished."""
        piece = self._new_text()[self._given :]
        self._settle()
        return piece

    def _settle(self) -> None:
        """Cuts the row here; some decoders treat a first id differently, so one part stays."""
        self._context, self._done, self._given = self._done, len(self._ids), 0

    def _new_text(self) -> str:
        """Text of the ids that are not settled yet."""
        before = self._decode(self._ids[self._context : self._done])
        return self._decode(self._ids[self._context :])[len(before) :]


class StopFilter:
    """Holds text back while it might be the beginning of a stop text."""

    def __init__(self, stops: Sequence[str]) -> None:
        self._stops = tuple(stops)
        self._held = ""
        self.stopped = False

    def push(self, text: str) -> str:
        """Adds text and returns what is certain; sets ``stopped`` when a stop text is complete."""
        self._held += text
        found = [at for stop in self._stops if (at := self._held.find(stop)) >= 0]
        if found:
            self.stopped = True
            piece, self._held = self._held[: min(found)], ""
            return piece
        keep = max((self._overlap(stop) for stop in self._stops), default=0)
        cut = len(self._held) - keep
        piece, self._held = self._held[:cut], self._held[cut:]
        return piece

    def flush(self) -> str:
        """What was held back and never became a stop text."""
        piece, self._held = self._held, ""
        return piece

    def _overlap(self, stop: str) -> int:
        """Length of the longest end of the held text that begins the stop text."""
        for size in range(min(len(stop) - 1, len(self._held)), 0, -1):
            if self._held.endswith(stop[:size]):
                return size
        return 0
