"""Windows of sound against transformers' feature extractor, within 1e-4 (they reach 2)."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
import pytest

from edge_safe.errors import MediaError
from edge_safe.runtime.audio_io import read_audio
from edge_safe.runtime.audio_windows import Windows, cut, mel_features, problem, token_count
from tests.runtime.test_audio_io import wav

TOLERANCE = 1e-4
SOUND = Windows(
    kind="sound", feature_size=128, n_fft=400, hop_length=160, chunk_length=30,
    states_per_token=2, max_seconds=30,
)  # fmt: skip
WHOLE = Windows(
    kind="whole", feature_size=128, n_fft=400, hop_length=160, chunk_length=30,
    states_per_token=4, max_seconds=600,
)  # fmt: skip
CHUNKS = Windows(
    kind="chunks", feature_size=128, n_fft=400, hop_length=160, chunk_length=300,
    states_per_token=2, max_seconds=300, chunk_frames=200,
)  # fmt: skip


def speech(seconds: float, rate: int = 16_000) -> np.ndarray:
    """A gliding tone with noise."""
    random = np.random.default_rng(int(seconds * rate))
    time = np.arange(int(seconds * rate)) / rate
    tone = 0.4 * np.sin(2 * np.pi * (200 + 150 * np.sin(3 * time)) * time)
    return (tone + random.normal(0, 0.02, len(time))).astype(np.float32)


SOUNDS: dict[str, Callable[[], Any]] = {
    "one second": lambda: (speech(1.0), 16_000),
    "8 kHz": lambda: (speech(2.3, 8_000), 8_000),
    "22.05 kHz": lambda: (speech(2.3, 22_050), 22_050),
    "44.1 kHz": lambda: (speech(2.3, 44_100), 44_100),
    "48 kHz, stereo": lambda: (
        np.stack([speech(2.3, 48_000), speech(2.3, 48_000)[::-1]], 1),
        48_000,
    ),
    "int16 file": lambda: wav(speech(1.7), 16_000),
    "float64": lambda: (speech(1.7).astype(np.float64), 16_000),
    "loud": lambda: (3 * speech(1.7), 16_000),
    "silence": lambda: (np.zeros(20_000, np.float32), 16_000),
    "very short": lambda: (speech(0.04), 16_000),
    "30 s": lambda: (speech(30.0), 16_000),
}


def extracted(samples: np.ndarray, **how: Any) -> Any:
    transformers = pytest.importorskip("transformers")
    extractor = transformers.WhisperFeatureExtractor(feature_size=128)
    return extractor(samples, sampling_rate=16_000, return_tensors="np", **how)


@pytest.mark.parametrize("name", SOUNDS)
def test_features_of_a_window_are_the_extractor_s(name: str) -> None:
    samples = read_audio(SOUNDS[name]())
    expected = extracted(samples, padding="max_length", return_attention_mask=True)
    features = mel_features(samples, SOUND)
    assert features.dtype == np.float32
    np.testing.assert_allclose(features, expected["input_features"], atol=TOLERANCE)
    (window,) = cut(samples, SOUND)
    frames = int(expected["attention_mask"].sum())
    states = (frames - 1) // 2 + 1
    assert window.feeds["steps"].tolist() == [states]
    assert window.tokens == (states - 2) // 2 + 1
    heard = window.feeds["input_features"]
    assert heard.shape[-1] == min(2 * states + 2, 3000)
    np.testing.assert_array_equal(heard, features[:, :, : heard.shape[-1]])


@pytest.mark.parametrize("seconds", [0.01, 12.5, 30.0, 30.1, 71.0])
def test_whole_windows_are_voxtral_s(seconds: float) -> None:
    samples = speech(seconds)
    how = {"padding": True, "truncation": False, "pad_to_multiple_of": 480_000}
    expected = extracted(samples, **how)["input_features"].reshape(128, -1, 3000).transpose(1, 0, 2)
    windows = list(cut(samples, WHOLE))
    found = np.concatenate([window.feeds["input_features"] for window in windows])
    np.testing.assert_allclose(found, expected, atol=TOLERANCE)
    assert {window.tokens for window in windows} == {375}
    assert token_count(len(samples), WHOLE) == 375 * len(expected)


@pytest.mark.parametrize("seconds", [0.03, 0.9, 2.0, 2.01, 5.125, 30.0, 299.9])
def test_chunks_are_the_frames_of_the_sound_alone(seconds: float) -> None:
    transformers = pytest.importorskip("transformers")
    samples = speech(seconds)
    # Qwen2.5-Omni's, which pads to five minutes.
    extractor = transformers.WhisperFeatureExtractor(feature_size=128, chunk_length=300)
    expected = extractor(
        samples, sampling_rate=16_000, return_tensors="np", return_attention_mask=True
    )
    frames = int(expected["attention_mask"].sum())
    windows = list(cut(samples, CHUNKS))
    parts = [window.feeds["input_features"] for window in windows]
    heard = sum(part.shape[-1] for part in parts)
    # What is left behind the last whole chunk may be less than a token.
    assert 0 <= frames - heard <= 2
    assert [part.shape[-1] for part in parts[:-1]] == [200] * (len(parts) - 1)
    np.testing.assert_allclose(
        np.concatenate(parts, axis=-1), expected["input_features"][:, :, :heard], atol=TOLERANCE
    )
    assert sum(window.tokens for window in windows) == ((frames - 1) // 2 + 1 - 2) // 2 + 1
    assert token_count(len(samples), CHUNKS) == sum(window.tokens for window in windows)


@pytest.mark.parametrize("samples", [1, 160, 320])
def test_a_sound_without_a_token_is_refused(samples: int) -> None:
    with pytest.raises(MediaError, match="too short"):
        token_count(samples, SOUND)


def test_a_longer_sound_is_refused_rather_than_cut() -> None:
    with pytest.raises(MediaError, match="31 s; at most 30 s"):
        read_audio((speech(31.0), 16_000), SOUND.max_seconds)
    assert len(read_audio((speech(31.0), 16_000), WHOLE.max_seconds)) == 31 * 16_000


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"max_seconds": 31}, "one window of 30 s"),
        ({"hop_length": 161}, "frames, no multiple"),
        ({"kind": "chunks"}, "'chunks' with chunk_frames None"),
        ({"chunk_frames": 200}, "'sound' with chunk_frames 200"),
        ({"kind": "chunks", "chunk_frames": 202}, "202 frames, no multiple of 4"),
        ({"n_fft": 4096, "chunk_length": 1, "max_seconds": 1, "hop_length": 40}, None),
    ],
)
def test_parameters_that_do_not_fit_are_named(changes: dict[str, Any], message: str | None) -> None:
    import msgspec

    found = problem(msgspec.structs.replace(SOUND, **changes))
    assert found is None if message is None else message in str(found)
