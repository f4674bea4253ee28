"""The part of Qwen2.5-Omni that answers, alone (``model_type: qwen2_5_omni_thinker``)."""

from __future__ import annotations

from pathlib import Path

from edge_safe.export.families.base import Opened
from edge_safe.export.families.qwen2_5_omni import FAMILY
from edge_safe.export.vision_language import open_vision


def open_checkpoint(folder: Path) -> Opened:
    """Opens such a checkpoint, as training writes it; see ``open_vision``."""
    return open_vision(folder, FAMILY)
