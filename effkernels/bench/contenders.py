"""Whole networks in every form worth comparing, all with the same small interface.

All of them get the same weights. "The plain network" is the architecture out of ordinary PyTorch modules. For one of
this package's networks it is timm's where timm is installed, otherwise this package's with every operator on the
reference backend, with the weights of ``check.sample_model``; for any other model it is that model, with the weights of
``samples.sample_foreign``. The label names which one ran.
"""

from __future__ import annotations

import contextlib
import copy
import functools
import importlib
import importlib.util
import os
import shutil
import warnings
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_leaves

import effkernels
from effkernels import _library
from effkernels.bench.check import sample_model
from effkernels.bench.network_case import Contender, NetworkCase, ReadyContender
from effkernels.bench.samples import sample_foreign
from effkernels.models import peers
from effkernels.models.layouts import TIMM, TORCHVISION, translation
from effkernels.models.sources import unwrapped
from effkernels.ops import backends

__all__ = ["CONTENDERS", "Contender", "NetworkCase", "ReadyContender", "plain_network", "to_tensor"]


# ------------------------------------------------------------------------------------------- PyTorch modules


def _layout(channels_last: bool) -> torch.memory_format:
    return torch.channels_last if channels_last else torch.contiguous_format


def _ready_module(
    label: str,
    case: NetworkCase,
    module: nn.Module,
    *,
    channels_last: bool,
    packages: tuple[str, ...] = (),
    compiles: bool = False,
    transform: Callable[[nn.Module], Callable[[Tensor], Tensor]] = lambda module: module,
) -> ReadyContender:
    """Return a contender that calls a module with the case's device, dtype and autocast, and the given layout."""
    module = module.to(case.torch_device, case.numbers.dtype, memory_format=_layout(channels_last))  # type: ignore[call-overload]
    call = transform(module)
    autocast = case.numbers.autocast

    def convert(images: Tensor) -> Tensor:
        return images.to(case.torch_device, case.numbers.dtype).to(memory_format=_layout(channels_last))

    def run(images: Tensor) -> Tensor:
        return call(images)

    def run_autocast(images: Tensor) -> Tensor:
        with torch.autocast(case.torch_device.type, dtype=autocast):
            return call(images)

    return ReadyContender(
        label, convert, run if autocast is None else run_autocast, packages, compiles,
        module if call is module else None,
    )  # fmt: skip


class _OnReference(nn.Module):
    """A model of this package with every operator in plain PyTorch, whatever the backend in force."""

    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        self.model = model

    def forward(self, images: Tensor) -> Tensor:
        with effkernels.backend("reference"):
            return self.model(images)  # type: ignore[no-any-return]


def _timm_model(case: NetworkCase) -> nn.Module:
    model: nn.Module = peers.import_timm().create_model(case.model).eval()
    model.load_state_dict(sample_model(case.model, case.seed).state_dict())
    return model


def _timm_missing(case: NetworkCase) -> str | None:
    try:
        timm = peers.import_timm()
    except ImportError as error:
        return f"not available: {error}"
    return None if timm.is_model(case.model) else f"timm {timm.__version__} has no model {case.model}"


def plain_network(case: NetworkCase) -> tuple[nn.Module, str, tuple[str, ...]]:
    """Return the plain network with the case's weights, the name of its source, and the packages it comes from."""
    source = case.source
    if not source.is_own:
        model = sample_foreign(case.model, case.channels, case.img_size, case.seed)
        return copy.deepcopy(model), source.library, source.packages
    if _timm_missing(case) is None:
        return _timm_model(case), "timm", ("timm",)
    return _OnReference(copy.deepcopy(sample_model(case.model, case.seed))), "reference", ()


def _effkernels_backend(case: NetworkCase) -> str:
    """Return the backend that runs a block's depthwise convolution in this case, as that of the model."""
    x = torch.empty(1, 32, 8, 8, dtype=case.numbers.computes_in, device=case.torch_device)
    weight = torch.empty(32, 1, 3, 3, dtype=x.dtype, device=x.device)
    return backends.choose("depthwise_bn_act_gate", x, weight, activation="silu")


def _kernels_missing(case: NetworkCase) -> str | None:
    if _effkernels_backend(case) == "reference":
        reason = _library.load_error() or "no kernel takes this device and dtype (see: effkernels info)"
        return f"not available: {reason}"
    return None


def _effkernels_missing(case: NetworkCase) -> str | None:
    if not case.source.is_own:
        return f"runs this package's own networks; optimized and engine run {case.model}"
    return _kernels_missing(case)


def _effkernels(case: NetworkCase) -> ReadyContender:
    model = copy.deepcopy(sample_model(case.model, case.seed))
    return _ready_module(f"effkernels-{_effkernels_backend(case)}", case, model, channels_last=case.channels_last)


def _optimized_missing(case: NetworkCase) -> str | None:
    return _kernels_missing(case) or (_timm_missing(case) if case.source.is_own else None)


def _optimized(case: NetworkCase) -> ReadyContender:
    model, source, packages = plain_network(case)
    model = unwrapped(model).to(case.torch_device, case.numbers.dtype)
    # Of another library's model a part may well stay as it is.
    effkernels.optimize_(model, strict=case.source.is_own, input_size=case.input_size)
    return _ready_module(f"optimized ({source})", case, model, channels_last=case.channels_last, packages=packages)


def _engine_missing(case: NetworkCase) -> str | None:
    if case.numbers.autocast is not None:
        return f"an engine has one dtype, and {case.precision} is autocast"
    return _optimized_missing(case)


def _engine(case: NetworkCase) -> ReadyContender:
    """As a user has it: what goes in is copied, what comes out is the caller's."""
    model, source, packages = plain_network(case)
    engine = effkernels.InferenceEngine(
        unwrapped(model), dtype=case.numbers.dtype, device=case.torch_device, batch_sizes=(case.batch,),
        input_size=case.input_size,
    )  # fmt: skip
    (bucket,) = engine.report.buckets

    def convert(images: Tensor) -> Tensor:
        return images.to(case.torch_device, case.numbers.dtype).to(memory_format=_layout(case.channels_last))

    return ReadyContender(f"engine, {bucket.runner} ({source})", convert, engine.run, packages)


def _eager(case: NetworkCase, channels_last: bool) -> ReadyContender:
    model, source, packages = plain_network(case)
    name = "eager-channels-last" if channels_last else "eager"
    return _ready_module(f"{name} ({source})", case, model, channels_last=channels_last, packages=packages)


def _as_it_comes_missing(library: str, own: Callable[[NetworkCase], str | None], case: NetworkCase) -> str | None:
    """Return why a library's unchanged model cannot run: ``own`` for one of this package's networks."""
    if case.source.is_own:
        return own(case)
    return None if case.source.library == library else f"{case.model} is not one of {library}'s models"


def _foreign(case: NetworkCase) -> ReadyContender:
    model, source, packages = plain_network(case)
    return _ready_module(source, case, model, channels_last=case.channels_last, packages=packages)


def _timm(case: NetworkCase) -> ReadyContender:
    if not case.source.is_own:
        return _foreign(case)
    return _ready_module("timm", case, _timm_model(case), channels_last=case.channels_last, packages=("timm",))


def _torchvision_missing(case: NetworkCase) -> str | None:
    try:
        torchvision = peers.import_torchvision()
    except ImportError as error:
        return f"not available: {error}"
    if case.model.startswith("tf_"):
        return f"torchvision has no model with the SAME padding of {case.model}"
    if case.model not in importlib.import_module("torchvision.models").list_models():
        return f"torchvision {torchvision.__version__} has no model {case.model}"
    return None


def _torchvision(case: NetworkCase) -> ReadyContender:
    if not case.source.is_own:
        return _foreign(case)
    peers.import_torchvision()
    source = sample_model(case.model, case.seed)
    names = translation(TIMM, TORCHVISION, source.architecture)
    model: nn.Module = importlib.import_module("torchvision.models").get_model(case.model).eval()
    state = {}
    for key, value in source.state_dict().items():
        owner, _, leaf = key.rpartition(".")
        state[f"{names[owner]}.{leaf}"] = value
    model.load_state_dict(state)
    for module in model.modules():
        if isinstance(module, nn.BatchNorm2d):
            module.eps = source.bn1.eps  # B5 to B7 have another one there
    return _ready_module("torchvision", case, model, channels_last=case.channels_last, packages=("torchvision",))


# --------------------------------------------------------------------------------------------- torch.compile


def _compiler_missing(case: NetworkCase) -> str | None:
    if case.torch_device.type == "cuda":
        return None if importlib.util.find_spec("triton") else "not available: pip install triton"
    compiler = os.environ.get("CXX") or "g++"
    return None if shutil.which(compiler) or shutil.which("clang++") else f"not available: no C++ compiler ({compiler})"


def _compiled(case: NetworkCase, name: str, mode: str | None, graph: bool = False) -> ReadyContender:
    model, source, packages = plain_network(case)

    def transform(module: nn.Module) -> Callable[[Tensor], Tensor]:
        compiled: Callable[[Tensor], Tensor] = torch.compile(module, mode=mode, dynamic=False)
        inductor_config = importlib.import_module("torch._inductor.config")
        # Freezing folds the norms into the weights and prepacks them. It is read while the first call compiles,
        # so the setting is taken back after that and meets no other contender.
        images = case.images(0).to(case.torch_device, case.numbers.dtype).to(memory_format=torch.channels_last)
        autocast: contextlib.AbstractContextManager[Any] = contextlib.nullcontext()
        if case.numbers.autocast is not None:
            autocast = torch.autocast(case.torch_device.type, dtype=case.numbers.autocast)
        with inductor_config.patch(freezing=True), torch.inference_mode(), autocast:
            compiled(images)
        return compiled

    label = f"{name} ({source})"
    # A graph takes its memory while it is recorded, which must not be left out with the compiler's.
    return _ready_module(
        label, case, model, channels_last=True, packages=packages, compiles=not graph, transform=transform
    )


# ----------------------------------------------------------------------------------------------- CUDA graphs


def _as_graph(prepare: Callable[[NetworkCase], ReadyContender], case: NetworkCase) -> ReadyContender:
    """Return a contender replayed as one CUDA graph; a call copies its input into the graph's own and replays."""
    ready = prepare(case)
    static_input = ready.convert(case.images(0))
    side = torch.cuda.Stream(case.torch_device)
    side.wait_stream(torch.cuda.current_stream(case.torch_device))
    with torch.inference_mode(), torch.cuda.stream(side):
        for _ in range(3):
            ready.run(static_input)
    torch.cuda.current_stream(case.torch_device).wait_stream(side)
    graph = torch.cuda.CUDAGraph()
    with torch.inference_mode(), torch.cuda.graph(graph):
        static_output = ready.run(static_input)

    def run(images: Tensor) -> Tensor:
        static_input.copy_(images)
        graph.replay()
        return static_output  # type: ignore[no-any-return]

    name, _, source = ready.label.partition(" ")
    return ReadyContender(f"{name}-graph {source}".rstrip(), ready.convert, run, ready.packages, ready.compiles)


# ----------------------------------------------------------------------------------------- ONNX Runtime, OpenVINO


def _packages_missing(name: str) -> str | None:
    missing = CONTENDERS[name].not_installed()
    return f"not available: pip install {' '.join(missing)}" if missing else None


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


def _onnxruntime_missing(case: NetworkCase) -> str | None:
    if case.numbers.name != "float32":
        return f"ONNX Runtime's CPU kernels have no {case.numbers.name}"
    return _packages_missing("onnxruntime")


def _onnxruntime(case: NetworkCase) -> ReadyContender:
    onnxruntime = importlib.import_module("onnxruntime")
    content, source, packages = _onnx_model(case.model, case.channels, case.img_size, case.batch, case.seed)
    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = case.threads
    # Its threads otherwise spin for a while after a call and take the cores from whoever has the next turn.
    options.add_session_config_entry("session.force_spinning_stop", "1")
    session = onnxruntime.InferenceSession(content, options, providers=["CPUExecutionProvider"])
    name = session.get_inputs()[0].name
    return ReadyContender(
        f"onnxruntime ({source})",
        lambda images: images.numpy(),
        lambda images: session.run(None, {name: images}),
        ("onnxruntime", "onnx", *packages),
    )


def _openvino_missing(case: NetworkCase) -> str | None:
    missing = _packages_missing("openvino")
    if missing or case.numbers.name == "float32":
        return missing
    if case.numbers.name == "bfloat16":
        capabilities = importlib.import_module("openvino").Core().get_property("CPU", "OPTIMIZATION_CAPABILITIES")
        return None if "BF16" in capabilities else "OpenVINO has no bfloat16 on this processor"
    return f"the OpenVINO contender runs float32 and bfloat16, not {case.numbers.name}"


def _openvino(case: NetworkCase) -> ReadyContender:
    openvino = importlib.import_module("openvino")
    content, source, packages = _onnx_model(case.model, case.channels, case.img_size, case.batch, case.seed)
    core = openvino.Core()
    settings = {
        "INFERENCE_NUM_THREADS": case.threads,
        "PERFORMANCE_HINT": "LATENCY",
        # Left alone it takes bfloat16 wherever the processor has it, also for a float32 model.
        "INFERENCE_PRECISION_HINT": "f32" if case.numbers.name == "float32" else "bf16",
    }
    compiled = core.compile_model(core.read_model(content), "CPU", settings)
    return ReadyContender(
        f"openvino ({source})",
        lambda images: images.numpy(),
        lambda images: list(compiled([images], share_inputs=True).values()),
        ("openvino", "onnx", *packages),
    )


def _nothing_missing(case: NetworkCase) -> str | None:
    return None


_eager_nchw = functools.partial(_eager, channels_last=False)
_eager_channels_last = functools.partial(_eager, channels_last=True)

CONTENDERS: dict[str, Contender] = {
    contender.name: contender
    for contender in (
        Contender("effkernels", "this package", ("cpu", "cuda"), _effkernels_missing, _effkernels),
        Contender("eager", "plain PyTorch, NCHW", ("cpu", "cuda"), _nothing_missing, _eager_nchw),
        Contender(
            "eager-channels-last", "plain PyTorch, channels_last", ("cpu", "cuda"), _nothing_missing,
            _eager_channels_last,
        ),
        Contender(
            "compile", "torch.compile with freezing, channels_last", ("cpu", "cuda"), _compiler_missing,
            functools.partial(_compiled, name="compile", mode=None),
        ),
        Contender(
            "compile-max-autotune", "the same, kernels tuned by measurement", ("cuda",), _compiler_missing,
            functools.partial(_compiled, name="compile-max-autotune", mode="max-autotune-no-cudagraphs"),
        ),
        Contender(
            "effkernels-graph", "this package in one CUDA graph", ("cuda",), _effkernels_missing,
            functools.partial(_as_graph, _effkernels),
        ),
        Contender(
            "eager-channels-last-graph", "plain PyTorch, channels_last, in one CUDA graph", ("cuda",),
            _nothing_missing, functools.partial(_as_graph, _eager_channels_last),
        ),
        Contender(
            "compile-graph", "torch.compile with freezing and CUDA graphs", ("cuda",), _compiler_missing,
            functools.partial(_compiled, name="compile-graph", mode="reduce-overhead", graph=True),
        ),
        Contender(
            "compile-max-autotune-graph", "tuned by measurement, with CUDA graphs", ("cuda",), _compiler_missing,
            functools.partial(_compiled, name="compile-max-autotune-graph", mode="max-autotune", graph=True),
        ),
        Contender(
            "timm", "timm's model, unchanged", ("cpu", "cuda"),
            functools.partial(_as_it_comes_missing, "timm", _timm_missing), _timm, ("timm",),
        ),
        Contender(
            "optimized", "timm's or any other model after optimize_", ("cpu", "cuda"), _optimized_missing, _optimized,
            ("timm",),
        ),
        Contender(
            "engine", "the same model in an InferenceEngine, which allocates memory before the calls", ("cpu", "cuda"),
            _engine_missing, _engine, ("timm",),
        ),
        Contender(
            "torchvision", "torchvision's model, unchanged", ("cpu", "cuda"),
            functools.partial(_as_it_comes_missing, "torchvision", _torchvision_missing), _torchvision,
            ("torchvision",),
        ),
        Contender(
            "onnxruntime", "ONNX Runtime", ("cpu",), _onnxruntime_missing, _onnxruntime,
            ("onnx", "onnxscript", "onnxruntime"),
        ),
        Contender(
            "openvino", "OpenVINO", ("cpu",), _openvino_missing, _openvino, ("onnx", "onnxscript", "openvino"),
        ),
    )
}  # fmt: skip


def to_tensor(output: Any) -> Tensor:
    """Return a contender's output as a tensor; several tensors become one, (N, all their values)."""
    tensors = [torch.as_tensor(leaf) for leaf in tree_leaves(output) if leaf is not None]
    return tensors[0] if len(tensors) == 1 else torch.cat([tensor.flatten(1) for tensor in tensors], 1)
