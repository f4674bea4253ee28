"""Whisper's own tokens as text, and text as its tokens."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from tokenizers import Tokenizer

from edge_safe.errors import CheckpointError

WORDS_FILE = "audio_tokenizer.json"
"""How Whisper's ``tokenizer.json`` is called in a checkpoint, beside the language model's."""


class SpeechWords:
    """Whisper's tokenizer.

    Args:
        data: Contents of its ``tokenizer.json``.

    Raises:
        CheckpointError: They are no tokenizer.
    """

    def __init__(self, data: bytes) -> None:
        try:
            self._tokenizer = Tokenizer.from_buffer(data)
        except Exception as error:  # the library raises bare Exception
            raise CheckpointError(f"Whisper's tokenizer cannot be read: {error}") from error
        self._tokenizer.no_truncation()
        self._tokenizer.no_padding()
        self._tokenizer.encode_special_tokens = True
        self.data = data

    @classmethod
    def beside(cls, folder: Path) -> SpeechWords | None:
        """That of a checkpoint folder; None where it has none."""
        path = folder / WORDS_FILE
        return cls(path.read_bytes()) if path.is_file() else None

    def save(self, folder: Path) -> None:
        """Writes the file as it came."""
        (folder / WORDS_FILE).write_bytes(self.data)

    def text(self, ids: Sequence[int]) -> str:
        """Text of tokens, without the space that Whisper begins every transcript with."""
        text: str = self._tokenizer.decode(list(ids), skip_special_tokens=True)
        return text.strip()

    def ids(self, text: str) -> list[int]:
        """Tokens of a transcript, as Whisper would write it: with a space in front."""
        ids: list[int] = self._tokenizer.encode(f" {text.strip()}", add_special_tokens=False).ids
        return ids
