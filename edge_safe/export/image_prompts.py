"""What tokenizer and chat template have to be for prompts with pictures, checked before weights."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from transformers import AutoTokenizer, PreTrainedTokenizerBase

from edge_safe.errors import ExportError
from edge_safe.models.prompts import template_parts
from edge_safe.runtime.image_tokens import Layout, markers
from edge_safe.runtime.prompt import token_ids
from edge_safe.runtime.tokens import Tokens, Trusted

TEMPLATE_FILE = "chat_template.jinja"
# Where checkpoints of before 2025 have it.
OLD_TEMPLATE_FILE = "chat_template.json"


def read_tokenizer(folder: Path) -> PreTrainedTokenizerBase:
    """Reads a checkpoint's tokenizer.

    Raises:
        ExportError: transformers refuses it.
    """
    try:
        tokenizer: PreTrainedTokenizerBase = AutoTokenizer.from_pretrained(folder)
    except (OSError, ValueError, KeyError) as error:
        raise ExportError(f"transformers refuses the tokenizer of {folder}: {error}") from error
    return tokenizer


def placeholder_of(tokenizer: PreTrainedTokenizerBase, token_id: int, layout: Layout) -> str:
    """The placeholder, after a look at it and the markers.

    Raises:
        ExportError: Text could produce one, or it swallows what stands beside it.
    """
    added = tokenizer.added_tokens_decoder
    token = added.get(token_id)
    if token is None or not token.special:
        raise ExportError(
            f"The placeholder of pictures (id {token_id}) is no special token of "
            "the tokenizer, so a user's text could produce it. Mark it as special in "
            "tokenizer.json."
        )
    if token.lstrip or token.rstrip:
        raise ExportError(
            f"The placeholder {token.content!r} swallows white space beside it (lstrip, rstrip), "
            "which prompts with pictures cannot follow."
        )
    ordinary = {entry.content for entry in added.values() if not entry.special}
    found = ordinary.intersection(markers(layout))
    if found:
        raise ExportError(
            f"The markers {sorted(found)} are tokens that are not special, so a user's text could "
            "produce them. Mark them as special in tokenizer.json."
        )
    return str(token.content)


def whole_template(folder: Path, tokenizer: PreTrainedTokenizerBase) -> str:
    """The chat template with the token that the processor puts in front of a prompt.

    The processor lets the tokenizer add its first token (``<s>``) unless the template wrote it;
    the runtime tokenizes without additions, so that the template has to write it.

    Raises:
        ExportError: There is no template, or the tokenizer adds something behind the text.
    """
    old = folder / OLD_TEMPLATE_FILE
    if tokenizer.chat_template is None and old.is_file():
        try:
            tokenizer.chat_template = json.loads(old.read_text(encoding="utf-8"))["chat_template"]
        except (ValueError, KeyError, TypeError) as error:
            raise ExportError(f"{old} holds no chat_template: {error!r}.") from error
    if not isinstance(tokenizer.chat_template, str):
        raise ExportError(
            f"{folder} has no chat template, so there is no place for a safety token. "
            f"Put {TEMPLATE_FILE} beside the model."
        )
    plain = tokenizer("a", add_special_tokens=False)["input_ids"]
    whole = tokenizer("a")["input_ids"]
    first, behind = whole[: len(whole) - len(plain)], whole[len(whole) - len(plain) :]
    if behind != plain:
        raise ExportError("The tokenizer adds tokens behind a text, which no answer could follow.")
    start = "".join(tokenizer.convert_ids_to_tokens(first))
    before = _rendered(tokenizer)
    adds = bool(start) and not before.startswith(start)
    if adds:
        tokenizer.chat_template = f"{{{{ {json.dumps(start)} }}}}{tokenizer.chat_template}"
    expected = tokenizer(before, add_special_tokens=adds)["input_ids"]
    _check_ids(folder, tokenizer, expected)
    return tokenizer.chat_template


def _rendered(tokenizer: PreTrainedTokenizerBase) -> str:
    """A short conversation with a picture through the chat template."""
    parts: Any = [{"type": "image"}, *template_parts("What does it say?\nAnd where is it?")]
    return str(tokenizer.apply_chat_template([{"role": "user", "content": parts}], tokenize=False))


def _check_ids(folder: Path, tokenizer: PreTrainedTokenizerBase, expected: list[int]) -> None:
    """Makes sure that the runtime, which tokenizes between special tokens, finds the same ids.

    Raises:
        ExportError: It does not, or the tokenizer has no tokenizer.json.
    """
    try:
        # The file that goes into the bundle.
        data = (folder / "tokenizer.json").read_bytes()
    except OSError as error:
        raise ExportError(f"{folder} needs a fast tokenizer (tokenizer.json): {error}.") from error
    pieces = Tokens(data, ()).encode([Trusted(_rendered(tokenizer))])
    found = token_ids(pieces).tolist()
    if found != expected:
        raise ExportError(
            "The runtime would tokenize a prompt with a picture otherwise than the checkpoint's "
            f"tokenizer: {found} instead of {expected}. Text behind a special token is probably "
            "begun without the tokenizer's leading space."
        )
