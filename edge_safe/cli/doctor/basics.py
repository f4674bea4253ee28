"""What every machine has: Python, system, processor, memory, disk, extras."""

from __future__ import annotations

import platform
import shutil
import sys
from pathlib import Path

from edge_safe.cli.doctor.check import Check, version
from edge_safe.evaluation.speed.machine import cpu_flags, instruction_sets
from edge_safe.models.cache import cache_folder
from edge_safe.runtime.cores import available_cores

OLDEST_PYTHON, OLDEST_EXPORT_PYTHON = (3, 10), (3, 11)
OLDEST_GLIBC = (2, 27)
LEAST_MEMORY_MB, LEAST_EXPORT_MEMORY_MB = 600, 6000
LEAST_DISK_MB = 2000
# On a device whose GPU takes its memory from the system's, less than this calls for swap.
SWAP_BELOW_MB, SWAP_MB = 17000, 4000

PACKAGES_OF_EXTRA = {
    "audio": ("soundfile", "soxr"),
    "export": ("torch", "transformers", "onnx", "safetensors", "gguf"),
    "train": ("torch", "transformers", "accelerate", "peft", "safetensors", "gguf"),
    "eval": ("matplotlib",),
}
VERBS_OF_EXTRA = {
    "audio": "sound in run, chat, classify, eval",
    "export": "export, demo's first run",
    "train": "train",
    "eval": "eval --plot, bench --plot",
}


def python() -> Check:
    """The Python that runs this."""
    found = platform.python_version()
    if sys.version_info < OLDEST_PYTHON:
        return Check("Python", "missing", found, "install Python 3.10 to 3.13")
    if sys.version_info < OLDEST_EXPORT_PYTHON:
        return Check("Python", "note", found, "runs bundles; export and train need 3.11 or newer")
    return Check("Python", "ok", found)


def system() -> Check:
    """Kernel, machine and C library."""
    library, release = platform.libc_ver()
    found = f"{platform.system()} {platform.machine()}, {library or 'libc'} {release or 'unknown'}"
    numbers = tuple(int(part) for part in release.split(".")[:2] if part.isdigit())
    if library == "glibc" and numbers and numbers < OLDEST_GLIBC:
        return Check("System", "missing", found, "onnxruntime's wheels need glibc 2.27 or newer")
    if platform.system() == "Linux" and library != "glibc":
        return Check(
            "System", "note", found, "without glibc, build onnxruntime from source (no wheels)"
        )
    return Check("System", "ok", found)


def processor() -> Check:
    """Cores and vector extensions."""
    flags = cpu_flags()
    there = ", ".join(instruction_sets()) or "no vector extension found"
    found = f"{available_cores()} cores, {there}"
    if flags and "avx2" not in flags and "asimd" not in flags:
        return Check("Processor", "note", found, "without AVX2 it runs, several times slower")
    if flags and not flags & {"avx_vnni", "avx512_vnni", "asimddp", "i8mm"}:
        return Check("Processor", "note", found, "no int8 dot product: int4 prefill is slow")
    return Check("Processor", "ok", found)


def memory() -> Check:
    """What this process may still take."""
    free = _available_memory_mb()
    if free is None:
        return Check("Memory", "note", "unknown", f"a bundle needs about {LEAST_MEMORY_MB} MB free")
    found = f"{free} MB free"
    if free < LEAST_MEMORY_MB:
        return Check("Memory", "missing", found, f"free {LEAST_MEMORY_MB} MB: close programs")
    if free < LEAST_EXPORT_MEMORY_MB:
        return Check("Memory", "note", found, "enough to run bundles; export pebble elsewhere")
    return Check("Memory", "ok", found)


def swap(*, wanted: bool) -> Check:
    """Room on disk for what does not fit into memory.

    Args:
        wanted: Whether this is a device on which building an engine may need it.
    """
    sizes = _meminfo()
    free, all_of_it = sizes.get("SwapFree", 0), sizes.get("SwapTotal", 0)
    found = f"{free} of {all_of_it} MB free" if all_of_it else "none"
    if wanted and sizes.get("MemTotal", 0) < SWAP_BELOW_MB and all_of_it < SWAP_MB:
        return Check(
            "Swap",
            "note",
            found,
            "building an engine takes 3 to 4 times its model: add a swap file (docs/jetson.md)",
        )
    return Check("Swap", "ok", found)


def disk() -> Check:
    """Room where engines and downloads are kept."""
    folder = cache_folder()
    there = next(path for path in (folder, *folder.absolute().parents) if path.exists())
    free = shutil.disk_usage(there).free // 2**20
    found = f"{free} MB free for {folder}"
    if free < LEAST_DISK_MB:
        return Check("Disk", "note", found, "free some, or name another folder: EDGE_SAFE_CACHE")
    return Check("Disk", "ok", found)


def extra(name: str) -> Check:
    """The packages of one of edge-safe's extras."""
    packages = {package: version(package) for package in PACKAGES_OF_EXTRA[name]}
    absent = [package for package, there in packages.items() if there is None]
    present = ", ".join(f"{package} {there}" for package, there in packages.items() if there)
    if absent:
        return Check(
            f"Extra [{name}]",
            "note",
            f"without {', '.join(absent)}",
            f"for {VERBS_OF_EXTRA[name]}: pip install 'edge-safe[{name}]'",
        )
    return Check(f"Extra [{name}]", "ok", present)


def _available_memory_mb() -> int | None:
    """What this process may still take: the system's free memory or its container's limit."""
    free = _meminfo().get("MemAvailable")
    if free is None:
        return None
    try:
        group = Path("/sys/fs/cgroup")
        limit = int((group / "memory.max").read_text(encoding="ascii"))
        used = int((group / "memory.current").read_text(encoding="ascii"))
        free = min(free, (limit - used) // 2**20)
    except (OSError, ValueError):
        pass  # no container, or one without a limit ("max")
    return free


def _meminfo() -> dict[str, int]:
    """Sizes of /proc/meminfo in MB; empty where there is none."""
    sizes = {}
    try:
        for line in Path("/proc/meminfo").read_text(encoding="ascii").splitlines():
            name, _, rest = line.partition(":")
            sizes[name] = int(rest.split()[0]) // 2**10
    except (OSError, ValueError, IndexError):
        return {}
    return sizes
