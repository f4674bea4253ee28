"""How each model family prepares pictures and sound: one file per ``model_type``.

A file here is found by its name. It knows the graphs of its own towers and nothing of the gate.
"""

from __future__ import annotations
