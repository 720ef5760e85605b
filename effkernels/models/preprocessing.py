"""Turn an image into the input of a network.

The evaluation transform of the ImageNet recipes, and of timm: the shorter side resized to img_size / crop_pct (both
sides with crop_mode "squash"), a central square of img_size cut out, values to [0, 1], then mean and standard deviation
taken out per channel. Needs Pillow and numpy, which the extra ``models`` brings.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch
from torch import Tensor

if TYPE_CHECKING:
    import PIL.Image

    from effkernels.models import ModelConfig

# Images longer than this many times their shorter side are cropped before they are resized.
LONGEST_RESIZED = 16


_INTERPOLATIONS = ("nearest", "bilinear", "bicubic", "lanczos")
CROP_MODES = ("center", "squash")


@dataclass(frozen=True)
class Preprocessing:
    """The steps that turn an image into the input of a model.

    Attributes:
        img_size: height and width of the input in pixels.
        crop_pct: img_size over the length that the shorter side is resized to, in (0, 1].
        interpolation: 'nearest', 'bilinear', 'bicubic' or 'lanczos'.
        mean, std: per channel (red, green, blue), of values in [0, 1].
        crop_mode: 'center': the resize keeps the ratio of the sides; 'squash': it makes a square.
    """

    img_size: int
    crop_pct: float = 0.875
    interpolation: str = "bicubic"
    mean: tuple[float, float, float] = (0.485, 0.456, 0.406)
    std: tuple[float, float, float] = (0.229, 0.224, 0.225)
    crop_mode: str = "center"

    def __post_init__(self) -> None:
        if self.img_size < 1:
            raise ValueError(f"Preprocessing: img_size={self.img_size}; at least 1 is needed")
        if not 0 < self.crop_pct <= 1:
            raise ValueError(f"Preprocessing: crop_pct={self.crop_pct}; allowed: above 0, at most 1")
        if self.interpolation not in _INTERPOLATIONS:
            allowed = ", ".join(_INTERPOLATIONS)
            raise ValueError(f"Preprocessing: interpolation={self.interpolation!r}; allowed: {allowed}")
        if self.crop_mode not in CROP_MODES:
            raise ValueError(f"Preprocessing: crop_mode={self.crop_mode!r}; allowed: {', '.join(CROP_MODES)}")

    @classmethod
    def of(cls, config: ModelConfig, img_size: int | None = None) -> Preprocessing:
        """Return a model's preprocessing (``effkernels.models.model_config(name)``), optionally at another size."""
        size = config.input_size[-1] if img_size is None else img_size
        return cls(size, config.crop_pct, config.interpolation, config.mean, config.std, config.crop_mode)

    def placement(self, width: int, height: int) -> tuple[tuple[int, int], tuple[int, int]]:
        """Return the (width, height) that an image of width x height is resized to, and the (left, top) of the crop."""
        short = math.floor(self.img_size / self.crop_pct)
        if self.crop_mode == "squash":
            width = height = short
        resized = (short, int(short * height / width)) if width <= height else (int(short * width / height), short)
        return resized, (round((resized[0] - self.img_size) / 2), round((resized[1] - self.img_size) / 2))

    def __call__(self, image: PIL.Image.Image) -> Tensor:
        """Return a decoded RGB image as a tensor, (3, img_size, img_size), float32, normalised."""
        import numpy
        import PIL.Image

        size = self.img_size
        width, height = image.size
        resized, (left, top) = self.placement(width, height)
        resample = PIL.Image.Resampling[self.interpolation.upper()]
        if max(resized) <= LONGEST_RESIZED * min(resized):
            cut = image.resize(resized, resample).crop((left, top, left + size, top + size))
        else:
            # A panorama would become gigantic. Resizing only what the crop keeps is the same up to roundings.
            across, down = width / resized[0], height / resized[1]
            right, bottom = min((left + size) * across, width), min((top + size) * down, height)
            cut = image.resize((size, size), resample, box=(left * across, top * down, right, bottom))
        pixels = torch.from_numpy(numpy.array(cut, dtype=numpy.uint8)).permute(2, 0, 1).float() / 255
        mean, std = (torch.tensor(values)[:, None, None] for values in (self.mean, self.std))
        return (pixels - mean) / std
