"""`edge-safe doctor`: what this machine can run, and why not, in the order to fix it."""

from __future__ import annotations

import platform
import sys
from dataclasses import asdict, dataclass
from importlib import metadata
from pathlib import Path

from rich.table import Table
from rich.text import Text

from edge_safe.cli import options
from edge_safe.cli.console import Terminal
from edge_safe.errors import ProviderError
from edge_safe.evaluation.speed.machine import cpu_flags, instruction_sets
from edge_safe.runtime.cores import available_cores

OLDEST_PYTHON, OLDEST_EXPORT_PYTHON = (3, 10), (3, 11)
OLDEST_GLIBC = (2, 27)
LEAST_MEMORY_MB, LEAST_EXPORT_MEMORY_MB = 600, 6000
WHEELS = ("onnxruntime", "onnxruntime-gpu", "onnxruntime-qnn", "onnxruntime-openvino")

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


@dataclass(frozen=True, slots=True)
class Check:
    """One finding.

    Attributes:
        name: What was looked at.
        status: ``ok``, ``note`` (works, with a limit) or ``missing`` (keeps bundles from running).
        found: What is there.
        advice: What to do; empty when there is nothing to do.
    """

    name: str
    status: str
    found: str
    advice: str = ""


def command(
    as_json: options.Json = False,
    quiet: options.Quiet = False,
    verbose: options.Verbose = False,
) -> int:
    """Say what this machine can run, and why not, in the order to fix it."""
    terminal = Terminal(as_json, quiet, verbose)
    checks = examine()
    ok = all(check.status != "missing" for check in checks)
    terminal.document({"ok": ok, "checks": [asdict(check) for check in checks]})
    table = Table(box=None, pad_edge=False)
    for heading in ("", "", "found", "what to do"):
        table.add_column(heading, overflow="fold")
    marks = {"ok": "[green]ok[/]", "note": "[yellow]note[/]", "missing": "[red]missing[/]"}
    for check in checks:
        table.add_row(marks[check.status], Text(check.name), Text(check.found), Text(check.advice))
    terminal.show(table)
    terminal.say("This machine can run bundles." if ok else "This machine cannot run bundles yet.")
    return 0 if ok else 1


def examine() -> list[Check]:
    """All findings, most basic first."""
    return [
        _python(),
        _system(),
        _processor(),
        _memory(),
        _onnxruntime_wheels(),
        *_providers(),
        *(_extra(name) for name in PACKAGES_OF_EXTRA),
    ]


def _python() -> Check:
    found = platform.python_version()
    if sys.version_info < OLDEST_PYTHON:
        return Check("Python", "missing", found, "install Python 3.10 to 3.13")
    if sys.version_info < OLDEST_EXPORT_PYTHON:
        return Check("Python", "note", found, "runs bundles; export and train need 3.11 or newer")
    return Check("Python", "ok", found)


def _system() -> Check:
    library, version = platform.libc_ver()
    found = f"{platform.system()} {platform.machine()}, {library or 'libc'} {version or 'unknown'}"
    numbers = tuple(int(part) for part in version.split(".")[:2] if part.isdigit())
    if library == "glibc" and numbers and numbers < OLDEST_GLIBC:
        return Check("System", "missing", found, "onnxruntime's wheels need glibc 2.27 or newer")
    if platform.system() == "Linux" and library != "glibc":
        return Check(
            "System", "note", found, "without glibc, build onnxruntime from source (no wheels)"
        )
    return Check("System", "ok", found)


def _processor() -> Check:
    flags = cpu_flags()
    there = ", ".join(instruction_sets()) or "no vector extension found"
    found = f"{available_cores()} cores, {there}"
    if flags and "avx2" not in flags and "asimd" not in flags:
        return Check("Processor", "note", found, "without AVX2 it runs, several times slower")
    if flags and not flags & {"avx_vnni", "avx512_vnni", "asimddp", "i8mm"}:
        return Check("Processor", "note", found, "no int8 dot product: int4 prefill is slow")
    return Check("Processor", "ok", found)


def _memory() -> Check:
    free = _available_memory_mb()
    if free is None:
        return Check("Memory", "note", "unknown", f"a bundle needs about {LEAST_MEMORY_MB} MB free")
    found = f"{free} MB free"
    if free < LEAST_MEMORY_MB:
        return Check("Memory", "missing", found, f"free {LEAST_MEMORY_MB} MB: close programs")
    if free < LEAST_EXPORT_MEMORY_MB:
        return Check("Memory", "note", found, "enough to run bundles; export pebble elsewhere")
    return Check("Memory", "ok", found)


def _available_memory_mb() -> int | None:
    """What this process may still take: the system's free memory or its container's limit."""
    try:
        lines = Path("/proc/meminfo").read_text(encoding="ascii").splitlines()
        available = next(int(line.split()[1]) for line in lines if line.startswith("MemAvailable"))
    except (OSError, StopIteration, ValueError):
        return None
    free = available * 1024
    try:
        group = Path("/sys/fs/cgroup")
        limit = int((group / "memory.max").read_text(encoding="ascii"))
        used = int((group / "memory.current").read_text(encoding="ascii"))
        free = min(free, limit - used)
    except (OSError, ValueError):
        pass  # no container, or one without a limit ("max")
    return free // 2**20


def _onnxruntime_wheels() -> Check:
    there = [f"{name} {version}" for name in WHEELS if (version := _version(name))]
    if not there:
        return Check(
            "onnxruntime", "missing", "not installed", "pip install 'edge-safe[cpu]' (or [gpu])"
        )
    if len(there) > 1:
        return Check(
            "onnxruntime",
            "note",
            ", ".join(there),
            "these wheels overwrite each other: uninstall all, then install one",
        )
    return Check("onnxruntime", "ok", there[0])


def _providers() -> list[Check]:
    try:
        from edge_safe.runtime import session
    except ImportError as error:
        if not any(_version(name) for name in WHEELS):
            return []
        return [
            Check("Provider cpu", "missing", f"onnxruntime does not load: {error}", "reinstall it")
        ]
    checks = []
    for provider in session.PROVIDERS:
        try:
            name = session.provider_name(provider)
        except ProviderError:
            status = "missing" if provider == "cpu" else "note"
            hint = session.INSTALL_HINTS[provider]
            checks.append(Check(f"Provider {provider}", status, "not here", f"to use it, {hint}"))
        else:
            advice = "" if provider == "cpu" else "starts only with its driver and libraries"
            checks.append(Check(f"Provider {provider}", "ok", name, advice))
    return checks


def _extra(name: str) -> Check:
    packages = {package: _version(package) for package in PACKAGES_OF_EXTRA[name]}
    absent = [package for package, version in packages.items() if version is None]
    there = ", ".join(f"{package} {version}" for package, version in packages.items() if version)
    if absent:
        return Check(
            f"Extra [{name}]",
            "note",
            f"without {', '.join(absent)}",
            f"for {VERBS_OF_EXTRA[name]}: pip install 'edge-safe[{name}]'",
        )
    return Check(f"Extra [{name}]", "ok", there)


def _version(package: str) -> str | None:
    try:
        return metadata.version(package)
    except metadata.PackageNotFoundError:
        return None
