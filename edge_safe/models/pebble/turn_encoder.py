"""From the turns of a conversation to the ids of pebble's prompt.

The layout of a user turn: every picture, every recording, a line break, the text. Text can never
become a control token: special tokens are recognized in the template's own words alone.
"""

from __future__ import annotations

import re
import secrets
from collections.abc import Sequence

from transformers import PreTrainedTokenizerBase

from edge_safe.models.pebble.configuration_pebble import PebbleConfig
from edge_safe.models.pebble.turns import Turn


class TurnEncoder:
    """Encodes conversations with one tokenizer and the placeholders of one pebble."""

    def __init__(self, tokenizer: PreTrainedTokenizerBase, config: PebbleConfig) -> None:
        self._tokenizer = tokenizer
        self._config = config
        special = {t.content: i for i, t in tokenizer.added_tokens_decoder.items() if t.special}
        self._special_ids = special
        longest_first = sorted(special, key=len, reverse=True)
        self._special = re.compile("|".join(map(re.escape, longest_first)) or r"(?!)")

    def encode(self, turns: Sequence[Turn]) -> list[int]:
        """Ids of a conversation that ends where the answer begins, placeholders in place."""
        begun = turns[-1].role == "assistant"
        marks = [f"mark{secrets.token_hex(16)}end" for _ in turns]
        text = str(
            self._tokenizer.apply_chat_template(
                [{"role": t.role, "content": m} for t, m in zip(turns, marks, strict=True)],
                tokenize=False,
                add_generation_prompt=not begun,
            )
        )
        ids: list[int] = []
        run = ""
        for turn, mark in zip(turns, marks, strict=True):
            before, _, text = text.partition(mark)
            run = self._encode_template(ids, run, before)
            if turn.images or turn.audio:
                ids += self._plain(run)
                ids += [self._config.image_token_id] * len(turn.images)
                ids += [self._config.audio_token_id] * len(turn.audio)
                ids += self._after_media(turn.text)
                run = ""
            else:
                run += turn.text
        if not begun:
            run = self._encode_template(ids, run, text)
        return ids + self._plain(run)

    def _after_media(self, text: str) -> list[int]:
        """The line break behind media, and the text.

        Break and text are encoded together, as one piece of text would be. Where white space at
        the start of the text grows into one token with the break, that token always stays.
        """
        ids = self._plain("\n" + text)
        if ids[0] == self._config.newline_token_id:
            ids[0] = self._config.media_end_token_id
        return ids

    def _encode_template(self, ids: list[int], run: str, template: str) -> str:
        """Adds the template's words to ``ids``; returns the plain text that may still go on."""
        start = 0
        for match in self._special.finditer(template):
            ids += self._plain(run + template[start : match.start()])
            ids.append(self._special_ids[match.group()])
            run, start = "", match.end()
        return run + template[start:]

    def _plain(self, text: str) -> list[int]:
        """Ids of text in which no special token is recognized."""
        if not text:
            return []
        encoded = self._tokenizer(text, add_special_tokens=False, split_special_tokens=True)
        ids: list[int] = encoded["input_ids"]
        return ids
