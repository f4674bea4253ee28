"""The runtime's pixel values are those of transformers' image processors (PIL backend), bit by bit.

Reading a file is the runtime's own: transformers drops EXIF rotation and clips 16-bit grey unless
its own loader reads the file, so those two go through a loader first.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import msgspec
import numpy as np
import pytest
import torch
from hypothesis import assume, given
from hypothesis import strategies as st
from PIL import Image
from torch.nn.functional import interpolate
from transformers.image_utils import load_image
from transformers.models.clip.image_processing_pil_clip import CLIPImageProcessorPil
from transformers.models.gemma3.image_processing_pil_gemma3 import Gemma3ImageProcessorPil
from transformers.models.got_ocr2.image_processing_pil_got_ocr2 import GotOcr2ImageProcessorPil
from transformers.models.idefics3.image_processing_pil_idefics3 import Idefics3ImageProcessorPil
from transformers.models.llava.image_processing_pil_llava import LlavaImageProcessorPil
from transformers.models.llava_onevision.image_processing_pil_llava_onevision import (
    LlavaOnevisionImageProcessorPil,
)
from transformers.models.qwen2_vl.configuration_qwen2_vl import Qwen2VLVisionConfig
from transformers.models.qwen2_vl.image_processing_pil_qwen2_vl import (
    Qwen2VLImageProcessorPil,
    smart_resize,
)
from transformers.models.siglip.image_processing_pil_siglip import SiglipImageProcessorPil
from transformers.models.smolvlm.image_processing_pil_smolvlm import SmolVLMImageProcessorPil

from edge_safe.errors import ExportError, GateError, MediaError
from edge_safe.export.image_processors import (
    grid_and_thumbnail,
    grid_in_any_resolution,
    one_square,
    padded_square,
    patches_of_any_size,
    read_image_processor,
    tiles_and_whole,
)
from edge_safe.runtime.image_io import read_image
from edge_safe.runtime.image_steps import (
    FillCrops,
    Pixels,
    PixelValues,
    SmartResize,
    SplitIntoTiles,
    pixel_values,
    smart_sides,
)
from edge_safe.runtime.image_tokens import CropLines, count_features

LLAVA = {"size": {"shortest_edge": 336}, "crop_size": {"height": 336, "width": 336}}

GRIDS = [(1, 1), (1, 2), (1, 3), (2, 1), (2, 2), (2, 3), (3, 1), (3, 2), (3, 3)]
ONEVISION = partial(
    LlavaOnevisionImageProcessorPil, image_grid_pinpoints=[[384 * r, 384 * c] for r, c in GRIDS]
)
TILE = {"height": 448, "width": 448}


def smolvlm(**changes: Any) -> Any:
    sizes = {"size": {"longest_edge": 2048}, "max_image_size": {"longest_edge": 512}}
    return SmolVLMImageProcessorPil(**sizes | changes)


def patches(processor: Any, side: int) -> Pixels:
    """Steps for a tower of patches of that size."""
    return patches_of_any_size(processor, Qwen2VLVisionConfig(patch_size=side))


QWEN3_VL = {
    "patch_size": 16,
    "size": {"shortest_edge": 65536, "longest_edge": 1048576},
    "image_mean": [0.5, 0.5, 0.5],
    "image_std": [0.5, 0.5, 0.5],
}

# Processors with the sizes of well-known checkpoints, and the side of their towers' squares, or of
# their patches.
PROCESSORS: dict[str, tuple[Callable[[], Any], Callable[[Any, int], Pixels], int]] = {
    "llava 1.5": (partial(CLIPImageProcessorPil, **LLAVA), one_square, 336),
    "llava": (partial(LlavaImageProcessorPil, **LLAVA), one_square, 336),
    "llava padded": (partial(LlavaImageProcessorPil, do_pad=True, **LLAVA), one_square, 336),
    "siglip": (
        partial(SiglipImageProcessorPil, size={"height": 384, "width": 384}),
        one_square,
        384,
    ),
    "idefics3": (Idefics3ImageProcessorPil, tiles_and_whole, 364),
    "internvl": (partial(GotOcr2ImageProcessorPil, size=TILE), grid_and_thumbnail, 448),
    "internvl with few tiles": (
        partial(GotOcr2ImageProcessorPil, size=TILE, min_patches=2, max_patches=4),
        grid_and_thumbnail,
        448,
    ),
    "gemma3": (
        partial(Gemma3ImageProcessorPil, size={"height": 448, "width": 448}),
        one_square,
        448,
    ),
    "llava_onevision alone": (ONEVISION, grid_in_any_resolution, 384),
    "llava_onevision of several": (ONEVISION, padded_square, 384),
    "qwen2_vl": (Qwen2VLImageProcessorPil, patches, 14),
    "qwen2_5_vl": (partial(Qwen2VLImageProcessorPil, max_pixels=300000), patches, 14),
    "qwen3_vl": (partial(Qwen2VLImageProcessorPil, **QWEN3_VL), patches, 16),
    "smolvlm": (smolvlm, tiles_and_whole, 512),
    "smolvlm whole": (partial(smolvlm, do_image_splitting=False), tiles_and_whole, 512),
}


# Steps that other rows have as well.
SLOW = ("gemma3", "internvl with few tiles", "llava_onevision of several")


def noise(height: int, width: int, *channels: int) -> np.ndarray:
    """Large smooth patches with noise on them."""
    random = np.random.default_rng(height * width)
    coarse = random.integers(0, 200, (height // 7 + 1, width // 7 + 1, *channels), np.uint8)
    grown = np.repeat(np.repeat(coarse, 7, 0), 7, 1)[:height, :width]
    return grown + random.integers(0, 56, grown.shape, np.uint8)


def palette(transparent: int | None = None) -> Image.Image:
    image = Image.fromarray(noise(60, 90, 3)).quantize(32)
    if transparent is not None:
        image.info["transparency"] = transparent
    return image


# As transformers is given them.
PICTURES: dict[str, Callable[[], Image.Image]] = {
    "small": lambda: Image.fromarray(noise(11, 17, 3)),
    "large": lambda: Image.fromarray(noise(900, 1300, 3)),
    "one pixel": lambda: Image.fromarray(noise(1, 1, 3)),
    "very wide": lambda: Image.fromarray(noise(9, 1400, 3)),
    "very tall": lambda: Image.fromarray(noise(1400, 9, 3)),
    "as a tile": lambda: Image.fromarray(noise(364, 364, 3)),
    "alpha": lambda: Image.fromarray(noise(120, 80, 4)),
    "grey": lambda: Image.fromarray(noise(50, 70)),
    "grey with alpha": lambda: Image.fromarray(noise(50, 70, 2), "LA"),
    "palette": palette,
    "palette with a hole": partial(palette, 3),
}


def check(image: Any, expected: Any, name: str) -> None:
    make, convert, side = PROCESSORS[name]
    processor = make()
    found = pixel_values(read_image(image), convert(processor, side))
    rows = convert is tiles_and_whole
    # As InternVLProcessor asks for.
    grid = {"crop_to_patches": True} if convert is grid_and_thumbnail else {}
    options = {"return_row_col_info": True} if rows else grid
    given = [expected]
    if convert is padded_square:
        # Two pictures of one conversation.
        given = [[expected, expected]]
    golden = processor(given, return_tensors="np", **options)
    if convert is padded_square:
        golden["pixel_values"] = golden["pixel_values"][0]
    if convert is patches:
        np.testing.assert_array_equal(found.values, golden["pixel_values"])
        assert found.values.dtype == np.float32
        merge = processor.merge_size
        grid = [[1, found.rows * merge, found.columns * merge]]
        assert golden["image_grid_thw"].tolist() == grid
        return
    values = golden["pixel_values"].reshape(-1, *golden["pixel_values"].shape[-3:])
    np.testing.assert_array_equal(found.values, values)
    if rows:
        assert (found.rows, found.columns) == (golden["rows"][0][0], golden["cols"][0][0])
    assert found.values.dtype == np.float32
    assert found.values.shape[2:] == (side, side)


@pytest.mark.parametrize("picture", PICTURES)
@pytest.mark.parametrize(
    "name", [pytest.param(n, marks=[pytest.mark.slow] * (n in SLOW)) for n in PROCESSORS]
)
def test_pixel_values_are_transformers(name: str, picture: str) -> None:
    image = PICTURES[picture]()
    check(image, image, name)


@given(st.integers(1, 900), st.integers(1, 900), st.integers(1, 40), st.integers(1, 10**6))
def test_sides_are_transformers(height: int, width: int, factor: int, least: int) -> None:
    step = SmartResize(
        factor=factor, min_pixels=least, max_pixels=4 * least + 9, resample="bicubic"
    )
    assume(max(height, width) <= 200 * min(height, width))
    expected = smart_resize(height, width, factor, step.min_pixels, step.max_pixels)
    assert smart_sides(height, width, step) == expected


def test_a_picture_that_is_all_length_is_refused() -> None:
    pixels = patches(Qwen2VLImageProcessorPil(), 14)
    with pytest.raises(MediaError, match=r"1005 x 5 pixels.*200 to 1"):
        pixel_values(np.zeros((5, 1005, 3), np.uint8), pixels)


def test_several_tiles_cannot_be_cut_into_patches() -> None:
    pixels = patches(Qwen2VLImageProcessorPil(), 14)
    tiles = SplitIntoTiles(size=56, resample="bicubic")
    both = msgspec.structs.replace(pixels, steps=[tiles])
    with pytest.raises(GateError, match="5 tiles of 56 x 56"):
        pixel_values(np.zeros((112, 112, 3), np.uint8), both)


@pytest.mark.parametrize("name", ["llava", "idefics3", "qwen2_vl"])
def test_pixel_values_of_a_rotated_file(name: str, tmp_path: Path) -> None:
    path = tmp_path / "rotated.png"
    exif = Image.Exif()
    exif[0x0112] = 6
    Image.fromarray(noise(90, 200, 3)).save(path, exif=exif)
    assert load_image(str(path)).size == (90, 200)
    check(path, load_image(str(path)), name)


def test_sixteen_bits_keep_their_high_byte() -> None:
    deep = noise(40, 60).astype(np.uint16) * 257
    grey = Image.fromarray((deep >> 8).astype(np.uint8))
    check(Image.fromarray(deep), grey, "llava")


REFUSED = {
    "resample": (LlavaImageProcessorPil, {**LLAVA, "resample": 0}, "resample 0"),
    "no normalization": (LlavaImageProcessorPil, {**LLAVA, "do_normalize": False}, "do_normalize"),
    "no resize": (LlavaImageProcessorPil, {**LLAVA, "do_resize": False}, "do_resize"),
    "another size": (CLIPImageProcessorPil, {}, "224 x 224.*takes 336 x 336"),
    "no resize of patches": (Qwen2VLImageProcessorPil, {"do_resize": False}, "do_resize"),
    "another patch": (Qwen2VLImageProcessorPil, {"patch_size": 16}, r"\(16, 2, 2\).*\(14, 2, 2\)"),
    "another tile": (Idefics3ImageProcessorPil, {}, "364.*takes 336 x 336"),
}


@pytest.mark.parametrize("case", REFUSED)
def test_what_the_steps_cannot_do_is_refused(case: str) -> None:
    kind, options, message = REFUSED[case]
    kinds = {Idefics3ImageProcessorPil: tiles_and_whole, Qwen2VLImageProcessorPil: patches}
    convert = kinds.get(kind, one_square)
    with pytest.raises(ExportError, match=message):
        convert(kind(**options), 14 if convert is patches else 336)


def test_a_folder_without_an_image_processor_is_refused(tmp_path: Path) -> None:
    with pytest.raises(ExportError, match=r"no image processor.*preprocessor_config\.json"):
        read_image_processor(tmp_path)


# Side of a crop, of a patch and most crops; height and width of a picture; what transformers'
# Phi4MultimodalImageProcessor (torchvision 0.28) makes of it: rows, columns, features in all.
CROPS = {
    (448, 14, 36): {
        (11, 17): (1, 1, 460), (900, 1300): (3, 3, 1939), (448, 448): (1, 1, 545),
        (1, 1): (1, 1, 545), (9, 1400): (1, 4, 338), (1400, 9): (4, 1, 401),
        (449, 440): (2, 1, 562), (896, 896): (2, 2, 1329), (2000, 1500): (5, 4, 5153),
    },
    (448, 14, 4): {
        (2000, 1500): (2, 2, 1073), (900, 1300): (2, 2, 1032), (600, 2000): (1, 3, 1008),
    },
    (64, 2, 36): {(40, 90): (1, 2, 735), (130, 50): (3, 1, 987), (600, 100): (10, 2, 4753)},
    (62, 2, 8): {(40, 90): (1, 2, 735), (130, 50): (3, 1, 987), (62, 62): (1, 1, 545)},
}  # fmt: skip
CROP_CASES = [(crops, size) for crops, sizes in CROPS.items() for size in sizes]


def cropped(crops: tuple[int, int, int], size: tuple[int, int]) -> PixelValues:
    half = (0.5, 0.5, 0.5)
    pixels = Pixels(
        steps=[FillCrops(*crops)], rescale_factor=1 / 255, image_mean=half, image_std=half
    )
    return pixel_values(noise(*size, 3), pixels)


@pytest.mark.parametrize(("crops", "size"), CROP_CASES)
def test_crops_are_counted_as_transformers_counts_them(
    crops: tuple[int, int, int], size: tuple[int, int]
) -> None:
    found = cropped(crops, size)
    rows, columns, features = CROPS[crops][size]
    assert (found.rows, found.columns) == (rows, columns)
    assert count_features(CropLines(256), found) == features
    assert found.values.shape == (1 + rows * columns, 3, crops[0], crops[0])


def as_bytes(values: np.ndarray) -> np.ndarray:
    return values * 127.5 + 127.5


@pytest.mark.parametrize("size", [(40, 90), (130, 50), (900, 1300)])
def test_crops_are_interpolated_as_torch_does(size: tuple[int, int]) -> None:
    """Smoothed crops within 2 of 255 steps, as torch rounds its weights; the whole within 0.01."""
    crops = (64, 2, 36) if max(size) < 200 else (448, 14, 36)
    found = cropped(crops, size)
    side = crops[0]
    grid = found.values[1:].reshape(found.rows, found.columns, 3, side, side)
    canvas = grid.transpose(2, 0, 3, 1, 4).reshape(3, found.rows * side, found.columns * side)
    scale = min(canvas.shape[1] / size[0], canvas.shape[2] / size[1])
    tall, wide = int(size[0] * scale), int(size[1] * scale)
    source = torch.from_numpy(noise(*size, 3)).permute(2, 0, 1)[None]
    smooth = interpolate(source, (tall, wide), mode="bilinear", antialias=True)[0].numpy()
    part = as_bytes(canvas[:, :tall, :wide])
    difference = np.abs(part - smooth)
    assert difference.max() < 2.01
    assert (difference > 0.01).mean() < 0.03
    np.testing.assert_array_equal(canvas[:, tall:], 1.0)
    np.testing.assert_array_equal(canvas[:, :, wide:], 1.0)
    whole = interpolate(torch.from_numpy(canvas)[None], (side, side), mode="bicubic")[0].numpy()
    np.testing.assert_allclose(as_bytes(found.values[0]), as_bytes(whole), atol=0.01)


@pytest.mark.slow
@pytest.mark.parametrize(("crops", "size"), CROP_CASES)
def test_crops_are_transformers_processor_s(
    crops: tuple[int, int, int], size: tuple[int, int]
) -> None:
    """Within 2 of 255 steps, in less than 3 % of the values: it has torch resize, not Pillow."""
    pytest.importorskip("torchvision", reason="the processor has no other backend")
    from transformers.models.phi4_multimodal.image_processing_phi4_multimodal import (
        Phi4MultimodalImageProcessor,
    )

    side, patch, most = crops
    processor = Phi4MultimodalImageProcessor(
        size={"height": side, "width": side}, patch_size=patch, dynamic_hd=most
    )
    golden = processor([Image.fromarray(noise(*size, 3))], return_tensors="np")
    found = cropped(crops, size)
    np.testing.assert_array_equal(found.mask, golden["image_attention_mask"][0])
    assert count_features(CropLines(256), found) == int(golden["num_img_tokens"][0])
    difference = np.abs(as_bytes(found.values) - as_bytes(golden["image_pixel_values"][0]))
    assert difference.max() < 2.01
    assert (difference[1:] > 0.01).mean() < 0.03


def test_a_picture_that_leaves_a_thin_line_is_refused() -> None:
    with pytest.raises(MediaError, match="too long for its breadth"):
        cropped((448, 14, 36), (1, 1000))
