"""The shared libraries that providers of ONNX Runtime load, and the packages that bring them."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

# NVIDIA's drivers by the first number of the CUDA that they serve; the oldest that will do.
# Sources: https://docs.nvidia.com/deploy/cuda-compatibility/ and
# https://docs.nvidia.com/deeplearning/tensorrt/10.16.0/installing-tensorrt/prerequisites.html
OLDEST_DRIVER = {12: 525, 13: 580}

DRIVER_STEM = "libcuda"
NVML_STEM = "libnvidia-ml"

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


_RTX = "tensorrt-rtx"
_CUDA = ("cuda", "tensorrt")
_SAME = {12: 12, 13: 13}

# Numbers behind .so: what providers of onnxruntime-gpu 1.31.1 (CUDA 13) and 1.23.2 (CUDA 12) are
# linked to; for what 1.31.1 opens later (cuFFT, NVRTC, cuDNN), NVIDIA's packages for CUDA 13.
LIBRARIES = (
    Library(DRIVER_STEM, "NVIDIA's driver", (*_CUDA, _RTX), {12: 1, 13: 1}),
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
        _CUDA,
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
        NVML_STEM,
        "NVIDIA's driver, its part for tools",
        (_RTX,),
        {12: 1, 13: 1},
    ),
    Library(
        "libtensorrt_*rtx",
        "TensorRT for RTX",
        (_RTX,),
        {12: 1, 13: 1},
        {12: "'edge-safe[tensorrt-rtx]'", 13: "'edge-safe[tensorrt-rtx]'"},
    ),
)


def library_named(stem: str) -> Library | None:
    """The row of a file name without ``.so`` and what follows."""
    for row in LIBRARIES:
        if re.fullmatch(row.stem.replace("*", r"\w*"), stem):
            return row
    return None


def file_name(library: Library, cuda: int) -> str:
    """Name of a library's file, for one CUDA."""
    return f"{library.stem.removesuffix('*')}.so.{library.suffixes[cuda]}"


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
