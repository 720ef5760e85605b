"""Serve a model over HTTP with LitServe: a photograph in, its most probable classes out.

    python examples/serve_litserve.py --weights FILE --labels FILE --port 8000
    curl -F image=@photo.jpg http://127.0.0.1:8000/predict
    {"predictions": [{"class": 281, "label": "tabby", "probability": 0.87}, ...]}

Use it for requests that come one at a time from many clients, on the CPUs or GPUs of one machine. LitServe brings the
HTTP servers, a worker process per device and their supervision; each worker holds an `InferenceEngine`.

Batches are made by the engine's `submit` and not by LitServe's batcher: there an image that cannot be decoded fails
the requests that happen to share its batch, and decoding waits for the batch before. Here every request is decoded by
a thread of its own and joins the engine's next batch; what is wrong with it is its answer alone:

    400 the file is no photograph in one of FORMATS, is damaged, or has more than --max-megapixels
    422 the form has no file named `image`                      413 it is larger than --max-megabytes
    503 --max-queue photographs are waiting already             500 the model failed

A file of some kilobytes can hold gigabytes of pixels. The size in its header decides before anything is decoded, and
a worker decodes --decoders photographs at a time, each in some ten bytes a pixel.

`GET /health` answers 200 once every worker has warmed up its engine, and 503 or nothing before. After SIGTERM the
server continues for --drain-seconds, so that whoever has connected by then is answered, in the queue of the system too;
then, and at once after Ctrl-C or a second SIGTERM, it lets the requests that it took finish and ends every process.
Take it out of the load balancer first. `pip install 'effkernels[serving]'` brings what it needs.
"""

# Annotations are not postponed here: FastAPI reads those of decode_request where it does not know their names.
import argparse
import asyncio
import io
import os
import signal
import sys
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from types import FrameType
from typing import Annotated, Any

import torch

import effkernels
from effkernels.engine import QueueFull
from effkernels.engine.images import ImageError, decode
from effkernels.engine.predict import read_labels
from effkernels.files import printable_lines
from effkernels.models import EfficientNet, load_checkpoint
from effkernels.models.preprocessing import Preprocessing

try:
    import litserve
    import PIL.Image  # noqa: F401
    from fastapi import File, HTTPException
except ImportError as missing:
    sys.exit(f"this example needs {missing.name}: pip install 'effkernels[serving]'")

FORMATS = ("AVIF", "BMP", "GIF", "JPEG", "PNG", "TIFF", "WEBP")


def load_model(options: argparse.Namespace) -> EfficientNet:
    """Return the model of the command line, in eval mode."""
    torch.manual_seed(0)  # every worker has the same random weights
    model = effkernels.create_model(options.model)
    if options.weights is not None:
        model = load_checkpoint(options.model, options.weights)
    return model.eval()


class Classifier(litserve.LitAPI):
    """The handling of a request by a worker; LitServe makes a copy in every worker process."""

    def __init__(self, options: argparse.Namespace, labels: list[str] | None) -> None:
        super().__init__(enable_async=True)  # many requests are under way at once, which is what fills the batches
        self.options = options
        self.labels = labels

    def setup(self, device: str) -> None:
        """Prepare the engine, once per worker."""
        if self.options.threads is not None:
            torch.set_num_threads(self.options.threads)
        model = load_model(self.options)
        self.preprocessing = Preprocessing.of(model.config, self.options.img_size)
        self.topk = min(self.options.topk, model.config.num_classes)
        self.decoders = ThreadPoolExecutor(self.options.decoders, "decoder")
        self.engine = effkernels.InferenceEngine(
            model,
            device=device,
            dtype=getattr(torch, self.options.dtype),
            batch_sizes=self.options.batch_sizes,
            input_size=self.preprocessing.img_size,
            max_latency_ms=self.options.max_latency_ms,
            max_queue=self.options.max_queue,
        )

    def decode(self, file: bytes) -> torch.Tensor:
        """Return a photograph as the model's input, (3, S, S); HTTPException 400 for what is none."""
        try:
            most = self.options.max_megapixels * 1_000_000
            return self.preprocessing(decode(io.BytesIO(file), formats=FORMATS, most_pixels=most))
        except ImageError as error:
            raise HTTPException(400, f"image: {len(file)} bytes: {error}") from error

    async def decode_request(self, request: Annotated[bytes, File(alias="image")]) -> torch.Tensor:
        """Decode in a thread, so that the next request is taken meanwhile."""
        return await asyncio.get_running_loop().run_in_executor(self.decoders, self.decode, request)

    async def predict(self, image: torch.Tensor) -> torch.Tensor:
        """Probabilities of all classes, from whatever batch the engine puts the image into."""
        try:
            future = self.engine.submit(image)
        except QueueFull as error:
            raise HTTPException(503, str(error)) from error
        logits: torch.Tensor = await asyncio.wrap_future(future)
        return torch.softmax(logits.float(), 0).cpu()

    async def encode_response(self, probabilities: torch.Tensor) -> dict[str, list[dict[str, Any]]]:
        """Return the most probable classes, the best first."""
        values, indices = probabilities.topk(self.topk)
        if not bool(torch.isfinite(values).all()):
            raise HTTPException(500, "the model's output is not finite")
        return {
            "predictions": [
                {"class": index, "label": self.labels[index] if self.labels else None, "probability": value}
                for index, value in zip(indices.tolist(), values.tolist(), strict=True)
            ]
        }


def positive(text: str) -> int:
    """Return a count of the command line."""
    if (value := int(text)) < 1:
        raise argparse.ArgumentTypeError(f"{value}; at least 1 is needed")
    return value


def parse_arguments() -> argparse.Namespace:
    """Return the command line."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    add = parser.add_argument
    add("--model", default="efficientnet_b0", metavar="NAME", help="default: %(default)s")
    add("--weights", type=Path, metavar="FILE", help="checkpoint (.pth, .safetensors); default: random weights")
    add("--labels", type=Path, metavar="FILE", help="text file with one class label per line")
    add("--topk", type=positive, default=5, metavar="K", help="default: %(default)s")
    add("--img-size", type=positive, metavar="PIXELS", help="default: the model's own")
    add("--dtype", choices=("float32", "bfloat16", "float16"), default="float32", help="default: %(default)s")
    add("--host", choices=("127.0.0.1", "0.0.0.0", "::"), default="127.0.0.1", help="default: %(default)s")
    add("--port", type=positive, default=8000, help="default: %(default)s")
    add("--accelerator", choices=("auto", "cpu", "cuda"), default="auto", help="default: %(default)s")
    add("--devices", type=positive, metavar="N", help="GPUs; default: all")
    add("--workers-per-device", type=positive, default=1, metavar="N", help="default: %(default)s")
    add("--threads", type=positive, metavar="N", help="of a worker on CPUs; default: PyTorch's")
    add("--batch-sizes", type=positive, nargs="+", default=[1, 4, 16], metavar="N", help="default: %(default)s")
    add("--max-latency-ms", type=float, default=2.0, metavar="MS", help="wait to fill a batch; default: %(default)s")
    add("--max-queue", type=positive, default=256, metavar="N", help="waiting images of a worker; default: %(default)s")
    add("--max-megabytes", type=positive, default=32, metavar="N", help="of a request; default: %(default)s")
    add("--max-megapixels", type=positive, default=50, metavar="N", help="of a photograph; default: %(default)s")
    cores = os.cpu_count() or 1
    add("--decoders", type=positive, default=cores, metavar="N", help="decoding at a time; default: one per core")
    add("--drain-seconds", type=float, default=2.0, metavar="S", help="from SIGTERM on; default: %(default)s")
    return parser.parse_args()


def main() -> None:
    """Serve until SIGTERM or Ctrl-C."""
    options = parse_arguments()
    try:
        labels = None if options.labels is None else read_labels(options.labels)
        classes = load_model(options).config.num_classes  # here, so that an error is one line and not a dead worker
    except (OSError, ValueError) as error:
        sys.exit(printable_lines(error))
    if labels is not None and len(labels) != classes:
        sys.exit(f"--labels {options.labels}: {len(labels)} labels, and the model has {classes} classes")
    server = litserve.LitServer(
        Classifier(options, labels),
        accelerator=options.accelerator,
        devices=options.devices or "auto",
        workers_per_device=options.workers_per_device,
        max_payload_size=options.max_megabytes * 2**20,
    )
    serving = os.getpid()

    def stop(number: int, frame: FrameType | None) -> None:
        # LitServe ends itself in order after Ctrl-C alone: SIGTERM would kill this process and not the others.
        # Those that it forks inherit this; they have ends of their own.
        if os.getpid() != serving:
            return
        is_draining = signal.getitimer(signal.ITIMER_REAL)[0] > 0
        if number == signal.SIGTERM and options.drain_seconds > 0 and not is_draining:
            signal.setitimer(signal.ITIMER_REAL, options.drain_seconds)  # ends in SIGALRM
            return
        signal.setitimer(signal.ITIMER_REAL, 0)
        raise KeyboardInterrupt

    signal.signal(signal.SIGALRM, stop)
    signal.signal(signal.SIGTERM, stop)
    server.run(host=options.host, port=options.port, generate_client_file=False)


if __name__ == "__main__":
    main()
