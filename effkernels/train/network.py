"""The network of a training: from random weights, a checkpoint or published weights, and from a stopped training."""

from __future__ import annotations

import functools
from collections.abc import Callable
from dataclasses import asdict
from typing import Any

import torch
from torch import nn

from effkernels.models import EfficientNet, ModelConfig, create_model, model_config
from effkernels.models.checkpoints import build_for, load_read, read_checkpoint
from effkernels.train.options import OptionError, TrainOptions
from effkernels.train.random_numbers import seed_for


def make_network(options: TrainOptions, data_classes: int, say: Callable[[str], None]) -> EfficientNet:
    """Return the network on the CPU, in training mode; `say` gets a sentence if the classifier is a fresh one.

    Raises:
        OptionError: an unknown model, or fewer classes than the data has, or weights without 3 channels.
        CheckpointError, OSError, ImportError: the weights cannot be read or do not fit.
    """
    try:
        dropout = model_config(options.model).dropout
    except ValueError as error:
        raise OptionError("model", options.model, str(error)) from error
    classes = data_classes if options.num_classes is None else options.num_classes
    if classes < data_classes:
        raise OptionError("num_classes", classes, f"allowed: at least {data_classes}, the classes of the data")
    torch.manual_seed(seed_for("weights", options.seed))
    build: Callable[..., Any] = functools.partial(
        create_model,
        options.model,
        drop_rate=dropout if options.drop is None else options.drop,
        drop_path_rate=options.drop_path,
    )
    source = options.weights
    if options.weights is not None:
        checkpoint = read_checkpoint(options.weights)
        model = load_read(build_for(checkpoint, build), checkpoint)
        if model.in_chans != 3:
            raise OptionError("weights", options.weights, f"{model.in_chans} image channels; 3 are needed")
    elif options.pretrained:
        try:
            model = build(pretrained=True)
        except ValueError as error:  # the name has no published weights
            raise OptionError("pretrained", True, str(error)) from error
        source = model.config.hf_hub_id
    else:
        model = build(num_classes=classes)
        _start_small(model)
        return _network(model)
    if model.num_classes != classes:
        say(f"the classifier is fresh: {source} has {model.num_classes} classes, and {classes} are wanted")
        model.reset_classifier(classes)
        _start_small(model)
    else:
        say(f"all weights are those of {source}, the classifier of {classes} classes, too")
    return _network(model)


def _start_small(model: EfficientNet) -> None:
    """Draw the classifier as PyTorch does, within 1 / sqrt(inputs).

    EfficientNet's 1 / sqrt(classes) is for a thousand of them: with ten the first loss of B0 is 5 and not ln(10) = 2.3.
    """
    assert isinstance(model.classifier, nn.Linear)
    model.classifier.reset_parameters()


def meaning_of(model: EfficientNet) -> dict[str, Any]:
    """Return what `make_network` decided beside the weights, for `network_again`."""
    assert model.config is not None
    return {
        "config": asdict(model.config),
        "num_classes": model.num_classes,
        "pad_type": model.pad_type,
        "bn_eps": model.bn1.eps,
        "bn_momentum": model.bn1.momentum,
        "drop": model.drop_rate,
    }


def network_again(options: TrainOptions, meaning: dict[str, Any]) -> EfficientNet:
    """Return the network of a stopped training, into which its weights still have to be loaded.

    Raises:
        KeyError, TypeError, ValueError: the meaning is not of `meaning_of`.
    """
    model = _network(
        create_model(
            options.model,
            num_classes=meaning["num_classes"],
            drop_rate=meaning["drop"],
            drop_path_rate=options.drop_path,
            bn_eps=meaning["bn_eps"],
            bn_momentum=meaning["bn_momentum"],
        )
    )
    model.config = ModelConfig(**meaning["config"])
    model.set_padding(meaning["pad_type"])
    return model


def _network(model: Any) -> EfficientNet:
    assert isinstance(model, EfficientNet)
    return model
