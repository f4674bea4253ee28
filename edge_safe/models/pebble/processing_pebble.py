"""From a conversation with pictures and sound to what pebble's ``forward`` takes."""

from __future__ import annotations

import os
import shutil
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import msgspec
import numpy as np
import torch
from numpy.typing import NDArray
from PIL import Image
from scipy.signal import resample_poly
from torch import Tensor
from transformers import (
    AutoTokenizer,
    BatchFeature,
    PreTrainedTokenizerBase,
    WhisperFeatureExtractor,
)

from edge_safe.errors import CheckpointError, MediaError, PromptError
from edge_safe.models.pebble.configuration_pebble import PebbleConfig
from edge_safe.models.pebble.processor_settings import (
    SETTINGS_FILE,
    ObjectConfig,
    ProcessorSettings,
)
from edge_safe.models.pebble.speech_encoder import window_of
from edge_safe.models.pebble.text_lines import cut_line, detector_input, find_boxes, line_pixels
from edge_safe.models.pebble.tokenization_pebble import PebbleTokenizer
from edge_safe.models.pebble.turn_encoder import TurnEncoder
from edge_safe.models.pebble.turns import Recording, read_turns

Detector = Callable[[Tensor], Tensor]
"""(1, 3, H, W) float32 -> (1, 1, H, W) probability of text: pebble's ``text_detector``."""


class PebbleProcessor:
    """Prepares one conversation."""

    def __init__(
        self, tokenizer: PreTrainedTokenizerBase, config: PebbleConfig, settings: ProcessorSettings
    ) -> None:
        self.tokenizer = tokenizer
        self.config = config
        self.settings = settings
        speech = settings.speech
        self.feature_extractor = WhisperFeatureExtractor(
            feature_size=speech.feature_size,
            sampling_rate=speech.sampling_rate,
            hop_length=speech.hop_length,
            n_fft=speech.n_fft,
            chunk_length=speech.chunk_length,
        )
        self._encoder = TurnEncoder(tokenizer, config)

    @classmethod
    def from_pretrained(
        cls, pretrained_model_name_or_path: str | os.PathLike[str], **kwargs: Any
    ) -> PebbleProcessor:
        """Opens a folder in either of pebble's forms.

        Raises:
            CheckpointError: preprocessor_config.json is missing or malformed.
        """
        folder = Path(pretrained_model_name_or_path)
        path = folder / SETTINGS_FILE
        try:
            settings = msgspec.json.decode(path.read_bytes(), type=ProcessorSettings)
        except (OSError, msgspec.DecodeError) as error:
            raise CheckpointError(f"{path} cannot be read: {error}") from error
        config = PebbleConfig.from_pretrained(folder)
        wheels = kwargs.get("wheels")
        if config.is_small_form:
            tokenizer: Any = PebbleTokenizer.from_pretrained(folder, wheels=wheels)
        else:
            tokenizer = AutoTokenizer.from_pretrained(folder)
        return cls(tokenizer, config, settings)

    def save_pretrained(self, save_directory: str | os.PathLike[str], **_: Any) -> None:
        """Writes tokenizer, chat template and preprocessor_config.json."""
        folder = Path(save_directory)
        folder.mkdir(parents=True, exist_ok=True)
        self.tokenizer.save_pretrained(folder)
        shutil.rmtree(folder / "additional_chat_templates", ignore_errors=True)
        encoded = msgspec.json.format(msgspec.json.encode(self.settings), indent=2)
        (folder / SETTINGS_FILE).write_bytes(encoded + b"\n")

    def __call__(
        self,
        conversation: str | Sequence[Mapping[str, Any]],
        images: Sequence[Image.Image] = (),
        audio: Recording | None = None,
        detector: Detector | None = None,
        untrained_towers: bool = False,
    ) -> BatchFeature:
        """Prepares a conversation up to slot T.

        Args:
            conversation: The user's text, or messages with ``role`` and ``content``; a content is
                text or a list of ``{"type": "text" | "image" | "audio", <type>: value}``.
            images: Pictures of the last user turn.
            audio: A recording of the last user turn.
            detector: Finds text in pictures; needed where text in pictures is read.
            untrained_towers: Also uses modalities whose projector was never trained.

        Returns:
            ``input_ids`` and ``attention_mask`` (1, T), and, where there are media, the other
            arguments of ``PebbleForConditionalGeneration.forward``.

        Raises:
            PromptError: The conversation is malformed.
            MediaError: A recording is too long, or nothing was trained for pictures or for sound.
        """
        turns = read_turns(conversation)
        last = next((t for t in reversed(turns) if t.role == "user"), None)
        if images or audio is not None:
            if last is None:
                raise PromptError("There are media but no user turn that they belong to.")
            last.images += images
            last.audio += [audio] if audio is not None else []
        data: dict[str, Tensor] = {}
        ids = self._encoder.encode(turns)
        data["input_ids"] = torch.tensor([ids])
        data["attention_mask"] = torch.ones_like(data["input_ids"])
        pictures = [image.convert("RGB") for turn in turns for image in turn.images]
        if pictures:
            data |= self._pictures(pictures, detector, untrained_towers)
        recordings = [recording for turn in turns for recording in turn.audio]
        if recordings:
            if not (untrained_towers or self.config.trained("speech")):
                raise MediaError(
                    "This model's speech decoder has not been trained, so sound cannot be "
                    "judged. Leave the recording out."
                )
            data |= self.log_mel(recordings)
        return BatchFeature(data)

    def _pictures(
        self, pictures: Sequence[Image.Image], detector: Detector | None, untrained: bool
    ) -> dict[str, Tensor]:
        """What the usable towers want of RGB pictures."""
        data: dict[str, Tensor] = {}
        if untrained or self.config.trained("text_lines"):
            if detector is None:
                raise PromptError(
                    "Pictures are read line by line: give the model's text_detector as detector."
                )
            data |= self.text_lines(pictures, detector)
        if untrained or self.config.trained("objects"):
            data["object_pixel_values"] = object_pixels(pictures, self.settings.objects)
        if not data:
            raise MediaError(
                "None of this model's projectors for pictures has been trained, so pictures "
                "cannot be judged. Leave the picture out."
            )
        return data

    def text_lines(self, pictures: Sequence[Image.Image], detector: Detector) -> dict[str, Tensor]:
        """Finds and cuts the lines of RGB pictures."""
        settings = self.settings.text_lines
        lines: list[Image.Image] = []
        owners: list[int] = []
        for number, picture in enumerate(pictures):
            with torch.no_grad():
                found = detector(torch.from_numpy(detector_input(picture, settings)))
            probability = found[0, 0].float().cpu().numpy()
            for box in find_boxes(probability, picture.size, settings):
                lines.append(cut_line(picture, box, settings))
                owners.append(number)
        pixels, widths = line_pixels(lines, settings)
        return {
            "line_pixel_values": torch.from_numpy(pixels),
            "line_widths": torch.tensor(widths, dtype=torch.long),
            "line_images": torch.tensor(owners, dtype=torch.long),
        }

    def log_mel(self, recordings: Sequence[Recording]) -> dict[str, Tensor]:
        """Log-mel (A, 80, frames) of recordings and the number of encoder states that are real.

        As long as the longest recording's window; the model cuts each one's own out of it.

        Raises:
            MediaError: A recording is empty or longer than the encoder's window.
        """
        settings = self.settings.speech
        samples: list[NDArray[np.float32]] = []
        for sound, rate in recordings:
            if rate != settings.sampling_rate:
                sound = resample_poly(sound, settings.sampling_rate, rate).astype(np.float32)
            seconds = len(sound) / settings.sampling_rate
            if not 0 < seconds <= settings.chunk_length:
                raise MediaError(
                    f"The recording lasts {seconds:.1f} s; this model hears more than 0 and at "
                    f"most {settings.chunk_length} s at once. Cut it into pieces."
                )
            samples.append(sound)
        lengths = [-(-len(sound) // settings.samples_per_state) for sound in samples]
        most = settings.chunk_length * settings.sampling_rate // settings.samples_per_state
        features = self.feature_extractor(
            samples,
            sampling_rate=settings.sampling_rate,
            padding="max_length",
            max_length=window_of(max(lengths), most) * settings.samples_per_state,
            return_tensors="pt",
        ).input_features
        return {"input_features": features, "audio_lengths": torch.tensor(lengths)}

    def batch_decode(self, sequences: Tensor, **kwargs: Any) -> list[str]:
        """Text of (B, T) ids."""
        texts: list[str] = self.tokenizer.batch_decode(sequences, **kwargs)
        return texts

    def decode(self, ids: Tensor | Sequence[int], **kwargs: Any) -> str:
        """Text of (T,) ids."""
        return str(self.tokenizer.decode(list(ids), **kwargs))


def object_pixels(pictures: Sequence[Image.Image], settings: ObjectConfig) -> Tensor:
    """(I, 3, 224, 224) float32 of RGB pictures."""
    size = (settings.size, settings.size)
    resized = [p.resize(size, Image.Resampling.BICUBIC) for p in pictures]
    pixels = np.stack([np.asarray(p, np.float32).transpose(2, 0, 1) for p in resized])
    return torch.from_numpy((pixels - np.float32(settings.mean)) / np.float32(settings.scale))
