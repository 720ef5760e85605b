"""Contenders that other programs than PyTorch run: ONNX Runtime and OpenVINO on a CPU, TensorRT on a GPU.

All get the plain network. The int8 ones are quantized by ONNX Runtime after training: weights per channel, activations
by their range over a few of the case's own images. They compute something else than the network, by some per cent.
"""

from __future__ import annotations

import functools
import importlib
import importlib.util
import tempfile
import warnings
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch

from effkernels.bench.network_case import Contender, NetworkCase, ReadyContender
from effkernels.bench.plain import plain_network

_ONNX = ("onnx", "onnxscript")
# Batches by whose activations the ranges of int8 are set; inputs of the measurement are among them.
_CALIBRATION_BATCHES = 4


def _not_installed(*packages: str) -> str | None:
    missing = [package for package in packages if importlib.util.find_spec(package) is None]
    return f"not available: pip install {' '.join(missing)}" if missing else None


# ------------------------------------------------------------------------------------------------ as ONNX files


@functools.lru_cache(maxsize=1)
def _onnx_model(model: str, channels: int, img_size: int, batch: int, seed: int) -> tuple[bytes, str, tuple[str, ...]]:
    """Return the plain network as an ONNX file in memory, with static shapes, which both runtimes optimise best."""
    case = NetworkCase(model, img_size, batch, seed=seed, channels=channels)
    network, source, packages = plain_network(case)
    with torch.no_grad(), warnings.catch_warnings():
        warnings.simplefilter("ignore")  # the exporter's own deprecations, nothing that a reader could act on
        program = torch.onnx.export(network.eval(), (case.images(0),), dynamo=True, external_data=False, verbose=False)
    assert program is not None
    return program.model_proto.SerializeToString(), source, packages


def _exported(case: NetworkCase) -> tuple[bytes, str, tuple[str, ...]]:
    return _onnx_model(case.model, case.channels, case.img_size, case.batch, case.seed)


@functools.lru_cache(maxsize=1)
def _int8_model(case: NetworkCase) -> bytes:
    """Return the plain network as an ONNX file with int8 convolutions and products, in QDQ form."""
    quantization = importlib.import_module("onnxruntime.quantization")
    shape_inference = importlib.import_module("onnxruntime.quantization.shape_inference")
    onnxruntime = importlib.import_module("onnxruntime")
    content, _, _ = _exported(case)
    name = onnxruntime.InferenceSession(content, providers=["CPUExecutionProvider"]).get_inputs()[0].name

    class Batches:
        """The reader that the quantizer asks for batch after batch."""

        def __init__(self) -> None:
            self._left: Iterator[dict[str, Any]] = (
                {name: case.images(number).numpy()} for number in range(_CALIBRATION_BATCHES)
            )

        def get_next(self) -> dict[str, Any] | None:
            return next(self._left, None)

    with tempfile.TemporaryDirectory() as folder:
        plain, folded, quantized = (str(Path(folder) / f"{step}.onnx") for step in ("plain", "folded", "int8"))
        Path(plain).write_bytes(content)
        # Folds the norms into the convolutions, which the quantizer would leave apart.
        shape_inference.quant_pre_process(plain, folded, skip_symbolic_shape=True)
        quantization.quantize_static(
            folded,
            quantized,
            Batches(),
            quant_format=quantization.QuantFormat.QDQ,
            per_channel=True,
            activation_type=quantization.QuantType.QUInt8,
            weight_type=quantization.QuantType.QInt8,
        )
        return Path(quantized).read_bytes()


def _only_float32(case: NetworkCase, label: str) -> str | None:
    if case.numbers.name == "float32":
        return None
    return f"{label} takes float32 images and computes in int8 itself: --precision float32"


# ------------------------------------------------------------------------------------------------- ONNX Runtime


def _onnxruntime_missing(case: NetworkCase) -> str | None:
    if case.numbers.name != "float32":
        return f"ONNX Runtime's CPU kernels have no {case.numbers.name}"
    return _not_installed(*_ONNX, "onnxruntime")


def _onnxruntime_int8_missing(case: NetworkCase) -> str | None:
    return _only_float32(case, "onnxruntime-int8") or _not_installed(*_ONNX, "onnxruntime")


def _onnxruntime(case: NetworkCase, *, int8: bool = False) -> ReadyContender:
    onnxruntime = importlib.import_module("onnxruntime")
    content, source, packages = _exported(case)
    if int8:
        content = _int8_model(case)
    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = case.threads
    # Its threads otherwise spin for a while after a call and take the cores from whoever has the next turn.
    options.add_session_config_entry("session.force_spinning_stop", "1")
    session = onnxruntime.InferenceSession(content, options, providers=["CPUExecutionProvider"])
    name = session.get_inputs()[0].name
    return ReadyContender(
        f"onnxruntime{'-int8' if int8 else ''} ({source})",
        lambda images: images.numpy(),
        lambda images: session.run(None, {name: images}),
        ("onnxruntime", "onnx", *packages),
    )


# ----------------------------------------------------------------------------------------------------- OpenVINO


def _openvino_missing(case: NetworkCase) -> str | None:
    missing = _not_installed(*_ONNX, "openvino")
    if missing or case.numbers.name == "float32":
        return missing
    if case.numbers.name == "bfloat16":
        capabilities = importlib.import_module("openvino").Core().get_property("CPU", "OPTIMIZATION_CAPABILITIES")
        return None if "BF16" in capabilities else "OpenVINO has no bfloat16 on this processor"
    return f"the OpenVINO contender runs float32 and bfloat16, not {case.numbers.name}"


def _openvino_int8_missing(case: NetworkCase) -> str | None:
    # OpenVINO reads the file that ONNX Runtime quantized.
    missing = _only_float32(case, "openvino-int8") or _not_installed(*_ONNX, "onnxruntime", "openvino")
    if missing:
        return missing
    capabilities = importlib.import_module("openvino").Core().get_property("CPU", "OPTIMIZATION_CAPABILITIES")
    return None if "INT8" in capabilities else "OpenVINO has no int8 on this processor"


def _openvino(case: NetworkCase, *, int8: bool = False) -> ReadyContender:
    openvino = importlib.import_module("openvino")
    content, source, packages = _exported(case)
    if int8:
        content = _int8_model(case)
    core = openvino.Core()
    settings = {
        "INFERENCE_NUM_THREADS": case.threads,
        "PERFORMANCE_HINT": "LATENCY",
        # Left alone it takes bfloat16 wherever the processor has it, also for a float32 model.
        "INFERENCE_PRECISION_HINT": "f32" if case.numbers.name == "float32" else "bf16",
    }
    compiled = core.compile_model(core.read_model(content), "CPU", settings)
    return ReadyContender(
        f"openvino{'-int8' if int8 else ''} ({source})",
        lambda images: images.numpy(),
        lambda images: list(compiled([images], share_inputs=True).values()),
        ("openvino", "onnx", *packages),
    )


# ----------------------------------------------------------------------------------------------------- TensorRT


def _tensorrt_missing(case: NetworkCase) -> str | None:
    if case.numbers.autocast is not None:
        return f"the TensorRT contender runs one dtype, and {case.precision} is autocast"
    return _not_installed("torch_tensorrt")


def _tensorrt(case: NetworkCase) -> ReadyContender:
    tensorrt = importlib.import_module("torch_tensorrt")
    network, source, packages = plain_network(case)
    network = network.to(case.torch_device, case.numbers.dtype).eval()

    def convert(images: torch.Tensor) -> torch.Tensor:
        return images.to(case.torch_device, case.numbers.dtype)

    images = convert(case.images(0))
    with torch.no_grad():
        program = torch.export.export(network, (images,))
        # The dtypes of the network, which is what the other contenders compute in; else it chooses them.
        engine = tensorrt.dynamo.compile(program, inputs=[images], use_explicit_typing=True)
    return ReadyContender(f"tensorrt ({source})", convert, engine, ("torch_tensorrt", "tensorrt", *packages), True)


RUNTIMES: tuple[Contender, ...] = (
    Contender(
        "onnxruntime", "ONNX Runtime", ("cpu",), _onnxruntime_missing, _onnxruntime, (*_ONNX, "onnxruntime"),
    ),
    Contender(
        "onnxruntime-int8", "ONNX Runtime, quantized to int8", ("cpu",), _onnxruntime_int8_missing,
        functools.partial(_onnxruntime, int8=True), (*_ONNX, "onnxruntime"), lossy=True,
    ),
    Contender("openvino", "OpenVINO", ("cpu",), _openvino_missing, _openvino, (*_ONNX, "openvino")),
    Contender(
        "openvino-int8", "OpenVINO, quantized to int8", ("cpu",), _openvino_int8_missing,
        functools.partial(_openvino, int8=True), (*_ONNX, "onnxruntime", "openvino"), lossy=True,
    ),
    Contender("tensorrt", "TensorRT by torch_tensorrt", ("cuda",), _tensorrt_missing, _tensorrt, ("torch_tensorrt",)),
)  # fmt: skip
