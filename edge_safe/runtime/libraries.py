"""Why a provider did not start, and how to get what it lacks on this kind of machine.

ONNX Runtime's own words go in, one sentence comes out. Two tables hold what is known: the
libraries by file name, and other failures by the words they show.
"""

from __future__ import annotations

import platform
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

from edge_safe.runtime.jetson import Jetson, this_jetson

# NVIDIA's drivers by the first number of the CUDA that they serve; the oldest that will do.
# Sources: https://docs.nvidia.com/deploy/cuda-compatibility/ and
# https://docs.nvidia.com/deeplearning/tensorrt/10.16.0/installing-tensorrt/prerequisites.html
OLDEST_DRIVER = {12: 525, 13: 580}

DRIVER_STEM = "libcuda"

NVIDIA_INDEX = "https://pypi.nvidia.com"


@dataclass(frozen=True, slots=True)
class Library:
    """One row: a shared library that a provider loads.

    Attributes:
        stem: Its file name up to ``.so``; a trailing ``*`` stands for any ending.
        what: What it is.
        providers: Which providers load it.
        suffixes: The number behind ``.so.`` by the first number of CUDA.
        packages: The Python package that brings it, by the first number of CUDA; ``{suffix}``
            stands for the number behind ``.so.``.
        index: Index of the package, where it is not in the ordinary one.
    """

    stem: str
    what: str
    providers: tuple[str, ...]
    suffixes: Mapping[int, int]
    packages: Mapping[int, str] = field(default_factory=dict)
    index: str = ""


_CUDA = ("cuda", "tensorrt")
_SAME = {12: 12, 13: 13}

# Names behind .so: the NEEDED entries of onnxruntime-gpu 1.31.1 (CUDA 13) and 1.23.2 (CUDA 12).
LIBRARIES = (
    Library(DRIVER_STEM, "NVIDIA's driver", _CUDA, {12: 1, 13: 1}),
    Library(
        "libcudart",
        "the CUDA runtime",
        _CUDA,
        _SAME,
        {12: "nvidia-cuda-runtime-cu12", 13: "nvidia-cuda-runtime"},
    ),
    Library("libcublasLt", "cuBLAS", _CUDA, _SAME, {12: "nvidia-cublas-cu12", 13: "nvidia-cublas"}),
    Library("libcublas", "cuBLAS", _CUDA, _SAME, {12: "nvidia-cublas-cu12", 13: "nvidia-cublas"}),
    Library(
        "libcurand",
        "cuRAND",
        _CUDA,
        {12: 10, 13: 10},
        {12: "nvidia-curand-cu12", 13: "nvidia-curand"},
    ),
    Library(
        "libcufft", "cuFFT", _CUDA, {12: 11, 13: 12}, {12: "nvidia-cufft-cu12", 13: "nvidia-cufft"}
    ),
    Library(
        "libnvrtc",
        "CUDA's compiler",
        (),
        _SAME,
        {12: "nvidia-cuda-nvrtc-cu12", 13: "nvidia-cuda-nvrtc"},
    ),
    Library(
        "libcudnn*",
        "cuDNN",
        _CUDA,
        {12: 9, 13: 9},
        {12: "nvidia-cudnn-cu12", 13: "nvidia-cudnn-cu13"},
    ),
    Library(
        "libnvinfer*",
        "TensorRT",
        ("tensorrt",),
        {12: 10, 13: 10},
        {12: "'tensorrt-cu12=={suffix}.*'", 13: "'tensorrt-cu13=={suffix}.*'"},
        NVIDIA_INDEX,
    ),
    Library(
        "libnvonnxparser",
        "TensorRT's ONNX parser",
        ("tensorrt",),
        {12: 10, 13: 10},
        {12: "'tensorrt-cu12=={suffix}.*'", 13: "'tensorrt-cu13=={suffix}.*'"},
        NVIDIA_INDEX,
    ),
    Library(
        "libtensorrt_*rtx",
        "TensorRT for RTX",
        ("tensorrt-rtx",),
        {12: 1, 13: 1},
        {12: "'edge-safe[tensorrt-rtx]'", 13: "'edge-safe[tensorrt-rtx]'"},
    ),
)

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
        r"Please install TensorRT libraries",
        "TensorRT's libraries are missing",
        f"pip install 'tensorrt-cu13==10.*' --extra-index-url {NVIDIA_INDEX}",
        "sudo apt install nvidia-jetpack",
    ),
)

_MISSING = re.compile(
    r"(lib[\w+-]+)\.so(?:\.(\d+))?[.\d]*: cannot open shared object file"
    r"|(?:Unable to dlopen|dlopen failed for) (lib[\w+-]+)\.so(?:\.(\d+))?"
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
    found = diagnose(provider, message, this_jetson(), platform.machine())
    return f"{found.what}: {found.remedy}."


def diagnose(provider: str, message: str, jetson: Jetson | None, machine: str) -> Diagnosis:
    """Reads a failed start.

    Args:
        provider: As in ``advice``.
        message: As in ``advice``.
        jetson: The Jetson that this is, if it is one.
        machine: ``x86_64`` or ``aarch64``.
    """
    missing = _MISSING.search(message)
    if missing:
        stem, suffix = missing[1] or missing[3], missing[2] or missing[4]
        return _missing_library(stem, suffix, message, jetson)
    for row in FAILURES:
        if found := re.search(row.words, message):
            names = [name for name in found.groups() if name]
            remedy = row.on_jetson if jetson and row.on_jetson else row.remedy
            return Diagnosis(row.what.format(*names), remedy)
    return Diagnosis(
        f"provider '{provider}' is not in this onnxruntime, or did not say why it failed",
        how_to_get(provider, jetson, machine),
    )


def how_to_get(provider: str, jetson: Jetson | None, machine: str) -> str:
    """Which onnxruntime holds a provider, on this kind of machine."""
    if provider == "cpu":
        return "pip install 'edge-safe[cpu]'"
    if provider == "tensorrt-rtx":
        if machine == "x86_64":
            return "pip install 'edge-safe[tensorrt-rtx]'"
        other = "on Jetson use --provider tensorrt" if jetson else "use --provider cuda"
        return f"take another machine: TensorRT for RTX is made for x86-64 alone; {other}"
    if jetson:
        return f"pip uninstall onnxruntime, then {JETSON_WHEEL}"
    if provider == "tensorrt" and machine == "aarch64":
        return (
            "build onnxruntime with TensorRT: the package index's wheel for aarch64 has CUDA alone"
        )
    return "pip uninstall onnxruntime, then pip install 'edge-safe[gpu]'"


def library_named(stem: str) -> Library | None:
    """The row of a file name without ``.so`` and what follows."""
    for row in LIBRARIES:
        if re.fullmatch(row.stem.replace("*", r"\w*"), stem):
            return row
    return None


def install_command(libraries: Sequence[Library], cuda: int, suffix: str | None = None) -> str:
    """One pip command that brings libraries for one CUDA; empty if no package does.

    Args:
        libraries: Rows of the table.
        cuda: First number of CUDA.
        suffix: The number behind ``.so.`` where it is known; by default the table's.
    """
    packages = [
        row.packages[cuda].format(suffix=suffix or row.suffixes[cuda])
        for row in libraries
        if cuda in row.packages
    ]
    indexes = [f"--extra-index-url {row.index}" for row in libraries if row.index]
    words = ["pip install", *dict.fromkeys(packages), *dict.fromkeys(indexes)]
    return " ".join(words) if packages else ""


def _missing_library(
    stem: str, suffix: str | None, message: str, jetson: Jetson | None
) -> Diagnosis:
    name = f"{stem}.so" + (f".{suffix}" if suffix else "")
    row = library_named(stem)
    if row is None:
        return Diagnosis(f"{name} is missing", f"install the system's package that holds {name}")
    what = f"{name} ({row.what}) is missing"
    if row.stem == DRIVER_STEM:
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
    """Which CUDA a missing file belongs to: by its own number, or else by the words around it."""
    fitting = [cuda for cuda, own in row.suffixes.items() if suffix is None or str(own) == suffix]
    if len(fitting) == 1:
        return fitting[0]
    said = {int(number) for number in _CUDA_OF_BUILD.findall(message)} & set(row.suffixes)
    return said.pop() if len(said) == 1 else None
