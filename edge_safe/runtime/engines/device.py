"""What this device would build an engine with: versions of the software, and the GPU.

Read from NVIDIA's own libraries and from the kernel; no CUDA context is made for it. Sources: CUDA
driver API, NVML API and TensorRT's NvInferRuntime.h for names, constants and structures.
"""

from __future__ import annotations

import ctypes
import re
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from edge_safe.errors import ProviderError
from edge_safe.runtime import session
from edge_safe.runtime.engines.key import Device
from edge_safe.runtime.jetson import this_jetson
from edge_safe.runtime.libraries import advice
from edge_safe.runtime.packaged_libraries import load_packaged_libraries

# What ONNX Runtime's TensorRT provider is linked to: 10 since ONNX Runtime 1.18; JetPack 5 has 8.
TENSORRT_LIBRARIES = ("libnvinfer.so.10", "libnvinfer.so.8")

_PROVIDER = "tensorrt"

_CUDA, _NVML = "libcuda.so.1", "libnvidia-ml.so.1"

# CUdevice_attribute.
_INTEGRATED, _MAJOR, _MINOR = 18, 75, 76

_NAME_LENGTH, _BUS_ID_LENGTH = 256, 32


@dataclass(frozen=True, slots=True)
class Gpu:
    """The first GPU that CUDA shows.

    Attributes:
        name: As the driver calls it.
        compute_capability: ``8.7`` say.
        integrated: Whether it shares the system's memory.
        bus_id: Its place, by which NVML knows it too.
    """

    name: str
    compute_capability: str
    integrated: bool
    bus_id: str


class _Memory(ctypes.Structure):
    """NVML's nvmlMemory_t, in bytes."""

    _fields_ = (
        ("total", ctypes.c_ulonglong),
        ("free", ctypes.c_ulonglong),
        ("used", ctypes.c_ulonglong),
    )


def this_device() -> Device:
    """Versions and GPU that engines built here depend on.

    Raises:
        ProviderError: Something is missing that TensorRT needs; the first of it is named.
    """
    session.provider_name(_PROVIDER)
    load_packaged_libraries(_PROVIDER)
    tensorrt = tensorrt_version()
    gpu = first_gpu()
    if gpu is None:
        raise ProviderError(
            "No engine can be built here: CUDA shows no GPU. Check the driver; a container has to "
            "be given the GPU, and CUDA_VISIBLE_DEVICES must not hide it."
        )
    driver = driver_version()
    if driver is None:
        raise ProviderError(
            "No engine can be built here: the version of NVIDIA's driver is unknown, by which its "
            f"engines are told apart. Install {_NVML}, which comes with the driver."
        )
    return Device(
        onnxruntime=session.version(),
        tensorrt=tensorrt,
        driver=driver,
        gpu=gpu.name,
        compute_capability=gpu.compute_capability,
    )


def tensorrt_version(libraries: Sequence[str] = TENSORRT_LIBRARIES) -> str:
    """Version of the first of some TensorRT libraries that is there, ``10.3.0`` say.

    Raises:
        ProviderError: None is there.
    """
    for name in libraries:
        library = _library(name)
        if library is not None:
            number = int(library.getInferLibVersion())
            # Major, minor and patch: 100300 since TensorRT 10, before it 8502 for 8.5.2.
            unit = 10000 if number >= 10000 else 1000
            return f"{number // unit}.{number % unit // 100}.{number % 100}"
    missing = f"{libraries[0]}: cannot open shared object file"
    raise ProviderError(f"No engine can be built here. {advice(_PROVIDER, missing)}")


def driver_version(root: Path = Path("/")) -> str | None:
    """Version of NVIDIA's driver; of a Jetson also the release of its system.

    Args:
        root: Where ``proc`` and ``etc`` are.
    """
    try:
        module = (root / "proc/driver/nvidia/version").read_text(encoding="utf-8")
    except OSError:
        module = ""
    version = re.search(r"\d+\.\d+(?:\.\d+)?", module)
    jetson = this_jetson(root)
    parts = [
        version.group() if version else _nvml_driver(),
        f"Jetson Linux {jetson.l4t}" if jetson and jetson.l4t else None,
    ]
    return ", ".join(part for part in parts if part) or None


def first_gpu() -> Gpu | None:
    """The GPU that a CUDA program gets unless it asks for another one; None without one."""
    cuda = _library(_CUDA)
    device = ctypes.c_int()
    if cuda is None or cuda.cuInit(0) != 0 or cuda.cuDeviceGet(ctypes.byref(device), 0) != 0:
        return None

    def attribute(number: int) -> int:
        value = ctypes.c_int()
        cuda.cuDeviceGetAttribute(ctypes.byref(value), number, device)
        return value.value

    name = ctypes.create_string_buffer(_NAME_LENGTH)
    cuda.cuDeviceGetName(name, _NAME_LENGTH, device)
    bus_id = ctypes.create_string_buffer(_BUS_ID_LENGTH)
    cuda.cuDeviceGetPCIBusId(bus_id, _BUS_ID_LENGTH, device)
    return Gpu(
        name=name.value.decode(),
        compute_capability=f"{attribute(_MAJOR)}.{attribute(_MINOR)}",
        integrated=bool(attribute(_INTEGRATED)),
        bus_id=bus_id.value.decode(),
    )


def free_on_card(gpu: Gpu) -> int | None:
    """Bytes of a GPU's own memory that are free; None where it has none or NVML does not tell."""
    library = None if gpu.integrated else _nvml()
    if library is None:
        return None
    handle, memory = ctypes.c_void_p(), _Memory()
    found = library.nvmlDeviceGetHandleByPciBusId_v2(gpu.bus_id.encode(), ctypes.byref(handle))
    if found != 0 or library.nvmlDeviceGetMemoryInfo(handle, ctypes.byref(memory)) != 0:
        return None
    return int(memory.free)


def _nvml_driver() -> str | None:
    library = _nvml()
    text = ctypes.create_string_buffer(_NAME_LENGTH)
    if library is None or library.nvmlSystemGetDriverVersion(text, _NAME_LENGTH) != 0:
        return None
    return text.value.decode()


def _nvml() -> ctypes.CDLL | None:
    """NVIDIA's management library, ready for use."""
    library = _library(_NVML)
    return None if library is None or library.nvmlInit_v2() != 0 else library


def _library(name: str) -> ctypes.CDLL | None:
    try:
        return ctypes.CDLL(name)
    except OSError:
        return None
