"""Where parts, features and demo bundles are kept between runs."""

from __future__ import annotations

import os
from pathlib import Path

CACHE_VARIABLE = "EDGE_SAFE_CACHE"


def cache_folder() -> Path:
    """The folder named by EDGE_SAFE_CACHE, or the user's cache."""
    chosen = os.environ.get(CACHE_VARIABLE)
    if chosen:
        return Path(chosen)
    base = os.environ.get("XDG_CACHE_HOME") or os.environ.get("LOCALAPPDATA")
    return (Path(base) if base else Path.home() / ".cache") / "edge-safe"
