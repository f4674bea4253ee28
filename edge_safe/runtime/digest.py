"""Digests of files."""

from __future__ import annotations

import hashlib
import mmap
from pathlib import Path

_PART = 128 * 2**20
"""Bytes mapped at a time; a multiple of what systems let maps begin at."""


def sha256_file(path: Path) -> str:
    """Lower-case hex sha256 of a file.

    Raises:
        OSError: It cannot be read.
    """
    digest = hashlib.sha256()
    size = path.stat().st_size
    with path.open("rb") as stream:
        # Nothing is copied, and other threads run Python while a part is hashed: it is large, since
        # they may be slow to let this one go on, and not all of the file, since what is mapped and
        # was read counts as memory of this process.
        for start in range(0, size, _PART):
            length = min(_PART, size - start)
            with mmap.mmap(stream.fileno(), length, access=mmap.ACCESS_READ, offset=start) as part:
                digest.update(part)
    return digest.hexdigest()
