"""Whether a build fits into memory, told before it starts."""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

from edge_safe.errors import BundleError
from edge_safe.runtime.engines.plan import EnginePlan
from edge_safe.runtime.manifest import Tensor
from edge_safe.runtime.wire_format import read_fields

# NVIDIA/TensorRT-Edge-LLM, issue 30: a build takes three to four times the model's memory.
FACTOR = 4

_MB = 2**20

# Files of a control group: limit, use, and what of that use the kernel takes back when asked.
_CGROUP_2 = ("memory.max", "memory.current", "inactive_file")
_CGROUP_1 = ("memory.limit_in_bytes", "memory.usage_in_bytes", "total_inactive_file")

# ONNX IR: ModelProto.graph, GraphProto.initializer, TensorProto.external_data, and an entry of it.
_GRAPH, _INITIALIZER, _EXTERNAL, _KEY, _VALUE = 7, 5, 13, 1, 2


@dataclass(frozen=True, slots=True)
class Need:
    """What one graph takes.

    Attributes:
        weights: Bytes of its weights.
        inputs: Bytes of its inputs, keys and values among them, at their largest.
    """

    weights: int
    inputs: int

    @property
    def system(self) -> int:
        """Bytes of system memory that building its engine takes."""
        return FACTOR * self.card

    @property
    def card(self) -> int:
        """Bytes that the engine itself takes at least, wherever it runs."""
        return self.weights + self.inputs


def input_bytes(inputs: list[Tensor], plan: EnginePlan) -> int:
    """Bytes of a graph's inputs in the profile that has the largest.

    Args:
        inputs: As the manifest describes them.
        plan: Its profiles name every input whose shape varies.

    Raises:
        BundleError: One is not named.
    """
    totals = []
    for profile in plan.profiles:
        shapes = {name: sizes.max for name, sizes in profile.shapes.items()}
        totals.append(
            sum(
                math.prod(shapes.get(tensor.name) or _fixed(tensor)) * _bits(tensor.dtype) // 8
                for tensor in inputs
            )
        )
    return max(totals)


def weight_bytes(graph: bytes) -> int:
    """Bytes of a graph, with what it has in other files; those may hold other graphs' weights too.

    Args:
        graph: A serialized ModelProto. Tensors inside of functions and branches do not count.

    Raises:
        BundleError: It is not well-formed.
    """
    try:
        return len(graph) + sum(_external_bytes(memoryview(graph)))
    except (IndexError, ValueError) as error:
        raise BundleError(f"The graph is not a well-formed ONNX file: {error}.") from error


def available(root: Path = Path("/")) -> int | None:
    """Bytes that this process may still take: free memory and swap, within its control group.

    Args:
        root: Where ``proc`` and ``sys`` are.

    Returns:
        None where the system does not tell.
    """
    try:
        lines = (root / "proc/meminfo").read_text(encoding="ascii").splitlines()
        entries = {line.split(":")[0]: int(line.split()[1]) * 1024 for line in lines}
        free = entries["MemAvailable"] + entries.get("SwapFree", 0)
    except (OSError, KeyError, ValueError, IndexError):
        return None
    return min([free, *_left_in_groups(root)])


def require(need: Need, system: int | None, card: int | None) -> None:
    """Refuses a build that will not fit. What is not known does not count.

    Args:
        need: What the graph takes.
        system: Free bytes of system memory.
        card: Free bytes of the GPU's own memory.

    Raises:
        BundleError: There is too little; both figures are named.
    """
    if system is not None and system < need.system:
        raise BundleError(
            f"Building this engine takes about {_mb(need.system)} MB of memory ({FACTOR} times "
            f"{_mb(need.weights)} MB of weights and {_mb(need.inputs)} MB of inputs), and "
            f"{system // _MB} MB are free. End other programs or the desktop, add swap, or export "
            "the bundle with a smaller precision or context."
        )
    if card is not None and card < need.card:
        raise BundleError(
            f"This engine takes at least {_mb(need.card)} MB of the GPU's memory, of which "
            f"{card // _MB} MB are free. End other programs that use the GPU, or export the bundle "
            "with a smaller precision or context."
        )


def _external_bytes(model: memoryview) -> Iterator[int]:
    """Lengths that the initializers name for their external data."""
    for main in _messages(model, _GRAPH):
        for tensor in _messages(main, _INITIALIZER):
            for entry in _messages(tensor, _EXTERNAL):
                words = {n: bytes(v) for n, v in read_fields(entry) if not isinstance(v, int)}
                if words.get(_KEY) == b"length":
                    yield int(words[_VALUE])


def _messages(data: memoryview, wanted: int) -> Iterator[memoryview]:
    for number, value in read_fields(data):
        if number == wanted and not isinstance(value, int):
            yield value


def _fixed(tensor: Tensor) -> list[int]:
    """Shape of an input that always has the same."""
    sizes = [size for size in tensor.shape if isinstance(size, int)]
    if len(sizes) != len(tensor.shape):
        raise BundleError(
            f"Input {tensor.name!r} varies in shape, {tensor.shape}, and no profile says how far. "
            "Export the bundle again."
        )
    return sizes


def _bits(dtype: str) -> int:
    """Width of a type by its name, ``float16`` say."""
    digits = dtype.lstrip("abcdefghijklmnopqrstuvwxyz")
    return int(digits) if digits.isdecimal() else 8


def _left_in_groups(root: Path) -> Iterator[int]:
    """Bytes that are left to each control group above this process, where it has a limit."""
    try:
        lines = (root / "proc/self/cgroup").read_text(encoding="utf-8").splitlines()
    except OSError:
        return
    mounts = root / "sys/fs/cgroup"
    for line in lines:
        _, controllers, path = line.split(":", 2)
        if controllers and "memory" not in controllers.split(","):
            continue
        mount, files = (mounts / "memory", _CGROUP_1) if controllers else (mounts, _CGROUP_2)
        group = mount / path.lstrip("/")
        # A container may see its own group as the root, by another path than the kernel's.
        for folder in (group, *group.parents):
            if folder.is_relative_to(mount):
                left = _left(folder, files)
                if left is not None:
                    yield left


def _left(group: Path, files: tuple[str, str, str]) -> int | None:
    """Bytes that one control group may still take; None where it has no limit."""
    try:
        limit, used = (int((group / name).read_text(encoding="ascii")) for name in files[:2])
        entries = (group / "memory.stat").read_text(encoding="ascii").split()
        given_back = int(entries[entries.index(files[2]) + 1])
    except (OSError, ValueError, IndexError):
        return None
    return max(0, limit - (used - given_back))


def _mb(size: int) -> int:
    """What is needed, in whole megabytes."""
    return math.ceil(size / _MB)
