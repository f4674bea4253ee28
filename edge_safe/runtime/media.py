"""The kinds of pictures and sound a caller may hand over."""

from __future__ import annotations

from os import PathLike
from typing import TYPE_CHECKING, Literal

import numpy as np
from numpy.typing import NDArray

if TYPE_CHECKING:
    from PIL.Image import Image

    ImageInput = str | PathLike[str] | bytes | Image | NDArray[np.uint8]
    AudioInput = str | PathLike[str] | bytes | tuple[NDArray[np.float32], int]
else:
    # Spelled out above for type checkers alone: pillow is loaded when a picture is.
    ImageInput = AudioInput = object

Kind = Literal["image", "audio"]
