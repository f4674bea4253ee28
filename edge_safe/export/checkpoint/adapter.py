"""peft's LoRA adapters, added to the weights they belong to as these are read.

Formula: W + scale * B A with scale = alpha / r, or alpha / sqrt(r) for rank-stabilized LoRA (Hu et
al., arXiv 2106.09685; Kalajdzievski, arXiv 2312.03732).
"""

from __future__ import annotations

import json
import math
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open

from edge_safe.errors import ExportError

CONFIG = "adapter_config.json"
TENSORS = "adapter_model.safetensors"
PREFIX = "base_model.model."
LINEAR_HALVES = (".lora_A.weight", ".lora_B.weight")
BASE = ".base_layer.weight"
EMBEDDING_HALVES = (".lora_embedding_A", ".lora_embedding_B")

# Options that change the formula, with the only value that is understood.
PLAIN: dict[str, Any] = {
    "peft_type": "LORA",
    "bias": "none",
    "fan_in_fan_out": False,
    "lora_bias": False,
    "use_dora": False,
    "use_qalora": False,
    "layer_replication": None,
    "trainable_token_indices": None,
    "target_parameters": None,
}


def is_adapter(folder: Path) -> bool:
    """Whether a folder holds an adapter instead of a whole model."""
    return (folder / CONFIG).is_file() and not (folder / "config.json").is_file()


def weights_folder(folder: Path) -> Path:
    """The folder with the model's own weights: an adapter's base, or the folder itself.

    Raises:
        ExportError: The adapter names no folder that is here.
    """
    if not is_adapter(folder):
        return folder
    name = _config(folder).get("base_model_name_or_path")
    # A relative path is seen from the adapter, else from here, as peft sees it.
    for base in (folder / str(name), Path(str(name))):
        if name and (base / "config.json").is_file():
            return base
    raise ExportError(
        f"The adapter {folder} is for the base model {name!r}, which is no folder here. Fetch it "
        f"and write its folder into base_model_name_or_path of {folder / CONFIG}."
    )


class Adapter:
    """The changes of one adapter folder, by name of the base model's tensor."""

    def __init__(self, folder: Path) -> None:
        """Reads the configuration and the tensors, which are small.

        Raises:
            ExportError: A file is missing or malformed, or the adapter is of a kind that is not
                understood.
        """
        config = _config(folder)
        for key, plain in PLAIN.items():
            if config.get(key, plain) != plain:
                raise ExportError(
                    f"{folder / CONFIG} has {key} {config[key]!r}, which the export cannot merge "
                    f"(it can: {plain!r}). Merge with peft's merge_and_unload and export that."
                )
        self._folder = folder
        self._config = config
        self._tensors = _read(folder / TENSORS)

    def targets(self) -> set[str]:
        """Names of the base model's tensors that it changes."""
        return {_target(key) for key in self._tensors}

    def apply(self, name: str, read: Callable[[str], torch.Tensor]) -> torch.Tensor:
        """A tensor of the base model with the adapter's change, float32 where there is one.

        Args:
            name: Name of the tensor in the base model.
            read: Gives the base model's tensor of that name.
        """
        whole = self._tensors.get(f"{PREFIX}{name}")
        if whole is not None:
            return whole
        module = name.removesuffix(".weight")
        # An adapted embedding is saved along with its adapter.
        saved = self._tensors.get(f"{PREFIX}{module}{BASE}")
        base = read(name) if saved is None else saved
        embedding = f"{PREFIX}{module}.lora_embedding_A" in self._tensors
        halves = EMBEDDING_HALVES if embedding else LINEAR_HALVES
        down, up = (self._tensors.get(f"{PREFIX}{module}{half}") for half in halves)
        if down is None and up is None:
            return base
        if down is None or up is None:
            raise ExportError(f"{self._folder / TENSORS} has but one half of the change to {name}.")
        change = up.float() @ down.float() * self._scale(module, len(down))
        change = change.T if embedding else change
        if change.shape != base.shape:
            raise ExportError(
                f"The adapter changes {name} by a matrix {tuple(change.shape)}, the base model's "
                f"is {tuple(base.shape)}. Is {self._folder} of another base model?"
            )
        return base.float() + change

    def _scale(self, module: str, rank: int) -> float:
        """Factor of a module's change."""
        alpha = self._config.get("lora_alpha", 8)
        for pattern, value in (self._config.get("alpha_pattern") or {}).items():
            if re.match(rf"(.*\.)?({pattern})$", module):
                alpha = value
                break
        return float(alpha) / (math.sqrt(rank) if self._config.get("use_rslora") else rank)


def _target(key: str) -> str:
    """The base model's tensor that a tensor of the adapter belongs to."""
    for part in (*LINEAR_HALVES, *EMBEDDING_HALVES, BASE):
        if key.endswith(part):
            key = key.removesuffix(part) + ".weight"
    return key.removeprefix(PREFIX)


def _config(folder: Path) -> dict[str, Any]:
    path = folder / CONFIG
    try:
        return dict(json.loads(path.read_text(encoding="utf-8")))
    except (OSError, ValueError, TypeError) as error:
        raise ExportError(f"{path} cannot be read: {error}. Write the adapter again.") from error


def _read(path: Path) -> dict[str, torch.Tensor]:
    try:
        with safe_open(path, framework="pt") as file:
            return {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118 - no mapping
    except (OSError, SafetensorError) as error:
        raise ExportError(f"{path} cannot be read ({error}). Fetch it again.") from error
