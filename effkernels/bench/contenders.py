"""Whole networks in every form worth comparing, all with the same small interface.

All of them get the same weights, those of the plain network (`plain.py`). The label names which one ran. `runtimes.py`
has the contenders that other programs than PyTorch run.
"""

from __future__ import annotations

import contextlib
import copy
import functools
import importlib
import importlib.util
import os
import shutil
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_leaves

import effkernels
from effkernels import _library
from effkernels.bench.check import sample_model
from effkernels.bench.network_case import Contender, NetworkCase, ReadyContender
from effkernels.bench.plain import plain_network, timm_missing, timm_model
from effkernels.bench.runtimes import RUNTIMES
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
    return _kernels_missing(case) or (timm_missing(case) if case.source.is_own else None)


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
    return _ready_module("timm", case, timm_model(case), channels_last=case.channels_last, packages=("timm",))


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
            "compile-max-autotune", "the same, kernels tuned by measurement", ("cpu", "cuda"), _compiler_missing,
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
            functools.partial(_as_it_comes_missing, "timm", timm_missing), _timm, ("timm",),
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
        *RUNTIMES,
    )
}  # fmt: skip


def to_tensor(output: Any) -> Tensor:
    """Return a contender's output as a tensor; several tensors become one, (N, all their values)."""
    tensors = [torch.as_tensor(leaf) for leaf in tree_leaves(output) if leaf is not None]
    return tensors[0] if len(tensors) == 1 else torch.cat([tensor.flatten(1) for tensor in tensors], 1)
