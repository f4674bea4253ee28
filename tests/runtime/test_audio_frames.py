"""Frames of sound against transformers' Phi4MultimodalFeatureExtractor, within 1e-4."""

from __future__ import annotations

from typing import Any

import msgspec
import numpy as np
import pytest

from edge_safe.errors import MediaError
from edge_safe.runtime.audio_frames import (
    BESIDE_PICTURES,
    FEATURES,
    STATES,
    Frames,
    cut_frames,
    frame_features,
    frame_tokens,
    frames_problem,
)
from edge_safe.runtime.audio_io import read_audio
from edge_safe.runtime.kaldi_mel import kaldi_filters
from tests.runtime.test_audio_windows import SOUNDS, TOLERANCE, speech

FRAMES = Frames(
    feature_size=80, n_fft=512, win_length=400, hop_length=160, preemphasis=0.97,
    min_frequency=0.0, max_frequency=7690.0, frames_per_token=8, window_tokens=500,
    max_seconds=600,
)  # fmt: skip


def extractor() -> Any:
    return pytest.importorskip("transformers").Phi4MultimodalFeatureExtractor()


def extracted(samples: np.ndarray) -> Any:
    return extractor()([samples], sampling_rate=16_000, return_tensors="np")


@pytest.mark.parametrize("name", SOUNDS)
def test_features_are_the_extractor_s(name: str) -> None:
    samples = read_audio(SOUNDS[name]())
    expected = extracted(samples)
    features = frame_features(samples, FRAMES)
    assert features.dtype == np.float32
    np.testing.assert_allclose(features, expected["audio_input_features"][0], atol=TOLERANCE)
    assert frame_tokens(len(samples), FRAMES) == int(expected["audio_embed_sizes"][0])


@pytest.mark.parametrize("samples", [400, 401, 559, 560, 1519, 1520, 1680, 1681, 16_001])
def test_lengths_are_the_extractor_s(samples: int) -> None:
    sound = speech(2.0)[:samples]
    expected = extracted(sound)
    found = frame_features(sound, FRAMES)
    np.testing.assert_allclose(found, expected["audio_input_features"][0], atol=TOLERANCE)
    assert frame_tokens(samples, FRAMES) == int(expected["audio_embed_sizes"][0])


def test_mel_filters_are_the_extractor_s() -> None:
    np.testing.assert_allclose(
        kaldi_filters(16_000, 80, 512, 0.0, 7690.0), extractor().mel_filters, atol=1e-12
    )


def test_a_longer_sound_is_cut_into_windows_that_reach_back() -> None:
    sound = speech(83.0)
    features = frame_features(sound, FRAMES)
    windows = list(cut_frames(sound, FRAMES, beside_pictures=False))
    tokens = frame_tokens(len(sound), FRAMES)
    assert [window.tokens for window in windows] == [500, 500, tokens - 1000]
    assert [window.feeds[STATES].tolist() for window in windows] == [[0, 500], [1, 500], [1, 500]]
    for number, window in enumerate(windows):
        first = max(4000 * number - 8, 0)
        expected = features[first : 4000 * (number + 1)]
        np.testing.assert_array_equal(window.feeds[FEATURES][0], expected)


@pytest.mark.parametrize("beside", [False, True])
def test_a_window_knows_of_pictures(beside: bool) -> None:
    (window,) = cut_frames(speech(1.0), FRAMES, beside)
    assert window.feeds[BESIDE_PICTURES].tolist() == [int(beside)]
    assert window.feeds[STATES].tolist() == [0, window.tokens]


def test_a_sound_shorter_than_a_frame_is_refused() -> None:
    with pytest.raises(MediaError, match="25 ms, too short"):
        frame_tokens(399, FRAMES)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"win_length": 600}, "600 samples for spectra of 512"),
        ({"min_frequency": 7690.0}, "7690.0 to 7690.0 Hz"),
        ({"n_fft": 400}, None),
    ],
)
def test_parameters_that_do_not_fit_are_named(changes: dict[str, Any], message: str | None) -> None:
    found = frames_problem(msgspec.structs.replace(FRAMES, **changes))
    assert found is None if message is None else message in str(found)
