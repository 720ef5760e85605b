"""Class activation maps by their definition (Zhou et al. 2016, section 2).

A classifier that is one linear layer on averaged features has the logit

    logit_c = sum_k w_ck * mean_xy f_k(x, y) + b_c = mean_xy map_c(x, y) + b_c,   map_c(x, y) = sum_k w_ck * f_k(x, y)

so that the map says, without any approximation, what each position adds to the logit. No gradient is needed, and no
library either: what is left to do is to find f and w in a model that somebody else wrote. `class_activation_map` reads
them off one forward.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode

_DEFINED_FOR = "class activation maps are defined only for a linear classifier on averaged features"


class ClassActivation(NamedTuple):
    """The result of `class_activation_map`.

    Attributes:
        maps: (N, H', W'), one value for each position of the last features, in the unit of the logits; the bias is
            left out, as in the definition: mean(maps[n]) + bias[classes[n]] is the logit. float32, or float64 for a
            model in float64.
        classes: (N,), int64, the class that each map is of.
        probabilities: (N,), of these classes, by softmax; of the dtype of the maps.
    """

    maps: Tensor
    classes: Tensor
    probabilities: Tensor


@torch.no_grad()
def class_activation_map(
    model: nn.Module, images: Tensor, classes: int | Sequence[int] | Tensor | None = None
) -> ClassActivation:
    """Map what every position of the image adds to a class's logit.

    For a model with `forward_features` and a classifier the maps equal this PyTorch:
    `(model.classifier.weight[classes][:, :, None, None] * model.forward_features(images)).sum(1)`.

    The model is called once, and what it calls is watched: the classifier is the `F.linear` whose result the model
    returns, the features are those whose mean over all positions went into it. It therefore works for models of
    effkernels, timm, torchvision and lukemelas, `effkernels.optimize_`d or not, and for your own. Hooks are not used:
    they would keep fused operators from standing in for the hooked modules.

    Args:
        model: in eval mode; images to logits (N, classes), or to an object with an attribute `logits`.
        images: (N, C, H, W), on the device and in the dtype of the model: float64, float32, bfloat16 or float16.
        classes: of each image, or one for all of them; None: the most probable ones.

    Returns:
        Maps, classes and their probabilities, on the device of the model.

    Raises:
        ValueError: the model is in training mode, or its logits are no linear layer on averaged features; images that
            are not 4-D, a class that there is not, or logits that are not finite.
    """
    if model.training:
        raise ValueError("class_activation_map: the model is in training mode; needed: eval mode, model.eval()")
    if images.dim() != 4 or len(images) == 0:
        raise ValueError(
            f"class_activation_map: images has shape {tuple(images.shape)}; needed: (N, C, H, W), at least one"
        )
    model = getattr(model, "_orig_mod", model)  # torch.compile's wrapper: what runs compiled calls nothing to watch
    with _Watch() as seen:
        returned = model(images)
    returned = getattr(returned, "logits", returned)
    call = seen.linear
    name = type(model).__name__
    if call is None or not isinstance(returned, Tensor) or not _is_result(returned, call.result):
        raise ValueError(
            f"class_activation_map: {name} does not return what its last linear layer computes from one vector per "
            f"image; {_DEFINED_FOR}"
        )
    features = seen.averaged_into(call.vector)
    if features is None:
        raise ValueError(
            f"class_activation_map: the classifier of {name} takes {call.vector.shape[1]} values that are not the mean "
            "over all positions of a feature map (a single position in so small an image, another pooling, or layers "
            f"between pooling and classifier); {_DEFINED_FOR}"
        )
    dtype = torch.float64 if features.dtype == torch.float64 else torch.float32
    logits = call.result.to(dtype)
    if not bool(torch.isfinite(logits).all()):
        raise ValueError("class_activation_map: the logits are not finite; are there NaN or infinite weights?")
    chosen = _chosen(classes, logits)
    # A sum, not a matrix product: PyTorch may compute those of float32 in TF32.
    maps = (call.weight[chosen].to(dtype)[:, :, None, None] * features.to(dtype)).sum(1)
    probabilities = logits.softmax(1).gather(1, chosen[:, None])[:, 0]
    return ClassActivation(maps, chosen, probabilities)


def upsampled(maps: Tensor, size: tuple[int, int]) -> Tensor:
    """Resize maps (N, H', W') to `size` (H, W), bilinear between the centres of the positions: (N, H, W)."""
    return F.interpolate(maps[:, None], size, mode="bilinear", align_corners=False)[:, 0]


def normalised(maps: Tensor) -> Tensor:
    """Return each map of (N, H, W) stretched to [0, 1], for display; a map of one value alone becomes 0."""
    low, high = maps.amin((1, 2), keepdim=True), maps.amax((1, 2), keepdim=True)
    return torch.where(high > low, (maps - low) / (high - low), torch.zeros_like(maps))


def peaks(maps: Tensor) -> Tensor:
    """Return where each map of (N, H, W) is largest: (N, 2), x and y of the position's centre, as shares of the map."""
    height, width = maps.shape[1:]
    place = maps.flatten(1).argmax(1)
    return torch.stack([(place % width + 0.5) / width, (place // width + 0.5) / height], 1)


class _LinearCall(NamedTuple):
    """A call of `F.linear`: (N, K) and (classes, K) to (N, classes)."""

    vector: Tensor
    weight: Tensor
    result: Tensor


class _Watch(TorchFunctionMode):
    """Notes the last `F.linear` on one vector per image, and what was averaged.

    Of the many feature maps in a forward only the last of each number of channels is kept: squeeze-and-excitation
    averages the large ones at the start of a network too.
    """

    def __init__(self) -> None:
        super().__init__()
        self.linear: _LinearCall | None = None
        self._averaged: dict[tuple[int, str], Tensor] = {}

    def __torch_function__(
        self, func: Callable[..., Any], types: Any, args: Sequence[Any] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        kwargs = kwargs or {}
        result = func(*args, **kwargs)
        if isinstance(result, Tensor):
            if func is F.linear:
                self._note_linear(*args, **kwargs, result=result)
            else:
                self._note_averaged((*args, *kwargs.values()), result)
        return result

    def _note_linear(self, input: Tensor, weight: Tensor, bias: Tensor | None = None, *, result: Tensor) -> None:
        if input.dim() == 2:
            self.linear = _LinearCall(input, weight, result)

    def _note_averaged(self, arguments: Iterable[Any], result: Tensor) -> None:
        """Keep a 4-D argument if the result has as many numbers as images times channels."""
        for x in arguments:
            if not isinstance(x, Tensor) or x.dim() != 4 or x is result:
                continue
            # A single position is no map: that is what remains after the pooling, maybe with more layers after it.
            if result.numel() == x.shape[0] * x.shape[1] and x.shape[2:] != (1, 1):
                self._averaged[x.shape[1], "channels first"] = x
            if result.numel() == x.shape[0] * x.shape[3] and x.shape[1:3] != (1, 1):  # as in Swin
                self._averaged[x.shape[3], "channels last"] = x.permute(0, 3, 1, 2)

    def averaged_into(self, vector: Tensor) -> Tensor | None:
        """Return the feature map (N, K, H', W') whose mean over the positions is `vector` (N, K), if there is one."""
        for kind in ("channels first", "channels last"):
            features = self._averaged.get((vector.shape[1], kind))
            if features is not None and _is_mean(vector, features):
                return features
        return None


def _is_mean(vector: Tensor, features: Tensor) -> bool:
    """Return whether (N, K) is the mean of (N, K, H', W') over positions, up to the roundings of a sum in any order.

    Sums of 16-bit values are taken in float32 by all of PyTorch's poolings; the result is rounded once.
    """
    if len(vector) != len(features):
        return False
    exact, scale = features.double().mean((2, 3)), features.double().abs().mean((2, 3))
    sum_dtype = torch.float64 if features.dtype == torch.float64 else torch.float32
    one = max(torch.finfo(vector.dtype).eps, torch.finfo(features.dtype).eps)
    allowed = scale * (features[0, 0].numel() * torch.finfo(sum_dtype).eps + one)
    # What is below the smallest normal number may be flushed to zero.
    return bool(((vector.double() - exact).abs() <= allowed + torch.finfo(vector.dtype).tiny).all())


def _is_result(returned: Tensor, result: Tensor) -> bool:
    """Return whether a model returned the result of its classifier, as it is or in another dtype."""
    return returned is result or (
        returned.shape == result.shape and torch.equal(returned.nan_to_num(), result.to(returned.dtype).nan_to_num())
    )


def _chosen(classes: int | Sequence[int] | Tensor | None, logits: Tensor) -> Tensor:
    if classes is None:
        return logits.argmax(1)
    images, count = logits.shape
    chosen = torch.as_tensor(classes, device=logits.device)
    if chosen.is_floating_point() or chosen.is_complex() or chosen.dtype == torch.bool or chosen.dim() > 1:
        raise ValueError(f"class_activation_map: classes={classes!r}; allowed: whole numbers, one per image or one")
    if chosen.dim() == 1 and len(chosen) != images:
        raise ValueError(
            f"class_activation_map: {len(chosen)} classes for {images} images; allowed: one per image, or one"
        )
    if bool(((chosen < 0) | (chosen >= count)).any()):
        raise ValueError(f"class_activation_map: classes={classes!r}; allowed: 0 to {count - 1}")
    return chosen.long().expand(images)
