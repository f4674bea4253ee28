"""Opens a model that is a text decoder with an audio encoder, so that its family file is short.

The counterpart of ``vision_language`` for sound: a family says what it needs from ``config.json``
and the feature extractor, before a weight is read, and how its encoder becomes a graph.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Literal, cast, get_args

import msgspec
import torch
from jinja2 import TemplateError
from transformers import (
    AutoFeatureExtractor,
    PreTrainedTokenizerBase,
    WhisperFeatureExtractor,
)

from edge_safe.errors import ExportError
from edge_safe.export.decoder_config import of_language, read_config, tensors_of, text_family
from edge_safe.export.families.base import Opened, Tower
from edge_safe.export.image_prompts import (
    TEMPLATE_FILE,
    placeholder_of,
    read_template,
    read_tokenizer,
    rendered,
    whole_template,
)
from edge_safe.export.towers.vision_transformer import check_activation
from edge_safe.models.base_model import load_base
from edge_safe.runtime.audio_io import SAMPLE_RATE
from edge_safe.runtime.audio_windows import Windows, problem
from edge_safe.runtime.hearing import AudioProcessor, Part


@dataclass(frozen=True, slots=True)
class AudioFamily:
    """One audio-language family.

    Attributes:
        describe: Reads the configuration and the checkpoint's folder; refuses with an
            ``ExportError`` what cannot be exported.
        tower: Makes ``audio_encoder`` of the torch model; see ``towers.audio_encoder``.
        start: What every prompt begins with.
        before: A special token that stands in front of a sound, whether or not the chat template
            writes it.
    """

    describe: Callable[[Any, Path], Windows]
    tower: Callable[[Any, Windows], Tower]
    start: str = ""
    before: str | None = None


def open_audio(folder: Path, family: AudioFamily) -> Opened:
    """Opens an audio-language checkpoint in fp32.

    Raises:
        CheckpointError: It cannot be opened.
        ExportError: It uses something that the graphs or the runtime cannot express.
    """
    config = read_config(folder)
    text = text_family(config.text_config.model_type)
    # transformers gives these models an lm_head of their own, whatever the configuration says.
    spec = replace(text.spec_of(config.text_config), tied=False)
    windows = family.describe(config, folder)
    tokenizer = read_tokenizer(folder)
    processor = audio_processor(folder, family, tokenizer, config.audio_token_id, windows)
    template = whole_template(folder, tokenizer, processor.part)
    model = load_base(folder, torch.float32).model
    return Opened(
        spec=spec,
        tensor=text.tensors(of_language(tensors_of(model), "model.language_model."), spec),
        language=model,
        tokenizer=tokenizer,
        modalities={"audio": True},
        processors={"audio": msgspec.to_builtins(processor)},
        towers=[family.tower(model, windows)],
        files={TEMPLATE_FILE: template.encode()},
    )


def audio_processor(
    folder: Path,
    family: AudioFamily,
    tokenizer: PreTrainedTokenizerBase,
    token_id: int,
    windows: Windows,
) -> AudioProcessor:
    """What the runtime has to know of sound.

    Args:
        folder: The checkpoint.
        family: Its family.
        tokenizer: Its tokenizer, which is given the chat template.
        token_id: Id of the placeholder.
        windows: As the family describes them.

    Raises:
        ExportError: The placeholder could come from a user's text, or the template has no place
            for it.
    """
    placeholder, part = sound_place(folder, tokenizer, token_id)
    return AudioProcessor(
        placeholder=placeholder,
        part=part,
        windows=windows,
        before=_before(tokenizer, rendered(tokenizer, part), family),
    )


def whisper_windows(
    config: Any,
    folder: Path,
    kind: Literal["sound", "whole", "chunks"],
    states_per_token: int,
    chunk_frames: int | None = None,
) -> Windows:
    """The windows of an encoder of Whisper's kind, for sounds of one window at most.

    Args:
        config: The encoder's configuration.
        folder: The checkpoint, with ``preprocessor_config.json`` or ``processor_config.json``.
        kind: See ``Windows``.
        states_per_token: See ``Windows``.
        chunk_frames: See ``Windows``.

    Raises:
        ExportError: The runtime cannot prepare sound this way, or the encoder takes other windows
            than the feature extractor gives.
    """
    check_activation(config.activation_function)
    needed = {
        "sampling_rate": SAMPLE_RATE,
        "dither": 0.0,
        "padding_value": 0.0,
        "padding_side": "right",
    }
    extractor = read_extractor(folder, WhisperFeatureExtractor, needed)
    if chunk_frames is not None and not 2 <= chunk_frames <= 2 * config.max_source_positions:
        raise ExportError(
            f"The encoder hears {chunk_frames} frames at once (twice n_window) and has positions "
            f"for {2 * config.max_source_positions} (twice max_source_positions)."
        )
    windows = Windows(
        kind=kind,
        feature_size=extractor.feature_size,
        n_fft=extractor.n_fft,
        hop_length=extractor.hop_length,
        chunk_length=extractor.chunk_length,
        states_per_token=states_per_token,
        max_seconds=extractor.chunk_length,
        chunk_frames=chunk_frames,
    )
    # Chunk by chunk, a sound may be as long as it likes.
    frames = windows.frames if kind == "chunks" else 2 * config.max_source_positions
    expected = (config.num_mel_bins, frames)
    if (windows.feature_size, windows.frames) != expected:
        raise ExportError(
            f"The feature extractor gives {windows.feature_size} bins and {windows.frames} frames "
            f"of a window; the encoder takes {expected[0]} and {expected[1]}."
        )
    wrong = problem(windows)
    if wrong is not None:
        raise ExportError(f"The feature extractor and the encoder have {wrong}.")
    return windows


def read_extractor(folder: Path, kind: type, needed: Mapping[str, object]) -> Any:
    """Reads a checkpoint's feature extractor.

    Args:
        folder: The checkpoint.
        kind: Its class.
        needed: Values that the runtime, or the encoder, asks of it by name.

    Raises:
        ExportError: There is none, it is another one, or it has other values.
    """
    try:
        extractor = AutoFeatureExtractor.from_pretrained(folder)
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise ExportError(
            f"transformers refuses the feature extractor of {folder}: {error}"
        ) from error
    if type(extractor) is not kind:
        raise ExportError(
            f"The feature extractor is a {type(extractor).__name__}; possible: {kind.__name__}."
        )
    for name, value in needed.items():
        if getattr(extractor, name) != value:
            raise ExportError(
                f"The feature extractor's {name} is {getattr(extractor, name)}; it has to be "
                f"{value}."
            )
    return extractor


def sound_place(
    folder: Path, tokenizer: PreTrainedTokenizerBase, token_id: int
) -> tuple[str, Part]:
    """The placeholder of a sound, and the type of part for which the template writes it.

    Raises:
        ExportError: Text could produce it, or the template writes none.
    """
    placeholder = placeholder_of(tokenizer, token_id, media="sound")
    read_template(folder, tokenizer)
    return placeholder, _part_of(tokenizer, placeholder)


def _part_of(tokenizer: PreTrainedTokenizerBase, placeholder: str) -> Part:
    """The type of part for which the chat template writes the placeholder.

    Raises:
        ExportError: There is none.
    """
    for part in get_args(Part):
        try:
            if rendered(tokenizer, part).count(placeholder) == 1:
                return cast(Part, part)
        except TemplateError:  # templates refuse parts that they do not know
            continue
    raise ExportError(
        f"The chat template writes no {placeholder!r} for a sound, as a part of type "
        f"{' or '.join(get_args(Part))}. Take the template that the model was trained with."
    )


def _before(tokenizer: PreTrainedTokenizerBase, prompt: str, family: AudioFamily) -> str | None:
    """The token in front of a sound, None where there is none or the template writes it.

    Raises:
        ExportError: It is no special token, or the prompt does not begin as it has to.
    """
    if not prompt.startswith(family.start):
        raise ExportError(
            f"Prompts of this family begin with {family.start!r}, which the chat template does not "
            "write. Give bos_token in tokenizer_config.json."
        )
    special = {t.content for t in tokenizer.added_tokens_decoder.values() if t.special}
    if family.before is None or family.before in prompt:
        return None
    if family.before not in special:
        raise ExportError(
            f"{family.before!r} stands in front of sound but is no special token of the tokenizer. "
            "Mark it as special in tokenizer.json."
        )
    return family.before
