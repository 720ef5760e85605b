"""Check that converted weights compute in the target library's model what they computed in the source's.

Both models are built by the very lines that the conversion gives its user, take the weights strictly, and see the same
random images, at the native size and at another one, where frozen padding shows. The rule is that of
`effkernels.ops.parity`: at most twice the source model's own error against float64, plus one rounding.
"""

from __future__ import annotations

import contextlib
import copy
import importlib
from collections.abc import Mapping
from dataclasses import dataclass
from importlib.metadata import PackageNotFoundError, version

import torch
from torch import Tensor, nn

from effkernels.models import create_model, peers
from effkernels.models.checkpoints import set_native_padding
from effkernels.models.conversion import Conversion, convert
from effkernels.models.layouts import HUGGING_FACE, LUKEMELAS, TIMM, TORCHVISION, Layout, Semantics
from effkernels.models.recipes import Recipe, recipe, same_logits
from effkernels.models.variants import is_lite
from effkernels.ops.parity import Errors, errors, limits

# The package that holds each library's models; NVIDIA's are in no package.
_PACKAGES = {
    TIMM.name: "timm",
    TORCHVISION.name: "torchvision",
    LUKEMELAS.name: "efficientnet_pytorch",
    HUGGING_FACE.name: "transformers",
}
_LITE_PACKAGES = {LUKEMELAS.name: "efficientnet_lite_pytorch"}
_BATCH = 2


class VerificationError(RuntimeError):
    """A model that could not be built or does not take the weights; the message says which and why."""


@dataclass(frozen=True)
class Comparison:
    """The logits of both models for square images of one size.

    Attributes:
        size: height and width of the images, in pixels.
        error, limit: of the target's logits against the source's in float64, of the two measures that
            `effkernels.ops.parity.Errors` has the one that is nearer to its limit.
        same: whether the error keeps to the limit.
        expected: whether the paddings of the two models let them agree at this size.
    """

    size: int
    error: float
    limit: float
    same: bool
    expected: bool


@dataclass(frozen=True)
class Verification:
    """The result of `verify`.

    Attributes:
        source, target: the implementations that were compared, such as "timm 1.0.31".
        comparisons: the native size first.
    """

    source: str
    target: str
    comparisons: tuple[Comparison, ...]

    @property
    def passed(self) -> bool:
        """Return whether the models agree at the native size and wherever else their paddings let them."""
        native, *others = self.comparisons
        return native.same and all(other.same or not other.expected for other in others)


def verify(tensors: Mapping[str, Tensor], conversion: Conversion, sizes: tuple[int, ...] = ()) -> Verification:
    """Compare the two models' logits.

    Args:
        tensors: the weights as they were, under the source library's names.
        conversion: of these weights.
        sizes: of the square images, in pixels, the one that decides first; (): the native size and an odd one of about
            three quarters of it, at which all ways to pad differ.

    Raises:
        ValueError: the meaning of the weights is not known.
        VerificationError: a model cannot be built as shown, or does not take the weights.
    """
    meaning = conversion.semantics
    if meaning.pad_type is None or meaning.native_size is None or meaning.variant is None:
        raise ValueError(
            f"the meaning of the weights is not known, so there is nothing to compare with: {meaning.warnings[0]}"
        )
    sizes = sizes or (meaning.native_size, _telling_size(meaning.native_size))
    ends = {"in_chans": conversion.in_chans, "num_classes": conversion.num_classes}
    recipes = [recipe(layout, meaning, **ends) for layout in (conversion.source, conversion.target)]
    # In the source's own recipe nothing is lost; the target's may pad otherwise, and that is what is to be seen.
    source, source_name = _build(conversion.source, recipes[0], tensors, conversion)
    target, target_name = _build(conversion.target, recipes[1], conversion.tensors, conversion)
    comparisons = []
    for size in sizes:
        generator = torch.Generator().manual_seed(size)
        x = torch.randn(_BATCH, conversion.in_chans, size, size, generator=generator)
        error, limit, same = _compare(source, target, x)
        paddings = recipes[0].pad_type, recipes[1].pad_type
        comparisons.append(Comparison(size, error, limit, same, same_logits(meaning.variant, *paddings, size)))
    return Verification(source_name, target_name, tuple(comparisons))


def _telling_size(native: int) -> int:
    """Return a size, some 3/4 of the native one, at which all ways to pad differ: SAME is symmetric at sizes of
    32 k + 1, and as it is at the native size at those that differ from it by a multiple of 32.
    """
    size = native * 3 // 4 | 1
    while size % 32 in (1, native % 32):
        size += 2
    return size


def _compare(source: nn.Module, target: nn.Module, x: Tensor) -> tuple[float, float, bool]:
    with torch.inference_mode():
        truth = _logits(copy.deepcopy(source).double(), x.double())
        # Both memory formats: rounding differs by chance between them, and one alone would be a yardstick made of luck.
        channels_last = copy.deepcopy(source).to(memory_format=torch.channels_last)  # type: ignore[call-overload]
        own = [
            limits(_logits(source, x), truth),
            limits(_logits(channels_last, x.contiguous(memory_format=torch.channels_last)), truth),
        ]
        found = errors(_logits(target, x), truth)
    allowed = Errors(max(one.l2 for one in own), max(one.largest for one in own))
    pairs = [(found.l2, allowed.l2), (found.largest, allowed.largest)]
    error, limit = max(pairs, key=lambda pair: pair[0] / pair[1])
    return error, limit, error <= limit


def _logits(model: nn.Module, x: Tensor) -> Tensor:
    """(N, classes), or the pooled features (N, channels) of a model without classifier."""
    result = model(x)
    if not isinstance(result, Tensor):  # transformers wraps its results
        result = result.logits if hasattr(result, "logits") else result.pooler_output
    logits: Tensor = result.flatten(1)
    return logits


def _build(
    layout: Layout, made: Recipe, tensors: Mapping[str, Tensor], conversion: Conversion
) -> tuple[nn.Module, str]:
    """Return the library's model with the weights in float32; without the library, ours with the same padding."""
    weights = {key: tensor.float() if tensor.is_floating_point() else tensor for key, tensor in tensors.items()}
    try:
        name = _import(layout, conversion.semantics.variant or "")
    except ImportError as error:
        return _stand_in(
            layout, made, weights, conversion.semantics
        ), f"effkernels, in place of {layout.name} ({error})"
    namespace: dict[str, object] = {}
    try:
        with torch.device("meta"):  # the weights come next, and drawing others first takes seconds
            # Our own text of names and numbers: to run what is printed is to know that what is printed is right.
            exec(made.code, namespace)
    except (AttributeError, ImportError, TypeError, ValueError) as error:  # of a release that has changed its arguments
        raise VerificationError(f"{name} does not build the model as shown: {error}\n{made.code}") from error
    model = namespace["model"]
    assert isinstance(model, nn.Module)
    return _loaded(model, weights, name), name


def _import(layout: Layout, variant: str) -> str:
    """Import the library; its name and version. ImportError, with the reason in a few words, where that fails."""
    package = _PACKAGES.get(layout.name)
    if is_lite(variant):
        package = _LITE_PACKAGES.get(layout.name, package)
    if package is None:
        raise ImportError("in no package")
    # Most of them import torchvision, which beside a CPU-only torch has to be made to work first.
    with contextlib.suppress(ImportError):
        peers.import_torchvision()
    try:
        importlib.import_module(package)
        return f"{layout.name} {version(package)}"
    except (ModuleNotFoundError, PackageNotFoundError) as error:
        raise ImportError("not installed") from error


def _stand_in(layout: Layout, made: Recipe, weights: Mapping[str, Tensor], meaning: Semantics) -> nn.Module:
    conversion = convert(weights, layout.name, TIMM.name)
    model = create_model(
        f"efficientnet_{conversion.semantics.variant}",
        in_chans=conversion.in_chans,
        num_classes=conversion.num_classes,
        bn_eps=meaning.bn_eps,
        bn_momentum=meaning.bn_momentum,
        backend="reference",
        device="meta",
    )
    set_native_padding(model, made.pad_type, conversion.semantics.native_size)
    return _loaded(model, conversion.tensors, "effkernels")


def _loaded(model: nn.Module, weights: Mapping[str, Tensor], name: str) -> nn.Module:
    try:
        model.load_state_dict(dict(weights), assign=True)
    except RuntimeError as error:
        raise VerificationError(f"the model of {name} does not take the weights: {error}") from error
    return model.eval()
