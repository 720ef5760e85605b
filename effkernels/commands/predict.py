"""``effkernels predict``: photographs in, classes out."""

from __future__ import annotations

import argparse
import json
import os
from dataclasses import asdict

import torch
from torch import nn

import effkernels
from effkernels import console
from effkernels.bench.precision import PRECISIONS, Precision
from effkernels.commands.common import (
    DEFAULT_MODEL,
    MODEL_HELP,
    UsageError,
    add_device,
    building,
    device_of,
    labels_of,
    model_source,
    positive,
    reading,
)
from effkernels.files import printable
from effkernels.models import EfficientNet
from effkernels.models.sources import ModelSource, unwrapped

TEXT = "Classify photographs."


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Add the flags of the command."""
    parser.add_argument("image", nargs="*", metavar="IMAGE", help="a file, a folder (searched in depth) or a pattern")
    parser.add_argument("--example", action="store_true", help="also the photograph that comes with the package")
    parser.add_argument("--model", default=DEFAULT_MODEL, metavar="NAME", help=MODEL_HELP)
    weights = parser.add_mutually_exclusive_group()
    weights.add_argument(
        "--weights", metavar="FILE", help="checkpoint (.pth, .safetensors) of timm, torchvision, lukemelas"
    )
    weights.add_argument(
        "--pretrained",
        action="store_true",
        help="the weights that the model's library publishes (for ours timm's), or the cached ones",
    )
    parser.add_argument("--labels", metavar="FILE", help="text file with one class label per line")
    parser.add_argument("--topk", type=positive, default=5, metavar="K", help="default: %(default)s")
    parser.add_argument("--batch-size", type=positive, default=16, metavar="N", help="default: %(default)s")
    parser.add_argument("--img-size", type=positive, metavar="PIXELS", help="default: the model's own")
    add_device(parser)
    parser.add_argument("--precision", choices=PRECISIONS, default="float32", help="default: %(default)s")
    parser.add_argument("--format", choices=("table", "json"), default="table", help="default: %(default)s")
    parser.add_argument("--json", dest="format", action="store_const", const="json", help="the same as --format json")


def run(arguments: argparse.Namespace) -> int:
    """Classify photographs."""
    try:
        import numpy  # noqa: F401
        import PIL  # noqa: F401
    except ImportError as error:
        raise UsageError(f"predict needs {error.name}: pip install 'effkernels[models]'") from error
    from effkernels.engine.images import Failure, example_image, find_images
    from effkernels.engine.predict import Prediction, classify
    from effkernels.models.preprocessing import Preprocessing

    if not arguments.image and not arguments.example:
        raise UsageError("no IMAGE given; name files, folders or patterns, or use --example")
    source = model_source(arguments.model)
    device = device_of(arguments.device)
    precision = Precision.of(arguments.precision, device.type)
    labels = None
    if arguments.labels:
        labels = labels_of(arguments.labels)
    model, weights = _model_with_weights(source, arguments.weights, arguments.pretrained)
    if isinstance(model, EfficientNet) and model.config is not None:
        # A file may have set the size and the mean of its weights.
        preprocessing, classes = Preprocessing.of(model.config, arguments.img_size), model.num_classes
    else:
        with building():
            preprocessing = source.preprocessing(arguments.img_size)
        classes = _fused_classes(model, preprocessing.img_size, arguments.model)
    if labels is not None and len(labels) != classes:
        raise UsageError(f"--labels {arguments.labels}: {len(labels)} lines for a model of {classes} classes")
    model = model.eval().to(device, precision.dtype)

    named = list(arguments.image)
    if arguments.example:
        try:
            named.append(os.path.relpath(example_image()))
        except ImportError as error:
            raise UsageError(f"--example: {error}") from error
    files, failures = find_images(named)
    predictions: list[Prediction] = []
    with console.progress("predict", len(files)) as advance:
        for result in classify(
            model,
            files,
            preprocessing=preprocessing,
            topk=arguments.topk,
            labels=labels,
            batch_size=arguments.batch_size,
            amp_dtype=precision.autocast,
        ):
            if isinstance(result, Failure):
                failures.append(result)
            else:
                predictions.append(result)
            advance(result.file)
    if arguments.format == "json":
        report = {
            "model": arguments.model,
            "weights": weights,
            "predictions": [asdict(prediction) for prediction in predictions],
            "failures": [asdict(failure) for failure in failures],
        }
        print(json.dumps(report, indent=2))
    elif predictions:
        rows = [
            [prediction.file if rank == 0 else "", score.label, f"{score.probability:.4f}"]
            for prediction in predictions
            for rank, score in enumerate(prediction.scores)
        ]
        images = "1 image" if len(predictions) == 1 else f"{len(predictions)} images"
        console.table(f"{arguments.model}: {images}", ["image", "class", "probability"], rows)
    for failure in failures:
        console.note(f"predict: {printable(failure.file)}: {printable(failure.reason)}")
    return 1 if failures else 0


def _model_with_weights(source: ModelSource, file: str | None, pretrained: bool) -> tuple[nn.Module, str | None]:
    """Return the model and where its weights are from: the file, the hub or the library, or None for random ones.

    The model has the classes of its weights. For random weights a warning is printed.
    """
    if pretrained:
        try:
            with reading("--pretrained", source.text):
                model = source.build(pretrained=True)
        except ValueError as error:  # the name has no published weights
            raise UsageError(f"--pretrained: {error}") from error
        config = model.config if isinstance(model, EfficientNet) else None
        return model, f"published ({source.library})" if config is None else config.hf_hub_id
    if file is None:
        if source.library != "file":  # a function of a file decides on its weights
            console.note(
                f"WARNING: the weights of {source.text} are RANDOM and its predictions mean nothing. --pretrained "
                "fetches the published ones, --weights FILE reads a checkpoint"
            )
        torch.manual_seed(0)
        with building():
            model = source.build()
    else:
        with reading("--weights", file):
            model = source.build(checkpoint=file)
    if isinstance(model, EfficientNet) and (model.num_classes == 0 or model.in_chans != 3):
        found = f"{model.in_chans} image channels and {model.num_classes} classes"
        raise UsageError(f"--weights {file}: {found}; needed are 3 channels and at least one class")
    return model, file


def _fused_classes(model: nn.Module, img_size: int, name: str) -> int:
    """Let a model of another library use the fused operators; return the number of its classes.

    Raises:
        UsageError: it takes no photographs, or returns no logits.
    """
    effkernels.optimize_(unwrapped(model), input_size=(3, img_size, img_size))
    try:
        with torch.inference_mode():
            logits = model(torch.zeros(1, 3, img_size, img_size))
    except Exception as error:  # anybody's code
        raise UsageError(
            f"--model {name} takes no images of 3 x {img_size} x {img_size}: {type(error).__name__}: {error}"
        ) from error
    if not isinstance(logits, torch.Tensor) or logits.ndim != 2:
        raise UsageError(f"--model {name}: a classifier is needed, whose result is one tensor, (images, classes)")
    return logits.shape[1]
