"""pebble's tokenizer: the language model's own, found where its parts are."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

from transformers import PreTrainedTokenizerFast

from edge_safe.models.pebble import assembly
from edge_safe.models.pebble.configuration_pebble import PebbleConfig


class PebbleTokenizer(PreTrainedTokenizerFast):
    """SmolLM2's tokenizer with pebble's names for five of its reserved rows."""

    @classmethod
    def from_pretrained(
        cls, pretrained_model_name_or_path: str | os.PathLike[str], *inputs: Any, **kwargs: Any
    ) -> PebbleTokenizer:
        """Opens a folder in either of pebble's forms."""
        folder = Path(pretrained_model_name_or_path)
        if not (folder / "tokenizer.json").exists():
            config = PebbleConfig.from_pretrained(folder)
            template = (folder / "chat_template.jinja").read_text(encoding="utf-8")
            kwargs.setdefault("chat_template", template)
            folder = assembly.base_language_model(config, kwargs.pop("wheels", None))
        tokenizer: PebbleTokenizer = super().from_pretrained(folder, *inputs, **kwargs)
        return tokenizer
