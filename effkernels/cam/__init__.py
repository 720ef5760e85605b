"""Class activation maps (Zhou et al. 2016): where in an image a network saw the class it names."""

from __future__ import annotations

from effkernels.cam.maps import ClassActivation, class_activation_map, normalised, peaks, upsampled

__all__ = ["ClassActivation", "class_activation_map", "normalised", "peaks", "upsampled"]
