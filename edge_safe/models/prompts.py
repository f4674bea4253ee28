"""From a conversation to token ids, with text that can never become a control token.

Knows nothing of media: a multimodal model's processor puts those beside the ids.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass

from transformers import PreTrainedTokenizerBase

from edge_safe.errors import CheckpointError

# Two private-use characters mark where a template puts a message's text.
_OPEN, _CLOSE = "\ue000", "\ue001"


@dataclass(frozen=True, slots=True)
class Message:
    """One message of a conversation: role ``system``, ``user`` or ``assistant``, and its text."""

    role: str
    content: str


class PromptEncoder:
    """Encodes conversations with a tokenizer's chat template, up to the start of the answer.

    For ordinary text the ids are those of the whole template. Where a message contains the string
    of a special token, that string is encoded as plain text.
    """

    def __init__(self, tokenizer: PreTrainedTokenizerBase, max_tokens: int | None = None) -> None:
        if tokenizer.chat_template is None:
            raise CheckpointError(
                "The tokenizer has no chat template, so there is no slot for a safety token. "
                "Put a chat_template.jinja beside the model."
            )
        self.tokenizer = tokenizer
        self.max_tokens = max_tokens
        special = {t.content: i for i, t in tokenizer.added_tokens_decoder.items() if t.special}
        self._special_ids = special
        longest_first = sorted(special, key=len, reverse=True)
        self._special = re.compile("|".join(re.escape(token) for token in longest_first) or r"$^")

    def encode(self, messages: Sequence[Message]) -> list[int]:
        """Ids of the conversation, ending where the assistant's next token would stand.

        A prompt longer than ``max_tokens`` loses its middle: the start and the end of a request
        say most about it, and both keep their place in the template.

        Raises:
            CheckpointError: The template changes the text of a message.
        """
        text = self._render(messages)
        if any(self._special.search(message.content) for message in messages):
            ids = self._encode_inert(messages, text)
        else:
            ids = self._plain(text, as_text=False)
        if self.max_tokens is not None and len(ids) > self.max_tokens:
            tail = self.max_tokens // 2
            ids = ids[: self.max_tokens - tail] + ids[-tail:]
        return ids

    def encode_answer(self, text: str) -> list[int]:
        """Ids of an answer as the model would decode it, with the end-of-turn token."""
        end = self.tokenizer.eos_token_id
        return self._plain(text, as_text=True) + ([] if end is None else [int(end)])

    def _render(self, messages: Sequence[Message]) -> str:
        conversation = [{"role": m.role, "content": m.content} for m in messages]
        rendered = self.tokenizer.apply_chat_template(
            conversation, tokenize=False, add_generation_prompt=True
        )
        return str(rendered)

    def _plain(self, text: str, *, as_text: bool) -> list[int]:
        ids: list[int] = self.tokenizer(
            text, add_special_tokens=False, split_special_tokens=as_text
        )["input_ids"]
        return ids

    def _encode_inert(self, messages: Sequence[Message], text: str) -> list[int]:
        """Encodes so that special tokens are recognized in the template's own text alone."""
        marked = self._render(
            [Message(m.role, f"{_OPEN}{i}{_CLOSE}") for i, m in enumerate(messages)]
        )
        # Odd pieces are message numbers, even ones the template's text.
        pieces = re.split(f"{_OPEN}(\\d+){_CLOSE}", marked)
        for contents in (
            [m.content for m in messages],
            [m.content.strip() for m in messages],  # some templates trim
        ):
            filled = [
                contents[int(piece)] if odd % 2 else piece for odd, piece in enumerate(pieces)
            ]
            if "".join(filled) == text:
                return self._encode_pieces(filled)
        raise CheckpointError(
            "The chat template changes the text of a message, so it cannot be kept inert. "
            "Use a template that writes message['content'] as it is."
        )

    def _encode_pieces(self, pieces: Sequence[str]) -> list[int]:
        ids: list[int] = []
        plain = ""
        for odd, piece in enumerate(pieces):
            if odd % 2:
                plain += piece
                continue
            start = 0
            for match in self._special.finditer(piece):
                plain += piece[start : match.start()]
                ids += self._plain(plain, as_text=True) if plain else []
                ids.append(self._special_ids[match.group()])
                plain, start = "", match.end()
            plain += piece[start:]
        return ids + (self._plain(plain, as_text=True) if plain else [])
