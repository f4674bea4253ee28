"""What an engine depends on. Two engines are the same exactly if their keys are."""

from __future__ import annotations

import hashlib
import re

import msgspec

# Of the 64 hex digits of a key's hash, those that stand in the name of its folder.
_SHOWN = 16

_UNUSUAL = re.compile(r"[^A-Za-z0-9_-]")


class Device(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """The software and the GPU that an engine is built by and for.

    Attributes:
        onnxruntime: Version.
        tensorrt: Version of the library that is loaded.
        driver: Version of NVIDIA's driver; on Jetson with the release of its system.
        gpu: Name of the GPU.
        compute_capability: Of the GPU, ``8.7`` say.
    """

    onnxruntime: str
    tensorrt: str
    driver: str
    gpu: str
    compute_capability: str


class EngineKey(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """Everything that makes an engine another one when it changes.

    Attributes:
        graph: Name of the graph in its bundle.
        files: Hex sha256 of the graph and of its weight files, by name.
        options: What the provider is told: profiles, precision and the like.
        device: Software and GPU.
    """

    graph: str
    files: dict[str, str]
    options: dict[str, str]
    device: Device

    @property
    def digest(self) -> str:
        """Hex sha256 over all parts; the order of names in them does not count."""
        return hashlib.sha256(msgspec.json.encode(self, order="deterministic")).hexdigest()

    @property
    def name(self) -> str:
        """Name of the engine's folder; what a file's name should not have becomes ``_``."""
        return f"{_UNUSUAL.sub('_', self.graph)}-{self.digest[:_SHOWN]}"
