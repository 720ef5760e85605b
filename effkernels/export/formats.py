"""One writer for each file format: it writes the file and returns what runs it, for the check."""

from __future__ import annotations

import importlib
import importlib.util
import json
import os
import re
import shutil
import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.export import ExportedProgram
from torch.utils._pytree import tree_leaves

from effkernels._version import __version__
from effkernels.export.sizes import Sizes
from effkernels.export.verify import Run, on_reference
from effkernels.models import EfficientNet, load_checkpoint

OPSETS = range(18, 24)
DEFAULT_OPSET = 20
METADATA = "effkernels"
"""The key in a safetensors file or an ONNX file under which `Job.description` is stored, as JSON."""

_AXES = {0: "batch", 2: "height", 3: "width"}


class ExportError(RuntimeError):
    """A network that could not be exported, or a file that does not do what the network does; nothing is left."""


@dataclass(frozen=True)
class Job:
    """One export.

    Attributes:
        model: in eval mode, on its device and in its dtype; not to be changed.
        name: of the model, for the files' metadata.
        sizes: of the input.
        file: to write.
        opset: of an ONNX file.
        on_reference: trace plain PyTorch operators in place of the fused ones.
    """

    model: nn.Module
    name: str
    sizes: Sizes
    dtype: torch.dtype
    device: torch.device
    file: Path
    opset: int
    on_reference: bool
    axis_names: dict[str, str] = field(default_factory=dict)

    @property
    def description(self) -> dict[str, str]:
        """Return what a reader of the file has to know about its input."""
        sizes = self.sizes
        return {
            "effkernels_version": __version__,
            "model": self.name,
            "input_shape": f"{sizes.batch},{sizes.channels},{sizes.image},{sizes.image}",
            "dtype": str(self.dtype).removeprefix("torch."),
        }

    @cached_property
    def program(self) -> ExportedProgram:
        """The network as one graph.

        Raises:
            ExportError: torch.export cannot trace it, or not for all the sizes.
        """
        axes = self.sizes.dynamic_axes()
        example = torch.zeros(self.sizes.example(), dtype=self.dtype, device=self.device)
        try:
            traced_on = on_reference(self.model) if self.on_reference else nullcontext()
            with torch.no_grad(), _without_warnings(), traced_on:
                program = torch.export.export(self.model, (example,), dynamic_shapes=(axes,) if axes else None)
        except Exception as error:  # whatever tracing meets in foreign code; the cause is kept
            raise ExportError(f"torch.export cannot trace {self.name}: {_first_line(error)}") from error
        for node in program.graph.nodes:
            node.meta.pop("stack_trace", None)  # the path of the sources on this machine is private
        self._find_axes(program, axes or {})
        return program

    @property
    def operators(self) -> tuple[str, ...]:
        """The operators in the graph that plain PyTorch does not have, as "namespace::name", in alphabetical order."""
        called = (node.target for node in self.program.graph.nodes if node.op == "call_function")
        found = {target.name().partition(".")[0] for target in called if isinstance(target, torch._ops.OpOverload)}
        return tuple(sorted(name for name in found if name.startswith("effkernels")))

    def _find_axes(self, program: ExportedProgram, axes: dict[int, Any]) -> None:
        """Note the symbols of the open axes, and refuse a program that is valid for fewer sizes than were asked for."""
        [name] = program.graph_signature.user_inputs
        [images] = [node for node in program.graph.nodes if node.name == name]
        for axis in axes:
            size = images.meta["val"].shape[axis]
            wanted = self.sizes.batch if axis == 0 else self.sizes.image
            found = None if isinstance(size, int) else program.range_constraints[size.node.expr]
            if found is None or found.lower > wanted.low or found.upper < wanted.high:
                held = size if found is None else f"{found.lower} to {found.upper}"
                raise ExportError(
                    f"{self.name}: {_AXES[axis]} of {wanted.low} to {wanted.high} was asked for, but the "
                    f"traced network is valid for {held} only"
                )
            self.axis_names[str(size)] = _AXES[axis]


@dataclass(frozen=True)
class Format:
    """A file format.

    Attributes:
        suffix: that its files must have.
        write: writes the file of a job and returns what runs it.
        holds: what the file holds, in one line.
        on_reference: the graph is to be plain PyTorch.
        any_device: the file runs on any device, whichever it was made on.
        packages: that writing and checking it need.
        extra: of this project, which brings them.
    """

    suffix: str
    write: Callable[[Job], Run]
    holds: str
    on_reference: bool = False
    any_device: bool = False
    packages: tuple[str, ...] = ()
    extra: str = ""

    def missing(self) -> str | None:
        """Return what has to be installed first, or None."""
        absent = [package for package in self.packages if importlib.util.find_spec(package) is None]
        if absent:
            return f"{' and '.join(absent)} is not installed: pip install 'effkernels[{self.extra}]'"
        return None


@contextmanager
def _without_warnings() -> Iterator[None]:
    """Silence deprecations inside torch's exporters, nothing that a caller could act on."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        yield


def _first_line(error: BaseException) -> str:
    lines = [line.strip() for line in str(error).splitlines() if line.strip()]
    return f"{type(error).__name__}: {lines[0][:300]}" if lines else type(error).__name__


# --------------------------------------------------------------------------------------------------------- AOTInductor


def _write_aoti(job: Job) -> Run:
    compiler = os.environ.get("CXX") or "g++"
    if not shutil.which(compiler) and not shutil.which("clang++"):
        raise ExportError(f"an AOTInductor package is compiled, and there is no C++ compiler ({compiler}, clang++)")
    inductor = importlib.import_module("torch._inductor")
    configuration: dict[str, Any] = {"aot_inductor.metadata": job.description}
    if not job.sizes.batch.fixed and job.sizes.batch.low < 2:
        # A traced size is taken for 2 or more, and with AOTI_RUNTIME_CHECK_INPUTS the package would refuse one image.
        configuration["aot_inductor.check_lowerbound"] = False
    try:
        with _without_warnings():
            inductor.aoti_compile_and_package(job.program, package_path=str(job.file), inductor_configs=configuration)
    except Exception as error:  # the compiler's own classes, many and private; the cause is kept
        raise ExportError(f"AOTInductor cannot compile {job.name}: {_first_line(error)}") from error
    package = inductor.aoti_load_package(str(job.file))

    def run(images: Tensor) -> Any:
        with _environment("AOTI_RUNTIME_CHECK_INPUTS", "1"):  # what its checks refuse would be found by users only
            return package(images)

    return run


@contextmanager
def _environment(name: str, value: str) -> Iterator[None]:
    """Set an environment variable inside the block."""
    before = os.environ.get(name)
    os.environ[name] = value
    try:
        yield
    finally:
        if before is None:
            del os.environ[name]
        else:
            os.environ[name] = before


# ---------------------------------------------------------------------------------------------------- PyTorch programs


def _write_program(job: Job) -> Run:
    extra = {METADATA: json.dumps(job.description)}
    torch.export.save(job.program, job.file, extra_files=extra)
    with _without_warnings():
        run: Run = torch.export.load(job.file).module()
    return run


# ---------------------------------------------------------------------------------------------------------------- ONNX


def _write_onnx(job: Job) -> Run:
    model = job.model
    with torch.no_grad():
        outputs = len(tree_leaves(job.program.graph_signature.user_outputs))
    names = ["logits"] if outputs == 1 else [f"output_{i}" for i in range(outputs)]
    try:
        with _without_warnings():
            found = torch.onnx.export(
                job.program,
                dynamo=True,
                opset_version=job.opset,
                input_names=["images"],
                output_names=names,
                external_data=False,
                verbose=False,
            )
        assert found is not None
        proto = found.model_proto
        _name_axes(proto.graph, job.axis_names)
        entry = proto.metadata_props.add()
        entry.key, entry.value = METADATA, json.dumps(job.description)
        content = proto.SerializeToString()
    except Exception as error:  # the exporter's own classes, and protobuf's limit of 2 GiB; the cause is kept
        raise ExportError(f"torch.onnx cannot export {type(model).__name__}: {_first_line(error)}") from error
    written = {entry.domain: entry.version for entry in proto.opset_import}
    if written != {"": job.opset} or proto.functions:
        raise ExportError(f"the ONNX graph needs operators {written}; only opset {job.opset} was asked for")
    job.file.write_bytes(content)
    onnxruntime = importlib.import_module("onnxruntime")
    session = onnxruntime.InferenceSession(str(job.file), providers=["CPUExecutionProvider"])

    def run(images: Tensor) -> list[Tensor]:
        return [torch.from_numpy(value) for value in session.run(None, {"images": images.cpu().numpy()})]

    return run


def _name_axes(graph: Any, names: dict[str, str]) -> None:
    """Put "batch", "height" and "width" in place of the trace's symbols, also inside of expressions."""
    for value in (*graph.input, *graph.output, *graph.value_info):
        for size in value.type.tensor_type.shape.dim:
            if size.dim_param:
                size.dim_param = re.sub(r"\bs\d+\b", lambda m: names.get(m.group(), m.group()), size.dim_param)


# --------------------------------------------------------------------------------------------------------- safetensors


def _write_safetensors(job: Job) -> Run:
    safetensors = importlib.import_module("safetensors.torch")
    model = job.model
    if not isinstance(model, EfficientNet) or model.config is None:
        raise ValueError(
            f"format='safetensors' is for classifiers of create_model, whose names and meaning load_checkpoint knows; "
            f"the model is a {type(model).__name__}. Its weights alone: safetensors.torch.save_file(model.state_dict())"
        )
    # load_checkpoint sets these again, whatever the model's name implies.
    _, height, width = model.config.input_size
    meaning = {
        "pad_type": model.pad_type,
        "bn_eps": model.bn1.eps,
        "bn_momentum": model.bn1.momentum,
        "native_size": height if height == width else None,
    }
    state = {key: value.contiguous() for key, value in model.state_dict().items()}
    metadata = {"format": "pt", METADATA: json.dumps({**job.description, **meaning})}
    job.file.write_bytes(safetensors.save(state, metadata))  # save_file makes files that only their owner may read
    again = load_checkpoint(model.config.name, job.file).eval().to(job.device, job.dtype)
    for key, value in again.state_dict().items():
        if not torch.equal(value, state[key]):
            raise ExportError(f"{key} reads back from the file as other values")
    return again


FORMATS: dict[str, Format] = {
    "aoti": Format(".pt2", _write_aoti, "a compiled library that runs without Python, made by AOTInductor"),
    "onnx": Format(
        ".onnx",
        _write_onnx,
        "an ONNX graph of standard operators",
        on_reference=True,
        any_device=True,
        packages=("onnx", "onnxscript", "onnxruntime"),
        extra="export",
    ),
    "pt2": Format(".pt2", _write_program, "the traced program with its weights, for torch.export.load"),
    "safetensors": Format(
        ".safetensors",
        _write_safetensors,
        "the weights and what they mean, for effkernels.models.load_checkpoint",
        any_device=True,
        packages=("safetensors",),
        extra="export",
    ),
}
