"""Sound from anywhere into 16 kHz mono, with its length checked before decoding.

With the ``[audio]`` extra every format of libsndfile is read and resampling is soxr's. Without
it the standard library reads PCM WAV, and numpy resamples with a windowed sinc.
"""

from __future__ import annotations

import io
import math
import wave
from os import PathLike
from pathlib import Path
from typing import BinaryIO

import numpy as np
from numpy.typing import NDArray

from edge_safe.errors import MediaError
from edge_safe.runtime.media import AudioInput

SAMPLE_RATE = 16_000

MAX_SECONDS = 30.0

_MIN_RATE, _MAX_RATE = 1_000, 768_000

_SINC_ZEROS = 32

INSTALL = "Install edge-safe[audio] for other formats, or convert it to PCM WAV."


def read_audio(source: AudioInput, max_seconds: float = MAX_SECONDS) -> NDArray[np.float32]:
    """Reads a sound.

    Args:
        source: A path, the bytes of a file, or float32 samples (n,) or (n, channels) with their
            rate in Hz.
        max_seconds: The longest sound that is accepted.

    Returns:
        (n,) float32 at 16 kHz, mono, in [-1, 1] for PCM files.

    Raises:
        MediaError: It is missing, empty, too long, damaged, or of an unknown format.
    """
    if isinstance(source, tuple):
        samples, rate = _check_samples(source, max_seconds)
    else:
        samples, rate = _decode(source, max_seconds)
    if samples.ndim == 2:
        samples = samples.mean(axis=1)
    if not np.isfinite(samples).all():
        raise MediaError("The sound has samples that are not finite numbers.")
    return resample(np.ascontiguousarray(samples, np.float32), rate)


def resample(samples: NDArray[np.float32], rate: int) -> NDArray[np.float32]:
    """Brings (n,) samples from ``rate`` Hz to 16 kHz."""
    if rate == SAMPLE_RATE:
        return samples
    try:
        import soxr
    except ImportError:
        return _sinc_resample(samples, rate)
    out: NDArray[np.float32] = soxr.resample(samples, rate, SAMPLE_RATE)
    return out


def _check_samples(pair: tuple[object, ...], max_seconds: float) -> tuple[NDArray[np.float32], int]:
    """Checks samples that were given directly."""
    samples, rate = pair if len(pair) == 2 else (None, None)
    if not isinstance(samples, np.ndarray) or samples.dtype.kind != "f" or samples.ndim > 2:
        raise MediaError("Give a sound as a pair of float32 samples (n,) or (n, channels) and Hz.")
    if not isinstance(rate, int | np.integer):
        raise MediaError(f"The sample rate is {rate!r}; give a whole number of Hz.")
    _check_length(len(samples), int(rate), "the sound", max_seconds)
    return samples.astype(np.float32), int(rate)


def _check_length(frames: int, rate: int, name: str, max_seconds: float) -> None:
    """Turns away what is empty or too long."""
    if not _MIN_RATE <= rate <= _MAX_RATE:
        raise MediaError(f"{name} has a sample rate of {rate} Hz, which is not usable.")
    if frames < 1:
        raise MediaError(f"{name} has no samples.")
    seconds = frames / rate
    if seconds > max_seconds:
        raise MediaError(
            f"{name} lasts {seconds:.0f} s; at most {max_seconds:.0f} s are accepted. Cut it."
        )


def _decode(source: object, max_seconds: float) -> tuple[NDArray[np.float32], int]:
    """Samples (n, channels) and rate of a file."""
    if not isinstance(source, bytes | str | PathLike):
        raise MediaError(
            f"A sound was given as {type(source).__name__}; give a path, bytes, or a pair of "
            "float32 samples and their rate."
        )
    name = "the sound" if isinstance(source, bytes) else str(source)
    if not isinstance(source, bytes):
        path = Path(source)
        try:
            size = path.stat().st_size if path.is_file() else -1
        except (OSError, ValueError) as error:
            raise MediaError(f"Cannot read the sound {name}: {error}.") from error
        if size < 0:
            raise MediaError(f"There is no sound file at {name}.")
    else:
        size = len(source)
    if size == 0:
        raise MediaError(f"{name} is empty (0 bytes).")
    try:
        import soundfile
    except (ImportError, OSError):  # OSError: the wheel is there, its libsndfile is not
        return _decode_wave(source, name, max_seconds)
    stream = io.BytesIO(source) if isinstance(source, bytes) else str(source)
    try:
        with soundfile.SoundFile(stream) as file:
            _check_length(file.frames, file.samplerate, name, max_seconds)
            samples: NDArray[np.float32] = file.read(dtype="float32", always_2d=True)
            rate = int(file.samplerate)
    except (soundfile.LibsndfileError, OSError, RuntimeError, TypeError) as error:
        raise MediaError(f"{name} is not a sound file that can be read: {error}") from error
    _check_length(len(samples), rate, name, max_seconds)
    return samples, rate


def _decode_wave(
    source: bytes | str | PathLike[str], name: str, max_seconds: float
) -> tuple[NDArray[np.float32], int]:
    """Reads PCM WAV with the standard library."""
    try:
        with _open(source) as stream, wave.open(stream) as file:
            rate, channels, width = file.getframerate(), file.getnchannels(), file.getsampwidth()
            _check_length(file.getnframes(), rate, name, max_seconds)
            data = file.readframes(file.getnframes())
    except (wave.Error, EOFError, OSError) as error:
        raise MediaError(f"{name} is not a PCM WAV file: {error}. {INSTALL}") from error
    whole = len(data) - len(data) % (width * channels)
    samples = _pcm(data[:whole], width, name).reshape(-1, channels)
    _check_length(len(samples), rate, name, max_seconds)
    return samples, rate


def _open(source: bytes | str | PathLike[str]) -> BinaryIO:
    """A stream over bytes or a file."""
    return io.BytesIO(source) if isinstance(source, bytes) else Path(source).open("rb")


def _pcm(data: bytes, width: int, name: str) -> NDArray[np.float32]:
    """Little-endian PCM of 1 to 4 bytes into [-1, 1)."""
    if width == 1:
        return (np.frombuffer(data, np.uint8).astype(np.float32) - 128.0) / 128.0
    if width == 2:
        return np.frombuffer(data, "<i2").astype(np.float32) / 32768.0
    if width == 3:
        raw = np.frombuffer(data, np.uint8).reshape(-1, 3).astype(np.int32)
        value = (raw[:, 0] << 8 | raw[:, 1] << 16 | raw[:, 2] << 24) >> 8
        return value.astype(np.float32) / 8388608.0
    if width == 4:
        return (np.frombuffer(data, "<i4").astype(np.float64) / 2147483648.0).astype(np.float32)
    raise MediaError(f"{name} has {8 * width}-bit samples. {INSTALL}")


def _sinc_resample(samples: NDArray[np.float32], rate: int) -> NDArray[np.float32]:
    """Band-limited resampling by a Hann-windowed sinc, one phase at a time."""
    factor = math.gcd(rate, SAMPLE_RATE)
    up, down = SAMPLE_RATE // factor, rate // factor
    cutoff = min(1.0, up / down)
    half = math.ceil(_SINC_ZEROS / cutoff)
    count = -(-len(samples) * up // down)
    padded = np.pad(samples.astype(np.float64), half + 1)
    windows = np.lib.stride_tricks.sliding_window_view(padded, 2 * half + 1)
    out = np.empty(count, np.float32)
    for phase in range(min(up, count)):
        places = np.arange(phase, count, up) * down
        fraction = (places[0] % up) / up
        offsets = np.arange(-half, half + 1) - fraction
        window = np.cos(np.pi * offsets / (2 * (half + 1))) ** 2
        kernel = cutoff * np.sinc(cutoff * offsets) * window
        out[phase::up] = windows[places // up + 1] @ kernel
    return out
