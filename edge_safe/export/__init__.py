"""The room between a torch checkpoint and a bundle.

It knows torch, ONNX and the runtime. It does not know the command line, nor how a model was
trained.
"""

from __future__ import annotations

from edge_safe.export.pipeline import export_bundle
from edge_safe.export.report import ExportReport

__all__ = ["ExportReport", "export_bundle"]
