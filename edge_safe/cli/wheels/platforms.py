"""The machines that a folder of wheels can be made for, as a table."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field

from edge_safe.errors import UsageError

# The older names of some tags; wheels still carry them.
# Source: https://peps.python.org/pep-0600/#legacy-manylinux-tags
_LEGACY = {(2, 17): "manylinux2014", (2, 12): "manylinux2010", (2, 5): "manylinux1"}
_OLDEST_GLIBC = {"aarch64": 17, "x86_64": 5}

_JETSON_GPU = (
    "the package index's onnxruntime-gpu for aarch64 holds no kernels for Jetson's GPUs and no "
    "TensorRT; get the wheel made for this JetPack (docs/jetson.md says where) and name it with "
    "--extra-wheel"
)
_RTX = "TensorRT for RTX builds no engines for Jetson's GPUs; take TensorRT with the extra gpu"


@dataclass(frozen=True, slots=True)
class Platform:
    """One row of the table.

    Attributes:
        name: As ``--platform`` takes it.
        machine: ``aarch64`` or ``x86_64``.
        glibc: Version of its C library.
        pythons: Versions of Python that it has or may have; the first is the usual one.
        sources: Where that stands.
        own_wheels: Packages whose wheel in the package index does not serve here, so that the user
            has to bring one, and why.
        without: Extras that cannot work here, and why.
        notes: What INSTALL.txt says besides.
    """

    name: str
    machine: str
    glibc: tuple[int, int]
    pythons: tuple[str, ...]
    sources: tuple[str, ...]
    own_wheels: Mapping[str, str] = field(default_factory=dict)
    without: Mapping[str, str] = field(default_factory=dict)
    notes: tuple[str, ...] = ()

    def __str__(self) -> str:
        """``jetpack-6 (aarch64, glibc 2.35)``."""
        return f"{self.name} ({self.machine}, glibc {self.glibc[0]}.{self.glibc[1]})"

    def tags(self) -> list[str]:
        """Platform tags of wheels that run here, best first; pip compares them letter by letter."""
        names = []
        for minor in range(self.glibc[1], _OLDEST_GLIBC[self.machine] - 1, -1):
            names.append(f"manylinux_2_{minor}")
            if (2, minor) in _LEGACY:
                names.append(_LEGACY[2, minor])
        # What somebody built on such a machine carries no promise, and is wanted all the same.
        return [f"{name}_{self.machine}" for name in (*names, "linux")]

    def python(self, wanted: str | None) -> str:
        """The full version of Python that is meant.

        Args:
            wanted: ``3.12`` say; None for the usual one.

        Raises:
            UsageError: This platform does not have it.
        """
        for version in self.pythons:
            if wanted is None or version.rpartition(".")[0] == wanted or version == wanted:
                return version
        known = ", ".join(version.rpartition(".")[0] for version in self.pythons)
        raise UsageError(f"--python {wanted}: {self.name} has Python {known}; choose one of those.")


_VENV = "The first command needs the system's package python3-venv."
_JETPACK = "CUDA, cuDNN and TensorRT are JetPack's: sudo apt install nvidia-jetpack"
_RASPBERRY_PI = "https://www.raspberrypi.com/software/operating-systems/"
_LINUX_SOURCES = ("https://peps.python.org/pep-0600/",)
_LINUX_PYTHONS = ("3.12.0", "3.10.0", "3.11.0", "3.13.0")

PLATFORMS = {
    row.name: row
    for row in (
        Platform(
            "jetpack-6",
            "aarch64",
            (2, 35),
            ("3.10.12",),
            (
                "https://docs.nvidia.com/jetson/archives/r36.4.3/DeveloperGuide/SO/JetsonOrinSeries.html",
                "https://docs.nvidia.com/jetson/jetpack/release-notes/index.html",
            ),
            own_wheels={"onnxruntime-gpu": _JETSON_GPU},
            without={"tensorrt-rtx": _RTX},
            notes=(_VENV, _JETPACK),
        ),
        Platform(
            "jetpack-7",
            "aarch64",
            (2, 39),
            ("3.12.3",),
            (
                "https://docs.nvidia.com/jetson/archives/r39.2/DeveloperGuide/",
                "https://developer.nvidia.com/embedded/jetpack/downloads",
            ),
            own_wheels={"onnxruntime-gpu": _JETSON_GPU},
            without={"tensorrt-rtx": _RTX},
            notes=(_VENV, _JETPACK),
        ),
        Platform(
            "raspberry-pi-os-12",
            "aarch64",
            (2, 36),
            ("3.11.2",),
            (_RASPBERRY_PI, "Debian 12: packages libc6 2.36 and python3 3.11.2"),
            notes=(_VENV, "The system must be the 64-bit one: `uname -m` prints aarch64."),
        ),
        Platform(
            "raspberry-pi-os-13",
            "aarch64",
            (2, 41),
            ("3.13.5",),
            (_RASPBERRY_PI, "Debian 13: packages libc6 2.41 and python3 3.13.5"),
            notes=(_VENV, "The system must be the 64-bit one: `uname -m` prints aarch64."),
        ),
        Platform("linux-x86_64", "x86_64", (2, 28), _LINUX_PYTHONS, _LINUX_SOURCES),
        Platform("linux-aarch64", "aarch64", (2, 28), _LINUX_PYTHONS, _LINUX_SOURCES),
    )
}  # fmt: skip


def platform_named(name: str) -> Platform:
    """Finds a row.

    Raises:
        UsageError: There is none of that name.
    """
    if name not in PLATFORMS:
        raise UsageError(f"There is no platform {name!r}; choose one of {', '.join(PLATFORMS)}.")
    return PLATFORMS[name]
