"""The launches of a training step, known without a GPU, of a fused network and of the same network in plain PyTorch.

Forward and backward run once on the meta device. Every operator that would launch something counts by one rule, this
project's and PyTorch's: each tensor that it takes is read once and each result is written once. That is the least that
a kernel of its own can move. A kernel that reads an image twice moves more, as PyTorch's batch norm does in its
forward, so the bytes of plain PyTorch are underestimated.
"""

from __future__ import annotations

import functools
import json
import math
from collections.abc import Iterator
from dataclasses import asdict, dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.flop_counter import flop_registry

from effkernels import _library
from effkernels.models import create_model, model_config
from effkernels.nn import set_recompute
from effkernels.ops import training, training_steps
from effkernels.plan import gpus
from effkernels.plan.gpus import Gpu
from effkernels.plan.launches import PRECISIONS
from effkernels.plan.record import launches, tensors_in

PHASES = ("forward", "backward")


@dataclass(frozen=True)
class StepLaunches:
    """All launches of one operator in one half of a step.

    Attributes:
        phase: one of `PHASES`.
        op: the operator, 'effkernels::...' or 'aten::...'.
        launches: how many; an operator counts as one launch, if this project does not know better.
        bytes: each argument read once, each result written once.
        flops: two per multiply-add of convolutions and matrix products.
        floor_us: the sum of what each launch takes at the least, by its bytes or by its FLOPs at the GPU's rates.
    """

    phase: str
    op: str
    launches: int
    bytes: int
    flops: int
    floor_us: float


@dataclass(frozen=True)
class Step:
    """One forward and one backward of a network.

    Attributes:
        of: 'fused' or 'plain'.
        rows: of each phase, the operator that moves most bytes first.
        saved_bytes: of the tensors that the forward keeps for the backward, parameters and buffers left out.
    """

    of: str
    rows: tuple[StepLaunches, ...]
    saved_bytes: int

    @property
    def launches(self) -> int:
        """The number of launches."""
        return sum(row.launches for row in self.rows)

    @property
    def bytes(self) -> int:
        """The bytes that they move."""
        return sum(row.bytes for row in self.rows)

    @property
    def flops(self) -> int:
        """Their FLOPs."""
        return sum(row.flops for row in self.rows)

    @property
    def floor_us(self) -> float:
        """The sum of their floors."""
        return sum(row.floor_us for row in self.rows)


@dataclass(frozen=True)
class StepPlan:
    """A training step of a model, fused and plain.

    Attributes:
        model, gpu, batch_size, img_size, precision: as of `effkernels.plan.launches.Plan`.
        recompute: as of `effkernels.nn.set_recompute`.
        fused, plain: the two steps.
    """

    model: str
    gpu: str
    batch_size: int
    img_size: int
    precision: str
    recompute: str | None
    fused: Step
    plain: Step

    @property
    def share_of_bytes(self) -> float:
        """The bytes of the fused step as a share of the plain one's."""
        return self.fused.bytes / self.plain.bytes

    @property
    def share_of_saved(self) -> float:
        """The bytes saved for the backward as a share of the plain one's."""
        return self.fused.saved_bytes / self.plain.saved_bytes

    def to_json(self) -> str:
        """Return the plan and its sums as strict JSON."""
        report = asdict(self)
        for name, step in (("fused", self.fused), ("plain", self.plain)):
            sums = {"launches": step.launches, "bytes": step.bytes, "flops": step.flops, "floor_us": step.floor_us}
            report[name]["totals"] = sums
        report |= {"share_of_bytes": self.share_of_bytes, "share_of_saved": self.share_of_saved}
        return json.dumps(report, indent=2, allow_nan=False)


def plan_step(
    name: str,
    *,
    gpu: Gpu | str = gpus.DEFAULT_GPU,
    batch_size: int = 1,
    img_size: int | None = None,
    precision: str = "bfloat16",
    recompute: str | None = None,
) -> StepPlan:
    """Plan a training step of a model, forward and backward, in channels_last memory, without loss and optimizer.

    Args:
        name: one of `effkernels.list_models()`.
        gpu: one of `effkernels.plan.gpus.GPUS`, or its name.
        batch_size: images.
        img_size: height and width of an image in pixels; None: what the model was designed for.
        precision: one of `PRECISIONS`, of weights, images and gradients.
        recompute: as of `effkernels.nn.set_recompute`.

    Raises:
        ValueError: unknown model, GPU, precision or recompute, batch_size or img_size below 1.
        RuntimeError: the compiled library is not there.
    """
    if precision not in PRECISIONS:
        raise ValueError(f"precision={precision!r} is not known; allowed: {', '.join(PRECISIONS)}")
    img_size = model_config(name).input_size[-1] if img_size is None else img_size
    networks = []
    for backend in ("auto", "reference"):
        model = create_model(name, device="meta", dtype=PRECISIONS[precision], backend=backend).train()
        set_recompute(model, recompute)
        networks.append(model)
    return plan_step_of(
        *networks,
        name=name,
        gpu=gpu,
        batch_size=batch_size,
        img_size=img_size,
        precision=precision,
        recompute=recompute,
    )


def plan_step_of(
    fused: nn.Module,
    plain: nn.Module,
    *,
    name: str,
    img_size: int,
    gpu: Gpu | str = gpus.DEFAULT_GPU,
    batch_size: int = 1,
    precision: str = "bfloat16",
    recompute: str | None = None,
) -> StepPlan:
    """Plan a training step of any network, of RGB images, in channels_last memory, without loss and optimizer.

    Args:
        fused, plain: the network with this package's training operators, and in PyTorch's own; on the meta device, in
            training mode, with parameters in the dtype of `precision`.
        name: for the plan's title.
        img_size, gpu, batch_size, precision: as of `plan_step`.
        recompute: what was set in `fused`.

    Raises:
        ValueError: unknown GPU or precision, batch_size or img_size below 1.
        RuntimeError: the compiled library is not there.
    """
    if precision not in PRECISIONS:
        raise ValueError(f"precision={precision!r} is not known; allowed: {', '.join(PRECISIONS)}")
    gpu = gpus.find(gpu) if isinstance(gpu, str) else gpu
    for argument, value in (("batch_size", batch_size), ("img_size", img_size)):
        if value < 1:
            raise ValueError(f"{argument}={value} must be at least 1")
    if not _library.is_loaded():
        raise RuntimeError(f"a plan needs the compiled library: {_library.load_error()}")
    images = torch.empty((batch_size, 3, img_size, img_size), dtype=PRECISIONS[precision], device="meta")
    images = images.contiguous(memory_format=torch.channels_last)
    steps = []
    for of, model in (("fused", fused), ("plain", plain)):
        model = model.to(memory_format=torch.channels_last)  # type: ignore[call-overload]
        steps.append(record_step(model, images, gpu, of))
    return StepPlan(name, gpu.name, batch_size, img_size, precision, recompute, *steps)


def record_step(model: nn.Module, images: Tensor, gpu: Gpu, of: str) -> Step:
    """Record the launches of a step of a model on the meta device, as a GPU with this project's kernels makes them."""
    recorder = _Recorder(gpu)
    owned = {t.untyped_storage()._cdata for t in (*model.parameters(), *model.buffers())}
    saved: dict[int, int] = {}

    def pack(t: Tensor) -> Tensor:
        storage = t.untyped_storage()
        if storage._cdata not in owned:
            saved[storage._cdata] = storage.nbytes()
        return t

    with training_steps.by_kernels(), recorder:
        with torch.autograd.graph.saved_tensors_hooks(pack, lambda t: t):
            loss = model(images)
        recorder.phase = PHASES[1]
        torch.autograd.backward(loss, torch.empty_like(loss))
    order = {phase: i for i, phase in enumerate(PHASES)}
    rows = sorted(recorder.rows(), key=lambda row: (order[row.phase], -row.bytes, row.op))
    return Step(of, tuple(rows), sum(saved.values()))


class _Recorder(TorchDispatchMode):
    def __init__(self, gpu: Gpu) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.phase = PHASES[0]
        self._gpu = gpu
        self._found: dict[tuple[str, str], list[float]] = {}

    def rows(self) -> Iterator[StepLaunches]:
        for (phase, op), (count, moved, flops, floor) in self._found.items():
            yield StepLaunches(phase, op, int(count), int(moved), int(flops), floor)

    def __torch_dispatch__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        kwargs = kwargs or {}
        whole = training.KERNELS.get(func._schema.name)
        if whole is not None:  # an operator that is several launches
            with self:
                return whole(*args, **kwargs)
        if _is_composite(func.name()):
            with self:
                return func.decompose(*args, **kwargs)
        result = func(*args, **kwargs)
        if func._schema.name == "aten::convolution" and args[0].is_contiguous(memory_format=torch.channels_last):
            result = result.contiguous(memory_format=torch.channels_last)  # as on a GPU; the meta device forgets it
        results = list(tensors_in([result]))
        if launches(func, results) or _changes_lists(func):
            self._count(func, args, kwargs, result, results)
        return result

    def _count(self, func: Any, args: Any, kwargs: Any, result: Any, results: list[Tensor]) -> None:
        read = {id(t): t for t in tensors_in((*args, *kwargs.values()))}
        if not results:
            results = list(tensors_in(args[:1]))
        moved = sum(min(t.nbytes, t.untyped_storage().nbytes()) for t in (*read.values(), *results))
        flops = _flops(func, args, kwargs, result)
        dtype = next(iter(read.values()), results[0]).dtype
        # The depthwise kernels of this project multiply by plain instructions, matrix products by tensor cores.
        plain = dtype == torch.float32 or "training_depthwise" in func._schema.name
        rate = self._gpu.float32 if plain else self._gpu.tensor
        floor = 1e6 * max(moved / self._gpu.bandwidth, flops / rate)
        sums = self._found.setdefault((self.phase, func._schema.name), [0, 0, 0, 0.0])
        launched = _SEVERAL_LAUNCHES.get(func._schema.name, 1)
        for i, value in enumerate((launched, moved, flops, floor)):
            sums[i] += value


# Operators of this project that are more than one launch.
_SEVERAL_LAUNCHES = {"effkernels::training_excite_backward": 2}


@functools.cache
def _is_composite(name: str) -> bool:
    """Whether PyTorch puts an operator together of others on every device, as casts and copies of several kinds.

    Inside the operators of this project such a call is not taken apart before it is seen.
    """
    has_kernel = torch._C._dispatch_has_kernel_for_dispatch_key
    return has_kernel(name, "CompositeImplicitAutograd") and not has_kernel(name, "CPU")


def _changes_lists(func: Any) -> bool:
    """Whether an operator without a result works in place on lists of tensors: one launch for all of them."""
    returns, arguments = func._schema.returns, func._schema.arguments
    return not returns and any(a.alias_info is not None and a.alias_info.is_write for a in arguments)


def _flops(func: Any, args: Any, kwargs: Any, result: Any) -> int:
    if func._schema.name == "aten::convolution_backward":  # PyTorch's formula takes grouped convolutions for dense ones
        dy, _, weight = args[:3]
        return int(2 * dy.numel() * math.prod(weight.shape[1:]) * sum(args[-1][:2]))
    formula = flop_registry.get(func.overloadpacket)
    return 0 if formula is None else int(formula(*args, **kwargs, out_val=result))
