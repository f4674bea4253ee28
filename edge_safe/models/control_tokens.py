"""The two control tokens: which vocabulary rows they take, and their place in the tokenizer.

A control token takes a row that no text was ever trained on: one named by the caller, a reserved
special token, or a padding row of the embedding beyond the tokenizer's vocabulary. Only when there
is none does the embedding grow by two.
"""

from __future__ import annotations

import json
import re
import tempfile
from dataclasses import dataclass
from pathlib import Path
from typing import Any, cast

from torch import Tensor
from transformers import AutoTokenizer, PreTrainedModel, PreTrainedTokenizerBase

from edge_safe.errors import CheckpointError, RecipeError

# Names that model makers give to rows kept free for later use.
RESERVED_NAMES = re.compile(
    r"<\|?reserved[\w-]*\|?>|<\|?unused[\w-]*\|?>|\[unused[\w-]*\]|<\|?extra_\d+\|?>"
    r"|<\|?dummy_\d+\|?>|\[control_\d+\]|<SPECIAL_\d+>",
    re.IGNORECASE,
)


@dataclass(frozen=True, slots=True)
class ControlTokens:
    """Strings and vocabulary ids of the two control tokens."""

    safe: str
    unsafe: str
    safe_id: int
    unsafe_id: int

    @property
    def ids(self) -> tuple[int, int]:
        """Ids in the order of the verdict rows: unsafe, safe."""
        return self.unsafe_id, self.safe_id


def install_control_tokens(
    tokenizer: PreTrainedTokenizerBase,
    model: PreTrainedModel,
    safe: str,
    unsafe: str,
    ids: tuple[int, int] | None = None,
) -> tuple[PreTrainedTokenizerBase, ControlTokens]:
    """Gives the control tokens their rows, as special tokens.

    Args:
        tokenizer: The base model's own tokenizer; it is not changed.
        model: The base model; its embedding grows by two rows only if no row is free.
        safe: String of the safe token.
        unsafe: String of the unsafe token.
        ids: Rows (safe, unsafe) to take, or None to find two that are free.

    Returns:
        A tokenizer that knows both strings as special tokens, and the tokens.

    Raises:
        RecipeError: The ids are no rows of the vocabulary, or the strings stand for other rows.
    """
    known = _known_ids(tokenizer, safe, unsafe)
    if known is not None:
        if ids is not None and ids != known:
            raise RecipeError(
                f"The tokenizer has {safe} and {unsafe} at {known}, the recipe asks for {ids}. "
                "Leave the ids out of the recipe, or choose other strings."
            )
        return tokenizer, ControlTokens(safe, unsafe, *known)
    rows = len(cast(Tensor, model.get_input_embeddings().weight))
    chosen = ids if ids is not None else free_rows(tokenizer, rows)
    if chosen is None:
        model.resize_token_embeddings(max(rows, len(tokenizer) + 2))
        chosen = (len(tokenizer), len(tokenizer) + 1)
    elif len(set(chosen)) != 2 or not all(0 <= row < rows for row in chosen):
        raise RecipeError(
            f"The control token ids {chosen} are not two different rows of a vocabulary of {rows}. "
            "Choose two between 0 and the last row, or leave them out of the recipe."
        )
    renamed = _with_tokens(tokenizer, {chosen[0]: safe, chosen[1]: unsafe})
    if _known_ids(renamed, safe, unsafe) != chosen:
        raise CheckpointError(
            f"The tokenizer does not accept {safe} and {unsafe} at {chosen}. "
            "Give the ids of two reserved special tokens in the recipe."
        )
    return renamed, ControlTokens(safe, unsafe, *chosen)


def free_rows(tokenizer: PreTrainedTokenizerBase, rows: int) -> tuple[int, int] | None:
    """Two rows nobody uses: reserved names first, then padding rows, else None."""
    reserved = sorted(
        index for token, index in tokenizer.get_vocab().items() if RESERVED_NAMES.fullmatch(token)
    )
    if len(reserved) >= 2:
        return reserved[0], reserved[1]
    if len(tokenizer) + 2 <= rows:
        return len(tokenizer), len(tokenizer) + 1
    return None


def template_with_safe_token(template: str, safe: str) -> str:
    """A chat template that writes the safe token at the start of every past assistant turn.

    An answer was decoded after the safe token, so a later turn must see it there. A template that
    names the token already is left alone.
    """
    if safe in template:
        return template
    literal = json.dumps(safe)
    return (
        "{%- set answered = namespace(messages=[]) -%}"
        "{%- for message in messages -%}"
        "{%- if message['role'] == 'assistant' and message['content'] is string -%}"
        "{%- set answered.messages = answered.messages + "
        f"[dict(message, content={literal} + message['content'])] -%}}"
        "{%- else -%}"
        "{%- set answered.messages = answered.messages + [message] -%}"
        "{%- endif -%}"
        "{%- endfor -%}"
        "{%- set messages = answered.messages -%}" + template
    )


def _known_ids(
    tokenizer: PreTrainedTokenizerBase, safe: str, unsafe: str
) -> tuple[int, int] | None:
    """Ids of both strings where both are special tokens already, else None."""
    special = {
        token.content: index
        for index, token in tokenizer.added_tokens_decoder.items()
        if token.special
    }
    if safe in special and unsafe in special:
        return special[safe], special[unsafe]
    return None


def _with_tokens(
    tokenizer: PreTrainedTokenizerBase, names: dict[int, str]
) -> PreTrainedTokenizerBase:
    """A copy of the tokenizer in which each id has its new name, as a special token.

    The tokenizer's own files are edited, because the library can add tokens but not rename one.
    """
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        tokenizer.save_pretrained(folder)
        body = folder / "tokenizer.json"
        if not body.exists():
            raise CheckpointError(
                f"{type(tokenizer).__name__} has no tokenizer.json, so its tokens cannot be named. "
                "Use a fast tokenizer."
            )
        document = json.loads(body.read_text(encoding="utf-8"))
        old_names = _rename(document, names)
        body.write_text(json.dumps(document, ensure_ascii=False), encoding="utf-8")
        for other in ("tokenizer_config.json", "special_tokens_map.json"):
            path = folder / other
            if path.exists():
                text = json.loads(path.read_text(encoding="utf-8"))
                renamed = _replaced(text, old_names)
                path.write_text(json.dumps(renamed, ensure_ascii=False), encoding="utf-8")
        renamed_tokenizer: PreTrainedTokenizerBase = AutoTokenizer.from_pretrained(folder)
        return renamed_tokenizer


def _rename(document: dict[str, Any], names: dict[int, str]) -> dict[str, str]:
    """Renames rows in the document of a tokenizer.json; returns old name -> new name."""
    old_names: dict[str, str] = {}
    vocab = document["model"]["vocab"]
    for index, name in names.items():
        if isinstance(vocab, dict):
            old = next((token for token, row in vocab.items() if row == index), None)
            if old is not None:
                vocab[name] = vocab.pop(old)
                old_names[old] = name
        elif index < len(vocab):
            old_names[vocab[index][0]] = name
            vocab[index][0] = name
        added = [entry for entry in document["added_tokens"] if entry["id"] != index]
        old_names |= {
            entry["content"]: name for entry in document["added_tokens"] if entry["id"] == index
        }
        flags = {"single_word": False, "lstrip": False, "rstrip": False, "normalized": False}
        added.append({"id": index, "content": name, **flags, "special": True})
        document["added_tokens"] = sorted(added, key=lambda entry: int(entry["id"]))
    return old_names


def _replaced(value: Any, names: dict[str, str]) -> Any:
    """The JSON value with every string that is an old name replaced by the new one."""
    if isinstance(value, str):
        return names.get(value, value)
    if isinstance(value, list):
        return [_replaced(item, names) for item in value]
    if isinstance(value, dict):
        return {names.get(key, key): _replaced(item, names) for key, item in value.items()}
    return value
