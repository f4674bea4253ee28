"""What a Hugging Face image processor does, as the steps of a bundle's manifest.

The PIL backend is the one compared with: it is what the checkpoints were trained with, and the
runtime has Pillow but no torchvision.
"""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import msgspec
from transformers import AutoImageProcessor
from transformers.image_processing_base import ImageProcessingMixin

from edge_safe.errors import ExportError
from edge_safe.runtime.image_steps import (
    CenterCrop,
    FillCrops,
    FitIntoGrid,
    PadToSquare,
    Patches,
    Pixels,
    Resample,
    Resize,
    ResizeLongestEdge,
    ResizeShortestEdge,
    SmartResize,
    SplitIntoGrid,
    SplitIntoTiles,
    Step,
)

# By Pillow's numbers.
RESAMPLES: dict[int, Resample] = {1: "lanczos", 2: "bilinear", 3: "bicubic"}

# Phi4MultimodalImageProcessor's own defaults. It has no PIL backend, so that transformers opens it
# with torchvision alone, which nothing else here needs.
CROP_PROCESSORS = ("Phi4MultimodalImageProcessor", "Phi4MultimodalImageProcessorFast")
CROP_DEFAULTS: dict[str, Any] = {
    "size": {"height": 448, "width": 448},
    "patch_size": 14,
    "dynamic_hd": 36,
    "resample": 3,
    "do_rescale": True,
    "rescale_factor": 1 / 255,
    "do_normalize": True,
    "image_mean": [0.5, 0.5, 0.5],
    "image_std": [0.5, 0.5, 0.5],
}
# Features of a crop that the processor counts with, whatever the tower gives.
CROP_TOKENS = 256
# Crops of a picture that a bundle's manifest may ask for.
MOST_CROPS = 64


def read_image_processor(folder: Path) -> Any:
    """Reads a checkpoint's image processor with transformers' own defaults.

    Raises:
        ExportError: There is none, or transformers refuses it.
    """
    try:
        return AutoImageProcessor.from_pretrained(folder, backend="pil")
    except (OSError, ValueError, KeyError, TypeError, ImportError) as error:
        raise ExportError(
            f"{folder} has no image processor that transformers can open "
            f"(preprocessor_config.json): {error}"
        ) from error


def one_square(processor: Any, side: int) -> Pixels:
    """Steps of CLIP's, SigLIP's and LLaVA's processors: one square of the tower's size.

    Raises:
        ExportError: It does something else, or its squares are not the tower's.
    """
    resample = _resample(processor)
    steps: list[Step] = []
    # CLIP's processor has the option too, for something else.
    if processor.do_pad and type(processor).__name__.startswith("Llava"):
        red, green, blue = (int(mean * 255) for mean in processor.image_mean)
        steps.append(PadToSquare((red, green, blue)))
    size = _lengths(processor.size)
    height, width = size.get("height"), size.get("width")
    if processor.do_resize and set(size) == {"shortest_edge"}:
        steps.append(ResizeShortestEdge(size["shortest_edge"], resample))
    elif processor.do_resize and height and width and set(size) == {"height", "width"}:
        steps.append(Resize(height, width, resample))
    else:
        raise _unknown(processor, "do_resize with size", size)
    if getattr(processor, "do_center_crop", False):
        crop = _lengths(processor.crop_size)
        height, width = crop.get("height"), crop.get("width")
        if not (height and width):
            raise _unknown(processor, "crop_size", crop)
        steps.append(CenterCrop(height, width))
    if (height, width) != (side, side):
        raise ExportError(
            f"The image processor makes pictures of {height} x {width}; the vision tower takes "
            f"{side} x {side}."
        )
    return _pixels(processor, steps)


def tiles_and_whole(processor: Any, side: int) -> Pixels:
    """Steps of Idefics 3's and SmolVLM's processors: tiles and the whole picture.

    Raises:
        ExportError: It does something else, or its tiles are not the tower's.
    """
    resample = _resample(processor)
    size, tile = _lengths(processor.size), _lengths(processor.max_image_size)
    if not processor.do_resize or set(size) != {"longest_edge"}:
        raise _unknown(processor, "do_resize with size", size)
    if tile != {"longest_edge": side}:
        raise ExportError(
            f"The image processor makes tiles of {tile}; the vision tower takes {side} x {side}."
        )
    steps: list[Step] = [ResizeLongestEdge(size["longest_edge"], resample)]
    if processor.do_image_splitting:
        steps.append(SplitIntoTiles(side, resample))
    else:
        steps.append(Resize(side, side, resample))
    return _pixels(processor, steps)


def patches_of_any_size(processor: Any, vision: Any) -> Pixels:
    """Steps of Qwen2-VL's processor: sides of whole cells, cut into patches.

    Args:
        processor: The image processor.
        vision: Configuration of the tower.

    Raises:
        ExportError: It does something else, or its patches are not the tower's.
    """
    size = _lengths(processor.size)
    if not processor.do_resize or set(size) != {"shortest_edge", "longest_edge"}:
        raise _unknown(processor, "do_resize with size", size)
    own = (processor.patch_size, processor.merge_size, processor.temporal_patch_size)
    tower = (vision.patch_size, vision.spatial_merge_size, vision.temporal_patch_size)
    if own != tower:
        raise ExportError(
            "The image processor has patch_size, merge_size and temporal_patch_size "
            f"{own}; those of the vision tower are {tower}."
        )
    side, merge, frames = own
    resize = SmartResize(
        factor=side * merge,
        min_pixels=size["shortest_edge"],
        max_pixels=size["longest_edge"],
        resample=_resample(processor),
    )
    return msgspec.structs.replace(
        _pixels(processor, [resize]), patches=Patches(side, merge, frames)
    )


def grid_and_thumbnail(processor: Any, side: int) -> Pixels:
    """Steps of InternVL's processor (GOT-OCR 2's): a grid of tiles and the whole picture.

    ``InternVLProcessor`` cuts pictures up whatever the image processor's own file says.

    Raises:
        ExportError: It does something else, or its tiles are not the tower's.
    """
    _check_square(processor, side)
    least, most = int(processor.min_patches), int(processor.max_patches)
    if not 1 <= least <= most:
        raise _unknown(processor, "min_patches and max_patches", (least, most))
    return _pixels(processor, [SplitIntoGrid(side, least, most, _resample(processor))])


def grid_in_any_resolution(processor: Any, side: int) -> Pixels:
    """Steps of LLaVA-OneVision's processor for a picture alone: the whole of it, then a grid.

    Raises:
        ExportError: It does something else, or its tiles are not the tower's.
    """
    _check_square(processor, side)
    grids = []
    for height, width in processor.image_grid_pinpoints:
        if height % side or width % side:
            raise _unknown(processor, "image_grid_pinpoints", (height, width))
        grids.append((height // side, width // side))
    return _pixels(processor, [FitIntoGrid(side, grids, _resample(processor))])


def padded_square(processor: Any, side: int) -> Pixels:
    """Steps of LLaVA-OneVision's processor for one of several pictures.

    Raises:
        ExportError: It does something else, or its squares are not the tower's.
    """
    _check_square(processor, side)
    red, green, blue = (int(mean * 255) for mean in processor.image_mean)
    steps: list[Step] = [PadToSquare((red, green, blue)), Resize(side, side, _resample(processor))]
    return _pixels(processor, steps)


def crops_and_whole(folder: Path, vision: Any) -> Pixels:
    """Steps of Phi-4-multimodal's processor, read from its file alone: the whole picture, crops.

    Args:
        folder: The checkpoint.
        vision: Configuration of the tower.

    Raises:
        ExportError: There is none, it does something else, or its crops are not the tower's.
    """
    try:
        own, _ = ImageProcessingMixin.get_image_processor_dict(folder)
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise ExportError(
            f"{folder} has no image processor (preprocessor_config.json): {error}"
        ) from error
    kind = own.get("image_processor_type")
    if kind not in CROP_PROCESSORS:
        raise ExportError(
            f"The image processor is a {kind!r}; possible: {', '.join(CROP_PROCESSORS)}."
        )
    # An object of that name, as errors tell it.
    processor: Any = type(str(kind), (), CROP_DEFAULTS | own)()
    sides = {"height": vision.crop_size, "width": vision.crop_size}
    given = (_lengths(processor.size), processor.patch_size)
    if given != (sides, vision.patch_size) or vision.crop_size != vision.image_size:
        raise ExportError(
            f"The image processor makes crops of {given[0]} in patches of {given[1]}; the vision "
            f"tower has image_size {vision.image_size}, crop_size {vision.crop_size} and "
            f"patch_size {vision.patch_size}."
        )
    # Means of 2 x 2 patches.
    side = math.ceil(vision.crop_size // vision.patch_size / 2)
    if vision.crop_size % vision.patch_size or side**2 != CROP_TOKENS:
        raise ExportError(
            f"A crop of {vision.crop_size} in patches of {vision.patch_size} gives {side} x {side} "
            f"features; transformers' processor counts {CROP_TOKENS} of them."
        )
    if _resample(processor) != "bicubic":
        raise _unknown(processor, "resample", processor.resample)
    if not 1 <= processor.dynamic_hd <= MOST_CROPS:
        raise _unknown(processor, "dynamic_hd", processor.dynamic_hd)
    return _pixels(
        processor, [FillCrops(vision.crop_size, vision.patch_size, processor.dynamic_hd)]
    )


def _check_square(processor: Any, side: int) -> None:
    """Makes sure that a processor resizes to squares of the tower's size and crops nothing."""
    size = _lengths(processor.size)
    if not processor.do_resize or size != {"height": side, "width": side}:
        raise ExportError(
            f"The image processor makes tiles of {size} (do_resize {processor.do_resize}); the "
            f"vision tower takes {side} x {side}."
        )
    if getattr(processor, "do_center_crop", False):
        raise _unknown(processor, "do_center_crop", True)


def _pixels(processor: Any, steps: list[Step]) -> Pixels:
    if not (processor.do_rescale and processor.do_normalize):
        raise _unknown(processor, "do_rescale and do_normalize", "off")
    mean, std = _colors(processor.image_mean), _colors(processor.image_std)
    return Pixels(
        steps=steps, rescale_factor=float(processor.rescale_factor), image_mean=mean, image_std=std
    )


def _resample(processor: Any) -> Resample:
    number = int(processor.resample)
    if number not in RESAMPLES:
        raise _unknown(processor, "resample", number)
    return RESAMPLES[number]


def _lengths(size: Any) -> dict[str, int]:
    """A size's lengths by name; absent ones are left out."""
    return {name: int(value) for name, value in dict(size).items() if value is not None}


def _colors(values: Any) -> tuple[float, float, float]:
    red, green, blue = values if isinstance(values, list | tuple) else [values] * 3
    return float(red), float(green), float(blue)


def _unknown(processor: Any, option: str, value: object) -> ExportError:
    return ExportError(
        f"The image processor ({type(processor).__name__}) has {option} {value}, which the "
        "runtime's steps cannot do."
    )
