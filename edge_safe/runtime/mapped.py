"""Gives back pages of weight files that nobody reads any more.

ONNX Runtime maps weights and packs those of matrix products into memory of its own when a graph is
opened. The pages that it read for that stay with the process, some 15 MB for pebble. Dropped, they
are read from the file again where they are needed after all.
"""

from __future__ import annotations

import ctypes
import mmap
import re
import sys
from pathlib import Path

import numpy as np

_MAPS = Path("/proc/self/maps")
_PAGES = Path("/proc/self/pagemap")
_DONTNEED = 4  # MADV_DONTNEED of Linux

# Linux, Documentation/admin-guide/mm/pagemap.rst: of a page's 64 bits the highest three say that it
# is in memory, that it is swapped out, and that it is the file's own.
_ENTRY, _STATE = 8, 61
_ABSENT, _OF_THE_FILE = 0b000, 0b101


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
    # address perms offset device inode path
    private = rf"^([0-9a-f]+)-([0-9a-f]+) ...p \S+ \S+ \S+ +{re.escape(str(folder.resolve()))}/.*$"
    total = 0
    try:
        advise = ctypes.CDLL(None).madvise
        advise.argtypes = [ctypes.c_void_p, ctypes.c_size_t, ctypes.c_int]
        with _PAGES.open("rb", buffering=0) as pages:
            for mapping in re.finditer(private, _MAPS.read_text(), re.MULTILINE):
                first, end = (int(number, 16) for number in mapping.groups())
                pages.seek(first // mmap.PAGESIZE * _ENTRY)
                count = (end - first) // mmap.PAGESIZE
                states = np.frombuffer(pages.read(count * _ENTRY), np.uint64) >> _STATE
                untouched = (states == _ABSENT) | (states == _OF_THE_FILE)
                if (
                    len(states) == count
                    and untouched.all()
                    and not advise(first, end - first, _DONTNEED)
                ):
                    total += end - first
    except (OSError, AttributeError):
        # Not every system shows a process its own pages; nothing but memory is lost.
        return total
    return total
