"""Is this machine a Jetson, and with which release of NVIDIA's system?

It reads two small files of the system and knows nothing of providers.
"""

from __future__ import annotations

import re
from dataclasses import dataclass
from pathlib import Path

ROOT = Path("/")

# "# R36 (release), REVISION: 4.3, GCID: 38968081, BOARD: generic, EABI: aarch64, DATE: …"
_RELEASE = re.compile(r"# R(\d+) \(release\), REVISION: (\d+(?:\.\d+)*)")


@dataclass(frozen=True, slots=True)
class Generation:
    """One row: what a major release of Jetson Linux (L4T) brings.

    Attributes:
        l4t: First number of the release.
        jetpack: First number of the JetPack that it is part of.
        cuda: First number of the CUDA that comes with it.
    """

    l4t: int
    jetpack: int
    cuda: int


# Sources: https://docs.nvidia.com/jetson/archives/ (the developer guides r35, r36, r38, r39) and
# https://developer.nvidia.com/embedded/jetpack/downloads.
GENERATIONS = {
    row.l4t: row
    for row in (
        Generation(35, jetpack=5, cuda=11),
        Generation(36, jetpack=6, cuda=12),
        Generation(38, jetpack=7, cuda=13),
        Generation(39, jetpack=7, cuda=13),
    )
}


@dataclass(frozen=True, slots=True)
class Jetson:
    """A Jetson.

    Attributes:
        l4t: Its release of Jetson Linux, ``36.4.3`` say; empty where it cannot be read, as in a
            container that was not given the file.
        generation: The row of the table; None for an unknown release.
    """

    l4t: str
    generation: Generation | None

    def __str__(self) -> str:
        """As a person would say it: ``JetPack 6 (Jetson Linux 36.4.3)``."""
        release = f"Jetson Linux {self.l4t}" if self.l4t else "Jetson, release unknown"
        return f"JetPack {self.generation.jetpack} ({release})" if self.generation else release


def this_jetson(root: Path = ROOT) -> Jetson | None:
    """The Jetson that this is, or None on any other machine.

    Args:
        root: Where the system's files begin.
    """
    try:
        text = (root / "etc/nv_tegra_release").read_text(encoding="utf-8", errors="replace")
    except OSError:
        text = ""
    found = _RELEASE.search(text)
    if found:
        return Jetson(f"{found[1]}.{found[2]}", GENERATIONS.get(int(found[1])))
    try:
        compatible = (root / "proc/device-tree/compatible").read_bytes()
    except OSError:
        compatible = b""
    return Jetson("", None) if text or b"nvidia,tegra" in compatible else None
