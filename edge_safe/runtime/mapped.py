"""Gives back pages of weight files that nobody reads any more.

ONNX Runtime maps weights and packs those of matrix products into memory of its own when a graph is
opened. The pages that it read for that stay with the process, some 15 MB for pebble. Dropped, they
are read from the file again where they are needed after all.
"""

from __future__ import annotations

import ctypes
import re
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
        maps = _MAPS.read_text()
        advise = ctypes.CDLL(None).madvise
    except (OSError, AttributeError):
        return 0
    advise.argtypes = [ctypes.c_void_p, ctypes.c_size_t, ctypes.c_int]
    # address perms offset device inode path, and lines of fields after it
    private = rf"^([0-9a-f]+)-([0-9a-f]+) ...p \S+ \S+ \S+ +{re.escape(str(folder.resolve()))}/.*$"
    total = 0
    for mapping in re.finditer(private, maps, re.MULTILINE):
        if all(_is_none(maps, field, mapping.end()) for field in ("Anonymous:", "Swap:")):
            first, end = (int(number, 16) for number in mapping.groups())
            failed = advise(first, end - first, _DONTNEED)
            total += 0 if failed else end - first
    return total


def _is_none(maps: str, field: str, start: int) -> bool:
    """Whether a field of the mapping whose lines start there is 0 kB."""
    at = maps.find(field, start)
    return at >= 0 and maps[at + len(field) : maps.find("\n", at)].split() == ["0", "kB"]
