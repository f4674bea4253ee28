"""The engine: a bundle folder in, a verdict and only then an answer out.

This room needs numpy and onnxruntime. It knows nothing of torch, of how a bundle was trained or
made, or of terminals.
"""

from __future__ import annotations
