"""Safety-token models on small devices: a verdict before every answer.

The names below are loaded when first used, so that ``import edge_safe`` stays light: no typer,
torch, pillow, tokenizers or onnxruntime.
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING

from edge_safe.errors import (
    BundleError,
    CheckpointError,
    DataError,
    EdgeSafeError,
    ExportError,
    GateError,
    IntegrityError,
    JudgeError,
    MediaError,
    PartsError,
    PeerError,
    PolicyError,
    PromptError,
    ProviderError,
    RecipeError,
    SchemaError,
    UsageError,
)

if TYPE_CHECKING:
    from edge_safe.runtime.batch import Assessment, AssessRequest
    from edge_safe.runtime.model import SafeModel
    from edge_safe.runtime.policy import Policy
    from edge_safe.runtime.reply import Reply
    from edge_safe.runtime.verdict import Decision, Verdict

__version__ = "0.1.0"

_LAZY = {
    "SafeModel": "edge_safe.runtime.model",
    "Reply": "edge_safe.runtime.reply",
    "Verdict": "edge_safe.runtime.verdict",
    "Decision": "edge_safe.runtime.verdict",
    "Policy": "edge_safe.runtime.policy",
    "AssessRequest": "edge_safe.runtime.batch",
    "Assessment": "edge_safe.runtime.batch",
}

__all__ = [
    "AssessRequest",
    "Assessment",
    "BundleError",
    "CheckpointError",
    "DataError",
    "Decision",
    "EdgeSafeError",
    "ExportError",
    "GateError",
    "IntegrityError",
    "JudgeError",
    "MediaError",
    "PartsError",
    "PeerError",
    "Policy",
    "PolicyError",
    "PromptError",
    "ProviderError",
    "RecipeError",
    "Reply",
    "SafeModel",
    "SchemaError",
    "UsageError",
    "Verdict",
]


def __getattr__(name: str) -> object:
    """Loads a public name on first use."""
    if name not in _LAZY:
        raise AttributeError(f"module 'edge_safe' has no attribute {name!r}")
    value: object = getattr(importlib.import_module(_LAZY[name]), name)
    globals()[name] = value
    return value


def __dir__() -> list[str]:
    """Lists the lazy names too."""
    return sorted({*globals(), *__all__})
