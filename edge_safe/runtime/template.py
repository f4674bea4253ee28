"""Renders a bundle's chat template without letting any content take part in it.

Every message's content is replaced by a random mark before rendering; the rendered text is then
cut at these marks. So nothing a user writes is ever seen by the template, and the places where
user text begins and ends are known exactly. Nothing here knows about tokens.
"""

from __future__ import annotations

import secrets
from collections.abc import Sequence
from dataclasses import dataclass

import jinja2
from jinja2.sandbox import ImmutableSandboxedEnvironment

from edge_safe.errors import BundleError, PromptError

ROLES = ("system", "user", "assistant")


@dataclass(frozen=True, slots=True)
class Content:
    """The place of one message's content in the rendered prompt."""

    message: int


class ChatTemplate:
    """A compiled chat template. Safe to share between threads."""

    def __init__(self, source: str, variables: dict[str, str]) -> None:
        """Compiles a template.

        Args:
            source: Jinja text in the conventions of Hugging Face chat templates.
            variables: Extra names the template may use, such as ``bos_token``.

        Raises:
            BundleError: The template is not valid.
        """
        environment = ImmutableSandboxedEnvironment(
            trim_blocks=True, lstrip_blocks=True, extensions=["jinja2.ext.loopcontrols"]
        )
        environment.globals["raise_exception"] = _raise
        try:
            self._template = environment.from_string(source)
        except jinja2.TemplateError as error:
            raise BundleError(f"The bundle's chat template is not valid: {error}.") from error
        self._variables = variables

    def render(self, roles: Sequence[str]) -> list[str | Content]:
        """Renders a conversation up to slot T.

        Where the last role is ``assistant``, its message is an answer that was begun: the prompt
        ends with its content and no new turn is opened.

        Args:
            roles: Role of each message, first to last.

        Returns:
            Template text and places of content, in order.

        Raises:
            PromptError: A role is unknown, or the template rejects this order of roles.
            BundleError: The template drops, repeats or reorders contents.
        """
        for role in roles:
            if role not in ROLES:
                raise PromptError(f"Unknown role '{role}'; use one of {', '.join(ROLES)}.")
        begun = bool(roles) and roles[-1] == "assistant"
        marks = [f"mark{secrets.token_hex(16)}end" for _ in roles]
        messages = [
            {"role": role, "content": mark} for role, mark in zip(roles, marks, strict=True)
        ]
        try:
            text = self._template.render(
                messages=messages, add_generation_prompt=not begun, **self._variables
            )
        except jinja2.TemplateError as error:
            raise PromptError(
                f"The chat template does not accept the roles {list(roles)}: {error}."
            ) from error
        parts: list[str | Content] = []
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
        return [part for part in parts if part != ""]


def _raise(message: str) -> None:
    """The function by which templates reject a conversation."""
    raise jinja2.TemplateError(message)
