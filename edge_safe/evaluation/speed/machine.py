"""What a figure was measured on: processor, instruction sets, memory, versions."""

from __future__ import annotations

import os
import platform
import subprocess
from datetime import datetime, timezone
from importlib import metadata
from pathlib import Path
from typing import Any

from edge_safe.runtime.cores import available_cores

INSTRUCTION_SETS = {
    "avx2": "AVX2",
    "avx512f": "AVX-512",
    "avx_vnni": "VNNI",
    "avx512_vnni": "AVX-512 VNNI",
    "avx512_bf16": "AVX-512 BF16",
    "amx_int8": "AMX INT8",
    "asimd": "NEON",
    "asimddp": "dot product",
    "i8mm": "I8MM",
}
"""By the flag in /proc/cpuinfo: those that the kernels of ONNX Runtime make a difference by."""

PACKAGES = ("onnxruntime", "onnxruntime-gpu", "numpy", "tokenizers")


def describe_machine() -> dict[str, Any]:
    """The machine in words and numbers, for the document beside the figures."""
    from edge_safe import __version__

    versions = {name: version for name in PACKAGES if (version := _version(name))}
    return {
        "cpu": _cpu_model(),
        "cores": available_cores(),
        "instruction_sets": instruction_sets(),
        "memory_mb": os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") // 2**20,
        "system": f"{platform.system()} {platform.release()} {platform.machine()}",
        "python": platform.python_version(),
        "versions": {"edge-safe": __version__, **versions},
        "load_average": os.getloadavg()[0],
        "date": datetime.now(timezone.utc).date().isoformat(),
        "commit": _commit(),
    }


def cpu_flags() -> set[str]:
    """Flags of the first core as /proc/cpuinfo names them; empty where there is none."""
    return set(_cpuinfo("flags", "Features").split())


def instruction_sets() -> list[str]:
    """Names of the vector extensions that are there."""
    flags = cpu_flags()
    return [label for flag, label in INSTRUCTION_SETS.items() if flag in flags]


def _cpu_model() -> str:
    """Name of the processor, with family and model where the name alone says little."""
    name = _cpuinfo("model name", "Model", "Hardware") or platform.processor() or "unknown"
    family, model = _cpuinfo("cpu family"), _cpuinfo("model\t")
    return f"{name} (family {family}, model {model})" if family and model else name


def _cpuinfo(*keys: str) -> str:
    """The first value under one of the keys."""
    try:
        text = Path("/proc/cpuinfo").read_text(encoding="utf-8", errors="replace")
    except OSError:
        return ""
    for line in text.splitlines():
        if line.startswith(keys):
            return line.partition(":")[2].strip()
    return ""


def _commit() -> str | None:
    """The commit that runs, where it runs from a checkout; with a plus sign if files differ."""
    import edge_safe

    home = Path(edge_safe.__file__).parents[1]
    git = ["git", "-C", str(home), "describe", "--always", "--exclude=*", "--dirty=+"]
    if not (home / ".git").exists():
        return None
    try:
        done = subprocess.run(git, capture_output=True, text=True, check=False)
    except OSError:
        return None
    return done.stdout.strip() or None


def _version(package: str) -> str | None:
    try:
        return metadata.version(package)
    except metadata.PackageNotFoundError:
        return None
