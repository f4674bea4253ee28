"""What a GPU of NVIDIA's needs: the driver, CUDA, cuDNN, TensorRT; on a Jetson its system."""

from __future__ import annotations

import re
import shutil
import subprocess
from pathlib import Path
from typing import Any

from edge_safe.cli.doctor.asking import Answer
from edge_safe.cli.doctor.check import Check, version
from edge_safe.runtime.jetson import ROOT, Jetson
from edge_safe.runtime.libraries import diagnose
from edge_safe.runtime.library_table import (
    DRIVER_STEM,
    LIBRARIES,
    OLDEST_DRIVER,
    Library,
    file_name,
    install_command,
)

OLDEST_JETPACK = 6

# "NV Power Mode: 15W", and a line with its number.
_POWER_MODE = re.compile(r"NV Power Mode: (\S+)")
# "< POWER_MODEL ID=2 NAME=MAXN_SUPER >"
_POWER_MODEL = re.compile(r"<\s*POWER_MODEL\s+ID=(\d+)\s+NAME=(\S+)\s*>")
_STRONGEST = "MAXN"

_GROUPS = {
    "CUDA": ("libcudart", "libcublasLt", "libcublas", "libcurand", "libcufft"),
    "cuDNN": ("libcudnn*",),
    "TensorRT": ("libnvinfer*", "libnvonnxparser"),
}
_FOR = {"CUDA": "cuda and tensorrt", "cuDNN": "cuda and tensorrt", "TensorRT": "tensorrt"}


def jetson_checks(jetson: Jetson, root: Path = ROOT) -> list[Check]:
    """The system of a Jetson, and how much power it lets itself take."""
    installed = _package_version("nvidia-jetpack")
    found = f"{jetson}, nvidia-jetpack {installed}" if installed else str(jetson)
    generation = jetson.generation
    if generation and generation.jetpack < OLDEST_JETPACK:
        system = Check("Jetson", "note", found, "its Python is too old: flash JetPack 6 or 7")
    elif generation is None:
        system = Check(
            "Jetson", "note", found, "edge-safe knows JetPack 6 and 7; in a container that is fine"
        )
    else:
        system = Check("Jetson", "ok", found)
    return [system, _power_mode(root)]


def nvidia_checks(seen: Answer, jetson: Jetson | None) -> list[Check]:
    """Driver, CUDA, cuDNN, TensorRT, in the order in which one stands on the other."""
    if seen.document is None:
        what = f"looking for NVIDIA's libraries {seen.ending}"
        return [Check("NVIDIA driver", "note", what, "reinstall the driver and its libraries")]
    libraries: dict[str, str | None] = seen.document["libraries"]
    built_for: int | None = seen.document["cuda"]
    checks = [_driver(seen.document, jetson)]
    there = jetson is not None or seen.document["driver"] is not None
    if not there and built_for is None:
        return checks  # neither a GPU nor an onnxruntime for one
    for name, stems in _GROUPS.items():
        rows = [row for row in LIBRARIES if row.stem in stems]
        checks.append(_group(name, rows, libraries, built_for, jetson))
    if jetson is None:
        checks.append(_tensorrt_rtx())
    return checks


def _driver(document: dict[str, Any], jetson: Jetson | None) -> Check:
    name, driver, gpu = "NVIDIA driver", document["driver"], document["gpu"]
    serves: str | None = document["libraries"].get(f"{DRIVER_STEM}.so.1")
    if driver is None and serves is None:
        return Check(
            name,
            "note",
            "none found",
            "only cuda, tensorrt and tensorrt-rtx need one: install NVIDIA's driver "
            f"({OLDEST_DRIVER[13]} or newer); a container needs --gpus all or --runtime nvidia",
        )
    found = driver or "version unknown"
    if gpu is None:
        hint = diagnose("no CUDA-capable device", jetson)
        return Check(name, "note", f"{found}, but CUDA shows no GPU", hint.remedy if hint else "")
    found += f"; {gpu['name']}, compute capability {gpu['capability']}"
    wanted: int | None = document["cuda"]
    if serves and wanted and int(serves.partition(".")[0]) < wanted:
        hint = diagnose("driver version is insufficient", jetson)
        found += f"; it serves CUDA {serves}, and onnxruntime is built for {wanted}"
        return Check(name, "note", found, hint.remedy if hint else "")
    return Check(name, "ok", found)


def _group(
    name: str,
    rows: list[Library],
    libraries: dict[str, str | None],
    built_for: int | None,
    jetson: Jetson | None,
) -> Check:
    """The libraries of one of NVIDIA's packages, for the CUDA that onnxruntime is built for."""
    cuda = built_for or next(
        (cuda for cuda in sorted(OLDEST_DRIVER, reverse=True) if _has(rows, libraries, cuda)),
        max(OLDEST_DRIVER),
    )
    files = {file_name(row, cuda): row for row in rows}
    missing = [file for file in files if libraries.get(file) is None]
    versions = [v for file in files if (v := libraries.get(file))]
    if not missing:
        return Check(name, "ok", ", ".join(versions) or ", ".join(files))
    if jetson:
        hint = diagnose(f"{missing[0]}: cannot open shared object file (CUDA {cuda})", jetson)
        advice = hint.remedy if hint else ""
    else:
        advice = install_command([files[file] for file in missing], cuda)
    return Check(name, "note", f"without {', '.join(missing)}", f"for {_FOR[name]}: {advice}")


def _has(rows: list[Library], libraries: dict[str, str | None], cuda: int) -> bool:
    return all(libraries.get(file_name(row, cuda)) is not None for row in rows)


def _tensorrt_rtx() -> Check:
    """What runs its engines, and what builds them."""
    name, advice = "TensorRT for RTX", "for tensorrt-rtx: pip install 'edge-safe[tensorrt-rtx]'"
    parts = {"plugin": "onnxruntime-ep-nv-tensorrt-rtx", "builder": "tensorrt-rtx"}
    there = {part: found for part, package in parts.items() if (found := version(package))}
    found = ", ".join(f"{part} {number}" for part, number in there.items())
    if "plugin" in there:
        return Check(name, "ok", found)
    return Check(name, "note", f"{found}, no plugin" if found else "not installed", advice)


def _power_mode(root: Path) -> Check:
    name = "Power mode"
    printed = _printed("nvpmodel", "-q")
    mode = _POWER_MODE.search(printed or "")
    if mode is None:
        return Check(name, "note", "unknown", "look at it outside of the container: nvpmodel -q")
    try:
        text = (root / "etc/nvpmodel.conf").read_text(encoding="utf-8", errors="replace")
    except OSError:
        text = ""
    strongest = [found for found in _POWER_MODEL.findall(text) if found[1].startswith(_STRONGEST)]
    if mode[1].startswith(_STRONGEST) or not strongest:
        return Check(name, "ok", mode[1])
    number, best = strongest[-1]
    return Check(
        name, "note", mode[1], f"{best} is faster: sudo nvpmodel -m {number}; sudo jetson_clocks"
    )


def _package_version(package: str) -> str | None:
    """Version of a package of the system."""
    printed = _printed("dpkg-query", "--show", "--showformat=${Version}", package)
    return printed.strip() or None if printed else None


def _printed(*command: str) -> str | None:
    """What a program printed; None where it is not there or fails."""
    program = shutil.which(command[0])
    if program is None:
        return None
    try:
        done = subprocess.run(
            [program, *command[1:]],
            capture_output=True,
            text=True,
            timeout=20,
            stdin=subprocess.DEVNULL,
        )
    except (OSError, subprocess.TimeoutExpired):
        return None
    return done.stdout if done.returncode == 0 else None
