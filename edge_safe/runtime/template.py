"""Renders a bundle's chat template without letting any content take part in it.

Every message's content is replaced by a random mark before rendering; the rendered text is then
cut at these marks. So nothing a user writes is ever seen by the template, and the places where
user text begins and ends are known exactly. Where a template has places for media, contents are
given to it as parts, and the placeholders that the template itself wrote are found in what is left.
Nothing here knows about tokens.
"""

from __future__ import annotations

import re
import secrets
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from edge_safe.errors import BundleError, PromptError

ROLES = ("system", "user", "assistant")


@dataclass(frozen=True, slots=True)
class Content:
    """The place of one message's content in the rendered prompt."""

    message: int


@dataclass(frozen=True, slots=True)
class Place:
    """The place of one medium of a message in the rendered prompt."""

    message: int
    medium: int


Part = str | Content | Place


class ChatTemplate:
    """A compiled chat template. Safe to share between threads."""

    def __init__(
        self, source: str, variables: dict[str, str], placeholders: Mapping[str, str] | None = None
    ) -> None:
        """Compiles a template.

        Args:
            source: Jinja text in the conventions of Hugging Face chat templates.
            variables: Extra names the template may use, such as ``bos_token``.
            placeholders: By type of part (``image``), what the template writes in its place.
                With any, contents are lists of parts; without, they are strings.

        Raises:
            BundleError: The template is not valid.
        """
        from edge_safe.runtime.jinja_template import JinjaTemplate

        self._template = JinjaTemplate(source)
        self._variables = variables
        self._kinds = {text: kind for kind, text in (placeholders or {}).items()}
        longest_first = sorted(self._kinds, key=len, reverse=True)
        self._places = re.compile("|".join(map(re.escape, longest_first)) or r"(?!)")

    def render(self, roles: Sequence[str], media: Sequence[Sequence[str]] = ()) -> list[Part]:
        """Renders a conversation up to slot T.

        Where the last role is ``assistant``, its message is an answer that was begun: the prompt
        ends with its content and no new turn is opened.

        Args:
            roles: Role of each message, first to last.
            media: The types of each message's media, which stand in front of its text; empty
                where no message has any.

        Returns:
            Template text, places of content and of media, in order.

        Raises:
            PromptError: A role is unknown, or the template rejects this order of roles.
            BundleError: The template drops, repeats or reorders contents, or has not one place
                for each medium.
        """
        kinds = list(media) or [() for _ in roles]
        for role in roles:
            if role not in ROLES:
                raise PromptError(f"Unknown role '{role}'; use one of {', '.join(ROLES)}.")
        begun = bool(roles) and roles[-1] == "assistant"
        marks = [f"mark{secrets.token_hex(16)}end" for _ in roles]
        messages = [
            {"role": role, "content": self._content(mark, types)}
            for role, mark, types in zip(roles, marks, kinds, strict=True)
        ]
        try:
            text = self._template.render(
                messages=messages, add_generation_prompt=not begun, **self._variables
            )
        except ValueError as error:
            raise PromptError(
                f"The chat template does not accept the roles {list(roles)}: {error}."
            ) from error
        parts: list[Part] = []
        for index, mark in enumerate(marks):
            before, found, text = text.partition(mark)
            if not found or mark in text:
                raise BundleError(
                    f"The bundle's chat template does not write the content of message {index} "
                    f"('{roles[index]}') exactly once and in order; its prompts cannot be built."
                )
            parts.extend([before, Content(index)])
        if not begun:
            parts.append(text)
        return [part for part in self._placed(parts, kinds) if part != ""]

    def _content(self, mark: str, kinds: Sequence[str]) -> str | list[dict[str, str]]:
        """A message's content as this template takes it."""
        if not self._kinds:
            return mark
        return [*map(medium_part, kinds), {"type": "text", "text": mark}]

    def _placed(self, parts: Sequence[Part], kinds: Sequence[Sequence[str]]) -> list[Part]:
        """Cuts the template's own text at its placeholders.

        Raises:
            BundleError: There is not one of them for each medium.
        """
        waiting = [
            (kind, Place(message, medium))
            for message, types in enumerate(kinds)
            for medium, kind in enumerate(types)
        ]
        placed: list[Part] = []
        for part in parts:
            if not isinstance(part, str):
                placed.append(part)
                continue
            at = 0
            for match in self._places.finditer(part):
                kind = self._kinds[match.group()]
                found = next((entry for entry in waiting if entry[0] == kind), None)
                if found is None:
                    raise BundleError(
                        f"The bundle's chat template writes {match.group()} more often than there "
                        "are media; its prompts cannot be built."
                    )
                waiting.remove(found)
                placed += [part[at : match.start()], found[1]]
                at = match.end()
            placed.append(part[at:])
        if waiting:
            raise BundleError(
                f"The bundle's chat template has no place for {len(waiting)} of the media "
                f"({waiting[0][0]}); its prompts cannot be built."
            )
        return placed


def medium_part(kind: str) -> dict[str, str]:
    """A picture or sound as templates take it: some look at its type, others for its key."""
    return {"type": kind, kind: ""}
