"""Log-mel features as Whisper defines them (arXiv 2212.04356), in numpy.

Slaney mel scale and normalization, periodic Hann window, reflected edges, log10 with a floor 8
below the loudest value.
"""

from __future__ import annotations

from functools import lru_cache

import numpy as np
from numpy.typing import NDArray

_BREAK_HZ = 1000.0
_LINEAR_HZ = 200.0 / 3.0
_LOG_STEP = np.log(6.4) / 27.0

# Frames whose spectra are computed at once.
_BLOCK = 3000


def log_mel(
    samples: NDArray[np.float32],
    *,
    seconds: int,
    sample_rate: int,
    bins: int,
    window: int,
    hop: int,
) -> NDArray[np.float32]:
    """Features of one sound, padded with silence or cut to a fixed length.

    Args:
        samples: (n,) mono.
        seconds: Length of the window the encoder sees.
        sample_rate: Hz.
        bins: Mel bins.
        window: Samples of one spectrum.
        hop: Samples between spectra.

    Returns:
        (1, bins, seconds * sample_rate // hop) float32.
    """
    length = seconds * sample_rate
    padded = np.zeros(length, np.float32)
    padded[: min(len(samples), length)] = samples[:length]
    padded = np.pad(padded, window // 2, mode="reflect")
    hann = 0.5 - 0.5 * np.cos(2 * np.pi * np.arange(window) / window)
    frames = np.lib.stride_tricks.sliding_window_view(padded, window)[::hop][: length // hop]
    filters = mel_filters(sample_rate, bins, window).T
    log = np.empty((1, bins, len(frames)), np.float32)
    # Block by block, as the spectra of a long sound are many times larger than its samples.
    for start in range(0, len(frames), _BLOCK):
        power = np.abs(np.fft.rfft(frames[start : start + _BLOCK] * hann, axis=1)) ** 2
        log[0, :, start : start + _BLOCK] = np.log10(np.maximum(filters @ power.T, 1e-10))
    features: NDArray[np.float32] = (np.maximum(log, log.max() - np.float32(8.0)) + 4.0) / 4.0
    return features


@lru_cache(maxsize=4)
def mel_filters(sample_rate: int, bins: int, window: int) -> NDArray[np.float64]:
    """Triangular filters (window // 2 + 1, bins) of equal area, 0 Hz to half the rate."""
    edges = _to_hz(np.linspace(0.0, _to_mel(sample_rate / 2.0), bins + 2))
    grid = np.linspace(0.0, sample_rate / 2.0, window // 2 + 1)[:, None]
    rising = (grid - edges[:-2]) / (edges[1:-1] - edges[:-2])
    falling = (edges[2:] - grid) / (edges[2:] - edges[1:-1])
    triangles = np.maximum(0.0, np.minimum(rising, falling))
    filters: NDArray[np.float64] = triangles * (2.0 / (edges[2:] - edges[:-2]))
    return filters


def _to_mel(hertz: float) -> float:
    """Slaney's scale: linear up to 1 kHz, logarithmic above."""
    if hertz < _BREAK_HZ:
        return hertz / _LINEAR_HZ
    return float(_BREAK_HZ / _LINEAR_HZ + np.log(hertz / _BREAK_HZ) / _LOG_STEP)


def _to_hz(mel: NDArray[np.float64]) -> NDArray[np.float64]:
    """Inverse of ``_to_mel``."""
    knee = _BREAK_HZ / _LINEAR_HZ
    upper = _BREAK_HZ * np.exp(_LOG_STEP * (mel - knee))
    hertz: NDArray[np.float64] = np.where(mel < knee, mel * _LINEAR_HZ, upper)
    return hertz
