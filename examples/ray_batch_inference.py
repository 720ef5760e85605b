"""Classify a folder of photographs with Ray Data, on every GPU of a machine or a cluster, into Parquet files.

    python examples/ray_batch_inference.py photos/ --out results/ --weights FILE --labels FILE

Use it when a folder is too much for one process: several GPUs, several machines, or hours of work that may be
interrupted. For one device, `effkernels predict` or an `InferenceEngine` of your own is simpler.

Tasks on all CPUs decode, resize and crop, so that crops and not whole photographs go through the object store; actors,
one per GPU or several with a few threads each, hold an `InferenceEngine`. The driver writes the parts, each complete
or not there at all. So a run that was killed is resumed by running it again: paths in finished parts are skipped, and
what no part had yet, --part-rows photographs and those under way at most, is computed again.

Each row has path, class_index, label (with --labels), probability, topk_index, topk_label, topk_probability, and error:
why there is no result for a file, null where there is one. Bytes of a path that are not UTF-8 are written as \\xNN. A
folder of results belongs to one run at a time; a second is refused. On a cluster (--address) photographs must have the
same path on every node; weights and results stay with the driver. `pip install 'effkernels[serving]'` brings what it
needs.
"""

from __future__ import annotations

import argparse
import contextlib
import fcntl
import hashlib
import json
import os
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import torch

import effkernels
from effkernels.engine.images import find_images, read_image
from effkernels.engine.predict import read_labels
from effkernels.files import printable, printable_lines
from effkernels.models import load_checkpoint
from effkernels.models.preprocessing import Preprocessing

os.environ.setdefault("RAY_USAGE_STATS_ENABLED", "0")  # before the import: nothing is sent anywhere
try:
    import pyarrow as pa
    import pyarrow.parquet as pq
    import ray
except ImportError as missing:
    sys.exit(f"this example needs {missing.name}: pip install 'effkernels[serving]'")

# Of a task that decodes: PyTorch, and a large photograph. It also keeps Ray from running both steps in one process,
# which it does if they ask for the same resources: decoding would keep the engine waiting.
READER_BYTES = 2**29
SETTINGS = b"effkernels"  # the key of a part's metadata that says what its results were computed with


def read(batch: dict[str, np.ndarray], preprocessing: Preprocessing) -> dict[str, np.ndarray]:
    """Decode and preprocess: adds pixels, (N, 3, S, S) float32, and error, "" where the file is a photograph."""
    size = preprocessing.img_size
    pixels = np.zeros((len(batch["path"]), 3, size, size), np.float32)
    errors = []
    for index, path in enumerate(batch["path"]):
        try:
            pixels[index] = preprocessing(read_image(Path(os.fsdecode(path)))).numpy()
            errors.append("")
        except Exception as error:  # whatever is wrong with one file must not end the job
            errors.append(printable(error) or type(error).__name__)
    return {"path": batch["path"], "pixels": pixels, "error": np.array(errors, object)}


class Classifier:
    """An actor: one engine, which takes batches of photographs and returns their most probable classes."""

    def __init__(self, model: torch.nn.Module, dtype: str, batch_size: int, size: int, topk: int, threads: int) -> None:
        torch.set_num_threads(threads)
        self.topk = topk
        self.engine = effkernels.InferenceEngine(
            model,
            device="cuda" if torch.cuda.is_available() else "cpu",
            dtype=getattr(torch, dtype),
            batch_sizes=sorted({1, batch_size}),
            input_size=size,
        )

    def __call__(self, batch: dict[str, np.ndarray]) -> dict[str, np.ndarray]:
        errors = batch["error"].astype(object)
        good = np.flatnonzero(errors == "")
        logits = self.engine(torch.from_numpy(batch["pixels"][good])).float().cpu()
        for row in good[~torch.isfinite(logits).all(1).numpy()]:
            errors[row] = "the model's output is not finite"
        values, indices = torch.softmax(logits, 1).topk(self.topk)
        shape = (len(errors), self.topk)
        probability, index = np.zeros(shape, np.float32), np.zeros(shape, np.int32)
        probability[good], index[good] = values.numpy(), indices.numpy()
        return {"path": batch["path"], "index": index, "probability": probability, "error": errors}


def shown(path: bytes) -> str:
    """Return a path as the results have it, whose names need not be UTF-8."""
    return path.decode(errors="backslashreplace")


def to_table(batch: dict[str, np.ndarray], labels: list[str] | None, settings: bytes) -> pa.Table:
    """Return a part: the rows of the actors with labels, and null in place of the results of what failed."""
    failed = batch["error"] != ""
    index = [None if bad else row.tolist() for bad, row in zip(failed, batch["index"], strict=True)]
    probability = [None if bad else row.tolist() for bad, row in zip(failed, batch["probability"], strict=True)]
    label = [None if row is None or labels is None else [labels[number] for number in row] for row in index]
    columns = {
        "path": (pa.string(), [shown(path) for path in batch["path"]]),
        "class_index": (pa.int32(), [row and row[0] for row in index]),
        "label": (pa.string(), [row and row[0] for row in label]),
        "probability": (pa.float32(), [row and row[0] for row in probability]),
        "topk_index": (pa.list_(pa.int32()), index),
        "topk_label": (pa.list_(pa.string()), label),
        "topk_probability": (pa.list_(pa.float32()), probability),
        "error": (pa.string(), [text or None for text in batch["error"]]),
    }
    schema = pa.schema([(name, kind) for name, (kind, _) in columns.items()], {SETTINGS: settings})
    return pa.table({name: values for name, (_, values) in columns.items()}, schema)


def finished_paths(out: Path, settings: bytes) -> set[str]:
    """Return the paths in existing parts; refuse parts that were computed with other settings."""
    done: set[str] = set()
    for part in sorted(out.glob("part-*.parquet")):
        try:
            found = (pq.read_schema(part).metadata or {}).get(SETTINGS)
        except (pa.ArrowException, OSError) as error:
            sys.exit(f"--out {out}: {part.name} is no part of results: {error}; remove it")
        if found != settings:
            there = found.decode() if found else "unknown settings"
            sys.exit(f"--out {out}: {part.name} has results of {there}, this run is {settings.decode()}; give another")
        done.update(pq.read_table(part, columns=["path"])["path"].to_pylist())
    return done


@contextlib.contextmanager
def kept(out: Path) -> Iterator[None]:
    """Make the folder and keep it for this run alone; another run on this machine is refused meanwhile."""
    try:
        out.mkdir(parents=True, exist_ok=True)
        lock = os.open(out / "_lock", os.O_RDWR | os.O_CREAT | os.O_CLOEXEC | os.O_NOFOLLOW, 0o666)
    except OSError as error:
        sys.exit(f"--out {printable(out)}: {error.strerror}")
    try:
        fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        yield
    except BlockingIOError:
        sys.exit(f"--out {printable(out)}: another run is writing there; wait for its end, or give another folder")
    finally:
        os.close(lock)


def positive(text: str) -> int:
    """Return a count of the command line."""
    if (value := int(text)) < 1:
        raise argparse.ArgumentTypeError(f"{value}; at least 1 is needed")
    return value


def parse_arguments() -> argparse.Namespace:
    """Return the command line."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    add = parser.add_argument
    add("images", nargs="+", help="folders (searched in depth), files or patterns")
    add("--out", type=Path, required=True, metavar="FOLDER", help="for the Parquet parts; a second run resumes there")
    add("--model", default="efficientnet_b0", metavar="NAME", help="default: %(default)s")
    add("--weights", type=Path, metavar="FILE", help="checkpoint (.pth, .safetensors); default: random weights")
    add("--labels", type=Path, metavar="FILE", help="text file with one class label per line")
    add("--topk", type=positive, default=5, metavar="K", help="default: %(default)s")
    add("--img-size", type=positive, metavar="PIXELS", help="default: the model's own")
    add("--dtype", choices=("float32", "bfloat16", "float16"), default="float32", help="default: %(default)s")
    add("--batch-size", type=positive, default=64, metavar="N", help="default: %(default)s")
    add("--part-rows", type=positive, default=4096, metavar="N", help="rows of a part; default: %(default)s")
    add("--limit", type=positive, metavar="N", help="stop after N images that were not done before")
    add("--cpus", type=positive, metavar="N", help="of this machine for Ray; default: all")
    add("--address", help="of a Ray cluster ('auto': the running one); default: Ray on this machine alone")
    add("--actors", type=positive, metavar="N", help="engines; default: one per GPU, or one where there is none")
    add("--threads", type=positive, metavar="N", help="of an engine on CPUs; default: half of all over the engines")
    return parser.parse_args()


def main() -> None:
    """Classify what is not done yet."""
    options = parse_arguments()
    try:
        labels = None if options.labels is None else read_labels(options.labels)
        torch.manual_seed(0)  # random weights are the same in a resumed run
        model = effkernels.create_model(options.model)
        if options.weights is not None:
            model = load_checkpoint(options.model, options.weights)
    except (OSError, ValueError) as error:
        sys.exit(printable_lines(error))
    classes = model.config.num_classes
    if labels is not None and len(labels) != classes:
        sys.exit(f"--labels {options.labels}: {len(labels)} labels, and the model has {classes} classes")
    preprocessing, topk = Preprocessing.of(model.config, options.img_size), min(options.topk, classes)
    described = {"model": options.model, "img_size": preprocessing.img_size, "dtype": options.dtype, "topk": topk}
    for name, file in (("weights", options.weights), ("labels", options.labels)):
        described[name] = hashlib.sha256(file.read_bytes()).hexdigest()[:16] if file else None
    settings = json.dumps(described).encode()

    files, missing = find_images(options.images)
    for failure in missing:
        print(f"{printable(failure.file)}: {printable(failure.reason)}", file=sys.stderr)
    with kept(options.out):
        classify_missing(options, model, preprocessing, topk, labels, settings, files)


def classify_missing(
    options: argparse.Namespace,
    model: torch.nn.Module,
    preprocessing: Preprocessing,
    topk: int,
    labels: list[str] | None,
    settings: bytes,
    files: list[Path],
) -> None:
    """Classify the files that no part has yet, and write parts."""
    done = finished_paths(options.out, settings)
    paths = list(dict.fromkeys(os.fsencode(file.resolve()) for file in files))
    missing_paths = [path for path in paths if shown(path) not in done]
    todo = missing_paths[: options.limit]
    print(f"{len(paths)} images, {len(missing_paths)} to do, {len(todo)} now", file=sys.stderr)
    if not todo:
        sys.exit(0 if files else 1)

    if options.address is None:
        ray.init("local", num_cpus=options.cpus, include_dashboard=False)
    else:
        ray.init(options.address)
    cluster = ray.cluster_resources()
    gpus, cpus = int(cluster.get("GPU", 0)), int(cluster.get("CPU", 0))
    actors = options.actors or gpus or 1
    threads = options.threads or max(1, cpus // 2 // actors)
    if actors > gpus if gpus else actors * threads >= cpus:
        allowed = "at most an actor per GPU, or actors times threads below the CPUs, so that one is left to decode"
        sys.exit(f"--actors {actors} --threads {threads}: Ray has {gpus} GPUs and {cpus} CPUs; allowed: {allowed}")
    ray.data.DataContext.get_current().enable_progress_bars = False  # the line below says more
    rows = (
        ray.data.from_items([{"path": path} for path in todo], override_num_blocks=-(-len(todo) // options.batch_size))
        .map_batches(
            read,
            fn_kwargs={"preprocessing": preprocessing},
            batch_size=options.batch_size,
            memory=READER_BYTES,
        )
        .map_batches(
            Classifier,
            fn_constructor_args=(model, options.dtype, options.batch_size, preprocessing.img_size, topk, threads),
            batch_size=options.batch_size,
            compute=ray.data.ActorPoolStrategy(size=actors),
            **({"num_gpus": 1} if gpus else {"num_cpus": threads}),
        )
    )
    start, count, failed = time.monotonic(), 0, 0
    run = time.strftime("%Y%m%dT%H%M%S")
    for number, batch in enumerate(rows.iter_batches(batch_size=options.part_rows, batch_format="numpy")):
        part = options.out / f"part-{run}-{os.getpid()}-{number:05}.parquet"
        unfinished = options.out / "_unfinished"  # an underscore hides it from what reads a folder of Parquet
        try:
            pq.write_table(to_table(batch, labels, settings), unfinished)
            unfinished.replace(part)  # a part is complete from the moment it can be seen
        except OSError as error:
            sys.exit(f"--out {printable(options.out)}: {error}; the parts before stay, and another run goes on there")
        count, failed = count + len(batch["path"]), failed + int((batch["error"] != "").sum())
        rate = count / (time.monotonic() - start)
        print(f"{count} of {len(todo)} images, {failed} without result, {rate:.1f} images/s", file=sys.stderr)
    ray.shutdown()


if __name__ == "__main__":
    main()
