"""Pictures of every kind, good and bad."""

from __future__ import annotations

import io
import struct
import zlib
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from edge_safe.errors import MediaError
from edge_safe.runtime.image_io import read_image


def png(image: Image.Image, **options: object) -> bytes:
    stream = io.BytesIO()
    image.save(stream, "PNG", **options)
    return stream.getvalue()


@pytest.fixture
def picture() -> Image.Image:
    pixels = np.random.default_rng(0).integers(0, 255, (20, 30, 3)).astype(np.uint8)
    return Image.fromarray(pixels)


def test_path_bytes_image_and_array_are_the_same(picture: Image.Image, tmp_path: Path) -> None:
    path = tmp_path / "a.png"
    path.write_bytes(png(picture))
    expected = np.asarray(picture)
    for source in (path, str(path), png(picture), picture, expected):
        np.testing.assert_array_equal(read_image(source), expected)


def test_exif_rotation_is_applied(picture: Image.Image) -> None:
    exif = Image.Exif()
    exif[0x0112] = 6
    turned = read_image(png(picture, exif=exif))
    np.testing.assert_array_equal(turned, np.rot90(np.asarray(picture), -1))


def test_transparency_is_laid_over_white() -> None:
    clear = Image.new("RGBA", (4, 4), (10, 20, 30, 0))
    assert (read_image(clear) == 255).all()


def test_half_transparent_text_in_a_palette_keeps_its_colour() -> None:
    image = Image.new("P", (2, 1))
    image.putpalette([0, 0, 0, 200, 0, 0])
    image.putpixel((1, 0), 1)
    data = png(image, transparency=0)
    np.testing.assert_array_equal(read_image(data)[0], [[255, 255, 255], [200, 0, 0]])


def test_grey_becomes_rgb() -> None:
    assert (read_image(Image.new("L", (3, 2), 77)) == 77).all()


def test_sixteen_bits_keep_the_high_byte() -> None:
    deep = Image.fromarray(np.full((2, 2), 0x8123, np.uint16))
    assert (read_image(png(deep)) == 0x81).all()


def test_cmyk_is_converted() -> None:
    stream = io.BytesIO()
    Image.new("CMYK", (8, 8), (0, 0, 0, 255)).save(stream, "JPEG")
    assert read_image(stream.getvalue()).max() < 10


def test_a_missing_file_is_named(tmp_path: Path) -> None:
    with pytest.raises(MediaError, match=r"no picture at .*absent\.png"):
        read_image(tmp_path / "absent.png")


def test_a_folder_is_no_picture(tmp_path: Path) -> None:
    with pytest.raises(MediaError):
        read_image(tmp_path)


def test_a_text_file_named_png_is_no_picture(tmp_path: Path) -> None:
    path = tmp_path / "note.png"
    path.write_text("this is not a picture")
    with pytest.raises(MediaError, match=r"note\.png is not a picture"):
        read_image(path)


def test_an_empty_file_is_named(tmp_path: Path) -> None:
    path = tmp_path / "empty.png"
    path.touch()
    with pytest.raises(MediaError, match="0 bytes"):
        read_image(path)


def test_a_truncated_png_is_damaged(picture: Image.Image) -> None:
    data = png(picture.resize((300, 300)))
    with pytest.raises(MediaError, match="damaged"):
        read_image(data[: len(data) // 2])


def test_a_picture_of_900_million_pixels_is_not_decoded() -> None:
    def chunk(kind: bytes, data: bytes) -> bytes:
        body = kind + data
        return struct.pack(">I", len(data)) + body + struct.pack(">I", zlib.crc32(body))

    header = struct.pack(">IIBBBBB", 30_000, 30_000, 8, 2, 0, 0, 0)
    data = b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", header) + chunk(b"IDAT", b"")
    with pytest.raises(MediaError, match=r"large|million"):
        read_image(data)


def test_the_limit_counts_pixels_of_images_too() -> None:
    with pytest.raises(MediaError, match="50 million"):
        read_image(Image.new("1", (10_000, 5_001)))


@pytest.mark.parametrize(
    "array",
    [np.zeros((4, 4), np.uint8), np.zeros((4, 4, 3), np.float32), np.zeros((0, 4, 3), np.uint8)],
)
def test_unsuitable_arrays_are_rejected(array: np.ndarray) -> None:
    with pytest.raises(MediaError):
        read_image(array)


def test_other_objects_are_rejected() -> None:
    with pytest.raises(MediaError, match="int"):
        read_image(5)
