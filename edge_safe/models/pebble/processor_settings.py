"""The settings of pebble's preprocessing: what preprocessor_config.json holds."""

from __future__ import annotations

import msgspec

from edge_safe.models.pebble.text_lines import TextLineConfig

SETTINGS_FILE = "preprocessor_config.json"


class ObjectConfig(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """Section ``objects``: (pixel - mean) / scale of the picture, squeezed to size x size."""

    size: int = 224
    mean: float = 127.0
    scale: float = 128.0


class SpeechConfig(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """Section ``speech``: Whisper's log-mel.

    Attributes:
        sampling_rate: Hz that the encoder hears.
        feature_size: Mel bands.
        hop_length: Samples between two frames.
        n_fft: Samples of one frame.
        chunk_length: Seconds of the encoder's longest window, the longest recording.
        samples_per_state: Samples behind one state of the encoder.
    """

    sampling_rate: int = 16000
    feature_size: int = 80
    hop_length: int = 160
    n_fft: int = 400
    chunk_length: int = 30
    samples_per_state: int = 320


class ProcessorSettings(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """The whole of preprocessor_config.json."""

    text_lines: TextLineConfig = TextLineConfig()
    objects: ObjectConfig = ObjectConfig()
    speech: SpeechConfig = SpeechConfig()
    processor_class: str = "PebbleProcessor"
