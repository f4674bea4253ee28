"""The one place that touches Jinja.

Imported when a template is compiled: that takes 18 ms, in which a load hashes weights already.
"""

from __future__ import annotations

import jinja2
from jinja2.sandbox import ImmutableSandboxedEnvironment

from edge_safe.errors import BundleError


class JinjaTemplate:
    """A compiled template that can reach nothing but what it is given."""

    def __init__(self, source: str) -> None:
        """Compiles a template in the conventions of Hugging Face chat templates.

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

    def render(self, **variables: object) -> str:
        """Renders the template.

        Raises:
            ValueError: The template rejects what it was given.
        """
        try:
            return self._template.render(**variables)
        except jinja2.TemplateError as error:
            raise ValueError(str(error)) from error


def _raise(message: str) -> None:
    """The function by which templates reject a conversation."""
    raise jinja2.TemplateError(message)
