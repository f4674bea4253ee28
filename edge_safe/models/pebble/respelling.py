"""From what was read or heard to the word pieces that the same words have when they are typed.

A reader spells with few pieces, so it may write "hos", "p", "ital" where a typed prompt has one
piece, and what was heard comes in the speech decoder's own tokens. The language model and its gate
know the typed form best, and get it.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from tokenizers import Tokenizer

TOKENIZER_FILE = "tokenizer.json"


class Respelling:
    """Decodes pieces and encodes their text again, control tokens being text like any other."""

    def __init__(self, tokenizer: Tokenizer) -> None:
        self._tokenizer = tokenizer

    @classmethod
    def beside(cls, folder: Path) -> Respelling | None:
        """With the tokenizer of a folder; None where it has none."""
        path = folder / TOKENIZER_FILE
        if not path.is_file():
            return None
        tokenizer = Tokenizer.from_file(str(path))
        tokenizer.no_truncation()
        tokenizer.no_padding()
        tokenizer.encode_special_tokens = True
        return cls(tokenizer)

    def __call__(self, pieces: Sequence[int]) -> list[int]:
        """Ids of the text of some pieces."""
        return self.typed(self._tokenizer.decode(list(pieces), skip_special_tokens=True))

    def typed(self, text: str) -> list[int]:
        """Ids of a text."""
        ids: list[int] = self._tokenizer.encode(text, add_special_tokens=False).ids
        return ids
