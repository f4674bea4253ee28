"""The devices that can be planned for: one row each, every figure with its source.

A peak is what the data sheet gives for dense matrices. GPUs: FP16 with FP32 sums on the tensor
cores; where only INT8 is given, FP16 is half of it, as Ampere's tensor cores have it. CPUs: FP32,
fused multiply-adds a cycle times cores times clock, and four times that in INT8, where there are
dot-product instructions.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

from edge_safe.errors import UsageError

Kind = Literal["gpu", "thor", "cpu"]
"""Whose constants hold: GPUs; Jetson Thor, whose prefill and encoding need their own; CPUs."""

UNIFIED, OWN = 0.75, 0.9
"""Share of the memory that a model may take: shared with the system, and a GPU's own."""


@dataclass(frozen=True, slots=True)
class Mode:
    """A power mode.

    Attributes:
        name: As the system calls it.
        gb_per_second: Bandwidth of the memory.
        tflops: Dense peak in floating point.
        int8_tops: Dense peak of 8-bit integers.
    """

    name: str
    gb_per_second: float
    tflops: float
    int8_tops: float


@dataclass(frozen=True, slots=True)
class Device:
    """One device.

    Attributes:
        name: What ``--device`` takes.
        label: What it is called.
        kind: Whose constants hold.
        memory_gb: Size of the memory that the model has to fit into.
        usable: Share of it that a model may take.
        modes: Its power modes, the one taken by default first.
        sources: Where the figures stand.
    """

    name: str
    label: str
    kind: Kind
    memory_gb: float
    usable: float
    modes: tuple[Mode, ...]
    sources: tuple[str, ...]


_ADA = "NVIDIA Ada GPU Architecture whitepaper, v2.01, appendix A"
_ORIN_NANO = "NVIDIA Jetson Orin Nano Series Modules data sheet DS-11105-001"

DEVICES = (
    Device(
        "orin-nano",
        "Jetson Orin Nano 8GB",
        "gpu",
        8.0,
        UNIFIED,
        (Mode("15W", 68.0, 10.0, 20.0),),
        (f"{_ORIN_NANO}: 40 TOPS sparse, 20 dense INT8 at 625 MHz, 68 GB/s",),
    ),
    Device(
        "orin-nano-super",
        "Jetson Orin Nano 8GB Super",
        "gpu",
        8.0,
        UNIFIED,
        (
            Mode("MAXN_SUPER", 102.0, 16.75, 33.5),
            Mode("25W", 102.0, 13.5, 26.9),
            Mode("15W", 68.0, 10.0, 20.0),
        ),
        (
            "NVIDIA, Jetson Orin Nano Developer Kit Gets a Super Boost "
            "(developer.nvidia.com/blog, 2024): 67 TOPS sparse at 1020 MHz, 102 GB/s; before "
            "that 40 TOPS, 68 GB/s",
            "smolhub.com/posts/jetson-nano-super-benchmark-non-reasoning: 820 MHz in mode 25W; "
            "its peaks are those of 1020 MHz scaled by the clock",
        ),
    ),
    Device(
        "orin-nx",
        "Jetson Orin NX 16GB",
        "gpu",
        16.0,
        UNIFIED,
        (Mode("MAXN", 102.4, 14.7, 29.4), Mode("MAXN_SUPER", 102.4, 18.8, 37.5)),
        (
            "NVIDIA Jetson Orin NX Series Modules data sheet DS-10712-001: 32 tensor cores at "
            "918 MHz (1173 MHz in super mode), 102.4 GB/s; peaks of the GPU alone, those of the "
            "Orin Nano's 32 tensor cores scaled by the clock",
        ),
    ),
    Device(
        "agx-orin",
        "Jetson AGX Orin 64GB",
        "gpu",
        64.0,
        UNIFIED,
        (Mode("MAXN", 204.8, 42.5, 85.0),),
        (
            "NVIDIA Jetson AGX Orin Series Technical Brief v1.2: GPU 170 TOPS sparse, 85 dense "
            "INT8 (without the DLAs), 204.8 GB/s",
        ),
    ),
    Device(
        "thor",
        "Jetson AGX Thor 128GB",
        "thor",
        128.0,
        UNIFIED,
        (Mode("MAXN", 273.0, 258.5, 517.0),),
        (
            "NVIDIA Jetson Thor data sheet: T5000, 2070 TFLOPS sparse FP4, 273 GB/s; dense FP8 a "
            "quarter of it, dense FP16 an eighth, INT8 taken like FP8",
        ),
    ),
    Device(
        "rtx-3060",
        "GeForce RTX 3060 12GB",
        "gpu",
        12.0,
        OWN,
        (Mode("default", 360.0, 25.5, 102.0),),
        (
            "nvidia.com/geforce, RTX 3060: 28 SMs at 1.78 GHz, 360 GB/s; 512 FP16 and 2048 INT8 "
            "operations a cycle and SM as in the NVIDIA Ampere GA102 whitepaper, appendix A",
        ),
    ),
    Device(
        "rtx-4060",
        "GeForce RTX 4060 8GB",
        "gpu",
        8.0,
        OWN,
        (Mode("default", 272.0, 30.2, 121.0),),
        (
            f"nvidia.com/geforce, RTX 4060: 24 SMs at 2.46 GHz, 272 GB/s; operations a cycle and "
            f"SM as in the {_ADA}",
        ),
    ),
    Device(
        "rtx-4090",
        "GeForce RTX 4090 24GB",
        "gpu",
        24.0,
        OWN,
        (Mode("default", 1008.0, 165.2, 660.6),),
        (f"{_ADA}: RTX 4090",),
    ),
    Device(
        "rtx-5090",
        "GeForce RTX 5090 32GB",
        "gpu",
        32.0,
        OWN,
        (Mode("default", 1792.0, 209.5, 838.0),),
        ("NVIDIA RTX Blackwell GPU Architecture whitepaper, appendix A: RTX 5090",),
    ),
    Device(
        "raspberry-pi-5",
        "Raspberry Pi 5 8GB, CPU",
        "cpu",
        8.0,
        UNIFIED,
        (Mode("default", 17.1, 0.1536, 0.614),),
        (
            "raspberrypi.com, Raspberry Pi 5 product brief: four Cortex-A76 at 2.4 GHz, "
            "LPDDR4X-4267 of 32 bits",
            "Arm Cortex-A76 Software Optimization Guide: two 128-bit FMLA or SDOT a cycle",
        ),
    ),
    Device(
        "x86-laptop",
        "Framework Laptop 13, Ryzen AI 5 340, CPU",
        "cpu",
        16.0,
        UNIFIED,
        (Mode("default", 89.6, 0.787, 3.15),),
        (
            "amd.com, Ryzen AI 5 340: three Zen 5 cores up to 4.8 GHz, three Zen 5c up to 3.4 "
            "GHz, DDR5-5600 in two channels; 32 FP32 operations a cycle and core",
        ),
    ),
)


def find_device(name: str, power_mode: str | None = None) -> tuple[Device, Mode]:
    """The row of a device, and one of its power modes.

    Args:
        name: Its name.
        power_mode: The mode's name in any case; None takes the first.

    Raises:
        UsageError: There is no such device, or it has no such mode.
    """
    device = next((row for row in DEVICES if row.name == name), None)
    if device is None:
        known = ", ".join(row.name for row in DEVICES)
        raise UsageError(f"There is no device '{name}'; those there are: {known}.")
    if power_mode is None:
        return device, device.modes[0]
    for mode in device.modes:
        if mode.name.lower() == power_mode.lower():
            return device, mode
    modes = ", ".join(mode.name for mode in device.modes)
    raise UsageError(f"{device.label} has no power mode '{power_mode}'; it has {modes}.")
