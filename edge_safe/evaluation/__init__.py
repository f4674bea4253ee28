"""How good a gate is: metrics, baselines, readers of labelled rows, reports and pictures.

Stands on the runtime's public face; knows nothing of torch, ONNX files or terminals.
"""

from __future__ import annotations
