"""Labelled rows: of a file, or the mild ones that come with the package."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import tomllib

from edge_safe.errors import DataError
from edge_safe.models.data import read_json_lines
from edge_safe.runtime.calibration import Modality

BUILTIN = "built-in mild rows"
BUILTIN_FILE = Path(__file__).with_name("mild_rows.toml")


@dataclass(frozen=True, slots=True)
class LabelledRow:
    """One row of a calibration or acceptance file."""

    prompt: str
    images: tuple[Path, ...]
    audio: Path | None
    unsafe: bool

    @property
    def modality(self) -> Modality:
        """The way in. Text alone can torch judge without preprocessing media."""
        if self.audio is not None:
            return "audio"
        return "image" if self.images else "text"


@dataclass(frozen=True, slots=True)
class AcceptanceRows:
    """What a bundle is tested on.

    Attributes:
        name: The file, or ``BUILTIN``.
        rows: The rows.
        builtin: Whether they are those that come with the package.
    """

    name: str
    rows: list[LabelledRow]
    builtin: bool


def acceptance_rows(path: Path | None) -> AcceptanceRows:
    """The rows of a file, or the built-in ones.

    Raises:
        DataError: See ``read_labelled``.
    """
    if path is not None:
        return AcceptanceRows(path.name, read_labelled(path), False)

    table = tomllib.loads(BUILTIN_FILE.read_text(encoding="utf-8"))
    rows = [
        LabelledRow(prompt, (), None, label == "unsafe")
        for label in ("safe", "unsafe")
        for prompt in table[label]
    ]
    return AcceptanceRows(BUILTIN, rows, True)


def read_labelled(path: Path) -> list[LabelledRow]:
    """Reads a JSON Lines file of prompts with labels, media relative to the file.

    Raises:
        DataError: The file is missing or malformed, or does not have rows of both labels.
    """
    rows = []
    for number, line in read_json_lines(path):
        prompt, label = line.get("prompt"), line.get("label")
        if not isinstance(prompt, str) or label not in ("safe", "unsafe"):
            raise DataError(
                f'{path}, line {number}: needs "prompt" (text) and "label" ("safe" or "unsafe").'
            )
        images = line.get("image") or []
        names = [images] if isinstance(images, str) else list(images)
        audio = line.get("audio")
        rows.append(
            LabelledRow(
                prompt,
                tuple(path.parent / str(name) for name in names),
                None if audio is None else path.parent / str(audio),
                label == "unsafe",
            )
        )
    if len({row.unsafe for row in rows}) != 2:
        raise DataError(f"{path} needs rows of both labels, safe and unsafe.")
    return rows


def check_apart(calibration: Sequence[LabelledRow], acceptance: Sequence[LabelledRow]) -> None:
    """Refuses rows that would be fitted on and tested on.

    Raises:
        DataError: Some stand in both files.
    """
    shared = set(calibration) & set(acceptance)
    if shared:
        raise DataError(
            f"{len(shared)} rows stand in both the calibration and the acceptance file. A "
            "threshold must not be tested on rows it was fitted on; split them."
        )
