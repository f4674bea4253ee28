"""What a bundle holds in memory while it serves one request."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass

from edge_safe.evaluation.planning.devices import Device
from edge_safe.evaluation.speed.limits import cache_bytes
from edge_safe.runtime.bundle import Bundle
from edge_safe.runtime.external_data import external_files
from edge_safe.runtime.prefill import CHUNK, PREFILL

CPU_BASE = 60e6
"""Python, numpy and ONNX Runtime before a model is loaded: 57 MB resident with 1.32 on x86."""

GPU_BASE = 900e6
"""What GPU processes hold beside weights and cache: TensorRT Edge-LLM 0.9's memory on an Orin Nano
less those of Qwen3-0.6B and Qwen3-1.7B leaves 0.8 and 1.0 GB."""

CPU_COPIES = 2.0
"""On CPUs ONNX Runtime keeps multiplied weights a second time, in the order its kernels read."""

_TEXT = ("embed_tokens", "gate", "decoder", f"gate{PREFILL}", f"decoder{PREFILL}")
_LIVE_TENSORS = 4  # of a layer at one time, each as wide as the widest
_WIDEST = 4  # MLPs are mostly four times as wide as the layers
_FLOAT = 4


@dataclass(frozen=True, slots=True)
class Memory:
    """Bytes, by what holds them."""

    weights: float
    cache: float
    activations: float
    base: float

    @property
    def total(self) -> float:
        """All together."""
        return self.weights + self.cache + self.activations + self.base


def memory_of(
    bundle: Bundle, device: Device, prompt: int, context: int, graphs: Iterable[str]
) -> Memory:
    """Memory on one device.

    Args:
        bundle: The bundle.
        device: The device.
        prompt: Tokens of the prompt, which are computed in chunks.
        context: Tokens in the cache.
        graphs: Graphs that are opened beside those of the language model.

    Raises:
        BundleError: A graph is missing or damaged.
    """
    manifest = bundle.manifest
    copies, base = (CPU_COPIES, CPU_BASE) if device.kind == "cpu" else (1.0, GPU_BASE)
    files = {
        file
        for name in (*_TEXT, *graphs)
        if name in manifest.graphs
        for file in _files(bundle, manifest.graphs[name].file)
    }
    weights = copies * sum(manifest.files[file].size for file in files)
    live = min(prompt, CHUNK) * manifest.model.hidden_size * _WIDEST * _LIVE_TENSORS * _FLOAT
    cache = cache_bytes(manifest, context) + _gate_columns(bundle, context)
    return Memory(weights, cache, live, base)


def _files(bundle: Bundle, graph: str) -> set[str]:
    """A graph and the weights that it points to."""
    return {graph, *external_files(bundle.read(graph))}


def _gate_columns(bundle: Bundle, positions: int) -> int:
    """Bytes of the states that the safety attention reads."""
    attention = bundle.manifest.safety.attention
    if attention is None:
        return 0
    return len(attention.layers) * bundle.manifest.model.hidden_size * _FLOAT * positions
