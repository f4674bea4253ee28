"""SmolVLM and SmolVLM2 (``model_type: smolvlm``): Idefics 3 in small."""

from __future__ import annotations

from pathlib import Path

from edge_safe.export.families.base import Opened
from edge_safe.export.families.idefics3 import FAMILY
from edge_safe.export.vision_language import open_vision


def open_checkpoint(folder: Path) -> Opened:
    """Opens a SmolVLM checkpoint; see ``open_vision``."""
    return open_vision(folder, FAMILY)
