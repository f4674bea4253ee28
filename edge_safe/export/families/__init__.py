"""How each model family is opened for export: one file per Hugging Face ``model_type``.

A file here is found by its name; there is no list to edit.
"""

from __future__ import annotations
