"""Log-mel features against transformers' own Whisper feature extractor."""

from __future__ import annotations

import numpy as np
import pytest

from edge_safe.runtime.log_mel import log_mel


@pytest.mark.parametrize("seconds", [0.3, 7.5, 30.0])
def test_features_equal_whispers(seconds: float) -> None:
    transformers = pytest.importorskip("transformers")
    extractor = transformers.WhisperFeatureExtractor(feature_size=80)
    rng = np.random.default_rng(1)
    samples = rng.standard_normal(int(16_000 * seconds)).astype(np.float32) * 0.1
    samples += np.sin(np.arange(len(samples)) * 0.2).astype(np.float32)
    expected = extractor(samples, sampling_rate=16_000, return_tensors="np").input_features
    ours = log_mel(samples, seconds=30, sample_rate=16_000, bins=80, window=400, hop=160)
    assert ours.dtype == np.float32
    np.testing.assert_allclose(ours, expected, atol=1e-4)


def test_silence_is_finite() -> None:
    silence = np.zeros(16_000, np.float32)
    features = log_mel(silence, seconds=30, sample_rate=16_000, bins=80, window=400, hop=160)
    assert features.shape == (1, 80, 3000)
    assert np.isfinite(features).all()
