"""Remembers which engines of bundles were compared with their graphs on this device."""

from __future__ import annotations

import hashlib
import json
import os
import tempfile
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path

from edge_safe.runtime.engines.builder import engines_folder
from edge_safe.runtime.engines.device import driver_version, first_gpu
from edge_safe.runtime.session import version


def once_on_this_device(files: dict[str, str], compare: Callable[[], None]) -> None:
    """Compares an engine unless that was done before, with the same files on the same device.

    Where nothing can be remembered it is compared at every load.

    Args:
        files: Hex sha256 of the engine and of all that it is compared with, by name.
        compare: Raises where they differ.
    """
    device = [repr(first_gpu()), driver_version(), version()]
    text = json.dumps([sorted(files.items()), device])
    mark = engines_folder() / "agreed" / hashlib.sha256(text.encode()).hexdigest()
    if mark.is_file():
        return
    compare()
    with suppress(OSError):
        mark.parent.mkdir(parents=True, exist_ok=True)
        handle, name = tempfile.mkstemp(dir=mark.parent)
        os.close(handle)
        Path(name).replace(mark)
