"""Digests of files."""

from __future__ import annotations

import hashlib
import mmap
from collections.abc import Callable
from pathlib import Path

# Bytes mapped at a time, multiples of what systems let maps begin at. What is mapped and was read
# counts as memory of this process: little of it while graphs are opened. Between two parts the
# thread needs Python, which a tokenizer that is parsed meanwhile gives to nobody for some 70 ms.
_FIRST_PART = 128 * 2**20
_PART = 32 * 2**20


def sha256_file(path: Path, stopped: Callable[[], bool] = lambda: False) -> str:
    """Lower-case hex sha256 of a file.

    Args:
        path: The file.
        stopped: Asked between parts of large files; if it says so, nobody waits for the digest.

    Raises:
        OSError: It cannot be read, or was not read to its end because nobody waits.
    """
    digest = hashlib.sha256()
    size, start = path.stat().st_size, 0
    with path.open("rb") as stream:
        while start < size:
            if stopped():
                raise OSError("reading it was given up")
            length = min(_PART if start else _FIRST_PART, size - start)
            # Nothing is copied, and other threads run Python while a part is hashed.
            with mmap.mmap(stream.fileno(), length, access=mmap.ACCESS_READ, offset=start) as part:
                digest.update(part)
            start += length
    return digest.hexdigest()
