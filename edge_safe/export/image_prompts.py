"""What tokenizer and chat template have to be for prompts with media, checked before weights."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from jinja2 import TemplateError
from transformers import AutoTokenizer, PreTrainedTokenizerBase

from edge_safe.errors import ExportError
from edge_safe.models.prompts import template_parts
from edge_safe.runtime.image_tokens import Layout, markers
from edge_safe.runtime.prompt import token_ids
from edge_safe.runtime.template import medium_part
from edge_safe.runtime.tokens import Tokens, Trusted

TEMPLATE_FILE = "chat_template.jinja"
# Where checkpoints of before 2025 have it.
OLD_TEMPLATE_FILE = "chat_template.json"


def read_tokenizer(folder: Path) -> PreTrainedTokenizerBase:
    """Reads a checkpoint's tokenizer, always the one of the library ``tokenizers``.

    Raises:
        ExportError: transformers refuses it.
    """
    try:
        tokenizer: PreTrainedTokenizerBase = AutoTokenizer.from_pretrained(
            folder, mistral_format=False
        )
    except (OSError, ValueError, KeyError) as error:
        raise ExportError(f"transformers refuses the tokenizer of {folder}: {error}") from error
    return tokenizer


def marker_of(tokenizer: PreTrainedTokenizerBase, name: str) -> str:
    """A marker around pictures, by the name of the tokenizer's attribute.

    Raises:
        ExportError: The tokenizer has no such token.
    """
    marker = getattr(tokenizer, name, None)
    if not isinstance(marker, str) or not marker:
        raise ExportError(
            f"The tokenizer names no {name}, which stands beside pictures. Name it under "
            "extra_special_tokens in tokenizer_config.json."
        )
    return marker


def placeholder_of(
    tokenizer: PreTrainedTokenizerBase,
    token_id: int,
    layout: Layout | None = None,
    media: str = "pictures",
) -> str:
    """The placeholder, after a look at it and the markers.

    Raises:
        ExportError: Text could produce one, or it swallows what stands beside it.
    """
    added = tokenizer.added_tokens_decoder
    token = added.get(token_id)
    if token is None or not token.special:
        raise ExportError(
            f"The placeholder of {media} (id {token_id}) is no special token of "
            "the tokenizer, so a user's text could produce it. Mark it as special in "
            "tokenizer.json."
        )
    if token.lstrip or token.rstrip:
        raise ExportError(
            f"The placeholder {token.content!r} swallows white space beside it (lstrip, rstrip), "
            f"which prompts with {media} cannot follow."
        )
    ordinary = {entry.content for entry in added.values() if not entry.special}
    found = ordinary.intersection([] if layout is None else markers(layout))
    if found:
        raise ExportError(
            f"The markers {sorted(found)} are tokens that are not special, so a user's text could "
            "produce them. Mark them as special in tokenizer.json."
        )
    return str(token.content)


def read_template(
    folder: Path, tokenizer: PreTrainedTokenizerBase, one_turn: str | None = None
) -> None:
    """Gives the tokenizer the checkpoint's chat template, wherever that stands.

    Args:
        folder: The checkpoint.
        tokenizer: Its tokenizer.
        one_turn: See ``VisionFamily``.

    Raises:
        ExportError: There is none, or it has turns where the family has none.
    """
    old = folder / OLD_TEMPLATE_FILE
    if tokenizer.chat_template is None and old.is_file():
        try:
            tokenizer.chat_template = json.loads(old.read_text(encoding="utf-8"))["chat_template"]
        except (ValueError, KeyError, TypeError) as error:
            raise ExportError(f"{old} holds no chat_template: {error!r}.") from error
    if one_turn is not None:
        if tokenizer.chat_template is None:
            tokenizer.chat_template = one_turn
        _check_one_turn(tokenizer)
    if not isinstance(tokenizer.chat_template, str):
        raise ExportError(
            f"{folder} has no chat template, so there is no place for a safety token. "
            f"Put {TEMPLATE_FILE} beside the model."
        )


def whole_template(
    folder: Path,
    tokenizer: PreTrainedTokenizerBase,
    kind: str = "image",
    one_turn: str | None = None,
) -> str:
    """The chat template with the token that the processor puts in front of a prompt.

    The processor lets the tokenizer add its first token (``<s>``) unless the template wrote it;
    the runtime tokenizes without additions, so that the template has to write it.

    Args:
        folder: The checkpoint.
        tokenizer: Its tokenizer, whose template is made whole.
        kind: Type of the media that the model takes, as its template knows it.
        one_turn: See ``VisionFamily``.

    Raises:
        ExportError: There is no template, the tokenizer adds something behind the text, or the
            template has turns where the family has none.
    """
    read_template(folder, tokenizer, one_turn)
    plain = tokenizer("a", add_special_tokens=False)["input_ids"]
    whole = tokenizer("a")["input_ids"]
    first, behind = whole[: len(whole) - len(plain)], whole[len(whole) - len(plain) :]
    if behind != plain:
        raise ExportError("The tokenizer adds tokens behind a text, which no answer could follow.")
    start = "".join(tokenizer.convert_ids_to_tokens(first))
    before = rendered(tokenizer, kind)
    adds = bool(start) and one_turn is None and not before.startswith(start)
    if adds:
        tokenizer.chat_template = f"{{{{ {json.dumps(start)} }}}}{tokenizer.chat_template}"
    expected = tokenizer(before, add_special_tokens=adds)["input_ids"]
    _check_ids(folder, tokenizer, kind, expected)
    return str(tokenizer.chat_template)


def _check_one_turn(tokenizer: PreTrainedTokenizerBase) -> None:
    """Makes sure that a template rejects conversations.

    A prompt whose positions see each other would change when the next turn came, and with it what
    is cached of it.

    Raises:
        ExportError: It accepts them.
    """
    roles = ("user", "assistant", "user")
    turns: Any = [{"role": role, "content": template_parts("Hello.")} for role in roles]
    try:
        tokenizer.apply_chat_template(turns, tokenize=False)
    except TemplateError:
        return
    raise ExportError(
        "The chat template accepts several turns, but the positions of this model's prompt all see "
        "each other, so that a second turn would change the first. Take the template away, or let "
        "it raise_exception for more than one message."
    )


def rendered(tokenizer: PreTrainedTokenizerBase, kind: str) -> str:
    """A short conversation with a medium through the chat template."""
    parts: Any = [medium_part(kind), *template_parts("What does it say?\nAnd where is it?")]
    return str(tokenizer.apply_chat_template([{"role": "user", "content": parts}], tokenize=False))


def _check_ids(
    folder: Path, tokenizer: PreTrainedTokenizerBase, kind: str, expected: list[int]
) -> None:
    """Makes sure that the runtime, which tokenizes between special tokens, finds the same ids.

    Raises:
        ExportError: It does not, or the tokenizer has no tokenizer.json.
    """
    try:
        # The file that goes into the bundle.
        data = (folder / "tokenizer.json").read_bytes()
    except OSError as error:
        raise ExportError(f"{folder} needs a fast tokenizer (tokenizer.json): {error}.") from error
    pieces = Tokens(data, ()).encode([Trusted(rendered(tokenizer, kind))])
    found = token_ids(pieces).tolist()
    if found != expected:
        medium = "a picture" if kind == "image" else "a sound"
        raise ExportError(
            f"The runtime would tokenize a prompt with {medium} otherwise than the "
            f"checkpoint's tokenizer: {found} instead of {expected}. Text behind a special token "
            "is probably begun without the tokenizer's leading space."
        )
