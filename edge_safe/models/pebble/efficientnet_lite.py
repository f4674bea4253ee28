"""EfficientNet-Lite0's feature extractor (TensorFlow's TPU models, 2020), without its classifier.

Lite means: ReLU6 instead of swish, no squeeze-and-excitation, stem and head not scaled. The
padding is TensorFlow's SAME, which for stride 2 pads the right and bottom edge more.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor, nn
from torch.nn import functional

from edge_safe.errors import PartsError

EPS = 1e-3
CLASSIFIER = ("_fc.weight", "_fc.bias")


@dataclass(frozen=True, slots=True)
class Stage:
    """Blocks of one width: how many, kernel, stride of the first, expansion, channels."""

    repeats: int
    kernel: int
    stride: int
    expansion: int
    channels: int


LITE0_STAGES = (
    Stage(1, 3, 1, 1, 16),
    Stage(2, 3, 2, 6, 24),
    Stage(2, 5, 2, 6, 40),
    Stage(3, 3, 2, 6, 80),
    Stage(3, 5, 1, 6, 112),
    Stage(4, 5, 2, 6, 192),
    Stage(1, 3, 1, 6, 320),
)


class SameConv(nn.Module):
    """Convolution without bias, TensorFlow's SAME padding, then batch normalization."""

    def __init__(self, inputs: int, outputs: int, kernel: int, stride: int, groups: int) -> None:
        super().__init__()
        self.convolution = nn.Conv2d(inputs, outputs, kernel, stride, groups=groups, bias=False)
        self.norm = nn.BatchNorm2d(outputs, eps=EPS)
        self.kernel = kernel
        self.stride = stride

    def forward(self, x: Tensor) -> Tensor:
        """(B, c, H, W) -> (B, c', ceil(H / stride), ceil(W / stride))."""
        rows = self._total(x.shape[2])
        columns = self._total(x.shape[3])
        edges = (columns // 2, columns - columns // 2, rows // 2, rows - rows // 2)
        normalized: Tensor = self.norm(self.convolution(functional.pad(x, edges)))
        return normalized

    def _total(self, length: int) -> int:
        return max((-(-length // self.stride) - 1) * self.stride + self.kernel - length, 0)


class Block(nn.Module):
    """Inverted bottleneck: widen, mix each channel over space, narrow; residual where it fits."""

    def __init__(self, inputs: int, stage: Stage, stride: int) -> None:
        super().__init__()
        inner = inputs * stage.expansion
        self.expand = SameConv(inputs, inner, 1, 1, 1) if stage.expansion != 1 else None
        self.depthwise = SameConv(inner, inner, stage.kernel, stride, inner)
        self.project = SameConv(inner, stage.channels, 1, 1, 1)
        self.residual = stride == 1 and inputs == stage.channels

    def forward(self, x: Tensor) -> Tensor:
        """(B, c, H, W) -> (B, c', H / stride, W / stride)."""
        hidden = x if self.expand is None else functional.relu6(self.expand(x))
        hidden = functional.relu6(self.depthwise(hidden))
        narrow: Tensor = self.project(hidden)
        return narrow + x if self.residual else narrow


class EfficientNetLite(nn.Module):
    """Picture -> grid of features, row by row.

    Batch normalization always uses its stored statistics: the tower is frozen.

    Args:
        stem: Channels of the first convolution.
        stages: Widths and depths.
        head: Channels of the last convolution, the width of the states.
    """

    def __init__(
        self, stem: int = 32, stages: tuple[Stage, ...] = LITE0_STAGES, head: int = 1280
    ) -> None:
        super().__init__()
        self.stem = SameConv(3, stem, 3, 2, 1)
        blocks: list[Block] = []
        channels = stem
        for stage in stages:
            for i in range(stage.repeats):
                blocks.append(Block(channels, stage, stage.stride if i == 0 else 1))
                channels = stage.channels
        self.blocks = nn.ModuleList(blocks)
        self.head = SameConv(channels, head, 1, 1, 1)
        self.train(False)

    def train(self, mode: bool = True) -> EfficientNetLite:
        """Stays in inference mode, also inside a model that is being trained."""
        super().train(False)
        return self

    def forward(self, pixel_values: Tensor) -> Tensor:
        """(B, 3, H, W) float32 RGB, (x - 127) / 128 -> (B, ceil(H / 32) * ceil(W / 32), c)."""
        x = functional.relu6(self.stem(pixel_values))
        for block in self.blocks:
            x = block(x)
        return functional.relu6(self.head(x)).flatten(2).transpose(1, 2)


def read_checkpoint(path: Path) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
    """Reads the published ``.pth`` (weights only) and renames it.

    Returns:
        The state dict for ``EfficientNetLite`` and, apart, the ImageNet classifier's.

    Raises:
        PartsError: Not such a checkpoint.
    """
    try:
        stored = torch.load(path, map_location="cpu", weights_only=True)
    except Exception as error:  # torch raises several unrelated types for a damaged file
        raise PartsError(f"{path} is not a readable torch checkpoint: {error}") from error
    weights: dict[str, Tensor] = {}
    classifier: dict[str, Tensor] = {}
    for name, tensor in stored.items():
        if name in CLASSIFIER:
            classifier[name.removeprefix("_fc.")] = tensor
        else:
            weights[_renamed(name, path)] = tensor
    return weights, classifier


_MODULES = {
    "_conv_stem": "stem.convolution",
    "_bn0": "stem.norm",
    "_conv_head": "head.convolution",
    "_bn1": "head.norm",
}
_BLOCK_MODULES = {
    "_expand_conv": "expand.convolution",
    "_bn0": "expand.norm",
    "_depthwise_conv": "depthwise.convolution",
    "_bn1": "depthwise.norm",
    "_project_conv": "project.convolution",
    "_bn2": "project.norm",
}


def _renamed(name: str, path: Path) -> str:
    """``_blocks.3._bn1.weight`` -> ``blocks.3.depthwise.norm.weight``."""
    parts = name.split(".")
    try:
        if parts[0] == "_blocks":
            return ".".join(["blocks", parts[1], _BLOCK_MODULES[parts[2]], parts[3]])
        return f"{_MODULES[parts[0]]}.{parts[1]}"
    except (KeyError, IndexError) as error:
        raise PartsError(
            f"{path} holds {name!r}, which EfficientNet-Lite does not have."
        ) from error
