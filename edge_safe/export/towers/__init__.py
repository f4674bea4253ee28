"""Graphs beside the language model: encoders of pictures and sound, and their projectors.

Emitted node by node from the torch modules, as the language model is. Knows nothing of families.
"""

from __future__ import annotations
