"""The examples as their users run them: real processes, real photographs, against `effkernels.predict`."""

from __future__ import annotations

import argparse
import asyncio
import importlib.util
import json
import os
import shutil
import signal
import socket
import struct
import subprocess
import sys
import tempfile
import time
import urllib.error
import urllib.request
import zlib
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from http.client import HTTPConnection
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
import torch

import effkernels
from effkernels.engine.images import example_image, read_image
from effkernels.engine.predict import Prediction, classify
from effkernels.models import load_checkpoint
from effkernels.models.preprocessing import Preprocessing
from effkernels.ops.parity import errors, limits

# Only looked for: to import them takes seconds, and every process of a test run reads this file.
MISSING = [name for name in ("ray", "litserve", "pyarrow") if importlib.util.find_spec(name) is None]
pytestmark = pytest.mark.skipif(bool(MISSING), reason=f"needs {', '.join(MISSING)}: pip install 'effkernels[serving]'")

EXAMPLES = Path(__file__).parents[1] / "examples"
PHOTOGRAPHS = ("astronaut.png", "camera.png", "chelsea.png", "coffee.png", "hubble_deep_field.jpg", "rocket.jpg")
SIZE, CLASSES = 64, 10
# Against hangs alone: alone on a machine, what they wait for takes seconds.
PATIENCE_S = 240


@dataclass(frozen=True)
class Photographs:
    """A model, photographs, and what comes out.

    Attributes:
        folder: the photographs, one of them below a subfolder, and two files that are none.
        broken: those two.
        weights, labels: files for the command line.
        probabilities: by the name of a photograph, those of all classes, (CLASSES,), by `effkernels.predict`.
    """

    folder: Path
    broken: tuple[Path, Path]
    weights: Path
    labels: Path
    probabilities: dict[str, torch.Tensor]
    plain: torch.Tensor
    truth: torch.Tensor

    def path(self, name: str) -> Path:
        """Return the path of a photograph."""
        return next(self.folder.rglob(name))

    def check(self, found: dict[str, torch.Tensor]) -> None:
        """Probabilities by name: the best class is `effkernels.predict`'s, and all are right by the tolerance rule."""
        assert list(found) == list(self.probabilities)
        for name, probabilities in found.items():
            assert int(probabilities.argmax()) == int(self.probabilities[name].argmax()), name
        error, limit = errors(torch.stack(list(found.values())), self.truth), limits(self.plain, self.truth)
        assert error.l2 <= limit.l2
        assert error.largest <= limit.largest


@pytest.fixture(scope="module")
def case(tmp_path_factory: pytest.TempPathFactory) -> Photographs:
    home = tmp_path_factory.mktemp("case")
    folder = home / "photographs"
    (folder / "below").mkdir(parents=True)
    for name in PHOTOGRAPHS:
        place = folder / "below" if name == "rocket.jpg" else folder
        (place / name).write_bytes((example_image().parent / name).read_bytes())
    broken = (folder / "broken.jpg", folder / "text.png")
    broken[0].write_bytes((folder / "hubble_deep_field.jpg").read_bytes()[:20000])
    broken[1].write_text("no photograph")

    # Random weights alone would give every photograph nearly the same answer: norms that fit the photographs and a
    # steeper classifier give different answers.
    torch.manual_seed(5)
    files = [next(folder.rglob(name)) for name in PHOTOGRAPHS]
    model = effkernels.create_model("efficientnet_b0", num_classes=CLASSES)
    preprocessing = Preprocessing.of(model.config, SIZE)
    inputs = torch.stack([preprocessing(read_image(file)) for file in files])
    for module in model.modules():
        if isinstance(module, torch.nn.BatchNorm2d):
            module.momentum = None  # the statistics of this batch
    with torch.no_grad():
        model(inputs)
        logits = model.eval()(inputs)
        model.classifier.weight *= 2 / logits.std()
    weights, labels = home / "weights.pth", home / "labels.txt"
    torch.save(model.state_dict(), weights)
    labels.write_text("".join(f"kind {index}\n" for index in range(CLASSES)))

    model = load_checkpoint("efficientnet_b0", weights).eval()
    probabilities = {}
    for prediction in classify(model, files, preprocessing=preprocessing, topk=CLASSES):
        assert isinstance(prediction, Prediction)
        scores = sorted(prediction.scores, key=lambda score: score.index)
        probabilities[Path(prediction.file).name] = torch.tensor([score.probability for score in scores])
    with torch.inference_mode(), effkernels.backend("reference"):
        plain = torch.softmax(model(inputs), 1)
        truth = torch.softmax(model.double()(inputs.double()), 1)
    # An answer to another photograph would be noticed.
    assert torch.pdist(truth).min() > 100 * limits(plain, truth).l2 * torch.linalg.vector_norm(truth)
    return Photographs(folder, broken, weights, labels, probabilities, plain, truth)


@pytest.fixture(scope="module")
def environment(tmp_path_factory: pytest.TempPathFactory) -> Iterator[dict[str, str]]:
    """For the processes: no GPU, one thread, nothing written to the user's home."""
    with tempfile.TemporaryDirectory(prefix="ray", dir="/tmp") as short:  # for sockets, whose paths must be short
        yield {
            **os.environ,
            "HOME": str(tmp_path_factory.mktemp("home")),
            "RAY_TMPDIR": short,
            "CUDA_VISIBLE_DEVICES": "",
            "OMP_NUM_THREADS": "1",
        }


def loaded(name: str) -> ModuleType:
    """Return an example as a module."""
    spec = importlib.util.spec_from_file_location(name, EXAMPLES / f"{name}.py")
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def wait_until(condition: Callable[[], bool], what: str, interval_s: float = 0.02) -> None:
    until = time.monotonic() + PATIENCE_S
    while not condition():
        assert time.monotonic() < until, f"{what}: not within {PATIENCE_S} s"
        time.sleep(interval_s)


def processes_of(marker: str) -> list[int]:
    """Processes with `marker` in their environment, without this one."""
    found = []
    for entry in Path("/proc").iterdir():
        if entry.name.isdigit() and int(entry.name) != os.getpid():
            try:
                if marker.encode() in (entry / "environ").read_bytes():
                    found.append(int(entry.name))
            except OSError:
                continue  # it has ended, or it is another user's
    return found


def end_all(marker: str) -> None:
    for pid in processes_of(marker):
        try:
            os.kill(pid, signal.SIGKILL)
        except ProcessLookupError:
            continue


# --------------------------------------------------------------------------------------------------------- Ray Data


def ray_arguments(case: Photographs, folder: Path, out: Path) -> list[str]:
    files = ["--weights", str(case.weights), "--labels", str(case.labels), "--out", str(out)]
    sizes = ["--img-size", str(SIZE), "--topk", str(CLASSES), "--batch-size", "4", "--part-rows", "4", "--cpus", "2"]
    return [str(folder), *files, *sizes]


def rows_of(parts: list[Path]) -> list[dict[str, Any]]:
    import pyarrow.parquet as pq

    return [row for part in parts for row in pq.read_table(part).to_pylist()]


@pytest.mark.slow
@pytest.mark.thorough  # two clusters of Ray; what is done again and what is not, the tests below show in one process
def test_ray_batch_inference_resumes_where_it_was_killed(
    case: Photographs, environment: dict[str, str], tmp_path: Path
) -> None:
    folder, out = tmp_path / "many", tmp_path / "out"
    for copy in range(8):
        (folder / str(copy)).mkdir(parents=True)
        for name in PHOTOGRAPHS:
            os.link(case.path(name), folder / str(copy) / name)
    for file in case.broken:
        os.link(file, folder / file.name)
    images = {str(file) for file in folder.rglob("*") if file.is_file()}
    marker = f"TESTED_BY={tmp_path}"
    command = [sys.executable, str(EXAMPLES / "ray_batch_inference.py"), *ray_arguments(case, folder, out)]
    environment = {**environment, "TESTED_BY": str(tmp_path)}
    try:
        with (tmp_path / "first.log").open("wb") as log:
            first = subprocess.Popen(command, env=environment, stdout=log, stderr=log)

            def has_part() -> bool:
                assert first.poll() is None, (tmp_path / "first.log").read_text()
                return any(out.glob("part-*.parquet"))

            wait_until(has_part, "the first part")
            first.kill()
            first.wait()
        kept = {part: part.read_bytes() for part in out.glob("part-*.parquet")}
        done = {row["path"] for row in rows_of(list(kept))}
        assert 0 < len(done) < len(images)
        # Ray's own processes end with their driver.
        wait_until(lambda: not processes_of(marker), "the end of Ray")

        second = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=PATIENCE_S)
        assert second.returncode == 0, second.stderr
        assert f"{len(images)} images, {len(images) - len(done)} to do" in second.stderr
        assert f"{len(images) - len(done)} of {len(images) - len(done)} images" in second.stderr
    finally:
        end_all(marker)

    assert {part: part.read_bytes() for part in kept} == kept
    rows = rows_of(sorted(out.glob("part-*.parquet")))
    assert sorted(row["path"] for row in rows) == sorted(images)
    failed = {Path(row["path"]).name: row for row in rows if row["error"] is not None}
    assert set(failed) == {file.name for file in case.broken}
    for row in failed.values():
        assert row["class_index"] is row["label"] is row["probability"] is row["topk_index"] is None
    assert "truncated" in failed["broken.jpg"]["error"]
    for copy in range(8):
        by_name = {Path(row["path"]).name: row for row in rows if Path(row["path"]).parent.name == str(copy)}
        found = {}
        for name in PHOTOGRAPHS:
            row = by_name[name]
            assert row["class_index"] == row["topk_index"][0]
            assert row["probability"] == row["topk_probability"][0] == max(row["topk_probability"])
            assert row["label"] == f"kind {row['class_index']}"
            assert row["topk_label"] == [f"kind {index}" for index in row["topk_index"]]
            found[name] = torch.zeros(CLASSES)
            found[name][row["topk_index"]] = torch.tensor(row["topk_probability"])
        case.check(found)


class Started(Exception):
    """Ray would start now."""


@pytest.fixture
def ray_example(monkeypatch: pytest.MonkeyPatch) -> Callable[..., None]:
    """Runs the example in this process up to the start of Ray."""
    module = loaded("ray_batch_inference")

    def start(*_: object, **__: object) -> None:
        raise Started

    def run(*arguments: str) -> None:
        monkeypatch.setattr(sys, "argv", ["ray_batch_inference.py", *arguments])
        module.main()

    monkeypatch.setattr(module.ray, "init", start)
    return run


def write_part(case: Photographs, out: Path, paths: list[Path], settings: bytes) -> None:
    import numpy as np
    import pyarrow.parquet as pq

    results = {"index": np.zeros((len(paths), 1), int), "probability": np.ones((len(paths), 1))}
    batch = {
        "path": np.array([os.fsencode(path) for path in paths], object),
        "error": np.array([""] * len(paths)),
        **results,
    }
    out.mkdir(exist_ok=True)
    pq.write_table(loaded("ray_batch_inference").to_table(batch, None, settings), out / "part-1.parquet")


def settings_of(message: str) -> bytes:
    """Return the settings of this run, as in the refusal of another run's parts."""
    return message.partition("this run is ")[2].partition("; ")[0].encode()


def test_ray_batch_inference_does_what_is_missing_and_no_more(
    case: Photographs,
    ray_example: Callable[..., None],
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
) -> None:
    out = tmp_path / "out"
    arguments = ray_arguments(case, case.folder, out)
    with pytest.raises(Started):
        ray_example(*arguments, "--limit", "3")
    assert "8 images, 8 to do, 3 now" in capsys.readouterr().err

    done = [case.path("coffee.png"), case.broken[0]]
    write_part(case, out, done, b"{}")
    with pytest.raises(SystemExit, match=r"part-1\.parquet has results of \{\}, this run is") as other:
        ray_example(*arguments)

    write_part(case, out, done, settings_of(str(other.value)))
    (out / "_unfinished").write_bytes(b"of a run that was killed")
    with pytest.raises(Started):
        ray_example(*arguments)
    assert "8 images, 6 to do, 6 now" in capsys.readouterr().err

    write_part(case, out, [file for file in case.folder.rglob("*") if file.is_file()], settings_of(str(other.value)))
    with pytest.raises(SystemExit) as finished:
        ray_example(*arguments)
    assert finished.value.code == 0
    assert "8 images, 0 to do, 0 now" in capsys.readouterr().err

    # Another question to the same model is another result.
    with pytest.raises(SystemExit, match="give another"):
        ray_example(*arguments, "--dtype", "bfloat16")


def test_ray_batch_inference_reads_names_that_are_not_utf_8(case: Photographs, tmp_path: Path) -> None:
    """Such a name goes through the rows as bytes, and into the results as text."""
    import numpy as np

    module = loaded("ray_batch_inference")
    file = tmp_path / os.fsdecode(b"caf\xe9 \x1b[2J.png")
    shutil.copy(case.path("coffee.png"), file)
    batch = {"path": np.array([os.fsencode(file), os.fsencode(file) + b"?"], object)}
    read = module.read(batch, Preprocessing(SIZE))
    assert [bool(error) for error in read["error"]] == [False, True]
    assert read["error"][1].isprintable()
    results = {"index": np.zeros((2, 1), int), "probability": np.ones((2, 1))}
    table = module.to_table({"path": batch["path"], "error": read["error"], **results}, None, b"{}")
    assert table["path"].to_pylist()[0] == f"{tmp_path}/caf\\xe9 \x1b[2J.png"


def test_ray_batch_inference_keeps_its_folder_to_itself(
    case: Photographs, ray_example: Callable[..., None], tmp_path: Path
) -> None:
    out = tmp_path / "out"
    with loaded("ray_batch_inference").kept(out), pytest.raises(SystemExit, match="another run is writing there"):
        ray_example(*ray_arguments(case, case.folder, out))
    with pytest.raises(Started):
        ray_example(*ray_arguments(case, case.folder, out))
    (out / "part-1.parquet").write_bytes(b"torn")
    with pytest.raises(SystemExit, match=r"part-1\.parquet is no part of results: .*; remove it"):
        ray_example(*ray_arguments(case, case.folder, out))


def test_ray_batch_inference_names_what_is_wrong(
    case: Photographs, ray_example: Callable[..., None], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    arguments = ray_arguments(case, case.folder, tmp_path / "out")
    with pytest.raises(SystemExit, match=r"nowhere\.pth"):
        ray_example(*arguments, "--weights", str(tmp_path / "nowhere.pth"))
    few = tmp_path / "few.txt"
    few.write_text("one\ntwo\n")
    with pytest.raises(SystemExit, match=f"2 labels, and the model has {CLASSES} classes"):
        ray_example(*arguments, "--labels", str(few))
    with pytest.raises(SystemExit, match="2"):
        ray_example(*arguments, "--batch-size", "0")
    assert "--batch-size: 0; at least 1 is needed" in capsys.readouterr().err
    with pytest.raises(SystemExit) as nothing:
        ray_example(*ray_arguments(case, tmp_path / "nowhere", tmp_path / "out"))
    assert nothing.value.code == 1
    assert "nowhere: no such file or folder" in capsys.readouterr().err


# --------------------------------------------------------------------------------------------------------- LitServe


@dataclass(frozen=True)
class Server:
    """A server under test: its process, where it listens, what it printed, and how its processes are recognised."""

    process: subprocess.Popen[bytes]
    port: int
    log: Path
    marker: str

    def post(self, content: bytes, field: str = "image") -> tuple[int, dict[str, Any]]:
        """Status and answer of a request with a file."""
        kind, body = multipart(content, field)
        request = urllib.request.Request(f"http://127.0.0.1:{self.port}/predict", body, {"Content-Type": kind})
        try:
            with urllib.request.urlopen(request, timeout=PATIENCE_S) as answer:
                return answer.status, json.loads(answer.read())
        except urllib.error.HTTPError as error:
            return error.code, json.loads(error.read())


def multipart(content: bytes, field: str) -> tuple[str, bytes]:
    """Content type and body of a form with one file."""
    boundary = "effkernels-test-boundary"
    head = f'--{boundary}\r\nContent-Disposition: form-data; name="{field}"; filename="file"\r\n\r\n'
    return f"multipart/form-data; boundary={boundary}", head.encode() + content + f"\r\n--{boundary}--\r\n".encode()


def probabilities_of(answer: dict[str, Any]) -> torch.Tensor:
    """Return all classes of an answer, (CLASSES,); checks that they are in order and labelled."""
    predictions = answer["predictions"]
    values = [prediction["probability"] for prediction in predictions]
    assert values == sorted(values, reverse=True)
    assert all(prediction["label"] == f"kind {prediction['class']}" for prediction in predictions)
    found = torch.zeros(CLASSES)
    found[[prediction["class"] for prediction in predictions]] = torch.tensor(values)
    return found


@pytest.fixture(scope="module")
def server(
    case: Photographs, environment: dict[str, str], tmp_path_factory: pytest.TempPathFactory
) -> Iterator[Server]:
    home = tmp_path_factory.mktemp("server")
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    command = [sys.executable, str(EXAMPLES / "serve_litserve.py"), "--port", str(port), "--accelerator", "cpu"]
    command += ["--weights", str(case.weights), "--labels", str(case.labels), "--topk", str(CLASSES)]
    # A batch that is not full waits for seconds: the last test ends the server meanwhile.
    command += ["--img-size", str(SIZE), "--batch-sizes", "1", "4", "--max-latency-ms", "3000", "--max-megabytes", "2"]
    log = home / "log"
    marker = f"TESTED_BY={home}"
    with log.open("wb") as output:
        process = subprocess.Popen(
            command, env={**environment, "TESTED_BY": str(home)}, cwd=home, stdout=output, stderr=output
        )

        def healthy() -> bool:
            assert process.poll() is None, log.read_text()
            try:
                with urllib.request.urlopen(f"http://127.0.0.1:{port}/health", timeout=10) as answer:
                    return bool(answer.status == 200)
            except (urllib.error.URLError, ConnectionError, TimeoutError):
                return False

        try:
            wait_until(healthy, "GET /health", 0.2)
            yield Server(process, port, log, marker)
        finally:
            end_all(marker)
            process.wait()


@pytest.mark.slow
@pytest.mark.xdist_group("litserve")
def test_litserve_gives_every_photograph_its_own_answer(case: Photographs, server: Server) -> None:
    # Bad ones among them, which must not spoil the batches.
    names = [*PHOTOGRAPHS, *(file.name for file in case.broken)] * 4
    with ThreadPoolExecutor(len(names)) as pool:
        answers = list(pool.map(lambda name: server.post(case.path(name).read_bytes()), names))
    found = [
        {name: probabilities_of(answer) for name, (_, answer) in zip(PHOTOGRAPHS, part, strict=False)}
        for part in (answers[at : at + len(PHOTOGRAPHS) + 2] for at in range(0, len(answers), len(PHOTOGRAPHS) + 2))
    ]
    for probabilities in found:
        case.check(probabilities)
    for name, (status, answer) in zip(names, answers, strict=True):
        good = name in PHOTOGRAPHS
        assert status == (200 if good else 400), answer
        if not good:
            assert answer["detail"].startswith("image: ")


@pytest.mark.slow
@pytest.mark.xdist_group("litserve")
def test_litserve_refuses_what_is_no_photograph(case: Photographs, server: Server) -> None:
    status, answer = server.post(case.broken[0].read_bytes())
    assert (status, "truncated" in answer["detail"]) == (400, True)
    assert server.post(case.broken[1].read_bytes()) == (
        400,
        {
            "detail": f"image: {case.broken[1].stat().st_size} bytes: not an image file; known formats are AVIF, BMP, "
            "GIF, JPEG, PNG, TIFF, WEBP"
        },
    )
    postscript = b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 4 5\n%%EndComments\nshowpage\n"
    status, answer = server.post(postscript)
    assert (status, "not an image file" in answer["detail"]) == (400, True)
    assert server.post(b"")[0] == 400
    assert server.post(case.path("rocket.jpg").read_bytes(), field="picture")[0] == 422
    assert server.post(bytes(3 * 2**20))[0] == 413


@pytest.mark.slow
@pytest.mark.xdist_group("litserve")
def test_litserve_answers_what_it_took_before_sigterm_ends_it(case: Photographs, server: Server) -> None:
    kind, body = multipart(case.path("coffee.png").read_bytes(), "image")
    connection = HTTPConnection("127.0.0.1", server.port, timeout=PATIENCE_S)
    connection.putrequest("POST", "/predict")
    headers = {"Content-Type": kind, "Content-Length": str(len(body)), "Expect": "100-continue"}
    for name, value in headers.items():
        connection.putheader(name, value)
    connection.endheaders()
    # The server asks for the body: from here on the request is one that it took.
    assert connection.sock.recv(100).startswith(b"HTTP/1.1 100")
    connection.send(body)
    # Nobody accepts for a while: these connections wait in the queue of the system when the signal comes.
    children = [pid for pid in processes_of(server.marker) if pid != server.process.pid]
    for pid in children:
        os.kill(pid, signal.SIGSTOP)
    waiting = [HTTPConnection("127.0.0.1", server.port, timeout=PATIENCE_S) for _ in range(3)]
    for one in waiting:
        one.request("POST", "/predict", body, {"Content-Type": kind})
    server.process.send_signal(signal.SIGTERM)
    time.sleep(1)  # a server that passes the signal on at once would find it and the connections together
    for pid in children:
        os.kill(pid, signal.SIGCONT)
    assert [one.getresponse().status for one in waiting] == [200, 200, 200]
    answer = connection.getresponse()
    assert answer.status == 200
    probabilities = probabilities_of(json.loads(answer.read()))
    assert int(probabilities.argmax()) == int(case.probabilities["coffee.png"].argmax())
    connection.close()
    assert server.process.wait(PATIENCE_S) == 0
    wait_until(lambda: not processes_of(server.marker), "the end of every process")
    assert "Traceback" not in server.log.read_text()
    assert [file.name for file in server.log.parent.iterdir()] == ["log"]  # LitServe likes to write a client there


def a_bomb() -> bytes:
    """Return a PNG of 12 kB with 100 million pixels, one bit each."""
    rows = zlib.compressobj(9)
    content = b"".join([*(rows.compress(bytes(1251 * 1000)) for _ in range(10)), rows.flush()])
    chunks = ((b"IHDR", struct.pack(">IIBBBBB", 10_000, 10_000, 1, 0, 0, 0, 0)), (b"IDAT", content), (b"IEND", b""))
    return b"\x89PNG\r\n\x1a\n" + b"".join(
        struct.pack(">I", len(data)) + name + data + struct.pack(">I", zlib.crc32(name + data)) for name, data in chunks
    )


def test_litserve_says_503_when_the_queue_is_full(case: Photographs) -> None:
    module = loaded("serve_litserve")
    options = argparse.Namespace(
        model="efficientnet_b0",
        weights=case.weights,
        img_size=SIZE,
        topk=2,
        dtype="float32",
        threads=None,
        batch_sizes=[4],
        max_latency_ms=60_000.0,
        max_queue=1,
        max_megapixels=1,
        decoders=1,
    )
    api = module.Classifier(options, None)
    api.setup("cpu")

    async def ask() -> tuple[Any, Any]:
        image = await api.decode_request(case.path("coffee.png").read_bytes())
        first = asyncio.create_task(api.predict(image))
        await asyncio.sleep(0)  # it waits in the queue now
        with pytest.raises(module.HTTPException) as refused:
            await api.predict(image)
        await asyncio.to_thread(api.engine.close)  # answers what waits
        return refused.value, await api.encode_response(await first)

    with pytest.raises(module.HTTPException) as large:
        api.decode(a_bomb())
    assert large.value.status_code == 400
    assert "10000 x 10000 pixels are 100000000; allowed: 1000000" in large.value.detail

    refused, answer = asyncio.run(ask())
    assert refused.status_code == 503
    assert "max_queue=1" in refused.detail
    best = case.probabilities["coffee.png"].topk(2).indices.tolist()
    assert [prediction["class"] for prediction in answer["predictions"]] == best
    assert all(prediction["label"] is None for prediction in answer["predictions"])
