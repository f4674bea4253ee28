"""Sound of every kind, with and without the audio extra."""

from __future__ import annotations

import io
import sys
import wave
from pathlib import Path

import numpy as np
import pytest

from edge_safe.errors import MediaError
from edge_safe.runtime.audio_io import SAMPLE_RATE, read_audio


def wav(samples: np.ndarray, rate: int, width: int = 2) -> bytes:
    """PCM WAV bytes of (n,) or (n, channels) samples in [-1, 1)."""
    stream = io.BytesIO()
    with wave.open(stream, "wb") as file:
        file.setnchannels(1 if samples.ndim == 1 else samples.shape[1])
        file.setsampwidth(width)
        file.setframerate(rate)
        scaled = np.round(samples * 2 ** (8 * width - 1)).astype(np.int64)
        if width == 1:
            file.writeframes((scaled + 128).astype(np.uint8).tobytes())
        else:
            raw = scaled.astype("<i8").reshape(-1, 1).view(np.uint8)[:, :width]
            file.writeframes(raw.tobytes())
    return stream.getvalue()


def tone(rate: int, seconds: float = 0.5, hertz: float = 440.0) -> np.ndarray:
    return (0.5 * np.sin(2 * np.pi * hertz * np.arange(int(rate * seconds)) / rate)).astype(
        np.float32
    )


@pytest.fixture(params=["extra", "bare"])
def either(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> str:
    """Runs a test with the audio extra and as if it was not installed."""
    if request.param == "bare":
        monkeypatch.setitem(sys.modules, "soundfile", None)
        monkeypatch.setitem(sys.modules, "soxr", None)
    else:
        pytest.importorskip("soundfile")
        pytest.importorskip("soxr")
    return str(request.param)


@pytest.mark.usefixtures("either")
@pytest.mark.parametrize("width", [1, 2, 3, 4])
def test_pcm_of_every_width_is_read(width: int) -> None:
    samples = tone(SAMPLE_RATE)
    np.testing.assert_allclose(
        read_audio(wav(samples, SAMPLE_RATE, width)), samples, atol=1.1 * 2.0 ** (1 - 8 * width)
    )


@pytest.mark.usefixtures("either")
@pytest.mark.parametrize("rate", [8_000, 22_050, 44_100, 48_000])
def test_any_rate_becomes_16_khz(rate: int) -> None:
    heard = read_audio(wav(tone(rate), rate))
    expected = tone(SAMPLE_RATE)
    assert abs(len(heard) - len(expected)) <= 1
    inner = slice(800, 7000)
    assert np.abs(heard[inner] - expected[inner]).max() < 5e-3


@pytest.mark.usefixtures("either")
def test_frequencies_above_8_khz_do_not_fold_back() -> None:
    heard = read_audio((tone(48_000, hertz=11_000.0), 48_000))
    assert np.abs(heard[800:7000]).max() < 5e-3


@pytest.mark.usefixtures("either")
def test_channels_are_averaged() -> None:
    samples = np.stack([tone(SAMPLE_RATE), -tone(SAMPLE_RATE)], 1)
    assert np.abs(read_audio(wav(samples, SAMPLE_RATE))).max() < 1e-4


@pytest.mark.usefixtures("either")
def test_a_path_is_read(tmp_path: Path) -> None:
    path = tmp_path / "a.wav"
    path.write_bytes(wav(tone(SAMPLE_RATE), SAMPLE_RATE))
    assert len(read_audio(path)) == 8000


@pytest.mark.usefixtures("either")
def test_an_empty_file_is_named(tmp_path: Path) -> None:
    path = tmp_path / "empty.wav"
    path.touch()
    with pytest.raises(MediaError, match=r"empty\.wav is empty"):
        read_audio(path)


@pytest.mark.usefixtures("either")
def test_a_header_without_samples_is_rejected() -> None:
    with pytest.raises(MediaError, match="no samples"):
        read_audio(wav(np.zeros(0), SAMPLE_RATE))


@pytest.mark.usefixtures("either")
def test_a_text_file_is_no_sound() -> None:
    with pytest.raises(MediaError, match="sound"):
        read_audio(b"this is not a sound file at all")


@pytest.mark.usefixtures("either")
def test_a_two_hour_recording_is_turned_away_unread(tmp_path: Path) -> None:
    path = tmp_path / "long.wav"
    with wave.open(str(path), "wb") as file:
        file.setnchannels(1)
        file.setsampwidth(1)
        file.setframerate(1000)
        file.writeframes(b"\x80" * 7_200_000)
    with pytest.raises(MediaError, match="7200 s"):
        read_audio(path)


def test_a_missing_file_is_named(tmp_path: Path) -> None:
    with pytest.raises(MediaError, match=r"absent\.wav"):
        read_audio(tmp_path / "absent.wav")


@pytest.mark.parametrize(
    "source",
    [
        (np.zeros(0, np.float32), 16_000),
        (np.zeros(16_000 * 31, np.float32), 16_000),
        (np.full(100, np.nan, np.float32), 16_000),
        (np.zeros(100, np.int16), 16_000),
        (np.zeros(100, np.float32), 0),
        (np.zeros(100, np.float32), "16k"),
        (np.zeros(100, np.float32),),
        5,
    ],
)
def test_unsuitable_samples_are_rejected(source: object) -> None:
    with pytest.raises(MediaError):
        read_audio(source)
