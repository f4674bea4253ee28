"""The room between a torch checkpoint and a bundle.

It knows torch, ONNX and the runtime. It does not know the command line, nor how a model was
trained. The names below are loaded when first used, so that the command line can read the table of
precisions without torch.
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from edge_safe.export.pipeline import export_bundle
    from edge_safe.export.report import ExportReport

__all__ = ["ExportReport", "export_bundle"]

_LAZY = {
    "ExportReport": "edge_safe.export.report",
    "export_bundle": "edge_safe.export.pipeline",
}


def __getattr__(name: str) -> Any:
    if name not in _LAZY:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(importlib.import_module(_LAZY[name]), name)
