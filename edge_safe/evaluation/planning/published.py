"""Published figures with clear model, precision and device: one row each, as they stand there.

Taken are batch 1, no speculative decoding, dense transformers, prompts of at most 2,048 tokens.
Where a source does not name the power mode, the device's ordinary one is taken. From rates of
llama-bench ``tgN`` the cache is taken as N / 2 positions; where no length is given, as 128.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Literal

from edge_safe.evaluation.planning.devices import UNIFIED, Device, Mode, find_device
from edge_safe.evaluation.planning.public_models import (
    DECODERS,
    PRECISIONS,
    VISION_TOWERS,
    WHISPER,
)
from edge_safe.evaluation.planning.step import Step

Phase = Literal["encode", "prefill", "decode"]

PHASES: tuple[Phase, ...] = ("encode", "prefill", "decode")

SOURCES = {
    "edge-llm-0.9": "NVIDIA, TensorRT Edge-LLM documentation, Performance Benchmarks, v0.9.0, "
    "runtime dashboard "
    "(nvidia.github.io/TensorRT-Edge-LLM, user_guide/performance/performance-benchmarks)",
    "edge-llm-0.10": "the same page, v0.10.0, llm_bench with a prompt and a cache of 2,048",
    "super-boost": "NVIDIA, Jetson Orin Nano Developer Kit Gets a Super Boost, "
    "developer.nvidia.com/blog, 2024: MLC, INT4, before and with super mode",
    "gpu-benchmarks": "github.com/XiongjieDai/GPU-Benchmarks-on-LLM-Inference, README, snapshots "
    "of May 2024: llama.cpp, CUDA",
    "ai-benchmarks": "github.com/geerlingguy/ai-benchmarks, README and issues 7, 33, 40 and 43: "
    "llama.cpp (Vulkan on the cards), Ollama on CPUs",
    "sbc-reviews": "github.com/geerlingguy/sbc-reviews, issue 107: llama.cpp, two threads",
    "llama-cpp": "github.com/ggml-org/llama.cpp, pull request 6928, comment of 28 April 2024",
    "whisper-cpp": "github.com/ggml-org/whisper.cpp, issue 89, comment of 3 November 2023: four "
    "threads, NEON",
    "smolhub": "smolhub.com/posts/jetson-nano-super-benchmark-non-reasoning: llama.cpp, CUDA, "
    "mode 25W",
    "edge-safe": "docs/performance.md of 03d4403: edge-safe itself, ONNX Runtime 1.31.1, bandwidth "
    "and FP32 matrix product measured beside it",
}
"""Where rows come from, by their short name."""

OWN = "edge-safe"
"""Rows of this very runtime."""

SMALLEST_BYTES = 0.5e9
"""Below so many bytes a token, starting kernels sets a GPU's pace, not reading."""

EPYC = Device(
    "epyc",
    "EPYC (Zen 5), 2 threads",
    "cpu",
    24.0,
    UNIFIED,
    (
        Mode("int4", 40.4, 0.233, 0.932),
        Mode("int4-fast", 41.8, 0.237, 0.948),
        Mode("int4-int8", 41.1, 0.243, 0.972),
    ),
    (SOURCES[OWN],),
)
"""The machine of docs/performance.md of 03d4403; its peaks were measured with each bundle."""

CORE_I3 = Device(
    "core-i3",
    "Core i3-1315U, 2 threads",
    "cpu",
    8.0,
    UNIFIED,
    (Mode("default", 41.6, 0.288, 1.152),),
    (
        "intel.com, Core i3-1315U: two performance cores at 4.5 GHz, DDR5-5200; one module in the "
        "Framework Laptop 12",
    ),
)


@dataclass(frozen=True, slots=True)
class Figure:
    """One published figure and the work behind it.

    Attributes:
        source: Key of ``SOURCES``.
        device: Row of the device.
        mode: Power mode.
        model: Model and precision.
        phase: What was timed.
        tokens: Length of the prompt, or of the cache; 0 where it does not count.
        step: What a run reads and computes.
        seconds: What a run took.
    """

    source: str
    device: Device
    mode: Mode
    model: str
    phase: Phase
    tokens: int
    step: Step
    seconds: float

    @property
    def apart(self) -> bool:
        """Whether it is a GPU's figure of a model too small for the formulas."""
        small = self.step.read_bytes < SMALLEST_BYTES
        return self.device.kind != "cpu" and self.phase != "encode" and small


@dataclass(frozen=True, slots=True)
class _Row:
    """One row of a source; None where it has no such figure.

    Attributes:
        prompt: Tokens of the prompt.
        prefill_ms: Time of it.
        past: Positions in the cache while tokens are decoded.
        rate: Tokens a second.
        features: Of a picture.
        encode_ms: Time of it.
    """

    source: str
    device: str
    model: str
    precision: str
    prompt: int | None = None
    prefill_ms: float | None = None
    past: int | None = None
    rate: float | None = None
    features: int | None = None
    encode_ms: float | None = None
    mode: str | None = None


def _edge_llm_9(
    device: str, model: str, prompt: int, prefill: float, rate: float, encode: float | None = None
) -> _Row:
    features = None if encode is None else 265
    values = (model, "INT4 AWQ", prompt, prefill, prompt, rate, features, encode)
    return _Row("edge-llm-0.9", device, *values)


def _edge_llm_10(device: str, model: str, prefill: float, rate: float) -> _Row:
    return _Row("edge-llm-0.10", device, model, "INT4 AWQ", 2048, prefill, 2048, rate)


def _super(model: str, before: float, after: float) -> tuple[_Row, _Row]:
    device = "orin-nano-super"
    return (
        _Row("super-boost", device, model, "q4f16", past=128, rate=before, mode="15W"),
        _Row("super-boost", device, model, "q4f16", past=128, rate=after, mode="MAXN_SUPER"),
    )


def _bench(
    source: str,
    device: str,
    model: str,
    precision: str,
    prompt: tuple[int, float] | None = None,
    decode: tuple[int, float] | None = None,
) -> _Row:
    """Of llama-bench or Ollama: tokens of prompt and answer, each with its tokens a second."""
    tokens = None if prompt is None else prompt[0]
    prefill = None if prompt is None else 1000.0 * prompt[0] / prompt[1]
    past, rate = (None, None) if decode is None else (decode[0] // 2, decode[1])
    return _Row(source, device, model, precision, tokens, prefill, past, rate)


_ROWS = (
    _edge_llm_9("agx-orin", "Qwen3-0.6B", 61, 14.8, 186.4),
    _edge_llm_9("agx-orin", "Qwen3-1.7B", 61, 20.4, 98.6),
    _edge_llm_9("agx-orin", "Qwen3-4B", 57, 42.6, 53.1),
    _edge_llm_9("agx-orin", "Qwen3-8B", 61, 65.7, 32.5),
    _edge_llm_9("agx-orin", "Qwen3-VL-2B", 292, 50.0, 98.4, 39.0),
    _edge_llm_9("agx-orin", "Qwen3-VL-4B", 292, 123.7, 52.4, 39.3),
    _edge_llm_9("agx-orin", "Qwen3-VL-8B", 292, 225.1, 32.3, 57.2),
    _edge_llm_9("orin-nx", "Qwen3-0.6B", 61, 18.9, 117.4),
    _edge_llm_9("orin-nx", "Qwen3-1.7B", 61, 35.4, 60.4),
    _edge_llm_9("orin-nx", "Qwen3-4B", 57, 74.9, 31.6),
    _edge_llm_9("orin-nx", "Qwen3-8B", 61, 127.2, 19.0),
    _edge_llm_9("orin-nx", "Qwen3-VL-2B", 292, 103.1, 60.1, 82.1),
    _edge_llm_9("orin-nx", "Qwen3-VL-4B", 292, 244.6, 31.2, 83.7),
    _edge_llm_9("orin-nx", "Qwen3-VL-8B", 292, 462.1, 18.9, 120.0),
    _edge_llm_9("orin-nano", "Qwen3-0.6B", 61, 28.7, 72.8),
    _edge_llm_9("orin-nano", "Qwen3-1.7B", 61, 63.1, 37.4),
    _edge_llm_9("orin-nano", "Qwen3-VL-2B", 292, 190.9, 36.9, 151.1),
    _edge_llm_9("thor", "Qwen3-4B", 57, 33.5, 79.6),
    _edge_llm_9("thor", "Qwen3-8B", 61, 56.0, 49.3),
    _edge_llm_9("thor", "Qwen3-VL-4B", 292, 85.2, 79.0, 11.7),
    _edge_llm_9("thor", "Qwen3-VL-8B", 292, 156.5, 48.9, 15.8),
    _edge_llm_10("agx-orin", "Qwen3-0.6B", 118.5, 162.5),
    _edge_llm_10("agx-orin", "Qwen3-1.7B", 308.3, 89.5),
    _edge_llm_10("agx-orin", "Qwen3-4B", 761.9, 50.7),
    _edge_llm_10("agx-orin", "Qwen3-8B", 1384.1, 30.6),
    _edge_llm_10("agx-orin", "Qwen3-VL-2B", 298.4, 88.7),
    _edge_llm_10("agx-orin", "Qwen3-VL-4B", 757.7, 50.8),
    _edge_llm_10("agx-orin", "Qwen3-VL-8B", 1388.1, 30.6),
    _edge_llm_10("orin-nx", "Qwen3-0.6B", 268.8, 98.9),
    _edge_llm_10("orin-nx", "Qwen3-1.7B", 674.0, 52.2),
    _edge_llm_10("orin-nx", "Qwen3-4B", 1880.5, 29.2),
    _edge_llm_10("orin-nx", "Qwen3-8B", 2944.1, 17.5),
    _edge_llm_10("orin-nx", "Qwen3-VL-2B", 760.3, 52.6),
    _edge_llm_10("orin-nx", "Qwen3-VL-4B", 1740.8, 29.4),
    _edge_llm_10("orin-nx", "Qwen3-VL-8B", 3106.2, 17.4),
    _edge_llm_10("orin-nano", "Qwen3-0.6B", 445.2, 61.0),
    _edge_llm_10("orin-nano", "Qwen3-1.7B", 1021.0, 32.3),
    _edge_llm_10("orin-nano", "Qwen3-VL-2B", 1017.0, 32.3),
    _edge_llm_10("thor", "Qwen3-0.6B", 54.8, 253.1),
    _edge_llm_10("thor", "Qwen3-1.7B", 145.4, 135.1),
    _edge_llm_10("thor", "Qwen3-4B", 364.6, 76.5),
    _edge_llm_10("thor", "Qwen3-8B", 663.4, 46.4),
    _edge_llm_10("thor", "Qwen3-VL-2B", 145.3, 135.3),
    _edge_llm_10("thor", "Qwen3-VL-4B", 364.4, 76.3),
    _edge_llm_10("thor", "Qwen3-VL-8B", 662.2, 46.2),
    *_super("Llama-3.1-8B", 14.0, 19.14),
    *_super("Llama-3.2-3B", 27.7, 43.07),
    *_super("Qwen2.5-7B", 14.2, 21.75),
    *_super("Gemma-2-2B", 21.5, 34.97),
    *_super("Gemma-2-9B", 7.2, 9.21),
    *_super("Phi-3.5-mini", 24.7, 38.1),
    _bench("gpu-benchmarks", "rtx-4090", "Llama-3-8B", "Q4_K_M", (512, 7138.99), (512, 130.58)),
    _bench("gpu-benchmarks", "rtx-4090", "Llama-3-8B", "Q4_K_M", (1024, 6898.71), (1024, 127.74)),
    _bench("gpu-benchmarks", "rtx-4090", "Llama-3-8B", "F16", (512, 9382.0), (512, 54.84)),
    _bench("gpu-benchmarks", "rtx-4090", "Llama-3-8B", "F16", (1024, 9056.26), (1024, 54.34)),
    # TinyLlama's 10,802 tokens a second at 512 have a spread of 9,882 there, and are left out.
    _bench("ai-benchmarks", "rtx-4090", "TinyLlama-1.1B", "Q4_K_M", None, (128, 762.37)),
    _bench("ai-benchmarks", "rtx-4090", "Llama-3.2-3B", "Q4_K_M", (512, 20323.29), (128, 334.67)),
    _bench("ai-benchmarks", "rtx-4090", "R1-Distill-Qwen-14B", "Q4_K_M", None, (128, 92.49)),
    _bench("ai-benchmarks", "rtx-3060", "TinyLlama-1.1B", "Q4_K_M", (512, 6744.18), (128, 279.05)),
    _bench("ai-benchmarks", "rtx-3060", "Llama-3.2-3B", "Q4_K_M", None, (128, 122.85)),
    _bench("ai-benchmarks", "rtx-3060", "R1-Distill-Qwen-14B", "Q4_K_M", None, (128, 29.77)),
    _bench("ai-benchmarks", "raspberry-pi-5", "Llama-3.2-3B", "Q4_K_M", None, (256, 4.88)),
    _bench("ai-benchmarks", "raspberry-pi-5", "Llama-3.1-8B", "Q4_K_M", None, (256, 2.17)),
    _bench("ai-benchmarks", "raspberry-pi-5", "Llama-2-13B", "Q4_0", None, (256, 1.36)),
    _bench("ai-benchmarks", "x86-laptop", "Llama-3.2-3B", "Q4_K_M", None, (256, 23.81)),
    _bench("ai-benchmarks", "x86-laptop", "Llama-3.1-8B", "Q4_K_M", None, (256, 10.46)),
    _bench("ai-benchmarks", "x86-laptop", "R1-Distill-Qwen-14B", "Q4_K_M", None, (256, 5.83)),
    _bench("sbc-reviews", "core-i3", "Llama-3.2-3B", "Q4_K_M", (512, 28.67), (128, 11.05)),
    _bench("llama-cpp", "raspberry-pi-5", "Llama-2-7B", "Q4_0", (109, 8.10)),
    _Row("smolhub", "orin-nano-super", "SmolLM2-135M", "Q4_K_M", past=2048, rate=165.2, mode="25W"),
)

_WHISPER_MS = {
    "Whisper tiny.en": 1109.66,
    "Whisper base.en": 2465.12,
    "Whisper small.en": 8342.25,
    "Whisper medium.en": 26407.77,
}
"""Encoding on a Raspberry Pi 5; the plain models of the same sizes have the same encoders."""

_PICTURE = Step(109.0e6, 15.98e9)
"""Pebble's towers on the drawn sign, counted in the graphs of its int4 bundle by ``pictures``."""

_OWN_ROWS: tuple[tuple[str, Phase, int, Step, float], ...] = (
    ("int4", "encode", 0, _PICTURE, 75.8),
    ("int4-fast", "encode", 0, _PICTURE, 71.3),
    ("int4-int8", "encode", 0, _PICTURE, 84.2),
    ("int4", "prefill", 256, Step(116.2e6, 58.38e9), 198.4),
    ("int4-fast", "prefill", 256, Step(96.9e6, 57.59e9), 176.0),
    ("int4-int8", "prefill", 256, Step(118.6e6, 0.0, 56.68e9), 86.5),
    ("int4", "decode", 8, Step(104.7e6), 5.2),
    ("int4", "decode", 2000, Step(196.5e6), 11.3),
    ("int4-fast", "decode", 8, Step(85.5e6), 4.2),
    ("int4-fast", "decode", 2000, Step(177.3e6), 10.1),
    ("int4-int8", "decode", 8, Step(80.1e6), 3.6),
    ("int4-int8", "decode", 2000, Step(171.9e6), 9.3),
)
"""Bundle, phase, tokens, the work that the page says, and milliseconds."""


def figures() -> Iterator[Figure]:
    """Every published figure."""
    for row in _ROWS:
        yield from _figures_of(row)
    pi, default = find_device("raspberry-pi-5")
    for name, took in _WHISPER_MS.items():
        step = WHISPER[name].encode()
        yield Figure("whisper-cpp", pi, default, name, "encode", 0, step, took / 1000.0)
    modes = {mode.name: mode for mode in EPYC.modes}
    for bundle, phase, tokens, step, took in _OWN_ROWS:
        name = f"pebble, {bundle}"
        yield Figure(OWN, EPYC, modes[bundle], name, phase, tokens, step, took / 1000.0)


def _figures_of(row: _Row) -> Iterator[Figure]:
    """The figures of one row."""
    if row.device == CORE_I3.name:
        device, mode = CORE_I3, CORE_I3.modes[0]
    else:
        device, mode = find_device(row.device, row.mode)
    decoder, precision = DECODERS[row.model], PRECISIONS[row.precision]
    name = f"{row.model}, {row.precision}"
    if row.features is not None and row.encode_ms is not None:
        step = VISION_TOWERS[row.model].encode(row.features)
        seconds = row.encode_ms / 1000.0
        yield Figure(row.source, device, mode, row.model, "encode", row.features, step, seconds)
    if row.prompt is not None and row.prefill_ms is not None:
        step = decoder.prefill(precision, row.prompt)
        seconds = row.prefill_ms / 1000.0
        yield Figure(row.source, device, mode, name, "prefill", row.prompt, step, seconds)
    if row.past is not None and row.rate is not None:
        step = decoder.decode(precision, row.past)
        yield Figure(row.source, device, mode, name, "decode", row.past, step, 1.0 / row.rate)
