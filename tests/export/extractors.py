"""The file of a Whisper feature extractor with 128 bins and short windows."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from transformers import WhisperFeatureExtractor

RATE = 16_000
# Seconds of a window; Whisper's own 30 would make the tests slow.
WINDOW = 2


def write_extractor(folder: Path, **changes: Any) -> None:
    """Writes it, into the same file as an image processor that stands there."""
    path = folder / "preprocessor_config.json"
    beside = json.loads(path.read_text()) if path.is_file() else {}
    WhisperFeatureExtractor(feature_size=128, chunk_length=WINDOW).save_pretrained(folder)
    path.write_text(json.dumps(beside | json.loads(path.read_text()) | changes))
