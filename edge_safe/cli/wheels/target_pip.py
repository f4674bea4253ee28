"""Runs pip as if on another machine.

    python -m edge_safe.cli.wheels.target_pip ENVIRONMENT ARGUMENTS…

pip's own `--platform` and `--python-version` choose among wheels for another machine, but
conditions such as `python_version < "3.11"` are still asked of the machine that pip runs on. For
them, ENVIRONMENT replaces what pip reads off this machine: a JSON object of environment markers
(https://packaging.python.org/en/latest/specifications/dependency-specifiers/#environment-markers).
"""

from __future__ import annotations

import importlib
import json
import sys
from typing import Any


def main(environment: str, arguments: list[str]) -> int:
    """Runs one command of pip; returns its exit code.

    Raises:
        SystemExit: This pip does not let itself be told of another machine.
    """
    target: dict[str, str] = json.loads(environment)
    markers: Any = importlib.import_module("pip._vendor.packaging.markers")
    here = markers.default_environment
    markers.default_environment = lambda: {**here(), **target}
    # A pip that reads its markers elsewhere would make a folder with packages missing.
    for name, value in target.items():
        if not markers.Marker(f'{name} == "{value}"').evaluate():
            raise SystemExit(f"ERROR: this pip cannot be told of another machine's {name}")
    code: int = importlib.import_module("pip._internal.cli.main").main(arguments)
    return code


if __name__ == "__main__":
    sys.exit(main(sys.argv[1], sys.argv[2:]))
