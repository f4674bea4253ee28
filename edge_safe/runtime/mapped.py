"""Gives back pages of weight files that nobody reads any more.

ONNX Runtime maps weights and packs those of matrix products into memory of its own when a graph is
opened. The pages that it read for that stay with the process, some 15 MB for pebble. Dropped, they
are read from the file again where they are needed after all.
"""

from __future__ import annotations

import ctypes
import sys
from pathlib import Path

_MAPS = Path("/proc/self/smaps")
_DONTNEED = 4  # MADV_DONTNEED of Linux


def give_back(folder: Path) -> int:
    """Drops the pages of private mappings of files in a folder that nobody has written to.

    Does nothing but on Linux. A page that was written to is a copy of this process's own and would
    be lost, so a mapping that has one, in memory or swapped out, is left alone. Nobody may unmap
    files of this folder meanwhile.

    Returns:
        Bytes of these mappings.
    """
    if not sys.platform.startswith("linux"):
        return 0
    try:
        lines = _MAPS.read_text().splitlines()
        advise = ctypes.CDLL(None).madvise
    except (OSError, AttributeError):
        return 0
    advise.argtypes = [ctypes.c_void_p, ctypes.c_size_t, ctypes.c_int]
    inside = f" {folder.resolve()}/"
    total = first = end = 0
    clean = False
    for line in lines:
        name, *rest = line.split(maxsplit=2)
        if "-" in name and not name.endswith(":"):
            # address perms offset device inode path
            ours = rest[0].endswith("p") and inside in line
            first, end = (int(number, 16) for number in name.split("-")) if ours else (0, 0)
        elif name == "Anonymous:":
            clean = rest[0] == "0"
        elif name == "Swap:" and first and clean and rest[0] == "0":
            failed = advise(first, end - first, _DONTNEED)
            total += 0 if failed else end - first
    return total
