"""Networks to look into without any download: trained in a few minutes to name a digit hidden in a larger picture.

The digits are scikit-learn's (1797 of 8 x 8 pixels, from the UCI repository). Each is put, at random size and place,
into a picture with noise and with fragments of other digits. The network is not given the digit's position, but its map
has to be largest there if it uses the digit, and because the position is known, that can be counted.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from effkernels.cam.maps import class_activation_map, peaks
from effkernels.cam.networks import COMPARED, Scalable, Subject, scalings
from effkernels.models.preprocessing import Preprocessing
from effkernels.scaling.digits import load_digits, train
from effkernels.scaling.families import build_sequential
from effkernels.scaling.network import Stage, StagedNetwork

if TYPE_CHECKING:
    import PIL.Image

PICTURE = 64  # pixels
CLASSES = 10
_TRAINED_ON = 1500  # the first of the digits; the other 297 are for testing
_FRAGMENTS = 4
_MEAN, _STD = 0.2, 0.25  # of the pictures


def _layers(layers: int, channels: int, stride: int, expansion: int) -> Stage:
    options = {"expansion": expansion, "activation": "silu"}
    return Stage("inverted_residual", layers, channels, stride, options=options)


DIGITS_NETWORK = StagedNetwork(
    "DigitsNet",
    PICTURE,
    (
        Stage("conv", 1, 16, 2, options={"activation": "silu"}, deepens=False),
        _layers(1, 16, 2, expansion=1),
        _layers(1, 24, 1, expansion=3),
        _layers(1, 32, 2, expansion=3),
        Stage("conv", 1, 128, 1, 1, {"activation": "silu"}, deepens=False),
    ),
    build_sequential,
)
"""The baseline of the comparison: MBConv layers down to 8 x 8 positions."""


@dataclass(frozen=True)
class HiddenDigits:
    """Pictures with one digit each.

    Attributes:
        pictures: (N, PICTURE, PICTURE), in [0, 1].
        classes: (N,), the digits.
        boxes: (N, 4), left, top, right, bottom of the digit, in shares of the picture.
    """

    pictures: Tensor
    classes: Tensor
    boxes: Tensor


def hide_digits(to_train: bool, generator: torch.Generator) -> HiddenDigits:
    """Draw new pictures: each digit once, in their order, at another place every time.

    Args:
        to_train: hide the digits for training, or those for testing.
        generator: decides places, sizes, fragments and noise.

    Raises:
        ImportError: scikit-learn is not installed.
    """
    part = slice(None, _TRAINED_ON) if to_train else slice(_TRAINED_ON, None)
    digits, classes = (of[part] for of in load_digits())
    images = len(digits)

    def uniform(low: float, high: float, *shape: int) -> Tensor:
        return low + (high - low) * torch.rand(*shape, generator=generator)

    half = uniform(0.18, 0.26, images)  # half a digit's side, where the picture goes from 0 to 1
    centre = half[:, None] + (1 - 2 * half[:, None]) * uniform(0, 1, images, 2)
    pictures = _placed(digits, centre, half)
    # Fragments of 3 x 3 of the 8 x 8 pixels, as bright and as large as the digits: brightness does not show the digit.
    for _ in range(_FRAGMENTS):
        whole = digits[torch.randperm(images, generator=generator)]
        corner = torch.randint(0, 6, (images, 2, 1), generator=generator)
        inside = (torch.arange(8) >= corner) & (torch.arange(8) < corner + 3)
        fragment = whole * inside[:, 0, :, None] * inside[:, 1, None, :]
        places = uniform(0.1, 0.9, images, 2)
        pictures = torch.maximum(pictures, 0.9 * _placed(fragment, places, half))
    pictures = (pictures + 0.06 * torch.randn(pictures.shape, generator=generator) + 0.08).clamp(0, 1)
    return HiddenDigits(pictures, classes, torch.cat([centre - half[:, None], centre + half[:, None]], 1))


def _placed(digits: Tensor, centre: Tensor, half: Tensor) -> Tensor:
    """(N, 8, 8) as pictures (N, PICTURE, PICTURE), black around the digits."""
    scale, shift = 1 / (2 * half), (1 - 2 * centre) / (2 * half[:, None])
    affine = torch.zeros(len(digits), 2, 3)
    affine[:, 0, 0] = affine[:, 1, 1] = scale
    affine[:, :, 2] = shift
    grid = F.affine_grid(affine, [len(digits), 1, PICTURE, PICTURE], align_corners=False)
    return F.grid_sample(digits[:, None], grid, align_corners=False)[:, 0]


def digits_preprocessing(resolution: int) -> Preprocessing:
    """Return the preprocessing of a network for digits: the whole picture, without a crop."""
    return Preprocessing(resolution, 1.0, "bilinear", (_MEAN,) * 3, (_STD,) * 3)


def train_on_digits(
    network: Scalable,
    *,
    epochs: int = 10,
    batch_size: int = 50,
    seed: int = 0,
    device: torch.device | str = "cpu",
    after_epoch: Callable[[int, float], None] = lambda epoch, loss: None,
) -> nn.Module:
    """Train a network to name hidden digits; what it learns depends on the arguments alone.

    Args:
        network: built for 10 classes and trained at its resolution.
        epochs: passes over 1500 digits, each time at other places.
        batch_size: pictures in a step.
        seed: of weights, pictures and order.
        device: to train on.
        after_epoch: called with the number of epochs done and the mean loss of the last.

    Returns:
        The model in eval mode, on `device`.

    Raises:
        ImportError: scikit-learn is not installed.
    """

    def epoch_of(generator: torch.Generator) -> Iterator[tuple[Tensor, Tensor]]:
        hidden = hide_digits(True, generator)
        for batch in torch.randperm(len(hidden.classes), generator=generator).split(batch_size):
            yield _inputs(hidden.pictures[batch], network.resolution).to(device), hidden.classes[batch].to(device)

    return train(
        lambda: network.build(num_classes=CLASSES).to(device),
        epoch_of,
        epochs=epochs,
        steps=-(-_TRAINED_ON // batch_size),
        learning_rate=4e-3,
        seed=seed,
        after_epoch=after_epoch,
    )


def look_at_digits(model: nn.Module, hidden: HiddenDigits, resolution: int) -> dict[str, float]:
    """Measure a trained network's accuracy on pictures, and where its maps are largest.

    Returns:
        "accuracy": the share of digits that it names; "peak_on_digit": the share of pictures where the largest value
        of the map of the right class is within the digit's box; "digit_area": the mean share of the box in a
        picture, which a map that knows nothing would hit.
    """
    device = next(model.parameters()).device
    named, on_digit = 0, 0
    batches = (part.split(50) for part in (hidden.pictures, hidden.classes, hidden.boxes))
    for pictures, classes, boxes in zip(*batches, strict=True):
        inputs = _inputs(pictures, resolution).to(device)
        with torch.no_grad():
            named += int((model(inputs).argmax(1).cpu() == classes).sum())
        peak = peaks(class_activation_map(model, inputs, classes.to(device)).maps).cpu()
        on_digit += int(((boxes[:, :2] < peak) & (peak < boxes[:, 2:])).all(1).sum())
    count = len(hidden.classes)
    area = (hidden.boxes[:, 2:] - hidden.boxes[:, :2]).prod(1).mean()
    return {"accuracy": named / count, "peak_on_digit": on_digit / count, "digit_area": float(area)}


def digits_subjects(compare: bool, epochs: int, device: torch.device, note: Callable[[str], None]) -> Iterator[Subject]:
    """Train `DIGITS_NETWORK`, or all of its scalings, one after another.

    Args:
        compare: all of `effkernels.cam.networks.COMPARED`.
        epochs, device: as of `train_on_digits`.
        note: called with a line after every epoch.
    """
    networks = scalings(DIGITS_NETWORK) if compare else [DIGITS_NETWORK]
    for factors, network in zip(COMPARED[: len(networks)], networks, strict=True):

        def after_epoch(epoch: int, loss: float, name: str = factors.name) -> None:
            note(f"train {name}: epoch {epoch} of {epochs}, loss {loss:.3f}")

        model = train_on_digits(network, epochs=epochs, device=device, after_epoch=after_epoch)
        cost = network.cost(num_classes=CLASSES)
        preprocessing = digits_preprocessing(network.resolution)
        yield Subject(factors.name, model, preprocessing, cost.multiply_adds, cost.parameters, CLASSES, "trained here")


def as_photographs(hidden: HiddenDigits, count: int) -> list[tuple[str, PIL.Image.Image]]:
    """Return the first `count` pictures as RGB images, each with a name."""
    import PIL.Image

    found = []
    for number, (picture, digit) in enumerate(zip(hidden.pictures[:count], hidden.classes[:count], strict=True)):
        grey = PIL.Image.fromarray((picture * 255).round().byte().numpy())
        found.append((f"picture {number}: a {int(digit)}", grey.convert("RGB")))
    return found


def _inputs(pictures: Tensor, resolution: int) -> Tensor:
    """(N, PICTURE, PICTURE) as the (N, 3, resolution, resolution) that `digits_preprocessing` makes of them."""
    size = (resolution, resolution)
    resized = F.interpolate(pictures[:, None], size, mode="bilinear", align_corners=False, antialias=True)
    return ((resized - _MEAN) / _STD).expand(-1, 3, -1, -1).contiguous(memory_format=torch.channels_last)
