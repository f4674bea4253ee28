"""Digests of files."""

from __future__ import annotations

import hashlib
import mmap
from pathlib import Path


def sha256_file(path: Path) -> str:
    """Lower-case hex sha256 of a file.

    Raises:
        OSError: It cannot be read.
    """
    with path.open("rb") as stream:
        if not path.stat().st_size:
            return hashlib.sha256().hexdigest()
        # Nothing is copied, and other threads run Python until all of it is hashed.
        with mmap.mmap(stream.fileno(), 0, access=mmap.ACCESS_READ) as whole:
            return hashlib.sha256(whole).hexdigest()
