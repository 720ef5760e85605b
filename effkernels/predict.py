"""Photographs in, class predictions out: the names for users of what `models/` and `engine/` do."""

from __future__ import annotations

from effkernels.engine.images import Failure, ImageError, decode, example_image, find_images, read_image
from effkernels.engine.predict import Prediction, Score, classify, read_labels
from effkernels.models.preprocessing import Preprocessing

__all__ = [
    "Failure",
    "ImageError",
    "Prediction",
    "Preprocessing",
    "Score",
    "classify",
    "decode",
    "example_image",
    "find_images",
    "read_image",
    "read_labels",
]
