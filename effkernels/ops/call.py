"""One call of an operator by its sizes and options, and the tensors that such a call takes.

Tests, benchmarks, the tuner and the fuzzer describe calls by an `OpCall` and draw its tensors where they need them.
Which tensors there are, and in which order, is read from the schemas (`schemas.inc`).
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field, replace
from functools import cache
from typing import Any, TypeVar

import torch
from torch import Tensor
from torch.utils.flop_counter import FlopCounterMode

from effkernels._norm import gather_norms
from effkernels.ops import reference
from effkernels.ops._signature import Signature

DEPTHWISE_OPS = ("depthwise_bn_act", "depthwise_bn_act_squeeze", "depthwise_bn_act_gate", "depthwise_bn_act_se")

IMAGES = ("x", "residual")
"""The arguments that are images: (N, channels, height, width), in channels_last memory."""

_OF_IMAGES = (*IMAGES, "pooled", "gate")  # the arguments that have a batch
_MAKES_CHANNELS = ("pointwise_bn_act", "pointwise_bn_act_pool", "conv_bn_act", "expand_depthwise_squeeze", "mbconv")

PreparedCall = Callable[[], tuple[Tensor, ...]]
"""A call with its arguments; returns all results as a tuple."""

Self = TypeVar("Self", bound="OpCall")


@dataclass(frozen=True, kw_only=True)
class OpCall:
    """One call of one operator, without the values of its tensors and without their dtypes.

    A field that an operator has no use for keeps its default.

    Attributes:
        op: name in `effkernels.ops`.
        batch: images of x.
        channels: of x or pooled.
        out_channels: of the result of a 1x1 or a dense convolution, of `expand_depthwise_squeeze` and of `mbconv`.
        expanded: channels between the 1x1 convolutions of `mbconv`; 0: it has no expansion.
        reduced: channels between the two products of squeeze-and-excitation; 0 leaves it out of `mbconv`.
        height, width: of x, in pixels.
        kernel: height and width of the convolution's kernel.
        stride, padding, dilation: of the convolution; padding is (top, bottom, left, right).
        activation, expand_activation, se_activation, gate_activation: arguments of the operator.
        norm: "full"; "statistics", which has no weight and bias; or "none".
        bias: whether convolutions have one.
        se_bias: whether the products of squeeze-and-excitation have one.
        gated, residual: whether a gate and a residual are given.
        matrix_rank: 4 if the matrices of squeeze-and-excitation are weights of 1x1 convolutions, 2 if they are plain.
        allow_tf32: argument of the operator; None: as PyTorch is set.
    """

    op: str = field(kw_only=False)
    batch: int = 1
    channels: int
    out_channels: int = 0
    expanded: int = 0
    reduced: int = 0
    height: int = 1
    width: int = 1
    kernel: tuple[int, int] = (1, 1)
    stride: int = 1
    padding: tuple[int, int, int, int] = (0, 0, 0, 0)
    dilation: int = 1
    activation: str = "silu"
    expand_activation: str = "silu"
    se_activation: str = "silu"
    gate_activation: str = "sigmoid"
    norm: str = "full"
    bias: bool = False
    se_bias: bool = True
    gated: bool = False
    residual: bool = False
    matrix_rank: int = 4
    allow_tf32: bool | None = None

    @classmethod
    def on(cls: type[Self], op: str, shape: tuple[int, ...], kernel: int | tuple[int, int] = 3, **fields: Any) -> Self:
        """Return a call on images of a shape, (N, C, H, W), or on pooled channels, (N, C).

        Of what ``fields`` do not name, the padding is half the kernel, so that a stride of 1 keeps the size, and
        squeeze-and-excitation has a quarter of the channels, and `mbconv` expands them by 6.

        Args:
            kernel: height and width of a depthwise or dense convolution's kernel, or one number for both.
        """
        sizes: dict[str, Any] = dict(zip(("batch", "channels", "height", "width"), shape, strict=False))
        names = _arguments(op)
        if "padding" in names:
            rows, columns = (kernel, kernel) if isinstance(kernel, int) else kernel
            dilation = fields.get("dilation", 1)
            vertical, horizontal = dilation * (rows // 2), dilation * (columns // 2)
            fields = {"kernel": (rows, columns), "padding": (vertical, vertical, horizontal, horizontal), **fields}
        if "w_reduce" in names:
            fields = {"reduced": max(1, sizes["channels"] // 4), **fields}
        if "project_weight" in names:
            fields = {"expanded": 6 * sizes["channels"], **fields}
        return cls(op, **sizes, **fields)

    @classmethod
    def of(cls: type[Self], op: str, arguments: Mapping[str, Any]) -> Self:
        """Return the description of a call whose arguments are given by their names in the schema.

        allow_tf32 is left to PyTorch's setting, and `norm_eps` is not described.

        Raises:
            ValueError: the tensors are not those of such a call, such as one norm with and one without statistics.
        """
        shapes = {name: tuple(t.shape) for name, t in tensors(arguments)}
        sizes = shapes.get("x") or shapes["pooled"]
        fields: dict[str, Any] = dict(zip(("batch", "channels", "height", "width"), sizes, strict=False))
        for name, is_tensor in _arguments(op).items():
            if not is_tensor and name != "allow_tf32" and not name.endswith("norm_eps"):
                fields[name] = tuple(arguments[name]) if name == "padding" else arguments[name]
        if "weight" in shapes:
            fields["norm"] = "full" if "norm_weight" in shapes else "statistics" if "norm_mean" in shapes else "none"
            fields["bias"] = "bias" in shapes
            if op == "mbconv":
                expanded = shapes["weight"][0] if "expand_weight" in shapes else 0
                fields |= {"expanded": expanded, "out_channels": shapes["project_weight"][0]}
                if not expanded:
                    del fields["expand_activation"]
            elif op in _MAKES_CHANNELS:
                fields["out_channels"] = shapes["weight"][0]
            if "padding" in fields:
                fields["kernel"] = shapes["weight"][2:]
        if "w_reduce" in shapes:
            fields |= {"reduced": shapes["w_reduce"][0], "matrix_rank": len(shapes["w_reduce"])}
            fields["se_bias"] = "b_reduce" in shapes
        call = cls(op, **fields, gated="gate" in shapes, residual="residual" in shapes)
        if call.shapes() != shapes:
            raise ValueError(f"{op}: tensors of the shapes {shapes} are no call that OpCall describes")
        return call

    def with_(self: Self, **changes: Any) -> Self:
        """Return the call with some fields changed."""
        return replace(self, **changes)

    def __str__(self) -> str:
        """The call in words, such as 'pointwise_bn_act 2x96x14x14 to 24, gate, residual'."""
        words = f"{self.op} {self.size}"
        to = f" to {self.out_channels}" if self.op in _MAKES_CHANNELS else ""
        if self.op in ("expand_depthwise_squeeze", "mbconv"):
            through = f" through {self.expanded}" if self.op == "mbconv" and self.expanded else ""
            words += f"{through}{to}, {self.window}"
        else:
            words += f" {self.window}{to}" if self.window else to
        return words + ", gate" * self.gated + ", residual" * self.residual

    @property
    def size(self) -> str:
        """The shape of x or of pooled in words."""
        shapes = self.shapes()
        return "x".join(map(str, shapes.get("x") or shapes["pooled"]))

    @property
    def window(self) -> str:
        """Kernel and stride of a depthwise or dense convolution in words; "" for another operator."""
        rows, columns = self.kernel
        dilated = f", dilation {self.dilation}" if self.dilation > 1 else ""
        return f"{rows}x{columns} stride {self.stride}{dilated}" if "padding" in _arguments(self.op) else ""

    def shapes(self) -> dict[str, tuple[int, ...]]:
        """Return the shape of every tensor that is given, by its name in the schema, in the order of the schema."""
        channels = self._convolved
        weights = {"conv_bn_act": (self.channels, *self.kernel)}
        weights |= dict.fromkeys(("pointwise_bn_act", "pointwise_bn_act_pool"), (self.channels, 1, 1))
        tail = (1, 1) if self.matrix_rank == 4 else ()
        larger: dict[str, tuple[int, ...]] = {
            "x": (self.batch, self.channels, self.height, self.width),
            "pooled": (self.batch, self.channels),
            "expand_weight": (channels, self.channels, 1, 1),
            "weight": (channels, *weights.get(self.op, (1, *self.kernel))),
            "gate": (self.batch, self.channels),
            "residual": (self.batch, self.out_channels, *self._result_size),
            "w_reduce": (self.reduced, self._excited, *tail),
            "b_reduce": (self.reduced,),
            "w_expand": (self._excited, self.reduced, *tail),
            "project_weight": (self.out_channels, channels, 1, 1),
        }
        names = [name for name, is_tensor in _arguments(self.op).items() if is_tensor and self._has(name)]
        vectors = {name: (self.out_channels if name.startswith("project_") else channels,) for name in names}
        return {name: larger.get(name, vectors[name]) for name in names}

    @property
    def _convolved(self) -> int:
        """The channels of the result of the convolution whose weight is called `weight`."""
        if self.op == "mbconv":
            return self.expanded or self.channels
        return self.out_channels if self.op in _MAKES_CHANNELS else self.channels

    @property
    def _excited(self) -> int:
        """The channels of the gate."""
        return self._convolved if self.op == "mbconv" else self.channels

    @property
    def _result_size(self) -> tuple[int, int]:
        """Height and width of the result of a convolution by 1x1, and of a whole block."""
        if self.op != "mbconv":
            return self.height, self.width
        top, bottom, left, right = self.padding
        height, width = (
            (size + before + after - self.dilation * (kernel - 1) - 1) // self.stride + 1
            for size, before, after, kernel in (
                (self.height, top, bottom, self.kernel[0]),
                (self.width, left, right, self.kernel[1]),
            )
        )
        return height, width

    @property
    def _lacks_expansion(self) -> bool:
        return self.op == "mbconv" and not self.expanded

    def _has(self, name: str) -> bool:
        """Return whether a tensor of the schema is given."""
        if self._lacks_expansion and name.startswith("expand_"):
            return False
        if name.endswith(("norm_mean", "norm_var")):
            return self.norm != "none"
        if name.endswith(("norm_weight", "norm_bias")):
            return self.norm == "full"
        if self.op == "mbconv" and not self.reduced and name in ("w_reduce", "b_reduce", "w_expand", "b_expand"):
            return False
        if name.startswith("b_"):
            return self.se_bias
        if name.endswith("bias"):
            return self.bias
        return {"gate": self.gated, "residual": self.residual}.get(name, True)

    def options(self) -> dict[str, Any]:
        """Return the arguments that are no tensors, by name; those that it does not set keep their defaults."""
        names = (name for name, is_tensor in _arguments(self.op).items() if not is_tensor)
        found = {name: getattr(self, name) for name in names if not name.endswith("norm_eps")}
        if self._lacks_expansion:
            found["expand_activation"] = "identity"
        return {name: value for name, value in found.items() if value is not None}

    def arguments(
        self,
        dtype: torch.dtype = torch.float32,
        device: torch.device | str = "cpu",
        *,
        seed: int = 0,
        dtypes: Mapping[str, torch.dtype] | None = None,
        images: int | None = None,
    ) -> dict[str, Any]:
        """Return the arguments by their names in the schema, with random tensors of a size of about 1.

        The values are drawn on the CPU in float32, and are the same on every device; on "meta" there are none.

        Args:
            dtype: of images and matrices. Vectors of a value per channel and pooled channels are float32 at the least.
            dtypes: of single tensors by name, in place of those.
            images: of the batch that are drawn; the others repeat them. None: all of them.
        """
        generator = torch.Generator().manual_seed(seed)
        absent = {name: None for name, is_tensor in _arguments(self.op).items() if is_tensor and name.startswith("b_")}
        if self._lacks_expansion:
            absent["expand_weight"] = None
        arguments: dict[str, Any] = {**absent, **self.options()}
        for name, shape in self.shapes().items():
            is_vector = len(shape) == 1 or name == "pooled"
            own = (dtypes or {}).get(name, torch.promote_types(dtype, torch.float32) if is_vector else dtype)
            if torch.device(device).type == "meta":
                t = torch.empty(shape, dtype=own, device=device)
            else:
                count = shape[0] if images is None or name not in _OF_IMAGES else min(images, shape[0])
                t = draw(name, (count, *shape[1:]), generator).to(device, own)
                if count < shape[0]:
                    t = t.repeat(-(-shape[0] // count), *[1] * (t.ndim - 1))[: shape[0]]
            arguments[name] = t.contiguous(memory_format=torch.channels_last) if name in IMAGES else t
        return arguments

    def bytes_moved(self, dtype: torch.dtype) -> int:
        """Return the least bytes of a call in ``dtype``: every argument read once, every result written once."""
        arguments = self.arguments(dtype, "meta")
        results = run(reference, self.op, arguments)
        return sum(t.nbytes for t in (*(t for _, t in tensors(arguments)), *results))

    def flops(self) -> int:
        """Return the FLOPs of its convolutions and matrix products, two for each multiply-add."""
        with FlopCounterMode(display=False) as counter:
            run(reference, self.op, self.arguments(device="meta"))
        return int(counter.get_total_flops())


@cache
def _arguments(op: str) -> dict[str, bool]:
    """Return the arguments of an operator by name, and whether each is a tensor, in the order of the schema."""
    return {argument.name: "Tensor" in str(argument.type) for argument in Signature(op).flat}


def draw(name: str, shape: tuple[int, ...], generator: torch.Generator) -> Tensor:
    """Return normal numbers in float32 for a tensor argument, of a spread that keeps results at a size of about 1."""
    t = torch.randn(shape, generator=generator)
    if name.endswith("norm_var"):
        return 0.25 + 0.5 * t.abs()
    if name.endswith("norm_weight"):
        return 0.5 + 0.5 * t.abs()
    if name.endswith("norm_mean"):
        return 0.5 * t
    if name == "gate":
        return t.sigmoid()
    if name.endswith("weight") or name.startswith("w_"):
        return t / math.sqrt(math.prod(shape[1:]))
    return t


def tensors(arguments: Mapping[str, Any]) -> Iterator[tuple[str, Tensor]]:
    """Return the tensors among arguments, with their names."""
    return ((name, a) for name, a in arguments.items() if isinstance(a, Tensor))


def input_of(arguments: Mapping[str, Any]) -> Tensor:
    """Return x or pooled, by whose device and dtype a backend is chosen."""
    found: Tensor = arguments["x" if "x" in arguments else "pooled"]
    return found


def in_float64(arguments: Mapping[str, Any]) -> dict[str, Any]:
    """Return the same arguments with every tensor in float64."""
    return {name: a.double() if isinstance(a, Tensor) else a for name, a in arguments.items()}


def prepared(module: Any, op: str, arguments: Mapping[str, Any]) -> PreparedCall:
    """Return a function that calls ``module.<op>``.

    Args:
        module: `effkernels.ops`, `effkernels.ops.reference`, or whatever has a function of that name.
        arguments: by their names in the schema.
    """
    function, given = getattr(module, op), gather_norms(arguments)

    def call() -> tuple[Tensor, ...]:
        result = function(**given)
        return result if isinstance(result, tuple) else (result,)

    return call


def run(module: Any, op: str, arguments: Mapping[str, Any]) -> tuple[Tensor, ...]:
    """Return all results of a call of ``module.<op>``; arguments as of `prepared`."""
    return prepared(module, op, arguments)()
