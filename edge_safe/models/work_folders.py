"""Names of a run's work folders: what a result depends on is in the name.

So a changed recipe starts anew, a changed threshold does not.
"""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from pathlib import Path

import msgspec

from edge_safe.models import base_model
from edge_safe.models.base_model import BaseModel
from edge_safe.models.examples import Encoded
from edge_safe.models.recipe import Recipe


class WorkFolders:
    """Folders below one; the base model, as it is when a folder is asked for, is in every name."""

    def __init__(self, root: Path, base: BaseModel) -> None:
        self._root = root
        self._base = base

    def path(self, name: str, *parts: msgspec.Struct | str, suffix: str = "") -> Path:
        """Where something is kept that depends on ``parts``."""
        digest = hashlib.sha256(base_model.fingerprint(self._base.model).encode())
        for part in parts:
            digest.update(part.encode() if isinstance(part, str) else msgspec.json.encode(part))
        return self._root / f"{name}-{digest.hexdigest()[:16]}{suffix}"

    def of_task(
        self, task: str, seed: int, examples: Sequence[Encoded], *parts: msgspec.Struct | None
    ) -> Path:
        """Folder of a task that trains on examples."""
        content = repr((seed, [(e.prompts, e.unsafe, e.answer) for e in examples]))
        return self.path(task, content, *(p for p in parts if p is not None))

    def of_heads(self, recipe: Recipe, examples: Sequence[Encoded], member: int = 0) -> Path:
        """Folder of one member of the heads."""
        training = msgspec.structs.replace(
            recipe.training, checkpoint_every=1, seed=recipe.training.seed + member
        )
        heads = msgspec.structs.replace(
            recipe.heads, exit_layer="auto", members=1, joined=(), early_layer=None
        )
        parts = (training, heads, recipe.lora, recipe.losses, recipe.optimizer)
        return self.of_task("heads", recipe.training.seed, examples, *parts)
