"""Networks of other libraries and of a user's own code, scaled through the arguments of what builds them.

Their layers cannot be taken apart as a `StagedNetwork`'s can: depth and width are handed to the library, which rounds
them its own way, and the stages of equation 1 are read off a forward on the meta device.
"""

from __future__ import annotations

import inspect
import types
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, replace
from functools import cache, partial
from itertools import groupby
from typing import Any

import torch
from torch import Tensor, nn

from effkernels.models.compound import PUBLISHED, round_filters
from effkernels.models.peers import import_timm, import_torchvision
from effkernels.models.sources import check_timm, check_torchvision
from effkernels.scaling.counting import Cost, count
from effkernels.scaling.network import Rounding, StageRow

Build = Callable[..., nn.Module]


@dataclass(frozen=True)
class BuiltNetwork:
    """A network that a function builds at any depth and width; for `scale` and `fit` the like of a `StagedNetwork`.

    Attributes:
        name: for tables and messages.
        resolution: height and width of its input, in pixels.
        make: called as `make(depth=, width=, rounding=, num_classes=, in_chans=)`; returns the module, from images
            (N, in_chans, resolution, resolution) to logits.
        depth, width: factors on layers and channels of what `make` builds at 1.
        rounding: how the function is to round them, and how `scaled` rounds the resolution.
        channels: of its images, where `make` builds for no other number; None: whatever is asked for.
    """

    name: str = field(compare=False)
    resolution: int
    make: Build
    depth: float = 1.0
    width: float = 1.0
    rounding: Rounding = field(default_factory=Rounding)
    channels: int | None = None

    def build(
        self,
        *,
        num_classes: int = 1000,
        in_chans: int = 3,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> nn.Module:
        """Return the network as a module, with weights drawn at random, in training mode.

        Raises:
            ValueError: a depth or a width that the library cannot build.
        """
        with torch.device(device if device is not None else torch.get_default_device()):
            module = self.make(
                depth=self.depth,
                width=self.width,
                rounding=self.rounding,
                num_classes=num_classes,
                in_chans=in_chans,
            )
        return module.to(dtype=dtype).train()

    def cost(self, *, num_classes: int = 1000, in_chans: int = 3) -> Cost:
        """FLOPs, parameters and memory of one image at the network's resolution, counted, nothing is allocated."""
        return _cost(self, num_classes, in_chans)

    def scaled(
        self, *, depth: float, width: float, resolution: float, rounding: Rounding | None = None, name: str
    ) -> BuiltNetwork:
        """Return the network with its layers, channels and input multiplied; `scale` has the arguments.

        Factors multiply on, so that scaling twice by 1.2 asks the function for 1.44.

        Raises:
            ValueError: a depth or a width that the library cannot build.
        """
        rounding = rounding or self.rounding
        found = replace(
            self,
            name=name,
            resolution=rounding.pixels(self.resolution * resolution),
            depth=self.depth * depth,
            width=self.width * width,
            rounding=rounding,
        )
        found.build(device="meta")  # what cannot be built is said here, not where the network is first used
        return found

    def rows(self) -> list[StageRow]:
        """Equation 1, read off a forward: runs of layers of one class, one number of channels and one output size.

        A layer is a module in the root module or in plain `nn.Sequential` and `nn.ModuleList` containers below it;
        norms, activations and other layers without a weight matrix that keep the size are part of the layer before.
        """
        return _rows(self)


@cache
def _cost(network: BuiltNetwork, num_classes: int, in_chans: int) -> Cost:
    module = network.build(num_classes=num_classes, in_chans=in_chans, device="meta")
    return count(module, (network.channels or in_chans, network.resolution, network.resolution))


def _rows(network: BuiltNetwork) -> list[StageRow]:
    module = network.build(device="meta").eval()
    seen: list[tuple[str, int, int, int, int, int]] = []

    def watch(layer: nn.Module, arguments: tuple[Any, ...], result: Any) -> None:
        entered = arguments[0] if arguments else None
        if not (isinstance(entered, Tensor) and isinstance(result, Tensor) and entered.dim() == result.dim() == 4):
            return
        if entered.shape == result.shape and all(p.dim() < 2 for p in layer.parameters()):
            return
        seen.append((type(layer).__name__, result.shape[1], *result.shape[2:], *entered.shape[2:]))

    for layer in _layers(module):
        layer.register_forward_hook(watch)
    with torch.no_grad():
        module(torch.empty(1, network.channels or 3, network.resolution, network.resolution, device="meta"))
    rows = []
    for (operator, channels, *_), layers in groupby(seen, key=lambda layer: layer[:4]):
        run = list(layers)
        rows.append(StageRow(operator, len(run), channels, *run[0][4:]))
    return rows


def _layers(module: nn.Module) -> list[nn.Module]:
    """Return the layers below a module, in the order in which they are registered."""
    found: list[nn.Module] = []
    for child in module.children():
        found.extend(_layers(child) if type(child) in (nn.Sequential, nn.ModuleList) else [child])
    return found


def from_builder(name: str, resolution: int, build: Build, *, in_chans: int = 3) -> BuiltNetwork:
    """Return a user's own network.

    Args:
        name: for tables and messages.
        resolution: height and width of its input, in pixels.
        build: called as `build(depth, width, rounding)` with two factors and a `Rounding`, by position; returns the
            module in plain PyTorch. `Rounding.layers(3 * depth)` and `effkernels.scaling.round_filters(32, width)`
            give whole numbers. If it has parameters called `num_classes` and `in_chans`, it gets those too; else the
            network has one form, and asking for another number of classes builds that form all the same.
        in_chans: channels of its images, where `build` has no parameter for them.

    Raises:
        ValueError: a resolution or in_chans below 1, or what `build` returns at depth 1 and width 1 is no module.
        TypeError: `build` does not take the three arguments.
    """
    for word, value in (("resolution", resolution), ("in_chans", in_chans)):
        if value < 1:
            raise ValueError(f"from_builder({name!r}): {word}={value}; allowed: 1 or more")
    signature = inspect.signature(build)
    takes_all = any(p.kind is p.VAR_KEYWORD for p in signature.parameters.values())
    passed = tuple(word for word in ("num_classes", "in_chans") if takes_all or word in signature.parameters)
    try:
        signature.bind(1.0, 1.0, Rounding(), **dict.fromkeys(passed, 1))
    except TypeError as error:
        raise TypeError(f"from_builder({name!r}): build must take (depth, width, rounding): {error}") from error
    channels = None if "in_chans" in passed else in_chans
    network = BuiltNetwork(name, resolution, partial(_call_users, build, passed), channels=channels)
    network.build(device="meta")  # what it returns is looked at here, not where the network is first used
    return network


def _call_users(build: Build, passed: tuple[str, ...], *, depth: float, width: float, rounding: Rounding,
                **options: Any) -> nn.Module:  # fmt: skip
    module: Any = build(depth, width, rounding, **{word: options[word] for word in passed})
    if not isinstance(module, nn.Module):
        raise ValueError(f"from_builder: build returned {type(module).__name__}; needed: torch.nn.Module")
    return module


def from_timm(name: str, *, resolution: int | None = None, **options: Any) -> BuiltNetwork:
    """Return a timm model, scaled through timm's own arguments, which timm rounds (divisor 8, layers up).

    Models that timm builds from `channel_multiplier` and `depth_multiplier` (EfficientNet, MobileNet, MNASNet, TinyNet
    and others), and ResNets (`layers`, `channels`; a ResNet's stem keeps its channels, timm has no argument for them).
    A family without a depth multiplier can be scaled in width and resolution alone.

    Args:
        name: of the model, as `timm.create_model` knows it.
        resolution: height and width of the input; None: the model's own.
        options: for the model's constructor (drop_rate, act_layer, ...).

    Raises:
        ValueError: no such model, or none that timm can scale; the message says why.
        ImportError: timm is not installed.
    """
    timm = check_timm(name)
    entry = timm.model_entrypoint(name)
    own = timm.get_pretrained_cfg(name)
    size = resolution or (own.input_size[1] if own is not None else 224)
    if any(word.startswith("_gen_") for word in entry.__code__.co_names):
        make: Build = partial(_make_timm_multiplied, name, options)
    elif "_create_resnet" in entry.__code__.co_names:
        make = partial(_make_timm_resnet, name, options)
    else:
        raise ValueError(
            f"from_timm: timm builds {name!r} neither from multipliers nor as a ResNet, so it has no arguments to "
            "scale it by; write a function that builds it and use from_builder"
        )
    network = BuiltNetwork(f"timm {name}", size, make)
    network.build(device="meta")
    return network


_TIMM_MULTIPLIERS = {"depth": ("depth_multiplier",), "width": ("channel_multiplier", "model_width")}


def _make_timm_multiplied(
    name: str, options: Mapping[str, Any], *, depth: float, width: float, rounding: Rounding, **shape: Any
) -> nn.Module:
    """timm's function for a name calls a generator with the variant's multipliers: the same call, with larger ones.

    The multipliers are written in the function's body so a copy of the function is run in which a
    recorder replaces the generator; timm itself is not changed.
    """
    if (rounding.divisor, rounding.depth) != (8, "up"):
        raise ValueError(f"timm {name}: {rounding}; allowed: divisor=8, depth='up', which is how timm rounds")
    entry = import_timm().model_entrypoint(name)
    generator_name = next(word for word in entry.__code__.co_names if word.startswith("_gen_"))
    generator = entry.__globals__[generator_name]
    calls: list[inspect.BoundArguments] = []

    def record(*arguments: Any, **keywords: Any) -> None:
        calls.append(inspect.signature(generator).bind(*arguments, **keywords))

    twin = types.FunctionType(
        entry.__code__, {**entry.__globals__, generator_name: record}, name, entry.__defaults__, entry.__closure__
    )
    twin.__kwdefaults__ = entry.__kwdefaults__
    twin(pretrained=False, **options, **shape)
    call = calls[0]
    call.apply_defaults()
    for dimension, factor in (("depth", depth), ("width", width)):
        word = next((word for word in _TIMM_MULTIPLIERS[dimension] if word in call.arguments), None)
        if word is not None:
            call.arguments[word] *= factor
        elif factor != 1.0:
            raise ValueError(f"timm {name}: {dimension}={factor:g}; timm's {generator_name} has no multiplier for it")
    module: nn.Module = generator(*call.args, **call.kwargs)
    return module


def _make_timm_resnet(
    name: str, options: Mapping[str, Any], *, depth: float, width: float, rounding: Rounding, **shape: Any
) -> nn.Module:
    timm = import_timm()
    create = partial(timm.create_model, name, **options, **shape)
    if (depth, width) == (1.0, 1.0):
        module: nn.Module = create()
        return module
    with torch.device("meta"):
        model = create()
    stages = (model.layer1, model.layer2, model.layer3, model.layer4)
    arguments: dict[str, Any] = {"layers": tuple(rounding.layers(len(stage) * depth) for stage in stages)}
    if width != 1.0:
        expansion = type(model.layer1[0]).expansion
        last = "conv3" if hasattr(model.layer1[0], "conv3") else "conv2"
        outputs = [getattr(stage[-1], last).out_channels // expansion for stage in stages]
        arguments["channels"] = tuple(round_filters(channels, width, rounding.divisor) for channels in outputs)
    scaled: nn.Module = create(**arguments)
    return scaled


def from_torchvision(name: str, *, resolution: int | None = None, **options: Any) -> BuiltNetwork:
    """Return a torchvision model, scaled through torchvision's own arguments.

    MobileNetV2 (`inverted_residual_setting`, `width_mult`, `round_nearest`), EfficientNet B0 to B7 (`MBConvConfig`,
    which rounds by itself: divisor 8, layers up), ResNet, ResNeXt and wide ResNet with bottlenecks (`layers`,
    `width_per_group`: it widens what is inside of the bottlenecks, torchvision has no argument for their outputs),
    ResNet-18 and 34 (`layers` alone), MobileNetV3 and MNASNet (`width_mult`, `alpha`: no depth).

    Args:
        name: of the model, as `torchvision.models.get_model` knows it.
        resolution: height and width of the input; None: 224, for EfficientNet the variant's own.
        options: for the model's constructor (dropout, norm_layer, ...).

    Raises:
        ValueError: no such model, or none that torchvision can scale; the message says why.
        ImportError: torchvision is not installed.
    """
    check_torchvision(name)
    family = next((prefix for prefix in _TORCHVISION if name.startswith(prefix)), None)
    if family is None:
        raise ValueError(f"from_torchvision: torchvision has no arguments to scale {name!r} by; it has for "
                         f"{', '.join(_TORCHVISION)}...; write a function and use from_builder")  # fmt: skip
    if family == "efficientnet_b":
        resolution = resolution or PUBLISHED[name.removeprefix("efficientnet_")].resolution
    network = BuiltNetwork(f"torchvision {name}", resolution or 224, partial(_TORCHVISION[family], name, options))
    network.build(device="meta")
    return network


def _torchvision_model(name: str, in_chans: int, **arguments: Any) -> nn.Module:
    if in_chans != 3:
        raise ValueError(f"torchvision {name}: in_chans={in_chans}; allowed: 3, torchvision has no argument for it")
    module: nn.Module = import_torchvision().models.get_model(name, weights=None, **arguments)
    return module


def _refuse(name: str, dimension: str, factor: float, why: str) -> None:
    if factor != 1.0:
        raise ValueError(f"torchvision {name}: {dimension}={factor:g}; allowed: 1, {why}")


def _make_torchvision_mobilenet_v2(
    name: str, options: Mapping[str, Any], *, depth: float, width: float, rounding: Rounding, **shape: Any
) -> nn.Module:
    rows = [(1, 16, 1, 1), (6, 24, 2, 2), (6, 32, 3, 2), (6, 64, 4, 2), (6, 96, 3, 1), (6, 160, 3, 2), (6, 320, 1, 1)]
    setting = [[expand, channels, rounding.layers(n * depth), stride] for expand, channels, n, stride in rows]
    arguments: dict[str, Any] = {
        "width_mult": width,
        "inverted_residual_setting": setting,
        "round_nearest": rounding.divisor,
    }
    return _torchvision_model(name, **arguments, **options, **shape)


def _make_torchvision_efficientnet(
    name: str,
    options: Mapping[str, Any],
    *,
    depth: float,
    width: float,
    rounding: Rounding,
    in_chans: int,
    **shape: Any,
) -> nn.Module:
    if (rounding.divisor, rounding.depth) != (8, "up"):
        raise ValueError(f"torchvision {name}: {rounding}; allowed: divisor=8, depth='up', which is how torchvision "
                         "rounds")  # fmt: skip
    if in_chans != 3:
        raise ValueError(f"torchvision {name}: in_chans={in_chans}; allowed: 3, torchvision has no argument for it")
    import_torchvision()
    from torchvision.models.efficientnet import EfficientNet, MBConvConfig

    from effkernels.models.architecture import BASELINE

    own = PUBLISHED[name.removeprefix("efficientnet_")]
    setting, entering = [], BASELINE.stem_channels
    for row in BASELINE.stages:
        setting.append(
            MBConvConfig(
                row.expansion, row.kernel_size, row.stride, entering, row.channels, row.layers,
                width_mult=own.width * width, depth_mult=own.depth * depth,
            )
        )  # fmt: skip
        entering = row.channels
    arguments: dict[str, Any] = {"dropout": own.dropout, **options, **shape}
    module: nn.Module = EfficientNet(setting, **arguments)
    return module


def _make_torchvision_resnet(
    name: str, options: Mapping[str, Any], *, depth: float, width: float, rounding: Rounding, **shape: Any
) -> nn.Module:
    if (depth, width) == (1.0, 1.0):
        return _torchvision_model(name, **options, **shape)
    with torch.device("meta"):
        model: Any = _torchvision_model(name, **options, **shape)
    block = type(model.layer1[0])
    if block.expansion == 1:
        _refuse(name, "width", width, "torchvision's basic blocks have 64 channels a group and nothing else")
    stages = (model.layer1, model.layer2, model.layer3, model.layer4)
    if depth != 1.0 and "layers" in options:
        raise ValueError(f"torchvision {name}: layers={options['layers']} and depth={depth:g}; allowed: one of them")
    arguments = {
        "width_per_group": round_filters(model.base_width, width, min(rounding.divisor, model.base_width)),
        "groups": model.groups,
        **{word: value for word, value in options.items() if word not in ("groups", "width_per_group")},
        **{word: value for word, value in shape.items() if word != "in_chans"},
    }
    from torchvision.models.resnet import ResNet

    module: nn.Module = ResNet(block, [rounding.layers(len(stage) * depth) for stage in stages], **arguments)
    return module


def _make_torchvision_width(
    word: str,
    name: str,
    options: Mapping[str, Any],
    *,
    depth: float,
    width: float,
    rounding: Rounding,
    in_chans: int,
    **shape: Any,
) -> nn.Module:
    _refuse(name, "depth", depth, "torchvision has no argument for its layers")
    if rounding.divisor != 8:
        raise ValueError(f"torchvision {name}: {rounding}; allowed: divisor=8, which is how torchvision rounds")
    if word == "alpha":
        import_torchvision()
        from torchvision.models.mnasnet import MNASNet

        own = float(name.removeprefix("mnasnet").replace("_", "."))
        if in_chans != 3:
            raise ValueError(f"torchvision {name}: in_chans={in_chans}; allowed: 3, torchvision has no argument for it")
        module: nn.Module = MNASNet(own * width, **options, **shape)
        return module
    return _torchvision_model(name, in_chans, **{word: width}, **options, **shape)


_TORCHVISION: dict[str, Build] = {
    "mobilenet_v2": _make_torchvision_mobilenet_v2,
    "mobilenet_v3": partial(_make_torchvision_width, "width_mult"),
    "mnasnet": partial(_make_torchvision_width, "alpha"),
    "efficientnet_b": _make_torchvision_efficientnet,
    "resnet": _make_torchvision_resnet,
    "resnext": _make_torchvision_resnet,
    "wide_resnet": _make_torchvision_resnet,
}
