"""Builds a prompt from messages: template, text and media become rows of ids and embeddings."""

from __future__ import annotations

import itertools
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

import numpy as np

from edge_safe.errors import PromptError
from edge_safe.runtime.calibration import Modality
from edge_safe.runtime.families.base import Placed
from edge_safe.runtime.session import Array
from edge_safe.runtime.template import ChatTemplate, Content, Place
from edge_safe.runtime.tokens import Encoded, Piece, Tokens, Trusted, Untrusted

# No tokenizer in use averages more characters per token; longer prompts are not even tokenized.
_CHARACTERS_PER_TOKEN = 8

ChatMessage = Mapping[str, str]
"""``{"role": "system" | "user" | "assistant", "content": text}``."""


@dataclass(slots=True)
class Message:
    """One message, its content ready for the tokenizer.

    Attributes:
        role: ``system``, ``user`` or ``assistant``.
        content: Texts and what needs no tokenizer, in order.
        media: What stands at the template's own places for media, in front of the content.
        image_tokens: Embeddings that stand for pictures.
        audio_tokens: Embeddings that stand for sound.
        modality: The way in.
    """

    role: str
    content: list[Piece] = field(default_factory=list)
    media: list[Placed] = field(default_factory=list)
    image_tokens: int = 0
    audio_tokens: int = 0
    modality: Modality = "text"


class PromptBuilder:
    """Turns messages into arrays, for one bundle. Safe to share between threads."""

    def __init__(
        self,
        template: ChatTemplate,
        tokens: Tokens,
        safe_token_id: int,
        context_length: int,
    ) -> None:
        self._template = template
        self._tokens = tokens
        self._safe = safe_token_id
        self._context = context_length

    def build(self, messages: Sequence[Message], after: int | None = None) -> list[Encoded]:
        """Renders and tokenizes a conversation up to slot T.

        Args:
            messages: The whole conversation.
            after: Leaves out everything up to and with the content of this message, which the
                caches hold already.

        Returns:
            Ids, embeddings and pictures, in order.

        Raises:
            PromptError: A text is too long, or the template rejects the conversation.
        """
        self._check_length(messages)
        pieces: list[Piece] = []
        kinds = [[medium.kind for medium in message.media] for message in messages]
        for part in self._template.render([message.role for message in messages], kinds):
            if isinstance(part, str):
                pieces.append(Trusted(part))
                continue
            if isinstance(part, Place):
                pieces.extend(messages[part.message].media[part.medium].pieces)
                continue
            message = messages[part.message]
            if message.role == "assistant" and not self._ends_with_safe(pieces):
                pieces.append(np.array([self._safe], np.int64))
            pieces.extend(message.content)
            if part == Content(after if after is not None else -1):
                pieces = []
        return self._tokens.encode(pieces)

    def _ends_with_safe(self, pieces: Sequence[Piece]) -> bool:
        """Whether the template itself wrote the safe token in front of an answer."""
        if not pieces or not isinstance(pieces[-1], Trusted):
            return False
        return pieces[-1].text.endswith(self._tokens.text_of(self._safe))

    def _check_length(self, messages: Sequence[Message]) -> None:
        """Turns absurd lengths away before anything is computed."""
        texts = [p.text for m in messages for p in m.content if isinstance(p, Untrusted)]
        total, limit = sum(map(len, texts)), self._context * _CHARACTERS_PER_TOKEN
        if total > limit:
            raise PromptError(
                f"The prompt has {total} characters; this model's context of {self._context} "
                f"tokens takes at most {limit}. Shorten it."
            )


def read_messages(prompt: str | Sequence[object], system: str | None) -> list[Message]:
    """Turns what a caller gave into messages.

    Args:
        prompt: The user's text, or a conversation whose last message is the user's, or an answer
            that was begun.
        system: A system text put in front.

    Raises:
        PromptError: There is nothing to answer, or a message is malformed.
    """
    if isinstance(prompt, str):
        prompt = [{"role": "user", "content": prompt}]
    messages = [] if system is None else [Message("system", [Untrusted(system)])]
    for index, entry in enumerate(prompt):
        if not isinstance(entry, Mapping) or set(entry) != {"role", "content"}:
            raise PromptError(f"Message {index} is {entry!r}; give exactly 'role' and 'content'.")
        role, content = entry["role"], entry["content"]
        if not isinstance(content, str):
            raise PromptError(f"The content of message {index} is {content!r}; give text.")
        if role == "system" and messages:
            raise PromptError(f"Message {index} has role 'system'; only the first one may.")
        messages.append(Message(role, [Untrusted(content)]))
    if not messages or messages[-1].role == "system":
        raise PromptError("The prompt is empty: it has 0 messages to answer.")
    return messages


def check_not_empty(message: Message) -> None:
    """Refuses a user message that has neither media nor any visible character.

    Raises:
        PromptError: It is empty.
    """
    visible = bool(message.media) or any(
        not isinstance(p, Untrusted) or p.text.strip() for p in message.content
    )
    if message.role == "user" and not visible:
        count = sum(len(p.text) for p in message.content if isinstance(p, Untrusted))
        raise PromptError(
            f"The prompt is empty ({count} characters, none of them visible). Write something."
        )


def positions(arrays: Sequence[Encoded]) -> int:
    """Positions that ids, embeddings and pictures take."""
    return sum(map(len, arrays))


def token_ids(arrays: Sequence[Encoded]) -> Array:
    """All ids (n,) among them."""
    ids = [a for a in arrays if isinstance(a, np.ndarray) and a.ndim == 1]
    return np.concatenate([np.zeros(0, np.int64), *ids])


def leading_ids(arrays: Sequence[Encoded]) -> Array:
    """The ids (n,) in front of the first embeddings or picture."""
    plain = itertools.takewhile(lambda a: isinstance(a, np.ndarray) and a.ndim == 1, arrays)
    return token_ids(list(plain))
