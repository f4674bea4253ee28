"""Bytes and operations of models that published figures speak of, by their public configurations.

A decoder is a plain transformer: grouped-query attention and a gated MLP.
"""

from __future__ import annotations

from dataclasses import dataclass

from edge_safe.evaluation.planning.step import Step

_CACHE_BYTES = 2  # a published model's cache is FP16


@dataclass(frozen=True, slots=True)
class Precision:
    """Bits of a weight, scales included: of the layers, and of lm_head."""

    body: float
    head: float


PRECISIONS = {
    # Groups of 128 with an FP16 scale; the exporter leaves lm_head in FP16.
    "INT4 AWQ": Precision(4.125, 16.0),
    # MLC, groups of 32 with an FP16 scale.
    "q4f16": Precision(4.5, 4.5),
    # llama.cpp: lm_head is Q6_K; Q4_K_M as its files' sizes give it.
    "Q4_0": Precision(4.5, 6.5625),
    "Q4_K_M": Precision(4.83, 6.5625),
    "F16": Precision(16.0, 16.0),
}


@dataclass(frozen=True, slots=True)
class Decoder:
    """A language model's shape."""

    layers: int
    width: int
    heads: int
    kv_heads: int
    head_dim: int
    inner: int
    vocabulary: int

    @property
    def body(self) -> int:
        """Weights of all layers."""
        attention = 2 * self.width * self.head_dim * (self.heads + self.kv_heads)
        return self.layers * (attention + 3 * self.width * self.inner)

    @property
    def head(self) -> int:
        """Weights of lm_head."""
        return self.width * self.vocabulary

    def weight_bytes(self, precision: Precision) -> float:
        """Bytes of the weights that a token reads."""
        return (self.body * precision.body + self.head * precision.head) / 8

    def cache_bytes(self, positions: float) -> float:
        """Bytes of keys and values."""
        return 2 * self.layers * self.kv_heads * self.head_dim * _CACHE_BYTES * positions

    def attention(self, positions: float, looked_at: float) -> float:
        """Operations of scores and weighted sums."""
        return 4.0 * self.layers * self.heads * self.head_dim * positions * looked_at

    def decode(self, precision: Precision, past: float) -> Step:
        """One token behind ``past`` positions."""
        operations = 2.0 * (self.body + self.head) + self.attention(1.0, past)
        return Step(self.weight_bytes(precision) + self.cache_bytes(past), operations)

    def prefill(self, precision: Precision, tokens: int) -> Step:
        """A prompt; lm_head multiplies its last position alone."""
        operations = 2.0 * (self.body * tokens + self.head) + self.attention(tokens, tokens / 2)
        return Step(self.weight_bytes(precision), operations)


@dataclass(frozen=True, slots=True)
class VisionTower:
    """A vision transformer of Qwen3-VL's kind, in FP16, all of whose patches see each other.

    Attributes:
        layers: Number of layers.
        width: Their width.
        inner: Width of the MLP.
        patch: Elements of a patch.
        merge: Patches that become one feature.
        mergers: Projectors of merged patches: the last one, and one for each deepstack layer.
        out: Width of the features.
    """

    layers: int
    width: int
    inner: int
    patch: int
    merge: int
    mergers: int
    out: int

    def encode(self, features: int) -> Step:
        """One picture of so many features."""
        patches, merged = features * self.merge, self.width * self.merge
        layer = 4 * self.width**2 + 2 * self.width * self.inner
        body = self.layers * layer + self.patch * self.width
        mergers = self.mergers * merged * (merged + self.out)
        attention = 4.0 * self.layers * self.width * patches**2
        operations = 2.0 * (body * patches + mergers * features) + attention
        return Step(2.0 * (body + mergers), operations)


@dataclass(frozen=True, slots=True)
class WhisperEncoder:
    """Whisper's encoder of a 30 s window, in FP16."""

    layers: int
    width: int

    def encode(self) -> Step:
        """One window: 3,000 frames of 80 bins, two convolutions, 1,500 positions."""
        body = self.layers * 12 * self.width**2
        first, second = 3 * 80 * self.width, 3 * self.width**2
        attention = 4.0 * self.layers * self.width * 1500**2
        operations = 2.0 * (body * 1500 + first * 3000 + second * 1500) + attention
        return Step(2.0 * (body + first + second), operations)


DECODERS = {
    "Qwen3-0.6B": Decoder(28, 1024, 16, 8, 128, 3072, 151936),
    "Qwen3-1.7B": Decoder(28, 2048, 16, 8, 128, 6144, 151936),
    "Qwen3-4B": Decoder(36, 2560, 32, 8, 128, 9728, 151936),
    "Qwen3-8B": Decoder(36, 4096, 32, 8, 128, 12288, 151936),
    "Qwen3-VL-2B": Decoder(28, 2048, 16, 8, 128, 6144, 151936),
    "Qwen3-VL-4B": Decoder(36, 2560, 32, 8, 128, 9728, 151936),
    "Qwen3-VL-8B": Decoder(36, 4096, 32, 8, 128, 12288, 151936),
    "Qwen2.5-7B": Decoder(28, 3584, 28, 4, 128, 18944, 152064),
    "R1-Distill-Qwen-14B": Decoder(48, 5120, 40, 8, 128, 13824, 152064),
    "Llama-3.2-3B": Decoder(28, 3072, 24, 8, 128, 8192, 128256),
    "Llama-3-8B": Decoder(32, 4096, 32, 8, 128, 14336, 128256),
    "Llama-3.1-8B": Decoder(32, 4096, 32, 8, 128, 14336, 128256),
    "Llama-2-7B": Decoder(32, 4096, 32, 32, 128, 11008, 32000),
    "Llama-2-13B": Decoder(40, 5120, 40, 40, 128, 13824, 32000),
    "TinyLlama-1.1B": Decoder(22, 2048, 32, 4, 64, 5632, 32000),
    "Gemma-2-2B": Decoder(26, 2304, 8, 4, 256, 9216, 256000),
    "Gemma-2-9B": Decoder(42, 3584, 16, 8, 256, 14336, 256000),
    "Phi-3.5-mini": Decoder(32, 3072, 32, 32, 96, 8192, 32064),
    "SmolLM2-135M": Decoder(30, 576, 9, 3, 64, 1536, 49152),
}

VISION_TOWERS = {
    "Qwen3-VL-2B": VisionTower(24, 1024, 4096, 1536, 4, 4, 2048),
    "Qwen3-VL-4B": VisionTower(24, 1024, 4096, 1536, 4, 4, 2560),
    "Qwen3-VL-8B": VisionTower(27, 1152, 4304, 1536, 4, 4, 4096),
}

WHISPER = {
    "Whisper tiny.en": WhisperEncoder(4, 384),
    "Whisper base.en": WhisperEncoder(6, 512),
    "Whisper small.en": WhisperEncoder(12, 768),
    "Whisper medium.en": WhisperEncoder(24, 1024),
}
