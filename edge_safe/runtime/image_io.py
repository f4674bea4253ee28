"""Pictures from anywhere into upright RGB arrays, with their size checked before decoding."""

from __future__ import annotations

import io
from os import PathLike
from pathlib import Path
from typing import TYPE_CHECKING, BinaryIO

import numpy as np
from numpy.typing import NDArray

from edge_safe.errors import MediaError
from edge_safe.runtime.media import ImageInput

if TYPE_CHECKING:
    from PIL.Image import Image

MAX_PIXELS = 50_000_000

# Pillow reads more, some of it by starting other programs.
FORMATS = ("BMP", "GIF", "JPEG", "PNG", "PPM", "TIFF", "WEBP")

_SIXTEEN_BIT = ("I;16", "I;16L", "I;16B", "I;16N")


def read_image(source: ImageInput) -> NDArray[np.uint8]:
    """Reads a picture.

    EXIF rotation is applied, transparency is laid over white, 16-bit grey keeps its high byte.

    Args:
        source: A path, the bytes of a file, a PIL image, or a uint8 array (H, W, 3) in RGB.

    Returns:
        (H, W, 3) uint8, contiguous.

    Raises:
        MediaError: It is missing, empty, too large, damaged, or no picture.
    """
    if isinstance(source, np.ndarray):
        return _check_array(source)
    from PIL import Image, UnidentifiedImageError

    if isinstance(source, Image.Image):
        return _to_rgb(source, "the picture")
    name = "the picture" if isinstance(source, bytes) else str(source)
    try:
        with _open(source, name) as stream, Image.open(stream, formats=FORMATS) as image:
            _check_size(image.width, image.height, name)
            return _to_rgb(image, name)
    except MediaError:
        raise
    except Image.DecompressionBombError as error:
        raise MediaError(f"{name} is too large: {error}. Scale it down.") from error
    except UnidentifiedImageError as error:
        raise MediaError(
            f"{name} is not a picture of a known format ({', '.join(FORMATS)})."
        ) from error
    except Exception as error:  # pillow's plug-ins raise whatever a damaged file provokes
        raise MediaError(f"{name} cannot be decoded, it seems damaged: {error}.") from error


def _open(source: ImageInput, name: str) -> BinaryIO:
    """A stream over a file or over bytes, not empty."""
    if isinstance(source, bytes):
        stream: BinaryIO = io.BytesIO(source)
    elif isinstance(source, str | PathLike):
        stream = _open_file(Path(source), name)
    else:
        raise MediaError(
            f"A picture was given as {type(source).__name__}; give a path, bytes, a PIL image or "
            "a uint8 array (H, W, 3)."
        )
    if not stream.read(1):
        stream.close()
        raise MediaError(f"{name} is empty (0 bytes).")
    stream.seek(0)
    return stream


def _open_file(path: Path, name: str) -> BinaryIO:
    """A file for reading."""
    try:
        return path.open("rb")
    except FileNotFoundError as error:
        raise MediaError(f"There is no picture at {name}.") from error
    except (OSError, ValueError) as error:
        raise MediaError(f"Cannot read the picture {name}: {error}.") from error


def _check_size(width: int, height: int, name: str) -> None:
    """Turns away pictures without or with too many pixels."""
    if width < 1 or height < 1:
        raise MediaError(f"{name} has no pixels ({width} x {height}).")
    if width * height > MAX_PIXELS:
        raise MediaError(
            f"{name} has {width} x {height} pixels; at most {MAX_PIXELS // 1_000_000} million are "
            "accepted. Scale it down."
        )


def _check_array(array: NDArray[np.uint8]) -> NDArray[np.uint8]:
    """Checks an array that was given as a picture."""
    if array.dtype != np.uint8 or array.ndim != 3 or array.shape[2] != 3:
        raise MediaError(
            f"A picture was given as {array.dtype} array {array.shape}; give uint8 (H, W, 3)."
        )
    _check_size(array.shape[1], array.shape[0], "the picture")
    return np.ascontiguousarray(array)


def _to_rgb(image: Image, name: str) -> NDArray[np.uint8]:
    """Decodes to upright RGB over white."""
    from PIL import ImageOps
    from PIL.Image import alpha_composite, fromarray, new

    _check_size(image.width, image.height, name)
    image = ImageOps.exif_transpose(image)
    if image.mode in _SIXTEEN_BIT or image.mode == "I":
        grey = (np.asarray(image).astype(np.int64) >> 8).clip(0, 255).astype(np.uint8)
        image = fromarray(grey)
    elif image.mode == "F":
        image = fromarray(np.asarray(image).clip(0, 255).astype(np.uint8))
    if image.has_transparency_data:
        image = image.convert("RGBA")
        white = new("RGBA", image.size, (255, 255, 255, 255))
        image = alpha_composite(white, image)
    return np.ascontiguousarray(np.asarray(image.convert("RGB")))
