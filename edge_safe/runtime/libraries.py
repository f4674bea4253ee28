"""Why a provider did not start, and how to get what it lacks on this kind of machine.

ONNX Runtime's own words go in, one sentence comes out. What is known of libraries stands in
``library_table.py``; other failures are told by the words below.
"""

from __future__ import annotations

import platform
import re
from dataclasses import dataclass

from edge_safe.runtime.jetson import Jetson, this_jetson
from edge_safe.runtime.library_table import (
    DRIVER_STEM,
    NVIDIA_INDEX,
    NVML_STEM,
    Library,
    install_command,
    library_named,
)
from edge_safe.runtime.packaged_libraries import cuda_of_onnxruntime

JETSON_WHEEL = "install an onnxruntime-gpu that was built for Jetson (docs/jetson.md says where)"


@dataclass(frozen=True, slots=True)
class Failure:
    """One row: a failure that no single library explains.

    Attributes:
        words: A regular expression; how the failure shows.
        what: What it means.
        remedy: What to do.
        on_jetson: What to do on a Jetson, where that differs.
    """

    words: str
    what: str
    remedy: str
    on_jetson: str = ""


FAILURES = (
    Failure(
        r"version `(GLIBC(?:XX)?_[\d.]+)' not found",
        "this onnxruntime is built for a newer system: it asks for {0}",
        "install an older onnxruntime, or a newer system",
        f"this wheel was made for another JetPack: {JETSON_WHEEL}",
    ),
    Failure(
        r"CUDA failure 35\b|driver version is insufficient|cudaErrorInsufficientDriver",
        "NVIDIA's driver is too old for the CUDA that this onnxruntime is built for",
        "install a newer driver (CUDA 13 needs 580 or newer)",
        f"its CUDA is newer than this JetPack's: {JETSON_WHEEL}",
    ),
    Failure(
        r"CUDA failure 209\b|no kernel image|cudaErrorNoKernelImageForDevice",
        "this onnxruntime holds no kernels for this GPU",
        "install an onnxruntime that is built for its compute capability",
        JETSON_WHEEL,
    ),
    Failure(
        r"CUDA failure 100\b|no CUDA-capable device|cudaErrorNoDevice",
        "no GPU is to be seen",
        "check `nvidia-smi`; a container needs `--gpus all`, a process CUDA_VISIBLE_DEVICES unset",
        "a container needs `--runtime nvidia`, a user the group `video`",
    ),
    Failure(
        r"CUDA failure 2\b|cudaErrorMemoryAllocation|CUDA out of memory",
        "the GPU has too little memory free",
        "close other programs that use it (`nvidia-smi` lists them), or use a smaller bundle",
        "CPU and GPU share it: stop the desktop and other programs (docs/jetson.md)",
    ),
    Failure(
        r"undefined symbol: (\w+)|version `(lib\w+\.so[.\d]*)' not found",
        "libraries of different releases are mixed: {0} is not where it should be",
        "remove the older one from LD_LIBRARY_PATH, or install all of one release",
    ),
    Failure(
        r"could not deserialize engine|failed to deserialize engine",
        "this TensorRT for RTX cannot read the engine: another release built it, or for other GPUs",
        "export the bundle again with this release, and with --capability of this GPU",
    ),
    Failure(
        r"Please install TensorRT libraries",
        "TensorRT's libraries are missing",
        f"pip install 'tensorrt-cu13==10.*' --extra-index-url {NVIDIA_INDEX}",
        "sudo apt install nvidia-jetpack",
    ),
)

# How the system's loader says it, how ONNX Runtime does, and how this module does.
_MISSING = (
    re.compile(r"(lib[\w+-]+)\.so(?:\.(\d+))?[.\d]*: cannot open shared object file"),
    re.compile(r"(?:Unable to dlopen|dlopen failed for) (lib[\w+-]+)\.so(?:\.(\d+))?"),
    re.compile(r"(lib[\w+-]+)\.so(?:\.(\d+))? \([^)]*\) is missing"),
)
_CUDA_OF_BUILD = re.compile(r"CUDA (1\d)\b")


@dataclass(frozen=True, slots=True)
class Diagnosis:
    """What is wrong, and what to do about it; both without a full stop."""

    what: str
    remedy: str


def advice(provider: str, message: str) -> str:
    """Says in one sentence what a provider lacks and how to get it on this machine.

    Args:
        provider: ``cpu``, ``cuda``, ``tensorrt`` or ``tensorrt-rtx``.
        message: What ONNX Runtime, or the system's loader, said.

    Returns:
        What is wrong, a colon, what to do, a full stop.
    """
    jetson, machine = this_jetson(), platform.machine()
    found = diagnose(message, jetson) or Diagnosis(
        f"provider '{provider}' did not say why it failed", how_to_get(provider, jetson, machine)
    )
    return f"{found.what}: {found.remedy}."


def diagnose(message: str, jetson: Jetson | None) -> Diagnosis | None:
    """Reads why a provider did not start; None if the message does not tell.

    Args:
        message: As in ``advice``.
        jetson: The Jetson that this is, if it is one.
    """
    for words in _MISSING:
        if missing := words.search(message):
            return _missing_library(missing[1], missing[2], message, jetson)
    for row in FAILURES:
        if found := re.search(row.words, message):
            names = [name for name in found.groups() if name]
            remedy = row.on_jetson if jetson and row.on_jetson else row.remedy
            return Diagnosis(row.what.format(*names), remedy)
    return None


def how_to_get(provider: str, jetson: Jetson | None, machine: str) -> str:
    """Which onnxruntime holds a provider, on this kind of machine."""
    if provider == "cpu":
        return "pip install 'edge-safe[cpu]'"
    if provider == "tensorrt-rtx":
        # It builds engines for compute capabilities 7.5, 8.0, 8.6, 8.9, 12.0 and 12.1.
        if jetson:
            return "use --provider tensorrt: TensorRT for RTX has no engines for Jetson's GPUs"
        if machine != "x86_64":
            return "use --provider cuda: its plugin (0.5.0) is published for x86_64 alone"
        return "pip install 'edge-safe[tensorrt-rtx]'"
    if jetson:
        return f"pip uninstall onnxruntime, then {JETSON_WHEEL}"
    if provider == "tensorrt" and machine == "aarch64":
        return (
            "build onnxruntime with TensorRT: the package index's wheel for aarch64 has CUDA alone"
        )
    return "pip uninstall onnxruntime, then pip install 'edge-safe[gpu]'"


def _missing_library(
    stem: str, suffix: str | None, message: str, jetson: Jetson | None
) -> Diagnosis:
    name = f"{stem}.so" + (f".{suffix}" if suffix else "")
    row = library_named(stem)
    if row is None:
        return Diagnosis(f"{name} is missing", f"install the system's package that holds {name}")
    what = f"{name} ({row.what}) is missing"
    if row.stem in (DRIVER_STEM, NVML_STEM):
        if jetson:
            return Diagnosis(what, "start the container with `--runtime nvidia`")
        return Diagnosis(
            what, "install NVIDIA's driver; in a container, start it with `--gpus all`"
        )
    cuda = _cuda_of(row, suffix, message)
    if jetson:
        own = jetson.generation.cuda if jetson.generation else None
        if cuda and own and cuda != own:
            return Diagnosis(
                f"{what}: this onnxruntime is built for CUDA {cuda}, and {jetson} has CUDA {own}",
                f"pip uninstall onnxruntime-gpu, then {JETSON_WHEEL}",
            )
        return Diagnosis(what, "sudo apt install nvidia-jetpack")
    if cuda:
        return Diagnosis(what, install_command([row], cuda, suffix))
    both = (f"{install_command([row], c, suffix)} (for CUDA {c})" for c in sorted(row.packages))
    return Diagnosis(what, " or ".join(both))


def _cuda_of(row: Library, suffix: str | None, message: str) -> int | None:
    """Which CUDA a missing file belongs to: by its number, the words around it, or onnxruntime."""
    fitting = [cuda for cuda, own in row.suffixes.items() if suffix is None or str(own) == suffix]
    if len(fitting) == 1:
        return fitting[0]
    said = {int(number) for number in _CUDA_OF_BUILD.findall(message)} & set(row.suffixes)
    cuda = said.pop() if len(said) == 1 else cuda_of_onnxruntime()
    return cuda if cuda in row.suffixes else None
