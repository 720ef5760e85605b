"""Photographs to inputs on the engine's device: resize, crop and normalise as `effkernels.predict` does with Pillow.

Pillow resizes in two passes, across and then down, and rounds to whole levels after each. So does this: one pass in
floating point would differ from it by up to 7 of 255 levels on a photograph, two passes differ by 1.
"""

from __future__ import annotations

import math
from dataclasses import replace
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from effkernels.engine.images import as_rgb
from effkernels.models.model_input import pretrained_config
from effkernels.models.preprocessing import CROP_MODES, LONGEST_RESIZED, Preprocessing

_MODES = {"nearest": "nearest-exact", "bilinear": "bilinear", "bicubic": "bicubic", "lanczos": "lanczos"}
_DOWN, _ACROSS = 2, 3  # dimensions of (N, C, H, W)
MOST_PIXELS = 178_956_970  # of a photograph: what Pillow, too, takes for an attack beyond


def preprocessing_of(model: nn.Module, size: tuple[int, int, int]) -> tuple[Preprocessing, str]:
    """Return a model's preprocessing and its source: the model's configuration, or the ImageNet recipe.

    Raises:
        ValueError: the configuration asks for what is not there; the message names it.
    """
    if size[1] != size[2]:
        raise ValueError(f"preprocess makes square inputs, and the engine's input is {size[1]} x {size[2]}")
    timm = dict(pretrained_config(model))
    config = getattr(model, "config", None)
    source = "the model's configuration"
    if not timm and getattr(config, "image_mean", None) is not None:
        timm = {"mean": config.image_mean, "std": config.image_std}  # type: ignore[union-attr]
    if not timm:
        source = "ImageNet defaults, the model has no configuration of its own"
    crop_mode = timm.get("crop_mode") or "center"
    if crop_mode not in CROP_MODES:
        raise ValueError(f"crop_mode={crop_mode!r} of the model's configuration; allowed: {', '.join(CROP_MODES)}")
    wanted: dict[str, Any] = {
        key: tuple(timm[key]) if key in ("mean", "std") else timm[key]
        for key in ("crop_pct", "interpolation", "mean", "std")
        if timm.get(key) is not None
    }
    return Preprocessing(size[2], **wanted, crop_mode=crop_mode), source


def preprocessing_from(given: Any, model: nn.Module, size: tuple[int, int, int]) -> tuple[Preprocessing, str]:
    """Return the `preprocessing` argument of an engine, and in a few words where it is from.

    Raises:
        TypeError: it is none.
        ValueError: it does not go with the engine's input; or as `preprocessing_of`.
    """
    if given is None:
        return preprocessing_of(model, size)
    if isinstance(given, Preprocessing):
        if (given.img_size, given.img_size) != size[1:]:
            raise ValueError(
                f"preprocessing.img_size={given.img_size}, and the engine's input is {size[1]} x {size[2]}"
            )
        return given, "as given"
    mean, std = getattr(given, "image_mean", None), getattr(given, "image_std", None)
    if mean is None or std is None:
        raise TypeError(
            f"InferenceEngine: preprocessing is {type(given).__name__}; allowed: effkernels.predict.Preprocessing, or "
            "an object with image_mean and image_std"
        )
    found, source = preprocessing_of(model, size)
    return replace(found, mean=tuple(mean), std=tuple(std)), f"mean and std of {type(given).__name__}, rest: {source}"


def check_pixels(image: Any, channels: int, dimensions: str) -> Tensor:
    """Return a uint8 array or tensor as a tensor (no copy), checked.

    Args:
        dimensions: "HWC" or "NHWC".

    Raises:
        TypeError: neither an array nor a tensor, or not uint8.
        ValueError: another number of dimensions or channels, or no pixels.
    """
    named = f"({', '.join(dimensions)})"
    if not isinstance(image, Tensor):
        if not hasattr(image, "__array_interface__"):
            raise TypeError(
                f"an image is {type(image).__name__}; allowed: PIL images, and uint8 arrays and tensors {named}"
            )
        import numpy

        # A tensor has no negative strides (a flipped array) and warns about memory that it must not write.
        array = numpy.asarray(image)
        usable = array.flags.writeable and min((1, *array.strides)) > 0
        image = torch.from_numpy(array if usable else array.copy())
    assert isinstance(image, Tensor)
    if image.dtype != torch.uint8:
        raise TypeError(f"an image has dtype {image.dtype}; allowed: torch.uint8, values 0 to 255 in {named}")
    check_memory(image, "an image")
    if image.dim() != len(dimensions) or image.shape[-1] != channels:
        raise ValueError(f"an image has shape {tuple(image.shape)}; allowed: {named} with {channels} channels")
    if 0 in image.shape[-3:]:
        raise ValueError(f"an image has shape {tuple(image.shape)}; at least one pixel is needed")
    _check_pixel_count(image.shape[-3], image.shape[-2])
    return image


def check_memory(tensor: Tensor, name: str) -> None:
    """Refuse a tensor whose values are not stored in memory one by one.

    Raises:
        TypeError: it is sparse, packed for a library, quantized or nested, or of a class that computes for itself.
    """
    if tensor.layout is not torch.strided or tensor.is_nested:
        layout = "nested" if tensor.is_nested else str(tensor.layout)
        raise TypeError(f"{name} of layout {layout}; allowed: torch.strided (`tensor.to_dense()`)")
    if tensor.is_quantized:
        raise TypeError(f"{name} of quantized dtype {tensor.dtype}; allowed: `tensor.dequantize()`")
    if type(tensor).__torch_dispatch__ is not Tensor.__torch_dispatch__:
        raise TypeError(f"{name} of class {type(tensor).__name__}; allowed: torch.Tensor")


def _check_pixel_count(height: int, width: int) -> None:
    if height * width > MOST_PIXELS:
        raise ValueError(f"an image has {height} x {width} pixels; allowed: at most {MOST_PIXELS}")


def is_pil_image(image: Any) -> bool:
    """Return whether Pillow made it, without an import of Pillow."""
    return any(cls.__module__ == "PIL.Image" and cls.__name__ == "Image" for cls in type(image).__mro__)


def to_pixels(image: Any, channels: int) -> Tensor:
    """Return one image as uint8, (H, W, C).

    Args:
        image: a PIL image of any mode, or a uint8 array or tensor (H, W, C).

    Raises:
        TypeError, ValueError: as `check_pixels`, and from Pillow for an image that cannot be decoded.
        OSError: from Pillow, for a damaged image.
    """
    if not is_pil_image(image):
        return check_pixels(image, channels, "HWC")
    import numpy

    _check_pixel_count(image.height, image.width)
    if channels not in (1, 3):
        raise ValueError(f"a PIL image has 1 or 3 channels, and the model takes {channels}")
    array = numpy.array(as_rgb(image).convert("L" if channels == 1 else "RGB"))
    return check_pixels(array.reshape(*array.shape[:2], channels), channels, "HWC")


def transform(pixels: Tensor, preprocessing: Preprocessing, *, integers: bool | None = None) -> Tensor:
    """Turn images of one size into the input of a model, on the device where they are.

    Args:
        pixels: (N, H, W, C), uint8.
        integers: resize in uint8, which PyTorch has for bilinear and bicubic on the CPU, or in float32, several times
            as slow there; None: in uint8 where it can.

    Returns:
        (N, C, img_size, img_size), float32, in channels_last memory; at most one of 255 levels away from Pillow's
            (two where the image is longer than 16 times its width). Where crop_mode "squash" shrinks the height more
            than the width, recent releases of Pillow take the two passes in the other order, and single values are a
            few levels away.

    Raises:
        ValueError: mean and std have another number of channels.
    """
    size = preprocessing.img_size
    levels = pixels.permute(0, 3, 1, 2)
    height, width = levels.shape[2:]
    (wide, high), (left, top) = preprocessing.placement(width, height)
    scale = None
    if max(wide, high) > LONGEST_RESIZED * min(wide, high):
        # A panorama would become gigantic: what the crop does not need is cut off before.
        if width > height:
            scale = wide / width
            levels, left = _window(levels, _ACROSS, left, size, scale)
        else:
            scale = high / height
            levels, top = _window(levels, _DOWN, top, size, scale)
    if integers is None:
        integers = levels.device.type == "cpu" and preprocessing.interpolation in ("bilinear", "bicubic")
    cut = levels if integers else levels.float()
    for dimension, length, start in ((_ACROSS, wide, left), (_DOWN, high, top)):
        is_window = scale is not None and (dimension == _ACROSS) == (width > height)
        cut = _resized(cut, dimension, length, scale if is_window else None, preprocessing.interpolation)
        cut = cut.narrow(dimension, start, size).contiguous(memory_format=torch.channels_last)
    statistics = []
    for name, values in (("mean", preprocessing.mean), ("std", preprocessing.std)):
        if len(values) != pixels.shape[3]:
            raise ValueError(f"{name}={values} has {len(values)} channels, and the images have {pixels.shape[3]}")
        statistics.append(torch.tensor(values, device=pixels.device)[:, None, None])
    normalised = (cut / 255 - statistics[0]) / statistics[1]
    return normalised.contiguous(memory_format=torch.channels_last)


def _resized(levels: Tensor, dimension: int, length: int, scale: float | None, interpolation: str) -> Tensor:
    """Return one pass of Pillow's resize along one dimension: whole levels from 0 to 255, in the dtype of `levels`.

    Args:
        length: what the dimension becomes; it does not count where `scale` gives the ratio.
    """
    if scale is None and levels.shape[dimension] == length:
        return levels
    options: dict[str, Any] = {"mode": _MODES[interpolation]}
    if interpolation != "nearest":
        options["antialias"] = True
    if scale is None:
        options["size"] = (length, levels.shape[3]) if dimension == _DOWN else (levels.shape[2], length)
    else:
        options["scale_factor"] = (scale, 1.0) if dimension == _DOWN else (1.0, scale)
    out = F.interpolate(levels, **options)
    # Halves go up, as in Pillow.
    return out if out.dtype == torch.uint8 else out.add_(0.5).floor_().clamp_(0, 255)


def _window(levels: Tensor, dimension: int, start: int, size: int, scale: float) -> tuple[Tensor, int]:
    """Return the part of a long image that a crop needs, and where the crop starts in its resized form.

    The part begins where a pixel's edge falls on one of the resized image as closely as can be found, so that the
    resize of the part meets the same points.
    """
    margin = math.ceil(8 * max(1.0, 1 / scale))  # beyond the reach of every filter
    first = max(0, math.floor(start / scale) - margin)
    last = min(levels.shape[dimension], math.ceil((start + size) / scale) + margin)
    first = min(range(max(0, first - margin), first + 1), key=lambda at: abs(at * scale - round(at * scale)))
    return levels.narrow(dimension, first, last - first), start - round(first * scale)
