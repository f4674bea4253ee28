"""Checkpoints and fp32 bundles of families, made when a test asks for them."""

from __future__ import annotations

from collections.abc import Callable
from functools import cache
from pathlib import Path
from typing import NamedTuple

import pytest

from tests.conftest import export
from tests.export.audio_families import write_audio_family
from tests.export.families import write_family


class FamilyFiles(NamedTuple):
    checkpoint: Path
    bundle: Path


@pytest.fixture(scope="session")
def family_files(
    tiny_checkpoint: Path, tiny_bundle: Path, tmp_path_factory: pytest.TempPathFactory
) -> Callable[[str], FamilyFiles]:
    """By model_type; each is exported once a session."""

    @cache
    def files(family: str) -> FamilyFiles:
        if family == "llama":
            return FamilyFiles(tiny_checkpoint, tiny_bundle)
        folder = tmp_path_factory.mktemp(family)
        checkpoint = write_family(folder / "checkpoint", family)
        return FamilyFiles(checkpoint, export(checkpoint, folder / "bundle", "fp32"))

    return files


@pytest.fixture(scope="session")
def audio_files(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], FamilyFiles]:
    """By model_type; each is exported once a session."""

    @cache
    def files(family: str) -> FamilyFiles:
        folder = tmp_path_factory.mktemp(family)
        checkpoint = write_audio_family(folder / "checkpoint", family)
        return FamilyFiles(checkpoint, export(checkpoint, folder / "bundle", "fp32"))

    return files
