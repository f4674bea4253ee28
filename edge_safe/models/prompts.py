"""From a conversation to token ids, with text that can never become a control token.

A picture or a recording becomes the ids of the word pieces that the model reads or hears in it.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

from jinja2 import TemplateError
from transformers import PreTrainedTokenizerBase

from edge_safe.errors import CheckpointError, RecipeError
from edge_safe.models.media import Medium

# Two private-use characters mark where a template puts a message's text.
_OPEN, _CLOSE = "\ue000", "\ue001"


@dataclass(frozen=True, slots=True)
class Message:
    """One message of a conversation.

    Attributes:
        role: ``system``, ``user`` or ``assistant``. An assistant's message that stands last is an
            answer that was begun.
        content: Its text.
        medium: A picture or recording in front of the text.
    """

    role: str
    content: str
    medium: Medium | None = None


Read = Callable[[Medium], Sequence[int]]
"""What a model reads in a picture or hears in a recording, as ids of word pieces."""


def _reads_nothing(medium: Medium) -> Sequence[int]:
    raise RecipeError(
        f"The recipe asks for a {type(medium).__name__.lower()}, but this model has no tower that "
        "reads or hears word pieces. Leave data.pictures and data.recordings out."
    )


def template_parts(text: str) -> list[dict[str, str]]:
    """A content of text alone as templates with places for media take it."""
    return [{"type": "text", "text": text}]


def _takes_parts(tokenizer: PreTrainedTokenizerBase) -> bool:
    """Whether the chat template reads lists of parts and drops plain strings."""
    try:
        rendered = tokenizer.apply_chat_template(
            [{"role": "user", "content": _OPEN}], tokenize=False
        )
    except (TypeError, TemplateError):
        return True
    return _OPEN not in str(rendered)


class PromptEncoder:
    """Encodes conversations with a tokenizer's chat template, up to the start of the answer.

    For ordinary text the ids are those of the whole template. Where a message contains the string
    of a special token, that string is encoded as plain text.
    """

    def __init__(
        self,
        tokenizer: PreTrainedTokenizerBase,
        max_tokens: int | None = None,
        read: Read = _reads_nothing,
    ) -> None:
        if tokenizer.chat_template is None:
            raise CheckpointError(
                "The tokenizer has no chat template, so there is no slot for a safety token. "
                "Put a chat_template.jinja beside the model."
            )
        self.tokenizer = tokenizer
        self._parts = _takes_parts(tokenizer)
        self.max_tokens = max_tokens
        self.read = read
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
            RecipeError: There is a medium that the model cannot read.
        """
        text = self._render(messages)
        plain = not any(m.medium or self._special.search(m.content) for m in messages)
        if plain and messages[-1].role != "assistant":
            ids = self._plain(text, as_text=False)
        else:
            ids = self._encode_parts(messages, text)
        if self.max_tokens is not None and len(ids) > self.max_tokens:
            tail = self.max_tokens // 2
            ids = ids[: self.max_tokens - tail] + ids[-tail:]
        return ids

    def encode_answer(self, text: str) -> list[int]:
        """Ids of an answer as the model would decode it, with the end-of-turn token."""
        end = self.tokenizer.eos_token_id
        return self._plain(text, as_text=True) + ([] if end is None else [int(end)])

    def _render(self, messages: Sequence[Message]) -> str:
        conversation: Any = [
            {"role": m.role, "content": template_parts(m.content) if self._parts else m.content}
            for m in messages
        ]
        rendered = self.tokenizer.apply_chat_template(
            conversation, tokenize=False, add_generation_prompt=True
        )
        return str(rendered)

    def _plain(self, text: str, *, as_text: bool) -> list[int]:
        ids: list[int] = self.tokenizer(
            text, add_special_tokens=False, split_special_tokens=as_text
        )["input_ids"]
        return ids

    def _encode_parts(self, messages: Sequence[Message], text: str) -> list[int]:
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
                if messages[-1].role == "assistant":
                    del filled[-1]  # what closes the turn; the answer goes on instead
                return self._encode_pieces(filled, [m.medium for m in messages])
        raise CheckpointError(
            "The chat template changes the text of a message, so it cannot be kept inert. "
            "Use a template that writes message['content'] as it is."
        )

    def _encode_pieces(self, pieces: Sequence[str], media: Sequence[Medium | None]) -> list[int]:
        ids: list[int] = []
        plain = ""
        for number, piece in enumerate(pieces):
            if number % 2:
                medium = media[number // 2]
                read = list(self.read(medium)) if medium is not None else []
                if read:
                    ids += (self._plain(plain, as_text=True) if plain else []) + read
                    plain = "\n"
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
