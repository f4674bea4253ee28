"""The language model and its tokenizer, converted once from GGUF and kept in the parts cache.

Dequantized to float32, they are the reference that every figure is measured against.
"""

from __future__ import annotations

import json
import logging
import shutil
import tempfile
from pathlib import Path
from typing import Any

from transformers import AutoTokenizer, LlamaConfig, LlamaForCausalLM

from edge_safe.errors import PartsError
from edge_safe.models.cache import cache_folder
from edge_safe.models.pebble.parts import sha256

CONVERSION = 1
"""Counts up when the conversion itself changes, so that older results are not reused."""

TOKENS = {12: "<|image|>", 13: "<|audio|>", 14: "<|media_end|>", 15: "<|safe|>", 16: "<|unsafe|>"}
"""Rows of code-file markers that ordinary text never contains, and what they are called here."""

logger = logging.getLogger(__name__)


def converted(gguf: Path, cache: Path | None = None) -> Path:
    """Folder with the ordinary Hugging Face files of a GGUF language model.

    Args:
        gguf: The part's file, its hash already checked.
        cache: The parts cache (default: ``cache_folder()``).

    Returns:
        A folder with config.json, model.safetensors (float32), tokenizer.json and
        tokenizer_config.json.

    Raises:
        PartsError: The cache cannot be written.
    """
    root = (cache or cache_folder()) / "converted"
    folder = root / f"{sha256(gguf)[:16]}-{CONVERSION}"
    if folder.is_dir():
        return folder
    logger.info("converting %s, once", gguf.name)
    try:
        root.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryDirectory(dir=root, prefix=".partial-") as name:
            partial = Path(name) / "model"
            _convert(gguf, partial)
            if not folder.is_dir():  # another process may have been faster
                partial.rename(folder)
    except OSError as error:
        if folder.is_dir():
            return folder
        raise PartsError(f"Cannot keep the converted language model in {root}: {error}") from error
    return folder


def _convert(gguf: Path, folder: Path) -> None:
    loaded = LlamaForCausalLM.from_pretrained(gguf.parent, gguf_file=gguf.name)
    # The loaded one remembers the file's quantization and refuses to be saved.
    clean = LlamaForCausalLM(_without_quantization(loaded.config))
    clean.load_state_dict(loaded.state_dict())
    clean.float().save_pretrained(folder)
    AutoTokenizer.from_pretrained(gguf.parent, gguf_file=gguf.name).save_pretrained(folder)
    for name in ("tokenizer.json", "tokenizer_config.json"):
        path = folder / name
        document = json.loads(path.read_text(encoding="utf-8"))
        path.write_text(json.dumps(name_tokens(document), ensure_ascii=False), encoding="utf-8")
    for template in folder.glob("*.jinja"):  # pebble brings its own
        template.unlink()
    shutil.rmtree(folder / "additional_chat_templates", ignore_errors=True)


def _without_quantization(config: LlamaConfig) -> LlamaConfig:
    fields = config.to_dict()
    fields.pop("quantization_config", None)
    fields.pop("dtype", None)
    return LlamaConfig(**fields)


def name_tokens(document: dict[str, Any]) -> dict[str, Any]:
    """Gives the rows of ``TOKENS`` their names, in either of a tokenizer's two JSON files."""
    if "model" in document:
        vocabulary: dict[str, int] = document["model"]["vocab"]
        names = {row: token for token, row in vocabulary.items() if row in TOKENS}
        for row, old in names.items():
            vocabulary[TOKENS[row]] = vocabulary.pop(old)
        added = {entry["id"]: entry for entry in document["added_tokens"]}
        for row, name in TOKENS.items():
            flags = {"single_word": False, "lstrip": False, "rstrip": False, "normalized": False}
            added[row] = {"id": row, "content": name, **flags, "special": True}
        document["added_tokens"] = [added[row] for row in sorted(added)]
    document.pop("chat_template", None)
    document.pop("added_tokens_decoder", None)
    return document
