"""The command line: one file per verb, and one place where an error becomes a message.

Knows nothing of ONNX, torch or training itself; a verb imports what it needs when it runs.
"""

from __future__ import annotations
