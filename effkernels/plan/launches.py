"""The launch plan: what a network's forward will launch on a GPU, known without one.

A plan is a pure function of model, shape, dtype and the limits of a GPU: the network runs once on the meta device,
every fused operator it calls is put to the same plan that its launcher uses (`torch.ops.effkernels.cuda_plan`), and
nothing is measured. Bytes, FLOPs and special-function operations are counted from the shapes, and give a floor: the
time below which the published figures of the GPU do not let the launch go.
"""

from __future__ import annotations

import json
import math
import re
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import asdict, dataclass, replace
from typing import Any

import torch
from torch import Tensor, nn

from effkernels import _library
from effkernels.models import create_model, model_config
from effkernels.ops.mbconv import OPERATOR
from effkernels.ops.mbconv_stack import block_by_block
from effkernels.ops.reference import ACTIVATIONS, canonical_name
from effkernels.plan import gpus
from effkernels.plan.gpus import Gpu
from effkernels.plan.record import RecordedCall, record_calls, tensors_in
from effkernels.plan.time_estimate import (
    MODES,
    StackedBlock,
    TimeEstimate,
    estimate,
    estimate_stack,
    forward_us,
)

PRECISIONS: dict[str, torch.dtype] = {
    "float32": torch.float32,
    "float16": torch.float16,
    "bfloat16": torch.bfloat16,
}

__all__ = [
    "PRECISIONS",
    "Plan",
    "PlannedLaunch",
    "RecordedCall",
    "Totals",
    "plan_call",
    "plan_model",
    "plan_network",
    "record_calls",
]

Call = RecordedCall  # the name by which `effkernels.optimize` imports it

_NAMESPACE, _PYTORCH = "effkernels::", "aten::"
_BLOCK, _STACK = f"{_NAMESPACE}mbconv", f"{_NAMESPACE}mbconv_stack"


@dataclass(frozen=True)
class PlannedLaunch:
    """One launch.

    Attributes:
        layer: path of the module whose weight it reads, or in which it happens; of a stack of blocks the first block
            and the last one, 'blocks.3.1-6.0'.
        op: the operator that launches it, 'effkernels::...' or 'aten::...'.
        kernel: name of the kernel; of a launch of PyTorch's own the operator's name.
        grid, block: blocks, and threads of a block along x and y; None if PyTorch decides.
        shared_bytes: dynamic shared memory of a block; None if PyTorch decides.
        cluster: blocks of a cluster.
        cooperative: every block is resident at once.
        bytes: each byte of arguments, parameters and results once, of scratch memory twice (written and read back).
        workspace_bytes: of scratch memory.
        flops: two per multiply-add of convolutions and matrix products; the work per value around them is left out.
        unit: what computes them: 'tensor', 'tf32' or 'float32' (plain multiply-adds).
        special_functions: operations of the special function units: activations, gates, reciprocal roots of norms.
        floor_us: the longest of what bytes, FLOPs and special functions take at the GPU's published rates.
        limited_by: which of them that is: 'memory', the unit, or 'special'.
        variant: the kernel with its template arguments; None if PyTorch decides.
        time: an estimate of how long it takes, which counts instructions and fixed costs too.
        bytes_by_block: where it computes several blocks of the network, those of each.
    """

    layer: str
    op: str
    kernel: str
    grid: int | None
    block: tuple[int, int] | None
    shared_bytes: int | None
    cluster: int
    cooperative: bool
    bytes: int
    workspace_bytes: int
    flops: int
    unit: str
    special_functions: int
    floor_us: float
    limited_by: str
    variant: str | None
    time: TimeEstimate
    bytes_by_block: tuple[int, ...] = ()

    @property
    def is_own(self) -> bool:
        """Return whether it is a kernel of this project, and not one of PyTorch's."""
        return not self.kernel.startswith(_PYTORCH)

    @property
    def stacked(self) -> int:
        """Blocks of the network that it computes; 1 where it computes one, or a part of one."""
        return max(1, len(self.bytes_by_block))

    @property
    def block_of_network(self) -> str:
        """The part of the network it belongs to: 'blocks.2.1' for 'blocks.2.1.conv_dw', 'conv_stem' for 'conv_stem'."""
        return self.layer if self.stacked > 1 else _parent(self.layer)


def _parent(layer: str) -> str:
    return layer.rpartition(".")[0] or layer


@dataclass(frozen=True)
class Totals:
    """Sums over some launches; attributes as of `PlannedLaunch`."""

    launches: int
    bytes: int
    flops: int
    special_functions: int
    floor_us: float

    @classmethod
    def of(cls, launches: Iterable[PlannedLaunch]) -> Totals:
        """Return the sums over `launches`."""
        listed = list(launches)
        return cls(
            len(listed),
            sum(launch.bytes for launch in listed),
            sum(launch.flops for launch in listed),
            sum(launch.special_functions for launch in listed),
            sum(launch.floor_us for launch in listed),
        )


@dataclass(frozen=True)
class Plan:
    """The launches of one forward of a model.

    Attributes:
        model: name in the registry.
        gpu: name in `effkernels.plan.gpus`.
        batch_size: images.
        img_size: their height and width in pixels.
        precision: dtype of weights and images, one of `PRECISIONS`.
        allow_tf32: whether float32 convolutions may run in TF32.
        launches: in the order of the forward.
    """

    model: str
    gpu: str
    batch_size: int
    img_size: int
    precision: str
    allow_tf32: bool
    launches: tuple[PlannedLaunch, ...]

    @property
    def totals(self) -> Totals:
        """Sums over all launches."""
        return Totals.of(self.launches)

    def estimated_us(self, mode: str = MODES[0]) -> float:
        """Return the estimated time of a forward in microseconds.

        Args:
            mode: one of `effkernels.plan.time_estimate.MODES`: how the launches follow each other.

        Raises:
            ValueError: an unknown mode.
        """
        return forward_us((launch.time for launch in self.launches), mode)

    def by_block(self) -> dict[str, Totals]:
        """Return the sums per part of the network, in the order of the forward."""
        names = dict.fromkeys(launch.block_of_network for launch in self.launches)
        return {name: Totals.of(one for one in self.launches if one.block_of_network == name) for name in names}

    def to_json(self) -> str:
        """Return the plan and its sums as strict JSON."""
        blocks = {name: asdict(totals) for name, totals in self.by_block().items()}
        report = {**asdict(self), "blocks": blocks, "totals": asdict(self.totals)}
        for fields, launch in zip(report["launches"], self.launches, strict=True):
            fields["time"] |= {"us": launch.time.us, "longest": launch.time.longest}
        report["estimated_us"] = {mode: self.estimated_us(mode) for mode in MODES}
        return json.dumps(report, indent=2, allow_nan=False)

    @classmethod
    def from_json(cls, text: str) -> Plan:
        """Return the plan that `to_json` wrote."""
        report = json.loads(text)
        launches = []
        for fields in report.pop("launches"):
            block = fields.pop("block")
            time = fields.pop("time")
            del time["us"], time["longest"]
            fields["bytes_by_block"] = tuple(fields["bytes_by_block"])
            launches.append(
                PlannedLaunch(block=None if block is None else tuple(block), time=TimeEstimate(**time), **fields)
            )
        del report["blocks"], report["totals"], report["estimated_us"]
        return cls(launches=tuple(launches), **report)


def plan_model(
    name: str,
    *,
    gpu: Gpu | str = gpus.DEFAULT_GPU,
    batch_size: int = 1,
    img_size: int | None = None,
    precision: str = "bfloat16",
    allow_tf32: bool = True,
) -> Plan:
    """Plan a forward of a model in eval mode, images in channels_last memory.

    Args:
        name: one of `effkernels.list_models()`.
        gpu: one of `effkernels.plan.gpus.GPUS`, or its name.
        batch_size: images.
        img_size: height and width of an image in pixels; None: what the model was designed for.
        precision: one of `PRECISIONS`.
        allow_tf32: whether float32 convolutions may run in TF32, PyTorch's own default.

    Raises:
        ValueError: unknown model, GPU or precision, batch_size or img_size below 1; the message lists what is allowed.
        RuntimeError: the compiled library, which holds the plans, is not there.
    """
    size = model_config(name).input_size[-1] if img_size is None else img_size
    _check(batch_size, size, precision)
    network = create_model(name, device="meta", dtype=PRECISIONS[precision], backend="cpu").eval()
    return plan_network(
        network, (3, size, size), name=name, gpu=gpu, batch_size=batch_size, precision=precision, allow_tf32=allow_tf32
    )


def plan_network(
    network: nn.Module,
    input_size: tuple[int, int, int],
    *,
    name: str,
    gpu: Gpu | str = gpus.DEFAULT_GPU,
    batch_size: int = 1,
    precision: str = "bfloat16",
    allow_tf32: bool = True,
) -> Plan:
    """Plan a forward of a network of any origin, images in channels_last memory.

    Fused are the calls of this package's operators that the forward makes: those of `create_model`, and those that
    `effkernels.optimize_` put into another library's network. Every other operator is a launch of PyTorch's own.

    Args:
        network: on the meta device, in eval mode, of the precision's dtype.
        input_size: (channels, height, width) of an image, a square.
        name: of the network in the plan.
        gpu, batch_size, precision, allow_tf32: as of `plan_model`.

    Raises:
        ValueError, RuntimeError: as `plan_model`.
    """
    channels, size, width = input_size
    if size != width:
        raise ValueError(f"input_size={input_size}; allowed: squares")
    _check(batch_size, size, precision)
    gpu = gpus.find(gpu) if isinstance(gpu, str) else gpu
    images = torch.empty(
        (batch_size, channels, size, size),
        dtype=PRECISIONS[precision],
        device="meta",
        memory_format=torch.channels_last,
    )
    launches = tuple(
        launch for call in record_calls(network, images) for launch in plan_call(call, gpu, allow_tf32=allow_tf32)
    )
    return Plan(name, gpu.name, batch_size, size, precision, allow_tf32, launches)


def _check(batch_size: int, img_size: int, precision: str) -> None:
    if precision not in PRECISIONS:
        raise ValueError(f"precision={precision!r} is not known; allowed: {', '.join(PRECISIONS)}")
    for argument, value in (("batch_size", batch_size), ("img_size", img_size)):
        if value < 1:
            raise ValueError(f"{argument}={value} must be at least 1")
    if not _library.is_loaded():
        raise RuntimeError(
            f"a plan needs the compiled library, which holds the kernels' plans: {_library.load_error()}"
        )


def plan_call(call: RecordedCall, gpu: Gpu, *, allow_tf32: bool) -> list[PlannedLaunch]:
    """Return the launches of one call.

    The first one reads the arguments, computes and writes the results; a second one passes over the result once more,
    reading and writing it: the norm and activation after a convolution of PyTorch's, or the product with the gate in
    `depthwise_bn_act_se`, which goes from the first to the second. The two of `expand_depthwise_squeeze`, where it is
    not one, are its two convolutions, and the expanded tensor goes from the first to the second. `mbconv` may have the
    result of its depthwise convolution as scratch memory. The three of `mbconv` (without expansion two), where it is
    not one, are those of so many operators. `mbconv_stack` is the launches of its blocks, and one launch for all blocks
    of a stack.
    """
    if call.op == _STACK:
        groups = plan_groups(call, gpu, allow_tf32=allow_tf32)
        return [replace(launch, op=_STACK) for _, planned in groups for launch in planned]
    lines = [{"kernel": call.op}]
    if call.op.startswith(_NAMESPACE):
        lines = cuda_plan(call, gpu, allow_tf32=allow_tf32)
    if call.op == _BLOCK and len(lines) > 1:
        parts = (plan_call(part, gpu, allow_tf32=allow_tf32) for part in _calls_of_parts(call))
        return [replace(launch, op=call.op) for launches in parts for launch in launches]
    kernels = [line["kernel"] for line in lines]
    activating = next((kernel for kernel in kernels if not kernel.startswith(_PYTORCH)), None)
    found = []
    for position, line in enumerate(lines):
        first = position == 0
        kernel = line["kernel"]
        moved = 2 * int(line.get("workspace", 0))
        moved += moved_bytes(call) if len(lines) == 1 else _bytes_of_two(call)[position]
        flops = call.flops if first else 0
        special = special_functions(call) if kernel == activating else 0
        if len(lines) == 2 and _expands(call):
            of_expand = _special_functions_of_expand(call)
            special = of_expand if first else special_functions(call) - of_expand
        found.append(_launch(line, call, gpu, moved, flops, special, allow_tf32))
    return found


def _launch(
    line: Mapping[str, str], call: RecordedCall, gpu: Gpu, moved: int, flops: int, special: int, allow_tf32: bool,
    time: TimeEstimate | None = None,
) -> PlannedLaunch:  # fmt: skip
    """Return the launch that a line of `cuda_plan` describes; the others as of `PlannedLaunch`; without a time, it
    is estimated."""
    kernel = line["kernel"]
    unit = _unit(kernel, call.dtype, allow_tf32)
    rate = {"tensor": gpu.tensor, "tf32": gpu.tf32, "float32": gpu.float32}[unit]
    times = {
        "memory": moved / gpu.bandwidth,
        unit: flops / rate,
        "special": special / gpu.special_functions,
    }
    limited_by = max(times, key=lambda name: times[name])
    planned = not kernel.startswith(_PYTORCH)
    return PlannedLaunch(
        layer=call.layer,
        op=call.op,
        kernel=kernel,
        grid=int(line["grid"]) if planned else None,
        block=_two(line["block"]) if planned else None,
        shared_bytes=int(line["shared"]) if planned else None,
        cluster=int(line.get("cluster", 1)),
        cooperative=line.get("cooperative") == "1",
        bytes=moved,
        workspace_bytes=int(line.get("workspace", 0)),
        flops=flops,
        unit=unit,
        special_functions=special,
        floor_us=1e6 * times[limited_by],
        limited_by=limited_by,
        variant=line.get("variant"),
        time=estimate(line, call, gpu, moved=moved, flops=flops, rate=rate) if time is None else time,
    )


def plan_groups(
    call: RecordedCall, gpu: Gpu, *, allow_tf32: bool
) -> Iterator[tuple[list[RecordedCall], list[PlannedLaunch]]]:
    """Yield calls with their launches: of `mbconv_stack` those of its blocks, where several may share one launch."""
    if call.op != _STACK:
        yield [call], plan_call(call, gpu, allow_tf32=allow_tf32)
        return
    blocks = blocks_of_stack(call)
    by_block: dict[int, list[dict[str, str]]] = {}
    for line in cuda_plan(call, gpu, allow_tf32=allow_tf32):
        by_block.setdefault(int(line["at"]), []).append(line)
    position = 0
    while position < len(blocks):
        end = position + int(by_block[position][0].get("stacked", "1"))
        group = blocks[position:end]
        if len(group) == 1:
            yield group, plan_call(group[0], gpu, allow_tf32=allow_tf32)
        else:
            lines = [by_block[i][0] for i in range(position, end)]
            yield group, [_stacked_launch(lines, group, gpu, allow_tf32=allow_tf32)]
        position = end


def _stacked_launch(
    lines: list[dict[str, str]], blocks: list[RecordedCall], gpu: Gpu, *, allow_tf32: bool
) -> PlannedLaunch:
    """Return the launch of blocks that follow each other in it: their sums, and the largest of their shared memory.

    What a block writes for the next one is counted twice, written and read: it stays in L2 where it fits.
    """
    workspaces = [int(line["workspace"]) for line in lines]
    moved = [moved_bytes(block) + 2 * workspace for block, workspace in zip(blocks, workspaces, strict=True)]
    launch = _launch(
        lines[0],
        blocks[0],
        gpu,
        sum(moved),
        sum(block.flops for block in blocks),
        sum(map(special_functions, blocks)),
        allow_tf32,
        estimate_stack([StackedBlock(*one) for one in zip(lines, blocks, moved, strict=True)], gpu),
    )
    return replace(
        launch,
        layer=_range_of(_parent(blocks[0].layer), _parent(blocks[-1].layer)),
        workspace_bytes=sum(workspaces),
        variant=f"{launch.kernel}<{str(blocks[0].dtype).removeprefix('torch.')}>",
        bytes_by_block=tuple(moved),
    )


def _range_of(first: str, last: str) -> str:
    """Return one name for the blocks from one path to another: 'blocks.3.1-6.0'; of others' paths only the numbers that
    tell blocks apart, 'features.4.1-7.0' for 'features.4.1.block.1' and 'features.7.0.block.1', or '.block.0'.
    """
    (start, from_number, rest), (other, to_number, other_rest) = (
        re.fullmatch(r"((?:[^.\d][^.]*\.)*)([\d.]*)(.*?)[\d.]*", path).groups()  # type: ignore[union-attr]  # any path
        for path in (first, last)
    )
    if (start, rest) != (other, other_rest) or not from_number:
        return f"{first}-{last}"
    return f"{start}{from_number.rstrip('.')}-{to_number.rstrip('.')}"


def blocks_of_stack(call: RecordedCall) -> list[RecordedCall]:
    """Return the calls of `mbconv` that a call of `mbconv_stack` is."""
    names = OPERATOR.signature.flat_names
    blocks: list[RecordedCall] = []
    layers = call.layer.split()

    def run(position: int, flat: tuple[Any, ...]) -> Tensor:
        arguments = dict(zip(names, flat, strict=True))
        result: Tensor = OPERATOR.fake(*flat)
        shapes = {name: value.shape if isinstance(value, Tensor) else value for name, value in arguments.items()}
        layer = layers[position] if len(layers) > 1 else call.layer
        blocks.append(RecordedCall(_BLOCK, layer, arguments, [result], OPERATOR.flops(shapes, result.shape)))
        return result

    block_by_block(run, *call.arguments.values())
    return blocks


def _two(text: str) -> tuple[int, int]:
    x, y = text.split(",")
    return int(x), int(y)


def cuda_plan(call: RecordedCall, gpu: Gpu, *, allow_tf32: bool) -> list[dict[str, str]]:
    """Return the launches of a call of this project's operators as the compiled library plans them, by field."""
    name = call.op.removeprefix(_NAMESPACE)
    dtype = str(call.dtype).removeprefix("torch.")
    text: str = torch.ops.effkernels.cuda_plan(name, dtype, _shape(name, call.arguments, allow_tf32), gpu.limits())
    return [dict(field.split("=", 1) for field in line.split()) for line in text.splitlines()]


def _shape(op: str, arguments: Mapping[str, Any], allow_tf32: bool) -> list[int]:
    """Return the sizes that `cuda_plan` takes for an operator, in its order."""
    if op == "mbconv_stack":
        call = RecordedCall(_STACK, "", arguments, (), 0)
        return [size for block in blocks_of_stack(call) for size in _shape("mbconv", block.arguments, allow_tf32)]
    if op == "squeeze_excite_gate":
        return [*arguments["pooled"].shape, arguments["w_reduce"].shape[0]]
    batch, channels, height, width = arguments["x"].shape
    weight = arguments["weight"].shape
    if op in ("pointwise_bn_act", "pointwise_bn_act_pool"):
        gated, residual = (arguments.get(name) is not None for name in ("gate", "residual"))
        activation = ACTIVATIONS.index(canonical_name(arguments["activation"]))
        return [batch, height, width, channels, weight[0], int(gated), int(residual), int(allow_tf32), activation]
    stride, padding = arguments["stride"], arguments["padding"]
    if op == "expand_depthwise_squeeze":
        sizes = [batch, weight[0], height, width, weight[2], weight[3], stride, arguments["dilation"], *padding, 0]
        return [*sizes, channels, int(allow_tf32), ACTIVATIONS.index(canonical_name(arguments["expand_activation"]))]
    if op == "mbconv":
        reduced = 0 if arguments["w_reduce"] is None else arguments["w_reduce"].shape[0]
        sizes = [batch, weight[0], height, width, weight[2], weight[3], stride, arguments["dilation"], *padding]
        out_channels, residual = arguments["project_weight"].shape[0], arguments["residual"] is not None
        activation = ACTIVATIONS.index(canonical_name(arguments["expand_activation"]))
        inner = 0 if arguments["expand_weight"] is None else channels
        return [*sizes, reduced, inner, out_channels, int(residual), int(allow_tf32), activation]
    if op == "conv_bn_act":
        return [batch, channels, weight[0], height, width, weight[2], weight[3], stride, *padding]
    reduced = arguments["w_reduce"].shape[0] if "w_reduce" in arguments else 0
    return [batch, channels, height, width, weight[2], weight[3], stride, arguments["dilation"], *padding, reduced]


def _calls_of_parts(call: RecordedCall) -> list[RecordedCall]:
    """Return the operators that `mbconv` takes where it is no launch of its own: expand, depthwise, project."""
    given = call.arguments
    x, result, expands = given["x"], call.results[0], _expands(call)
    channels = given["weight"].shape[0]
    expanded = x.new_empty((x.shape[0], channels, *x.shape[2:]), device="meta")
    y = x.new_empty((x.shape[0], channels, *result.shape[2:]), device="meta")
    excites = given["w_reduce"] is not None
    gate = x.new_empty((x.shape[0], channels), device="meta") if excites else None

    def pointwise(prefix: str, of: Tensor, to: Tensor, **others: Any) -> RecordedCall:
        own = {name.removeprefix(prefix): value for name, value in given.items() if name.startswith(prefix)}
        arguments = {"x": of, "gate": None, "residual": None, "activation": "identity", **own, **others}
        flops = 2 * to.numel() * of.shape[1]
        return RecordedCall(f"{_NAMESPACE}pointwise_bn_act", call.layer, arguments, [to], flops)

    others = ("expand_", "project_", "residual") if excites else ("expand_", "project_", "residual", "w_", "b_", "se_")
    own = {name: value for name, value in given.items() if not name.startswith(others) or name == "w_expand"}
    products = 0
    if excites:
        products = given["w_reduce"].numel() + given["w_expand"].numel()
    else:
        own.pop("w_expand")
    depthwise = RecordedCall(
        f"{_NAMESPACE}depthwise_bn_act{'_gate' if excites else ''}",
        call.layer,
        {**own, "x": expanded if expands else x},
        [y] if gate is None else [y, gate],
        2 * y.numel() * math.prod(given["weight"].shape[2:]) + 2 * x.shape[0] * products,
    )
    project = pointwise("project_", y, result, gate=gate, residual=given["residual"])
    return [pointwise("expand_", x, expanded), depthwise, project] if expands else [depthwise, project]


def _stored_bytes(tensor: Tensor) -> int:
    """Return the bytes that a tensor occupies: an expanded one is smaller than its shape."""
    return min(tensor.nbytes, tensor.untyped_storage().nbytes())


def _expands(call: RecordedCall) -> bool:
    return call.arguments.get("expand_weight") is not None


def _expanded(call: RecordedCall) -> int:
    """Return the elements of the expanded tensor of `expand_depthwise_squeeze` and of `mbconv`."""
    batch, _, height, width = call.arguments["x"].shape
    return int(batch * call.arguments["expand_weight"].shape[0] * height * width)


def _activated(call: RecordedCall) -> int:
    """Return the values that the activation after the last convolution is applied to."""
    values = int(call.results[0].numel())
    pools = call.op == f"{_NAMESPACE}pointwise_bn_act_pool"
    return values * math.prod(call.arguments["x"].shape[2:]) if pools else values


def moved_bytes(call: RecordedCall) -> int:
    """Return the bytes that a call cannot avoid: every argument read once, every result written once."""
    read = {id(tensor): tensor for tensor in tensors_in(call.arguments.values())}
    return sum(_stored_bytes(tensor) for tensor in (*read.values(), *call.results))


def _bytes_of_two(call: RecordedCall) -> tuple[int, int]:
    """Return the same for a call that takes two launches, each by itself."""
    if _expands(call):
        inputs = [value for name, value in call.arguments.items() if name == "x" or name.startswith("expand_")]
        of_expand, hidden = sum(map(_stored_bytes, tensors_in(inputs))), _expanded(call) * call.dtype.itemsize
        return of_expand + hidden, hidden + moved_bytes(call) - of_expand
    second = 2 * call.results[0].nbytes
    if "w_reduce" in call.arguments:  # the first one writes a gate, which the second one reads
        gate = math.prod(call.results[0].shape[:2]) * call.dtype.itemsize
        return moved_bytes(call) + gate, second + gate
    vectors = [call.arguments[name] for name in ("bias", "norm_mean", "norm_var", "norm_weight", "norm_bias")]
    of_norm = sum(_stored_bytes(tensor) for tensor in tensors_in(vectors))
    return moved_bytes(call) - of_norm, second + of_norm


def _unit(kernel: str, dtype: torch.dtype, allow_tf32: bool) -> str:
    """Return the unit that computes the FLOPs of a kernel."""
    if kernel.startswith(_PYTORCH) or kernel in (
        "pointwise",
        "pointwise_pool",
        "expand_depthwise",
        "mbconv",
        "mbconv_queue",
        "mbconv_stack",
        "conv",
        "conv_stem",
    ):
        if dtype != torch.float32:
            return "tensor"
        # PyTorch lets convolutions run in TF32 by default, and other matrix products not.
        if allow_tf32 and kernel in ("pointwise", "pointwise_pool", "aten::convolution"):
            return "tf32"
    return "float32"


# Instructions of the special function units that nvcc makes of an activation (csrc/cuda/numeric.cuh): silu and the
# sigmoid are a power of two and a reciprocal, gelu's erf a power of two, tanh a power of two and a reciprocal.
_SPECIAL_FUNCTIONS = {"silu": 2, "gelu": 1, "gelu_tanh": 2, "sigmoid": 2}


def special_functions_of(activation: str, dtype: torch.dtype) -> int:
    """Special-function operations per value of an activation or a gate."""
    activation = canonical_name(activation)
    if activation == "silu" and dtype != torch.float32:
        return 1  # one tanh.approx
    return _SPECIAL_FUNCTIONS.get(activation, 0)


def special_functions(call: RecordedCall) -> int:
    """Special-function operations of a call; 0 for one of PyTorch's own, whose kernels are not known here."""
    if not call.op.startswith(_NAMESPACE):
        return 0
    arguments = call.arguments
    if call.op == _BLOCK:
        return sum(special_functions(part) for part in _calls_of_parts(call))
    count = 0
    inner = "se_activation"
    if "pooled" in arguments:
        inner = "activation"
    elif "activation" in arguments:
        count += _activated(call) * special_functions_of(arguments["activation"], call.dtype)
    if arguments.get("norm_var") is not None:
        count += arguments["norm_var"].numel()
    if _expands(call):
        count += _special_functions_of_expand(call)
    if "w_reduce" in arguments:  # computed in float32 whatever the dtype
        batch = call.results[0].shape[0]
        reduced, channels = arguments["w_reduce"].shape[:2]
        count += batch * reduced * special_functions_of(arguments[inner], torch.float32)
        count += batch * channels * special_functions_of(arguments["gate_activation"], torch.float32)
    return count


def _special_functions_of_expand(call: RecordedCall) -> int:
    """Return those of the first convolution of `expand_depthwise_squeeze`."""
    norm = call.arguments["expand_norm_var"]
    count = _expanded(call) * special_functions_of(call.arguments["expand_activation"], call.dtype)
    return count + (0 if norm is None else norm.numel())
