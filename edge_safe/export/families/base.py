"""What a family has to offer, and how it is found.

A text-only family is a ``TextFamily`` named ``TEXT`` (``decoder_config``) and ``open_checkpoint``.

A vision-language family is a ``VisionFamily`` (``vision_language``) and ``open_checkpoint``; its
language model is found by the ``model_type`` of ``text_config`` among the text-only families. It
has to give

- ``describe(config, folder)``: the ``Pictures``, or an ``ExportError``, before weights are read.
  The pixel values come from ``image_processors`` as rows of ``runtime.image_steps`` (``resize``,
  ``resize_shortest_edge``, ``resize_longest_edge``, ``pad_to_square``, ``center_crop``,
  ``split_into_tiles``, ``split_into_grid``, ``fit_into_grid``, ``fill_crops``, ``smart_resize``);
  what stands in the prompt is a row of ``runtime.image_tokens`` (``plain``, ``tile_rows``,
  ``enclosed``, ``any_resolution``, ``crop_lines``, ``grid``). A new row is a Struct with its tag
  and one case in the function that matches it.
- ``language``: the prefix of the language model's weights;
- ``tower(model, pictures)``: the graph ``vision_encoder``. For squares ``towers.squares`` makes it
  of two functions: ``emit(model, layers, x)``, the nodes of tower and projector
  (``towers.vision_transformer``, ``towers.modules``), and ``features(model, pixel_values)``, what
  torch makes of the same. For patches of pictures of any size ``towers.patches`` has the pieces;
- ``text``: the language model as a ``TextFamily``, where that is no family of its own;
- ``adapt``, where the language model inside does something else than alone: ``bidirectional`` for
  positions that see each other.

An audio-language family is an ``AudioFamily`` (``audio_language``) and ``open_checkpoint``: its
``describe`` gives the ``Windows`` of ``runtime.audio_windows``, its ``tower`` the graph
``audio_encoder`` (``towers.audio_encoder``, two functions likewise), and its row of tests stands in
``tests/export/audio_families.py``. One that sees as well is a ``VisionFamily`` whose ``audio`` is
an ``AudioFamily``, with a row in both files of tests.

A family that sees and hears makes its ``Opened`` of the same pieces; ``phi4_multimodal`` is one.

``runtime.families.placeholders`` serves the bundle; no file there, unless a family needs more than
features at the template's places. ``tests/export/vision_families.py`` takes one row for its tiny
checkpoint, and every test of vision-language families runs on it; so does the table of
``benchmarks/families``, which finds checkpoints through ``tests/export/every_family.py``.
"""

from __future__ import annotations

import importlib
import json
import pkgutil
import re
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from types import ModuleType
from typing import Any, Protocol

import numpy as np
import numpy.typing as npt
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from edge_safe.errors import ExportError
from edge_safe.export import families
from edge_safe.export.checkpoint.adapter import weights_folder
from edge_safe.export.graphs.decoder import ModelWeights
from edge_safe.export.graphs.matrices import Matrix
from edge_safe.export.graphs.spec import DecoderSpec, LatticeSource, TensorSource
from edge_safe.export.graphs.store import WeightStore
from edge_safe.export.quantization import Precision

Array = npt.NDArray[Any]

# Files of this package that are no family.
HELPERS = {"base"}


@dataclass(frozen=True, slots=True)
class Emission:
    """Where a tower writes to.

    Attributes:
        folder: The bundle being built.
        store: The shared weights file.
        weights: The language model, stored there already.
        precision: How matrices are packed.
    """

    folder: Path
    store: WeightStore
    weights: ModelWeights
    precision: Precision


@dataclass(frozen=True, slots=True)
class TowerCase:
    """One input of a tower with what torch makes of it.

    Attributes:
        label: What is special about it.
        feeds: Inputs of the graph by name.
        expected: Outputs by name.
    """

    label: str
    feeds: Mapping[str, Array]
    expected: Mapping[str, Array]


class Tower(Protocol):
    """One graph beside the language model's."""

    @property
    def name(self) -> str:
        """Name of the graph; its file is ``{name}.onnx``."""

    def emit(self, emission: Emission) -> list[Matrix]:
        """Writes the graph and returns the matrices it stored."""

    def cases(self) -> Iterable[TowerCase]:
        """Inputs on which the graph has to agree with torch."""


@dataclass(slots=True)
class Opened:
    """A checkpoint, opened.

    Attributes:
        spec: Its language model.
        tensor: The language model's weights, by the names transformers gives to Llama's.
        language: The language model in torch, fp32; its forward takes ``inputs_embeds``.
        tokenizer: Its tokenizer.
        modalities: Inputs beside text, and whether their projectors were trained.
        processors: Parameters for the runtime's file of the same family.
        towers: The other graphs.
        files: Further files of the bundle, by name.
        lattice: Gives the values of linear layers that come in 4 bits, by name; None where none do.
        streamed: Whether ``language`` is too large to be held and reads its weights as it runs.
    """

    spec: DecoderSpec
    tensor: TensorSource
    language: PreTrainedModel
    tokenizer: PreTrainedTokenizerBase
    modalities: dict[str, bool] = field(default_factory=dict)
    processors: dict[str, dict[str, Any]] = field(default_factory=dict)
    towers: Sequence[Tower] = ()
    files: Mapping[str, bytes] = field(default_factory=dict)
    lattice: LatticeSource | None = None
    streamed: bool = False


OpenCheckpoint = Callable[[Path], Opened]


def find_family(folder: Path) -> tuple[str, OpenCheckpoint]:
    """Finds the file for a checkpoint's model_type before any weight is read.

    Returns:
        The model_type, and the function that opens the checkpoint.

    Raises:
        ExportError: The folder is no checkpoint, or there is no such family.
    """
    path = weights_folder(folder) / "config.json"
    try:
        config = json.loads(path.read_text(encoding="utf-8"))
        model_type = config["model_type"]
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise ExportError(
            f"{folder} is no checkpoint folder: config.json with a model_type is needed ({error})."
        ) from error
    known = family_names()
    if not isinstance(model_type, str) or model_type not in known:
        raise ExportError(
            f"There is no export for model type {model_type!r} yet; families: {', '.join(known)}. "
            "A new one is one file in edge_safe/export/families/."
        )
    module = importlib.import_module(f"{families.__name__}.{model_type}")
    opener: OpenCheckpoint = module.open_checkpoint
    return model_type, opener


def find_module(model_type: str) -> ModuleType | None:
    """The file of a model type, None where there is none."""
    if model_type not in family_names():
        return None
    return importlib.import_module(f"{families.__name__}.{model_type}")


def family_names() -> list[str]:
    """Model types there is a file for."""
    names = {module.name for module in pkgutil.iter_modules(families.__path__)}
    return sorted(name for name in names - HELPERS if re.fullmatch(r"[a-z]\w*", name))


def float_array(value: Any) -> npt.NDArray[np.float32]:
    """A torch tensor as a float32 array."""
    array: npt.NDArray[np.float32] = value.detach().float().cpu().contiguous().numpy()
    return array
