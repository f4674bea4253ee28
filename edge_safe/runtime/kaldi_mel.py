"""Log-mel features of frames on their own, in numpy: what Phi-4-multimodal hears.

Each frame is pre-emphasized by itself, weighted by a Hamming window and summed by triangles that
are straight on Kaldi's mel scale, 1127 ln(1 + f / 700); the natural logarithm has a floor at 0.
Nothing is padded: samples behind the last whole frame are not heard.
"""

from __future__ import annotations

from functools import lru_cache

import numpy as np
from numpy.typing import NDArray

# Samples in [-1, 1] count as 16-bit integers.
_FULL_SCALE = 32768.0

# Frames whose spectra are computed at once.
_BLOCK = 3000


def kaldi_mel(
    samples: NDArray[np.float32],
    *,
    sample_rate: int,
    bins: int,
    n_fft: int,
    window: int,
    hop: int,
    preemphasis: float,
    lowest: float,
    highest: float,
) -> NDArray[np.float32]:
    """Features of one sound.

    Args:
        samples: (n,) mono.
        sample_rate: Hz.
        bins: Mel bins.
        n_fft: Samples of a spectrum; what a frame lacks is silence.
        window: Samples of a frame.
        hop: Samples between frames.
        preemphasis: Share of the sample before that is taken off each.
        lowest: Where the first triangle begins, Hz.
        highest: Where the last one ends, Hz.

    Returns:
        ((n - window) // hop + 1, bins) float32.
    """
    frames = np.lib.stride_tricks.sliding_window_view(samples, window)[::hop]
    filters = kaldi_filters(sample_rate, bins, n_fft, lowest, highest)
    hamming = np.hamming(window)
    features = np.empty((len(frames), bins), np.float32)
    # Block by block, as the spectra of a long sound are many times larger than its samples.
    for start in range(0, len(frames), _BLOCK):
        block = frames[start : start + _BLOCK]
        # The first sample has none before it and takes itself.
        before = np.concatenate([block[:, :1], block[:, :-1]], axis=1)
        emphasized = (block - np.float32(preemphasis) * before) * np.float32(_FULL_SCALE)
        power = np.abs(np.fft.rfft(emphasized * hamming, n=n_fft, axis=1)) ** 2
        features[start : start + _BLOCK] = np.log(np.maximum(power @ filters, 1.0))
    return features


@lru_cache(maxsize=4)
def kaldi_filters(
    sample_rate: int, bins: int, n_fft: int, lowest: float, highest: float
) -> NDArray[np.float64]:
    """Triangular filters (n_fft // 2 + 1, bins) of height 1."""
    first, last = _to_mel(np.array([lowest, highest], np.float64)).tolist()
    edges = np.linspace(first, last, bins + 2)
    grid = _to_mel(np.arange(n_fft // 2 + 1) * np.float64(sample_rate / n_fft))[:, None]
    rising = (grid - edges[:-2]) / (edges[1:-1] - edges[:-2])
    falling = (edges[2:] - grid) / (edges[2:] - edges[1:-1])
    filters: NDArray[np.float64] = np.maximum(0.0, np.minimum(rising, falling))
    return filters


def _to_mel(hertz: NDArray[np.float64]) -> NDArray[np.float64]:
    """Kaldi's scale."""
    mel: NDArray[np.float64] = 1127.0 * np.log(1.0 + hertz / 700.0)
    return mel
