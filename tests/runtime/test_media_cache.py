"""A picture is encoded once, whatever it comes as, and only that very picture."""

from __future__ import annotations

import io
import threading
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
from PIL import Image

from edge_safe.errors import GateError, MediaError, PromptError
from edge_safe.runtime.audio_io import read_audio
from edge_safe.runtime.deadline import Deadline
from edge_safe.runtime.families.base import Media, Prepared
from edge_safe.runtime.image_io import read_image
from edge_safe.runtime.media_cache import MediaCache
from edge_safe.runtime.media_encoder import MediaEncoder

RED = np.full((4, 6, 3), (255, 0, 0), np.uint8)
BLUE = np.full((4, 6, 3), (0, 0, 255), np.uint8)
HUM = (np.sin(np.arange(1600, dtype=np.float32) / 9), 16_000)


class Averaging:
    """Towers whose features are the mean colour of a picture and the first samples of a sound.

    Pictures of a turn with more than two are a row longer.
    """

    def __init__(self) -> None:
        self.placeholders: dict[str, str] = {}
        self.calls = 0
        self.opened = threading.Event()
        self.opened.set()
        self.begun = threading.Semaphore(0)

    def variant(self, kind: str, images: int) -> str:
        return "many" if kind == "image" and images > 2 else ""

    def image(self, source: object, variant: str) -> Prepared:
        color = read_image(source).mean((0, 1), keepdims=True)[0]
        rows = np.repeat(color, 2 if variant == "many" else 1, axis=0)
        return Prepared(0, lambda _: self.encode(Media([rows], image_tokens=len(rows))))

    def sound(self, source: object, variant: str) -> Prepared:
        first = read_audio(source)[None, :3]
        return Prepared(1, lambda _: self.encode(Media([first], audio_tokens=1)))

    def encode(self, media: Media) -> Media:
        """Waits until it may, and counts."""
        self.calls += 1
        self.begun.release()
        if not self.opened.wait(10):
            raise GateError("nobody opened")
        return media


class Cached:
    """A cache, and what makes a family of it."""

    def __init__(self, towers: Averaging, limit: int = 1 << 20) -> None:
        self.cache = MediaCache(towers, limit)
        self.media = MediaEncoder(self.cache, 512).media


@pytest.fixture
def family() -> Averaging:
    return Averaging()


@pytest.fixture
def cache(family: Averaging) -> Cached:
    return Cached(family)


def png(pixels: np.ndarray) -> bytes:
    buffer = io.BytesIO()
    Image.fromarray(pixels).save(buffer, "PNG")
    return buffer.getvalue()


def test_the_same_is_encoded_once(cache: Cached, family: Averaging, tmp_path: Path) -> None:
    path = tmp_path / "red.png"
    path.write_bytes(png(RED))
    for medium in (RED, path, Image.fromarray(RED)):
        before = family.calls
        first, second = (cache.media([medium], HUM) for _ in range(2))
        # The sound is the same, and a PIL image is its pixels.
        assert family.calls - before == (2 if medium is RED else isinstance(medium, Path))
        for one, other in zip(first.features, second.features, strict=True):
            np.testing.assert_array_equal(one, other)
    # The bytes of a file are the file.
    before = family.calls
    cache.media([png(RED)], HUM)
    assert family.calls == before


@pytest.mark.parametrize(
    ("images", "audio", "anew"),
    [
        ([BLUE], HUM, 1),
        ([RED, RED], HUM, 0),
        ([RED, BLUE], HUM, 1),
        ([BLUE, RED], HUM, 1),
        ([BLUE, BLUE], None, 1),
        ([RED.reshape(6, 4, 3)], HUM, 1),
        ([RED], None, 0),
        ([], HUM, 0),
        ([RED], (HUM[0], 8_000), 1),
        ([RED], (HUM[0][::-1].copy(), 16_000), 1),
        ([RED, RED, RED], HUM, 1),
    ],
)
def test_only_what_is_new_is_encoded(
    cache: Cached,
    family: Averaging,
    images: list[np.ndarray],
    audio: tuple[np.ndarray, int] | None,
    anew: int,
) -> None:
    cache.media([RED], HUM)
    before = family.calls
    found = cache.media(images, audio)
    assert family.calls == before + anew
    expected = MediaEncoder(family, 512).media(images, audio)
    assert (found.image_tokens, found.audio_tokens) == (
        expected.image_tokens,
        expected.audio_tokens,
    )
    for one, other in zip(found.features, expected.features, strict=True):
        np.testing.assert_array_equal(one, other)


def test_one_of_two_requests_with_the_same_picture_encodes_it(
    cache: Cached, family: Averaging
) -> None:
    family.opened.clear()
    with ThreadPoolExecutor(2) as pool:
        both = [pool.submit(cache.media, [RED], None) for _ in range(2)]
        assert family.begun.acquire(timeout=10)
        assert not family.begun.acquire(timeout=0.2)
        family.opened.set()
        first, second = (one.result(10).features[0] for one in both)
    assert family.calls == 1
    np.testing.assert_array_equal(first, second)


def test_who_waited_in_vain_encodes_it_itself(
    cache: Cached, family: Averaging, monkeypatch: pytest.MonkeyPatch
) -> None:
    family.opened.clear()
    failing = threading.Event()

    def fail(_: float) -> bool:
        failing.wait(10)
        return False

    with ThreadPoolExecutor(2) as pool:
        with monkeypatch.context() as patch:
            patch.setattr(family, "opened", SimpleNamespace(wait=fail))
            first = pool.submit(cache.media, [RED], None)
            assert family.begun.acquire(timeout=10)
            second = pool.submit(cache.media, [RED], None)
            assert not family.begun.acquire(timeout=0.2)
        family.opened.set()
        failing.set()
        with pytest.raises(GateError, match="nobody opened"):
            first.result(10)
        np.testing.assert_array_equal(second.result(10).features[0], [[255, 0, 0]])
    assert family.calls == 2


def test_a_deadline_ends_the_wait_for_another_request(cache: Cached, family: Averaging) -> None:
    family.opened.clear()
    with ThreadPoolExecutor(1) as pool:
        first = pool.submit(cache.media, [RED], None)
        assert family.begun.acquire(timeout=10)
        with (
            pytest.raises(GateError, match="time for a verdict is over"),
            Deadline(0.2) as deadline,
        ):
            cache.media([RED], None, deadline)
        family.opened.set()
        assert first.result(10).image_tokens == 1
    assert family.calls == 1


def test_a_file_that_changes_while_it_is_encoded_is_not_kept(
    cache: Cached, family: Averaging, tmp_path: Path
) -> None:
    path = tmp_path / "picture.png"
    path.write_bytes(png(RED))
    family.opened.clear()
    with ThreadPoolExecutor(1) as pool:
        first = pool.submit(cache.media, [path], None)
        assert family.begun.acquire(timeout=10)
        path.write_bytes(png(BLUE))
        family.opened.set()
        np.testing.assert_array_equal(first.result(10).features[0], [[255, 0, 0]])
    assert cache.cache.size == 0
    np.testing.assert_array_equal(cache.media([path], None).features[0], [[0, 0, 255]])


def test_a_file_that_changes_is_read_again(
    cache: Cached, family: Averaging, tmp_path: Path
) -> None:
    path = tmp_path / "picture.png"
    for pixels in (RED, BLUE):
        path.write_bytes(png(pixels))
        np.testing.assert_array_equal(cache.media([path], None).features[0][0], pixels[0, 0])
    assert family.calls == 2


def test_what_cannot_be_read_is_said_as_ever(cache: Cached, family: Averaging) -> None:
    for medium in ("none.png", b"no picture", np.zeros((2, 2), np.uint8)):
        for _ in range(2):
            with pytest.raises(MediaError):
                cache.media([medium], None)
    assert cache.cache.size == 0


def test_it_holds_no_more_than_it_may(family: Averaging) -> None:
    cache = Cached(family, 3 * RED[0, :1].astype(np.float64).nbytes)
    for shade in range(10):
        cache.media([np.full_like(RED, shade)], None)
        assert cache.cache.size <= 72
    before = family.calls
    cache.media([np.full_like(RED, 9)], None)
    assert family.calls == before
    cache.media([np.full_like(RED, 1)], None)
    assert family.calls == before + 1


def test_what_a_caller_does_to_its_list_stays_there(cache: Cached) -> None:
    cache.media([RED], None).features.clear()
    assert len(cache.media([RED], None).features) == 1


def test_a_request_without_media_reads_nothing_and_takes_no_thread(
    cache: Cached, family: Averaging, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(threading.Thread, "start", None)
    assert cache.media([], None) == Media()
    assert (family.calls, cache.cache.size) == (0, 0)


def test_media_that_cannot_fit_are_turned_away_before_all_are_encoded(family: Averaging) -> None:
    encoder = MediaEncoder(family, 3)
    assert encoder.media([RED, BLUE], HUM).tokens == 3
    before = family.calls
    with pytest.raises(PromptError, match="pictures take 4 positions or more"):
        encoder.media([RED, BLUE, RED], HUM)
    assert family.calls == before + 2
    with pytest.raises(PromptError, match="sound takes 1 positions"):
        MediaEncoder(family, 2).media([RED, BLUE], HUM)
