"""Turns whatever a verb raises into one message and an exit code."""

from __future__ import annotations

import errno
from dataclasses import dataclass
from typing import Any

from edge_safe.errors import EdgeSafeError

INTERRUPTED = 130

EXTRA_OF_PACKAGE = {
    "onnxruntime": "cpu",
    "soundfile": "audio",
    "soxr": "audio",
    "accelerate": "train",
    "peft": "train",
    "matplotlib": "eval",
    "gguf": "export",
    "onnx": "export",
    "safetensors": "export",
    "scipy": "export",
    "torch": "export",
    "transformers": "export",
}


@dataclass(frozen=True, slots=True)
class Failure:
    """How a command ends.

    Attributes:
        kind: Name of the error's class, for programs.
        message: What was wrong and what to do, in one line where possible.
        exit_code: As documented in docs/cli.md.
    """

    kind: str
    message: str
    exit_code: int

    def to_dict(self) -> dict[str, Any]:
        """The document that `--json` prints instead of a result."""
        return {"error": {"type": self.kind, "message": self.message, "exit_code": self.exit_code}}


def explain(error: BaseException) -> Failure | None:
    """The failure behind an exception, or None for one that nobody expected."""
    kind = type(error).__name__
    if isinstance(error, EdgeSafeError):
        return Failure(kind, str(error), error.exit_code)
    if isinstance(error, KeyboardInterrupt):
        return Failure(kind, "interrupted; nothing half-written was left behind", INTERRUPTED)
    if isinstance(error, MemoryError):
        return Failure(kind, "out of memory; close other programs or use a smaller input", 1)
    if isinstance(error, ModuleNotFoundError) and error.name:
        package = error.name.partition(".")[0]
        if package in EXTRA_OF_PACKAGE:
            extra = EXTRA_OF_PACKAGE[package]
            return Failure(kind, f"this needs {package}: pip install 'edge-safe[{extra}]'", 1)
    if isinstance(error, OSError):
        return Failure(kind, _os_message(error), 1)
    return None


def _os_message(error: OSError) -> str:
    where = f" ({error.filename})" if error.filename else ""
    if error.errno in (errno.ENOSPC, errno.EDQUOT):
        return f"the disk is full{where}; free some space and run the command again"
    if error.errno in (errno.EACCES, errno.EPERM, errno.EROFS):
        return f"no permission{where}; choose another path or change its rights"
    return f"{error.strerror or error}{where}"
