"""The input that a model expects."""

from __future__ import annotations

import math
from dataclasses import asdict, dataclass
from typing import Any

IMAGENET_MEAN: tuple[float, float, float] = (0.485, 0.456, 0.406)
IMAGENET_STD: tuple[float, float, float] = (0.229, 0.224, 0.225)


@dataclass(frozen=True)
class ModelConfig:
    """The input a model was designed for, with timm's names.

    Attributes:
        name: of the model in the registry, without a tag.
        input_size: (channels, height, width) of one image, in pixels.
        dropout: the probability that the paper trains the variant with (`drop_rate` of `create_model`).
        crop_pct: share of the resized image that the central crop keeps: an image is resized so that its shorter side
            has height / crop_pct pixels, then cropped to (height, width).
        interpolation: of the resize.
        mean, std: per channel, of an image scaled to [0, 1]; the network sees (image - mean) / std.
        num_classes: of the classifier; 0: none.
        first_conv, classifier: names of the two modules that transfer learning replaces.
        crop_mode: of `effkernels.models.preprocessing.Preprocessing`: "center" or "squash".
        test_input_size, test_crop_pct: input_size and crop_pct that timm tests the weights with; None: the same.
        tag: of the published weights that the values are for; "": of none.
        hf_hub_id: the repository of the Hugging Face hub that has these weights; None: none.
    """

    name: str
    input_size: tuple[int, int, int]
    dropout: float
    crop_pct: float
    interpolation: str = "bicubic"
    mean: tuple[float, float, float] = IMAGENET_MEAN
    std: tuple[float, float, float] = IMAGENET_STD
    num_classes: int = 1000
    first_conv: str = "conv_stem"
    classifier: str = "classifier"
    crop_mode: str = "center"
    test_input_size: tuple[int, int, int] | None = None
    test_crop_pct: float | None = None
    tag: str = ""
    hf_hub_id: str | None = None

    @property
    def full_name(self) -> str:
        """`name`, or `name.tag` for published weights."""
        return f"{self.name}.{self.tag}" if self.tag else self.name

    @property
    def pool_size(self) -> tuple[int, int]:
        """(height, width) of the last feature map, which the pooling takes the mean of."""
        _, height, width = self.input_size
        return math.ceil(height / 32), math.ceil(width / 32)

    def to_dict(self) -> dict[str, Any]:
        """Return the attributes, `pool_size` and `architecture` (timm's word for the name) as a dict.

        timm's `resolve_data_config` takes it as a `pretrained_cfg`.
        """
        return {**asdict(self), "architecture": self.name, "pool_size": self.pool_size}
