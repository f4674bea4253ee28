"""A picture is encoded once, whatever it comes as, and only that very picture."""

from __future__ import annotations

import io
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from edge_safe.errors import MediaError
from edge_safe.runtime.audio_io import read_audio
from edge_safe.runtime.families.base import Media
from edge_safe.runtime.image_io import read_image
from edge_safe.runtime.media_cache import MediaCache

RED = np.full((4, 6, 3), (255, 0, 0), np.uint8)
BLUE = np.full((4, 6, 3), (0, 0, 255), np.uint8)
HUM = (np.sin(np.arange(1600, dtype=np.float32) / 9), 16_000)


class Averaging:
    """A family whose features are the mean colour of each picture and the first samples."""

    def __init__(self) -> None:
        self.placeholders: dict[str, str] = {}
        self.calls = 0

    def media(self, images: Sequence[object], audio: object, deadline: object = None) -> Media:
        self.calls += 1
        seen = [read_image(image).mean((0, 1), keepdims=True)[0] for image in images]
        heard = [] if audio is None else [read_audio(audio)[None, :3]]
        return Media([*seen, *heard], len(seen), len(heard))


@pytest.fixture
def family() -> Averaging:
    return Averaging()


@pytest.fixture
def cache(family: Averaging) -> MediaCache:
    return MediaCache(family, 1 << 20)


def png(pixels: np.ndarray) -> bytes:
    buffer = io.BytesIO()
    Image.fromarray(pixels).save(buffer, "PNG")
    return buffer.getvalue()


def test_the_same_is_encoded_once(cache: MediaCache, family: Averaging, tmp_path: Path) -> None:
    path = tmp_path / "red.png"
    path.write_bytes(png(RED))
    for medium in (RED, path, Image.fromarray(RED)):
        before = family.calls
        first, second = (cache.media([medium], HUM) for _ in range(2))
        assert family.calls == before + (0 if isinstance(medium, Image.Image) else 1)
        for one, other in zip(first.features, second.features, strict=True):
            np.testing.assert_array_equal(one, other)
    # The bytes of a file are the file.
    before = family.calls
    cache.media([png(RED)], HUM)
    assert family.calls == before


@pytest.mark.parametrize(
    ("images", "audio"),
    [
        ([BLUE], HUM),
        ([RED, RED], HUM),
        ([RED.reshape(6, 4, 3)], HUM),
        ([RED], None),
        ([RED], (HUM[0], 8_000)),
        ([RED], (HUM[0][::-1].copy(), 16_000)),
        ([], HUM),
    ],
)
def test_anything_else_is_encoded_anew(
    cache: MediaCache, family: Averaging, images: list[np.ndarray], audio: object
) -> None:
    cache.media([RED], HUM)
    found = cache.media(images, audio)
    assert family.calls == 2
    expected = family.media(images, audio)
    for one, other in zip(found.features, expected.features, strict=True):
        np.testing.assert_array_equal(one, other)


def test_a_file_that_changes_is_read_again(
    cache: MediaCache, family: Averaging, tmp_path: Path
) -> None:
    path = tmp_path / "picture.png"
    for pixels in (RED, BLUE):
        path.write_bytes(png(pixels))
        np.testing.assert_array_equal(cache.media([path], None).features[0][0], pixels[0, 0])
    assert family.calls == 2


def test_what_cannot_be_read_is_said_as_ever(cache: MediaCache, family: Averaging) -> None:
    for medium in ("none.png", b"no picture", np.zeros((2, 2), np.uint8)):
        for _ in range(2):
            with pytest.raises(MediaError):
                cache.media([medium], None)
    assert cache.size == 0


def test_it_holds_no_more_than_it_may(family: Averaging) -> None:
    cache = MediaCache(family, 3 * RED[0, :1].astype(np.float64).nbytes)
    for shade in range(10):
        cache.media([np.full_like(RED, shade)], None)
        assert cache.size <= 72
    before = family.calls
    cache.media([np.full_like(RED, 9)], None)
    assert family.calls == before
    cache.media([np.full_like(RED, 1)], None)
    assert family.calls == before + 1


def test_what_a_caller_does_to_its_list_stays_there(cache: MediaCache) -> None:
    cache.media([RED], None).features.clear()
    assert len(cache.media([RED], None).features) == 1


def test_a_request_without_media_asks_the_family(cache: MediaCache, family: Averaging) -> None:
    assert cache.media([], None).features == []
    assert family.calls == 1
    assert cache.size == 0
