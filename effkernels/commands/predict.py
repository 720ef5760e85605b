"""``effkernels predict``: photographs in, classes out."""

from __future__ import annotations

import argparse
import json
import os
from dataclasses import asdict

import torch

import effkernels
from effkernels import console
from effkernels.bench.precision import PRECISIONS, Precision
from effkernels.commands.common import (
    DEFAULT_MODEL,
    UsageError,
    add_device,
    check_models,
    device_of,
    labels_of,
    positive,
    reading,
)
from effkernels.files import printable
from effkernels.models import EfficientNet, load_checkpoint

TEXT = "Classify photographs."


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Add the flags of the command."""
    parser.add_argument("image", nargs="*", metavar="IMAGE", help="a file, a folder (searched in depth) or a pattern")
    parser.add_argument("--example", action="store_true", help="also the photograph that comes with the package")
    parser.add_argument("--model", default=DEFAULT_MODEL, metavar="NAME", help="NAME or NAME.TAG; default: %(default)s")
    weights = parser.add_mutually_exclusive_group()
    weights.add_argument(
        "--weights", metavar="FILE", help="checkpoint (.pth, .safetensors) of timm, torchvision, lukemelas"
    )
    weights.add_argument(
        "--pretrained", action="store_true", help="timm's weights, from the Hugging Face hub or the cache of its client"
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
    check_models([arguments.model])
    device = device_of(arguments.device)
    precision = Precision.of(arguments.precision, device.type)
    labels = None
    if arguments.labels:
        labels = labels_of(arguments.labels)
    model, weights = _model_with_weights(arguments.model, arguments.weights, arguments.pretrained)
    if labels is not None and len(labels) != model.num_classes:
        raise UsageError(f"--labels {arguments.labels}: {len(labels)} lines for a model of {model.num_classes} classes")
    model = model.eval().to(device, precision.dtype)
    assert model.config is not None

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
            preprocessing=Preprocessing.of(model.config, arguments.img_size),
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


def _model_with_weights(name: str, file: str | None, pretrained: bool) -> tuple[EfficientNet, str | None]:
    """Return the model and where its weights are from: the file, the repository of the hub, or None for random ones.

    The model has the classes of its weights. For random weights a warning is printed.
    """
    if pretrained:
        try:
            with reading("--pretrained", name):
                model = effkernels.create_model(name, pretrained=True)
        except ValueError as error:  # the name has no published weights
            raise UsageError(f"--pretrained: {error}") from error
        assert isinstance(model, EfficientNet)
        assert model.config is not None
        return model, model.config.hf_hub_id
    if file is None:
        console.note(
            f"WARNING: the weights of {name} are RANDOM and its predictions mean nothing. --pretrained fetches timm's, "
            "--weights FILE reads a checkpoint of timm, torchvision or lukemelas"
        )
        torch.manual_seed(0)
        model = effkernels.create_model(name)
    else:
        with reading("--weights", file):
            model = load_checkpoint(name, file)
    assert isinstance(model, EfficientNet)
    if model.num_classes == 0 or model.in_chans != 3:
        found = f"{model.in_chans} image channels and {model.num_classes} classes"
        raise UsageError(f"--weights {file}: {found}; needed are 3 channels and at least one class")
    return model, file
