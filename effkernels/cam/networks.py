"""The networks whose maps are drawn: one by its name, or the five of the paper's figure 7, with weights from files."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import cast

import torch
from torch import nn

from effkernels.models import (
    CheckpointError,
    EfficientNet,
    create_model,
    load_checkpoint,
    model_config,
    read_checkpoint,
)
from effkernels.models.checkpoint_files import read_file
from effkernels.models.checkpoint_tensors import check_fit
from effkernels.models.checkpoints import build_for, load_read
from effkernels.models.preprocessing import Preprocessing
from effkernels.scaling import BuiltNetwork, StagedNetwork, find_network, scale
from effkernels.scaling.counting import count

Scalable = StagedNetwork | BuiltNetwork


@dataclass(frozen=True)
class Factors:
    """The factors by which a network of the comparison is scaled."""

    name: str
    depth: float = 1.0
    width: float = 1.0
    resolution: float = 1.0


COMPARED: tuple[Factors, ...] = (
    Factors("baseline"),
    Factors("deeper (d=4)", depth=4),
    Factors("wider (w=2)", width=2),
    Factors("higher resolution (r=2)", resolution=2),
    Factors("compound (d=1.4, w=1.2, r=1.3)", depth=1.4, width=1.2, resolution=1.3),
)
"""The columns of figure 7 (Tan and Le 2019, table 7): four scalings of about the same FLOPs beside their baseline."""


@dataclass(frozen=True)
class Subject:
    """A network whose maps are drawn.

    Attributes:
        name: for titles.
        model: in eval mode, on the CPU.
        preprocessing: how an image becomes its input.
        multiply_adds: of one image; the paper's FLOPS.
        parameters: trained numbers.
        num_classes: of the classifier.
        weights: the file they come from; None: drawn at random, and maps that mean nothing.
    """

    name: str
    model: nn.Module
    preprocessing: Preprocessing
    multiply_adds: int
    parameters: int
    num_classes: int
    weights: str | None


def named_subject(name: str, weights: str | None = None, img_size: int | None = None) -> Subject:
    """Return a model of the registry, or any network that `effkernels.scaling.find_network` knows, by its name.

    Args:
        name: "efficientnet_b4", "mobilenet_v1", "timm:resnet50", ...
        weights: .pth or .safetensors; the number of classes is the file's. None: random weights of 1000 classes.
        img_size: height and width of the input; None: the network's own.

    Raises:
        ValueError: an unknown name.
        FileNotFoundError, CheckpointError: no such file, or one that does not fit.
    """
    try:
        config = model_config(name)
    except ValueError as not_registered:
        try:
            network = find_network(name)
        except ValueError as error:
            raise ValueError(f"{not_registered}; or a network to scale: {error}") from error
        return network_subject(network, weights, img_size)
    torch.manual_seed(0)
    model = create_model(name) if weights is None else load_checkpoint(name, weights)
    assert isinstance(model, EfficientNet)
    if model.num_classes == 0 or model.in_chans != 3:
        found = f"{model.in_chans} image channels and {model.num_classes} classes"
        raise CheckpointError(f"{weights} has {found}; needed are 3 channels and at least one class")
    counted = create_model(name, num_classes=model.num_classes, device="meta")
    return _subject(name, model, counted, Preprocessing.of(config, img_size), model.num_classes, weights)


def network_subject(
    network: Scalable, weights: str | None = None, img_size: int | None = None, name: str | None = None
) -> Subject:
    """Return a network of the scaling method as `named_subject` does; images are preprocessed as for ImageNet."""
    size = network.resolution if img_size is None else img_size
    torch.manual_seed(0)
    model = network.build() if weights is None else load_network_weights(network, weights)
    classes = _num_classes(model)
    counted = network.build(num_classes=classes, device="meta")
    return _subject(name or network.name, model, counted, Preprocessing(size), classes, weights)


def scalings(network: Scalable, img_size: int | None = None) -> list[Scalable]:
    """Return the networks of figure 7 for any baseline, in the order of `COMPARED`.

    Args:
        network: the baseline.
        img_size: height and width of its input; None: its own.

    Raises:
        ValueError: a dimension that the network's library cannot scale.
    """
    if img_size is not None:
        network = replace(network, resolution=img_size)
    return [scale(network, depth=by.depth, width=by.width, resolution=by.resolution) for by in COMPARED]


def compared_subjects(
    network: Scalable, weights: Sequence[str] | None = None, img_size: int | None = None
) -> list[Subject]:
    """Return `scalings` with their weights.

    Args:
        network: the baseline.
        weights: a file for each of `COMPARED`, in that order; None: random weights.
        img_size: height and width of the baseline's input; the others' follow. None: the network's own.

    Raises:
        ValueError: another number of files, or a dimension that the network's library cannot scale.
        FileNotFoundError, CheckpointError: no such file, or one that does not fit.
    """
    files: Sequence[str | None] = [None] * len(COMPARED) if weights is None else weights
    if len(files) != len(COMPARED):
        names = ", ".join(by.name for by in COMPARED)
        raise ValueError(f"weights: {len(files)} files; allowed: none, or {len(COMPARED)} in this order: {names}")
    networks = scalings(network, img_size)
    return [network_subject(one, file, name=by.name) for one, file, by in zip(networks, files, COMPARED, strict=True)]


def load_network_weights(network: Scalable, file: str) -> nn.Module:
    """Return a network with the weights and the number of classes of a file, on the CPU.

    An EfficientNet takes whatever `effkernels.models.load_checkpoint` reads; any other network a state_dict under its
    own names.

    Raises:
        FileNotFoundError: no such file.
        CheckpointError: the file cannot be read, or its keys or shapes do not fit.
    """
    outline = network.build(device="meta")
    if isinstance(outline, EfficientNet):
        checkpoint = read_checkpoint(file)
        build = cast(Callable[..., EfficientNet], network.build)
        return load_read(build_for(checkpoint, build), checkpoint)
    first = next(iter(outline.state_dict()))
    path = Path(file)
    tensors = read_file(path, lambda name: name == first).tensors
    key = f"{_classifier_name(outline)}.weight"
    classes = tensors[key].shape[0] if key in tensors and tensors[key].numel() else 1000
    # On the meta device first: nothing is allocated for what does not fit.
    outline = network.build(num_classes=classes, device="meta")
    check_fit(tensors, outline.state_dict(), path, network.name)
    model = network.build(num_classes=classes)
    model.load_state_dict(tensors)
    return model


def _subject(
    name: str,
    model: nn.Module,
    counted: nn.Module,
    preprocessing: Preprocessing,
    num_classes: int,
    weights: str | None,
) -> Subject:
    cost = count(counted, (3, preprocessing.img_size, preprocessing.img_size))
    return Subject(name, model.eval(), preprocessing, cost.multiply_adds, cost.parameters, num_classes, weights)


def _classifier_name(model: nn.Module) -> str:
    names: list[str] = [name for name, module in model.named_modules() if isinstance(module, nn.Linear)]
    if not names:
        raise CheckpointError(f"{type(model).__name__} has no linear layer and so no classifier to draw maps of")
    return names[-1]


def _num_classes(model: nn.Module) -> int:
    linear = model.get_submodule(_classifier_name(model))
    assert isinstance(linear, nn.Linear)
    return linear.out_features
