"""From text to ids and back, with user text that cannot become a control token.

A prompt is a row of trusted template text, untrusted text and ready-made pieces. Special tokens
are looked for in trusted text alone. Between two of them trusted and untrusted text is tokenized
in one go with special tokens disabled, so the ids equal those of the whole text at once.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from tokenizers import AddedToken, Tokenizer

from edge_safe.errors import BundleError, PromptError
from edge_safe.runtime.inputs import Inputs
from edge_safe.runtime.session import Array


@dataclass(frozen=True, slots=True)
class Trusted:
    """Text of the template, in which special tokens count."""

    text: str


@dataclass(frozen=True, slots=True)
class Untrusted:
    """Text of a user, a picture or an imported history, in which nothing counts."""

    text: str


Encoded = Array | Inputs
"""Ids (n,) int64, embeddings (n, d) float32 whose places are counted one by one, or a picture."""

Piece = Trusted | Untrusted | Encoded


class Tokens:
    """The bundle's tokenizer. Safe to share between threads: it is never changed after loading."""

    def __init__(self, data: bytes, control_ids: Sequence[int]) -> None:
        """Reads a ``tokenizer.json``.

        Args:
            data: Contents of the file.
            control_ids: Ids that must be special tokens, so that text cannot produce them.

        Raises:
            BundleError: The file is not a tokenizer, or a control token is an ordinary one.
        """
        try:
            self._tokenizer = Tokenizer.from_buffer(data)
        except Exception as error:  # the library raises bare Exception
            raise BundleError(f"The bundle's tokenizer.json cannot be read: {error}.") from error
        self._tokenizer.no_truncation()
        self._tokenizer.no_padding()
        self._tokenizer.encode_special_tokens = True
        added = self._tokenizer.get_added_tokens_decoder()
        special = {index: token for index, token in added.items() if token.special}
        missing = [index for index in control_ids if index not in special]
        if missing:
            raise BundleError(
                f"The control tokens {missing} are not special tokens of this tokenizer, so text "
                "could produce them. Export the bundle again."
            )
        self._ordinary = {t.content for t in added.values() if not t.special}
        self._ids = {token.content: index for index, token in special.items()}
        unknown = getattr(self._tokenizer.model, "unk_token", None)
        self._forbidden = np.array(
            [i for i, t in special.items() if i in control_ids or t.content != unknown], np.int64
        )
        ordered = sorted(special.values(), key=lambda token: len(token.content), reverse=True)
        self._pattern = re.compile("|".join(map(_pattern, ordered)) or r"(?!)")

    def encode(self, pieces: Sequence[Piece]) -> list[Encoded]:
        """Tokenizes a prompt.

        Args:
            pieces: Texts, and what is passed through in place.

        Returns:
            Ids, embeddings and pictures in order.

        Raises:
            PromptError: A text would produce a control token in spite of everything.
        """
        out: list[Encoded] = []
        run = ""
        for piece in pieces:
            if isinstance(piece, Untrusted):
                run += piece.text
            elif isinstance(piece, Trusted):
                at = 0
                for match in self._pattern.finditer(piece.text):
                    out.append(self._plain(run + piece.text[at : match.start()]))
                    content = match[match.lastindex or 0]
                    out.append(np.array([self._ids[content]], np.int64))
                    run, at = "", match.end()
                run += piece.text[at:]
            else:
                out.extend([self._plain(run), piece])
                run = ""
        out.append(self._plain(run))
        return [array for array in out if len(array)]

    def text_of(self, index: int) -> str:
        """How a special token is written."""
        return next((text for text, i in self._ids.items() if i == index), "\0")

    def require_special(self, text: str) -> None:
        """Makes sure that a text is one special token, which no user's text can become.

        Raises:
            BundleError: It is not.
        """
        if text not in self._ids:
            raise BundleError(
                f"{text!r} stands for media but is no special token of this tokenizer, so text "
                "could produce it. Export the bundle again."
            )

    def require_unspoken(self, texts: Sequence[str]) -> None:
        """Makes sure that markers are special tokens or plain words, not something between.

        Raises:
            BundleError: One is a token of its own that a user's text would become.
        """
        for text in texts:
            if text in self._ordinary:
                raise BundleError(
                    f"The marker {text!r} is a token that is not special, so text could produce "
                    "it. Export the bundle again."
                )

    def decode(self, ids: Sequence[int]) -> str:
        """Text of ids, without special tokens."""
        text: str = self._tokenizer.decode(list(ids), skip_special_tokens=True)
        return text

    def respelled(self, pieces: Sequence[int]) -> Array:
        """The ids that the text of some ids has when it is typed.

        Raises:
            PromptError: That text would become control tokens.
        """
        return self.typed(self.decode(pieces))

    def typed(self, text: str) -> Array:
        """The ids of a text, in which no special token is recognized.

        Raises:
            PromptError: It would become control tokens.
        """
        return self._plain(text)

    def _plain(self, text: str) -> Array:
        """Ids of text in which no special token is recognized."""
        if not text:
            return np.zeros(0, np.int64)
        try:
            ids = np.array(self._tokenizer.encode(text, add_special_tokens=False).ids, np.int64)
        except Exception as error:  # the library raises bare Exception
            raise PromptError(f"The text cannot be tokenized: {error}.") from error
        hit = ids[np.isin(ids, self._forbidden)]
        if hit.size:
            raise PromptError(
                f"The text would become the control tokens {sorted(set(hit.tolist()))}; it cannot "
                "be used with this bundle."
            )
        return ids


def _pattern(token: AddedToken) -> str:
    """Regular expression of one special token, with the white space it swallows."""
    before = r"\s*" if token.lstrip else ""
    after = r"\s*" if token.rstrip else ""
    return f"{before}({re.escape(token.content)}){after}"
