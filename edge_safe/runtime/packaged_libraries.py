"""Loads NVIDIA's libraries that came as Python packages, where no loader would look for them.

A library that is loaded is found by its name from then on, by a provider of ONNX Runtime too. It
knows where packages keep their libraries; ``library_table.py`` knows which ones a provider wants.
"""

from __future__ import annotations

import ctypes
import importlib.util
import re
from collections.abc import Iterator
from contextlib import suppress
from pathlib import Path

from edge_safe.runtime.library_table import LIBRARIES

_CUDA_VERSION = re.compile(r"^cuda_version = '(\d+)", re.MULTILINE)


def cuda_of_onnxruntime() -> int | None:
    """First number of the CUDA that the installed onnxruntime is built for; None for none.

    It is read from a file of the package, which is not imported.
    """
    for folder in _locations("onnxruntime"):
        with suppress(OSError):
            text = (folder / "capi/build_and_package_info.py").read_text(encoding="utf-8")
            if found := _CUDA_VERSION.search(text):
                return int(found[1])
    return None


def load_packaged_libraries(provider: str) -> list[Path]:
    """Loads what Python packages hold of a provider's libraries; what fails to load is left out.

    Args:
        provider: ``cuda`` or ``tensorrt``; others need nothing.

    Returns:
        The files that are loaded now.
    """
    cuda = cuda_of_onnxruntime()
    loaded = []
    for path in _files(provider, cuda) if cuda else ():
        with suppress(OSError):
            ctypes.CDLL(str(path))
            loaded.append(path)
    return loaded


def _files(provider: str, cuda: int) -> Iterator[Path]:
    """Files of a provider's libraries, those first that others stand on."""
    folders = [
        *(lib for root in _locations("nvidia") for lib in sorted(root.glob("*/lib"))),
        *_locations("tensorrt_libs"),
    ]
    for row in LIBRARIES:
        if provider in row.providers and row.packages and cuda in row.suffixes:
            for folder in folders:
                yield from sorted(folder.glob(f"{row.stem}.so.{row.suffixes[cuda]}"))


def _locations(package: str) -> list[Path]:
    """Folders of a package that may be spread over several."""
    spec = importlib.util.find_spec(package)
    return [] if spec is None else [Path(path) for path in spec.submodule_search_locations or ()]
