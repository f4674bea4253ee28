"""Digests of files of any size, read part by part."""

from __future__ import annotations

import hashlib
import mmap
from pathlib import Path

import pytest

from edge_safe.runtime import digest


@pytest.mark.parametrize("parts", [0, 0.5, 2, 2.25, 3, 4.25])
def test_parts_make_the_hash_of_the_whole(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, parts: float
) -> None:
    part = mmap.ALLOCATIONGRANULARITY
    monkeypatch.setattr(digest, "_FIRST_PART", 2 * part)
    monkeypatch.setattr(digest, "_PART", part)
    data = bytes(number * 7 % 251 for number in range(int(parts * part)))
    path = tmp_path / "weights"
    path.write_bytes(data)
    assert digest.sha256_file(path) == hashlib.sha256(data).hexdigest()


def test_a_file_that_is_not_there_is_an_error_of_the_system(tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError):
        digest.sha256_file(tmp_path / "weights")
