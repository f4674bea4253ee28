"""What the manifest says of an engine: for which shapes it is built, and in which precision.

It knows how ONNX Runtime's TensorRT provider wants that written, and builds nothing.
"""

from __future__ import annotations

from collections.abc import Callable

import msgspec

Shape = tuple[int, ...]


class _Record(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """Base of every structure here: immutable, unknown fields rejected."""


class Range(_Record, frozen=True):
    """Shapes of one input: the smallest, the one to be fastest for, and the largest."""

    min: Shape
    opt: Shape
    max: Shape

    def __post_init__(self) -> None:
        """Refuses shapes that no tensor has, or that are out of order."""
        if not len(self.min) == len(self.opt) == len(self.max):
            raise ValueError(f"shapes {self.min}, {self.opt}, {self.max} differ in length")
        for sizes in zip(self.min, self.opt, self.max, strict=True):
            if sizes[0] < 0 or list(sizes) != sorted(sizes):
                raise ValueError(f"sizes {sizes} are not 0 <= min <= opt <= max")


class Profile(_Record, frozen=True):
    """Shapes of all inputs that vary, by name; one profile serves one phase, prefill say."""

    shapes: dict[str, Range]

    def __post_init__(self) -> None:
        """Refuses names that the provider's own notation cannot hold."""
        for name in self.shapes:
            if not name or set(name) & set(":, "):
                raise ValueError(f"an input cannot be called {name!r} in a profile")


class EnginePlan(_Record, frozen=True):
    """How the engine of one graph is built.

    Attributes:
        profiles: At least one; all name the same inputs.
        fp16: Whether TensorRT may compute in 16 bits.
        int8: Whether it may compute in 8 bits where the graph quantizes.
    """

    profiles: tuple[Profile, ...]
    fp16: bool = False
    int8: bool = False

    def __post_init__(self) -> None:
        """Refuses plans that fix no shape, or not the same inputs in every profile."""
        if not self.profiles:
            raise ValueError("an engine needs at least one profile")
        names = [set(profile.shapes) for profile in self.profiles]
        if any(own != names[0] for own in names):
            raise ValueError("the profiles name different inputs")


def provider_options(plan: EnginePlan) -> dict[str, str]:
    """The plan in ONNX Runtime's words.

    Profiles follow one another: an input that is named again begins the next one. See
    onnxruntime.ai, "TensorRT Execution Provider", explicit shape range.
    """
    return {
        "trt_profile_min_shapes": _written(plan, lambda sizes: sizes.min),
        "trt_profile_opt_shapes": _written(plan, lambda sizes: sizes.opt),
        "trt_profile_max_shapes": _written(plan, lambda sizes: sizes.max),
        "trt_fp16_enable": "1" if plan.fp16 else "0",
        # The squares of a norm are beyond float16 where a state is beyond 256.
        "trt_layer_norm_fp32_fallback": "1",
        "trt_int8_enable": "1" if plan.int8 else "0",
    }


def _written(plan: EnginePlan, choose: Callable[[Range], Shape]) -> str:
    """One of the three lists of shapes: ``input:1x2x3,other:1``."""
    return ",".join(
        f"{name}:{'x'.join(map(str, choose(sizes)))}"
        for profile in plan.profiles
        for name, sizes in sorted(profile.shapes.items())
    )
