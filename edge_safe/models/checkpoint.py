"""Writes a safety-token model as a folder, whole or not at all.

The folder is an ordinary Hugging Face one with the safety module beside it. A model that offers
``save_trained(folder)`` writes a small form of itself: what was trained, without its parts.
"""

from __future__ import annotations

import os
import shutil
from collections.abc import Sequence
from pathlib import Path

from transformers import PreTrainedModel, PreTrainedTokenizerBase

from edge_safe.errors import CheckpointError
from edge_safe.models.safety_file import SAFETY_JSON, SafetyFile, write_safety
from edge_safe.models.safety_head import SafetyModule

# What a model needs for pictures and sound, and training leaves as it is.
PROCESSOR_FILES = ("preprocessor_config.json", "processor_config.json")


def check_target(out: Path) -> None:
    """Refuses to write over anything but a checkpoint of ours.

    Raises:
        CheckpointError: The folder has other things in it.
    """
    if out.exists() and (not out.is_dir() or (any(out.iterdir()) and not _is_ours(out))):
        raise CheckpointError(
            f"{out} exists and is no safety-token checkpoint. Choose another folder for --out."
        )


def write_checkpoint(
    out: Path,
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    safety: SafetyModule,
    file: SafetyFile,
    beside: Sequence[Path] = (),
    source: Path | None = None,
) -> None:
    """Writes the folder beside its place, then renames it.

    Files of an earlier checkpoint that this one does not write (a model card, the recipe) stay.

    Args:
        out: The folder; a checkpoint that is there is replaced.
        model: The language model, adapters merged.
        tokenizer: With the control tokens and the chat template.
        safety: The safety module.
        file: Its description and calibration.
        beside: Files to copy into the folder.
        source: The base model's folder, whose processor files are taken over.

    Raises:
        CheckpointError: The folder cannot be written; nothing is left half-written.
    """
    check_target(out)
    temporary = out.with_name(f".{out.name}.{os.getpid()}.part")
    aside = out.with_name(f".{out.name}.{os.getpid()}.old")
    try:
        shutil.rmtree(temporary, ignore_errors=True)
        temporary.mkdir(parents=True)
        save_trained = getattr(model, "save_trained", None)
        if save_trained is not None:
            save_trained(temporary)
        else:
            model.save_pretrained(temporary)
            tokenizer.save_pretrained(temporary)
            for name in PROCESSOR_FILES:
                if source is not None and (source / name).is_file():
                    shutil.copy2(source / name, temporary / name)
        write_safety(temporary, safety, file)
        for path in beside:
            shutil.copy2(path, temporary / path.name)
        if out.exists():
            for path in out.iterdir():
                if path.is_file() and not (temporary / path.name).exists():
                    shutil.copy2(path, temporary / path.name)
            out.rename(aside)
        temporary.rename(out)
    except OSError as error:
        if aside.exists() and not out.exists():
            aside.rename(out)
        raise CheckpointError(f"Cannot write the checkpoint {out}: {error}.") from error
    finally:
        shutil.rmtree(temporary, ignore_errors=True)
        shutil.rmtree(aside, ignore_errors=True)


def _is_ours(folder: Path) -> bool:
    return (folder / SAFETY_JSON).exists() or (folder / "recipe.toml").exists()
