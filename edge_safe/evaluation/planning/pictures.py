"""What one picture costs in a bundle: features in the prompt, and the work of its towers.

The picture is that of ``bench``: 640 x 480, a sign with three lines of text.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, replace

import msgspec
import numpy as np

from edge_safe.errors import SchemaError, UsageError
from edge_safe.evaluation.planning.step import Step
from edge_safe.evaluation.planning.tower_step import tower_step
from edge_safe.runtime.bundle import Bundle
from edge_safe.runtime.families import pebble, placeholders
from edge_safe.runtime.image_steps import pixel_values
from edge_safe.runtime.image_tokens import count_features

HEIGHT, WIDTH = 480, 640
_PEBBLE = "pebble"

LINES, LINE_WIDTH = 3, 400
"""Lines of the sign, and their width when cut to the recognizer's height."""

PEBBLE_TOKENS = 16
"""What pebble's int4 bundle puts into the prompt for the sign, by ``usage.image_tokens``."""

_TILES = 4  # dimensions of pixel values in tiles; patches have two

Shape = tuple[int, ...]


@dataclass(frozen=True, slots=True)
class Picture:
    """One picture.

    Attributes:
        tokens: Features in the prompt.
        graphs: Graphs that it goes through.
        step: Their work.
    """

    tokens: int
    graphs: tuple[str, ...]
    step: Step


def picture(bundle: Bundle) -> Picture | None:
    """The costs of a picture; None where the bundle takes none.

    Raises:
        SchemaError: The bundle's processors do not fit this version.
    """
    try:
        if bundle.manifest.family == _PEBBLE:
            return _pebble(bundle)
        return _placeholder(bundle)
    except msgspec.ValidationError as error:
        raise SchemaError(
            f"The processors of {bundle.folder} do not fit this version: {error}."
        ) from error


def require_picture(bundle: Bundle) -> Picture:
    """The costs of a picture.

    Raises:
        UsageError: The bundle takes none.
    """
    found = picture(bundle)
    if found is None:
        raise UsageError(f"{bundle.folder} has no tower for pictures; leave --images out.")
    return found


def _placeholder(bundle: Bundle) -> Picture | None:
    """Of a family whose template marks a picture's place."""
    processors = msgspec.convert(bundle.manifest.processors, placeholders.Processors)
    if processors.image is None:
        return None
    image = processors.image
    pixels = pixel_values(np.zeros((HEIGHT, WIDTH, 3), np.uint8), image.pixels)
    shape, tiles = tuple(pixels.values.shape), 1
    if len(shape) == _TILES:
        # Tiles do not see each other: one of them, so many times, but with weights read once.
        tiles, shape = shape[0], (1, *shape[1:])
    name = placeholders.VISION_ENCODER
    step = _step(bundle, name, {"pixel_values": shape})
    whole = replace(step.times(tiles), read_bytes=step.read_bytes)
    return Picture(count_features(image.layout, pixels), (name,), whole)


def _pebble(bundle: Bundle) -> Picture | None:
    """Of pebble, whose towers read the lines and see the objects."""
    processors = msgspec.convert(bundle.manifest.processors, pebble.Processors)
    runs = list(_pebble_runs(processors))
    if not runs:
        return None
    steps = (_step(bundle, name, shapes).times(count) for name, count, shapes in runs)
    return Picture(PEBBLE_TOKENS, tuple(name for name, _, _ in runs), sum(steps, Step()))


def _pebble_runs(
    processors: pebble.Processors,
) -> Iterator[tuple[str, int, dict[str, Shape]]]:
    """Graphs, how often each runs, and the shapes of its inputs."""
    text, objects = processors.text_lines, processors.objects
    if text is not None:
        step = text.multiple
        ratio = min(1.0, text.longest_side / max(HEIGHT, WIDTH))
        high, wide = (round(side * ratio / step) * step for side in (HEIGHT, WIDTH))
        yield "text_detector", 1, {"pixel_values": (1, 3, high, wide)}
        line = (1, 3, text.line_height, LINE_WIDTH)
        yield "text_recognizer", LINES, {"pixel_values": line}
        states = LINE_WIDTH // text.line_multiple
        yield "text_projector", 1, {"text_states": (LINES, states, 0)}
    if objects is not None:
        yield "vision_encoder", 1, {"pixel_values": (1, 3, objects.size, objects.size)}
        yield "vision_projector", 1, {"vision_states": (0, 0, 0)}


def _step(bundle: Bundle, name: str, shapes: dict[str, Shape]) -> Step:
    """The work of one run; where a shape has a 0, the manifest's own number stands."""
    graph = bundle.manifest.graphs[name]
    declared = {tensor.name: tensor.shape for tensor in graph.inputs}
    filled = {
        key: tuple(
            size or (said if isinstance(said, int) else 1)
            for size, said in zip(shape, declared[key], strict=True)
        )
        for key, shape in shapes.items()
    }
    return tower_step(bundle.read(graph.file), filled)
