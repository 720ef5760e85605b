"""EfficientNet (Tan and Le 2019) as a classifier and as a backbone that returns feature maps.

Module names and what each module computes are timm's: `conv_stem, bn1, blocks.S.I, conv_head, bn2, global_pool,
classifier`, with the activations inside the norms (`bn1.act`). So a network may be cut by its children, hooked and
rebuilt like timm's. In eval mode every convolution runs as a fused operator, in channels_last memory from the stem on;
in training mode, and where a trace of torch.fx or torch.jit looks on, the modules run one by one.
"""

# No `from __future__ import annotations`: torch.fx writes the types into its graphs, and TorchScript reads no strings.
import math
from collections.abc import Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, fx, nn
from torch.nn.modules.batchnorm import _BatchNorm as BatchNorm
from torch.utils.checkpoint import checkpoint

from effkernels.models.architecture import Architecture
from effkernels.models.config import ModelConfig
from effkernels.models.features import FeatureInfo
from effkernels.models.pooling import GlobalPool
from effkernels.nn import BatchNormAct2d, ConvBnAct, DepthwiseSeparable, MBConv, PaddedConv2d, conv_bn_act
from effkernels.nn.conv_bn_act import conv_bn_act_pool
from effkernels.nn.norm_act import not_scriptable
from effkernels.nn.stack import run_in_stacks
from effkernels.ops.backends import BACKENDS


class _Trunk(nn.Module):
    """Stem and stages, which the classifier and the backbone share."""

    def __init__(
        self,
        architecture: Architecture,
        *,
        in_chans: int,
        drop_rate: float,
        drop_path_rate: float,
        pad_type: str,
        bn_eps: float,
        bn_momentum: float,
        backend: str | None,
        config: ModelConfig | None,
        device: torch.device | str | None,
        dtype: torch.dtype | None,
    ) -> None:
        super().__init__()
        if in_chans < 1:
            raise ValueError(f"in_chans={in_chans} must be at least 1")
        for name, rate in (("drop_rate", drop_rate), ("drop_path_rate", drop_path_rate)):
            if not 0.0 <= rate < 1.0:
                raise ValueError(f"{name}={rate} is not a probability in [0, 1)")
        self.architecture = architecture
        self.config = config
        self.in_chans = in_chans
        self.drop_rate = drop_rate
        self.grad_checkpointing = False
        self.feature_info = FeatureInfo.of(architecture)

        norm: dict[str, Any] = {"eps": bn_eps, "momentum": bn_momentum, "activation": architecture.activation}
        place: dict[str, Any] = {"device": device, "dtype": dtype}
        self.conv_stem = PaddedConv2d(in_chans, architecture.stem_channels, 3, 2, **place)
        self.bn1 = BatchNormAct2d(architecture.stem_channels, **norm, **place)

        stages: list[nn.Module] = []
        channels = architecture.stem_channels
        total = sum(stage.layers for stage in architecture.stages)
        built = 0
        for stage in architecture.stages:
            blocks: list[nn.Module] = []
            for layer in range(stage.layers):
                options: dict[str, Any] = {
                    "kernel_size": stage.kernel_size,
                    "stride": stage.stride if layer == 0 else 1,
                    "se_channels": max(1, round(channels * architecture.se_ratio)) if architecture.se_ratio else 0,
                    "activation": architecture.activation,
                    # Later blocks drop more (Huang et al. 2016, section 3), in proportion to their position.
                    "drop_path_rate": drop_path_rate * built / total,
                    "bn_eps": bn_eps,
                    "bn_momentum": bn_momentum,
                    **place,
                }
                if stage.expansion == 1:
                    blocks.append(DepthwiseSeparable(channels, stage.channels, **options))
                else:
                    blocks.append(MBConv(channels, stage.channels, expansion=stage.expansion, **options))
                channels = stage.channels
                built += 1
            stages.append(nn.Sequential(*blocks))
        self.blocks = nn.Sequential(*stages)
        self.set_padding(pad_type)
        self.backend = backend

    @property
    def backend(self) -> str | None:
        """The backend that runs the operators of the model; None: as `effkernels.backend` asks where it is called.

        Set it to change it: one of `effkernels.ops.backends.BACKENDS`, "auto" or None, which mean the same. Other
        values raise ValueError.
        """
        return self._backend

    @backend.setter
    def backend(self, backend: str | None) -> None:
        if backend not in (None, "auto", *BACKENDS):
            raise ValueError(f"backend={backend!r} is not known; allowed: None, auto, {', '.join(BACKENDS)}")
        self._backend = backend
        for module in self.modules():
            if isinstance(module, ConvBnAct | DepthwiseSeparable | MBConv):
                module.backend = backend or "auto"

    @property
    def pretrained_cfg(self) -> dict[str, Any]:
        """`config` as a dict, under the name that timm's data helpers read; empty without a config."""
        return {} if self.config is None else self.config.to_dict()

    @property
    def default_cfg(self) -> dict[str, Any]:
        """`pretrained_cfg` under timm's older name."""
        return self.pretrained_cfg

    def set_padding(self, pad_type: str) -> None:
        """Change the padding of every convolution in place.

        Args:
            pad_type: one of `effkernels.nn.PAD_TYPES`. "same_native" freezes SAME padding as it is for images of
                `config.input_size`, as lukemelas' and Hugging Face's models do.

        Raises:
            ValueError: pad_type unknown, or "same_native" for a model without a config.
        """
        if pad_type == "same_native" and self.config is None:
            raise ValueError("pad_type='same_native' needs a model with a config, which holds the native size")
        height, width = self.config.input_size[1:] if self.config is not None else (0, 0)
        self.pad_type = pad_type
        for module in self.modules():  # in the order of the forward: the stem, then block after block
            if isinstance(module, PaddedConv2d):
                module.set_padding(pad_type, (height, width))
                height, width = math.ceil(height / module.stride[0]), math.ceil(width / module.stride[1])

    def set_norm(self, *, eps: float | None = None, momentum: float | None = None) -> None:
        """Change eps or momentum of every batch norm in place; None leaves it."""
        for module in self.modules():
            if isinstance(module, BatchNorm):
                module.eps = module.eps if eps is None else eps
                module.momentum = module.momentum if momentum is None else momentum

    def set_grad_checkpointing(self, enable: bool = True) -> None:
        """Keep only the inputs of the blocks for the backward pass and compute the rest again there."""
        self.grad_checkpointing = enable

    def group_matcher(self, coarse: bool = False) -> dict[str, Any]:
        """Regular expressions that group the parameters by depth, in timm's form (for layer-wise learning rates)."""
        return {
            "stem": r"^conv_stem|^bn1",
            "blocks": [
                (r"^blocks\.(\d+)" if coarse else r"^blocks\.(\d+)\.(\d+)", None),
                (r"^conv_head|^bn2", (99999,)),
            ],
        }

    def __prepare_scriptable__(self) -> nn.Module:
        return not_scriptable(self)

    def _stem(self, x: Tensor) -> Tensor:
        if isinstance(x, Tensor) and (x.dim() != 4 or x.shape[1] != self.in_chans):  # a proxy of torch.fx has no shape
            raise ValueError(
                f"{type(self).__name__}: x has shape {tuple(x.shape)}; needed are images (N, {self.in_chans}, H, W)"
            )
        return conv_bn_act(x, self.conv_stem, self.bn1, self.architecture.activation, self._backend or "auto")

    def _run(self, blocks: nn.Module, x: Tensor) -> Tensor:
        """Run a stage, or all of them; block by block and checkpointed if that was asked for."""
        if not (self.grad_checkpointing and torch.is_grad_enabled()):
            return run_in_stacks(blocks, x)
        for module in blocks.children():
            if isinstance(module, nn.Sequential):
                x = self._run(module, x)
            else:
                x = checkpoint(module, x, use_reentrant=False)
        return x


class EfficientNet(_Trunk):
    """The classifier.

    Args:
        architecture: stem, stages and head, already scaled.
        num_classes: of the classifier; 0: none, the pooled features are the output.
        in_chans: channels of an image.
        drop_rate: dropout in front of the classifier, in training.
        drop_path_rate: stochastic depth at the last block, in training; it grows from 0 at the first.
        global_pool: "avg", "max" or "" (no pooling, which needs num_classes=0).
        pad_type: one of `effkernels.nn.PAD_TYPES`.
        bn_eps, bn_momentum: of every batch norm.
        backend: that runs the operators, one of `effkernels.ops.backends.BACKENDS`; None and "auto": as
            `effkernels.backend` asks where the model is called.
        config: what input the model expects; needed for pad_type="same_native" only.
        device, dtype: of the parameters.

    Raises:
        ValueError: an argument out of its range; the message names it.
    """

    def __init__(
        self,
        architecture: Architecture,
        *,
        num_classes: int = 1000,
        in_chans: int = 3,
        drop_rate: float = 0.0,
        drop_path_rate: float = 0.0,
        global_pool: str = "avg",
        pad_type: str = "",
        bn_eps: float = 1e-5,
        bn_momentum: float = 0.1,
        backend: str | None = None,
        config: ModelConfig | None = None,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__(
            architecture,
            in_chans=in_chans,
            drop_rate=drop_rate,
            drop_path_rate=drop_path_rate,
            pad_type=pad_type,
            bn_eps=bn_eps,
            bn_momentum=bn_momentum,
            backend=backend,
            config=config,
            device=device,
            dtype=dtype,
        )
        self.num_features = architecture.head_channels
        self.head_hidden_size = architecture.head_channels
        self.conv_head = nn.Conv2d(
            architecture.stages[-1].channels, self.num_features, 1, bias=False, device=device, dtype=dtype
        )
        self.bn2 = BatchNormAct2d(
            self.num_features,
            eps=bn_eps,
            momentum=bn_momentum,
            activation=architecture.activation,
            device=device,
            dtype=dtype,
        )
        self.global_pool = _pooling(global_pool, num_classes)
        self.classifier = _classifier(self.num_features, num_classes, device, dtype)
        self.num_classes = num_classes
        initialize_weights(self)

    def forward(self, x: Tensor) -> Tensor:
        """Compute the logits of images.

        Args:
            x: (N, in_chans, H, W), floating, NCHW or channels_last.

        Returns:
            (N, num_classes); (N, num_features) where there is no classifier.
        """
        y = self._run(self.blocks, self._stem(x))
        if self._fuses_pooling():
            means = conv_bn_act_pool(y, self.conv_head, self.bn2, self.architecture.activation, self._backend or "auto")
            if means is not None:
                return self._classify(means)
        y = self._head(y)
        # What is pooled has no memory format any more.
        return self.forward_head(y if self._pools() else _in_memory_format_of(x, y))

    def forward_features(self, x: Tensor) -> Tensor:
        """(N, num_features, H / 32, W / 32) of images (N, in_chans, H, W), in the memory format of x."""
        return _in_memory_format_of(x, self._features(x))

    def forward_head(self, x: Tensor, pre_logits: bool = False) -> Tensor:
        """Pooling, dropout and classifier on the result of `forward_features`; `pre_logits` leaves out the classifier.

        Returns:
            (N, num_classes), or (N, num_features) with pre_logits or without a classifier.
        """
        x = self.global_pool(x)
        return self._classify(x, pre_logits)

    def _classify(self, means: Tensor, pre_logits: bool = False) -> Tensor:
        """Dropout and classifier on pooled features."""
        if self.drop_rate > 0.0:
            means = F.dropout(means, p=self.drop_rate, training=self.training)
        return means if pre_logits else self.classifier(means)

    def _fuses_pooling(self) -> bool:
        """Return whether the head's convolution may compute the means itself, as far as it does not decide that."""
        pool = self.global_pool
        own = "forward_head" not in self.__dict__ and type(self).forward_head is EfficientNet.forward_head
        return own and isinstance(pool, GlobalPool) and pool.is_plain_mean()

    def get_classifier(self) -> nn.Module:
        """Return the classifier: an `nn.Linear`, or an `nn.Identity` without classes."""
        return self.classifier

    def reset_classifier(self, num_classes: int, global_pool: str | None = None) -> None:
        """Put a new, freshly initialised classifier in place, on the device and in the dtype of the model.

        Args:
            num_classes: 0: no classifier.
            global_pool: "avg", "max" or ""; None leaves the pooling.

        Raises:
            ValueError: global_pool unknown, or "" with classes.
        """
        if global_pool is not None:
            self.global_pool = _pooling(global_pool, num_classes).train(self.training)
        elif num_classes > 0 and not self._pools():
            raise ValueError(f"num_classes={num_classes} needs global_pool='avg' or 'max'; the model does not pool")
        weight = self.conv_head.weight
        classifier = _classifier(self.num_features, num_classes, weight.device, weight.dtype)
        initialize_weights(classifier)
        self.classifier = classifier.train(self.training)
        self.num_classes = num_classes

    def as_sequential(self) -> nn.Sequential:
        """Return the parts of the network in order, the stages and the dropout among them; nothing is copied.

        In eval mode the stages run fused, stem and head as they are written.
        """
        parts = (self.conv_stem, self.bn1, *self.blocks, self.conv_head, self.bn2, self.global_pool)
        return nn.Sequential(*parts, nn.Dropout(self.drop_rate).train(self.training), self.classifier)

    def forward_intermediates(
        self,
        x: Tensor,
        indices: int | Sequence[int] | None = None,
        norm: bool = False,
        stop_early: bool = False,
        output_fmt: str = "NCHW",
        intermediates_only: bool = False,
        extra_blocks: bool = False,
    ) -> list[Tensor] | tuple[Tensor, list[Tensor]]:
        """Feature maps on the way, with timm's signature.

        Args:
            x: (N, in_chans, H, W), floating, NCHW or channels_last.
            indices: which of `feature_info`: the last so many, those at these positions (negative ones from the end),
                or None for all.
            norm: has no effect: there is no norm outside of the blocks.
            stop_early: do not run what comes after the last map asked for.
            output_fmt: "NCHW".
            intermediates_only: return the list alone.
            extra_blocks: count the stem as 0 and every stage from 1 on, in place of the positions in `feature_info`.

        Returns:
            What the last module gave that ran (after all stages, the result of `forward_features`), and the maps from
            the first stage to the last, all in the memory format of x.

        Raises:
            ValueError: an index out of range, or another output_fmt.
        """
        if output_fmt != "NCHW":
            raise ValueError(f"output_fmt={output_fmt!r} is not known; allowed: 'NCHW'")
        ends = (
            list(range(len(self.blocks) + 1)) if extra_blocks else [feature["stage"] for feature in self.feature_info]
        )
        wanted = {ends[i] for i in _positions(indices, len(ends))}
        last = max(wanted) if stop_early else len(self.blocks)
        y = self._stem(x)
        intermediates = [_in_memory_format_of(x, y)] if 0 in wanted else []
        for stage, blocks in enumerate(self.blocks, start=1):
            if stage > last:
                break
            y = self._run(blocks, y)
            if stage in wanted:
                intermediates.append(_in_memory_format_of(x, y))
        if intermediates_only:
            return intermediates
        if last == len(self.blocks):
            y = self._head(y)
        return _in_memory_format_of(x, y), intermediates

    def _pools(self) -> bool:
        pool = self.global_pool
        return not (isinstance(pool, nn.Identity) or (isinstance(pool, GlobalPool) and pool.is_identity()))

    def _features(self, x: Tensor) -> Tensor:
        return self._head(self._run(self.blocks, self._stem(x)))

    def _head(self, x: Tensor) -> Tensor:
        return conv_bn_act(x, self.conv_head, self.bn2, self.architecture.activation, self._backend or "auto")


class EfficientNetFeatures(_Trunk):
    """The backbone: returns the feature maps at falling resolution instead of logits.

    Args:
        architecture: stem, stages and head; the head is not built.
        out_indices: positions among the network's feature maps (`FeatureInfo.of(architecture)`), negative ones from
            the end; None: all. Stages after the last map asked for are not run; their parameters stay, so that a
            state_dict does not depend on out_indices.
        others: as of `EfficientNet`; `drop_rate` is kept but applies to nothing.

    Raises:
        ValueError: an argument out of its range; the message names it.
    """

    def __init__(
        self,
        architecture: Architecture,
        *,
        out_indices: Sequence[int] | None = None,
        in_chans: int = 3,
        drop_rate: float = 0.0,
        drop_path_rate: float = 0.0,
        pad_type: str = "",
        bn_eps: float = 1e-5,
        bn_momentum: float = 0.1,
        backend: str | None = None,
        config: ModelConfig | None = None,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__(
            architecture,
            in_chans=in_chans,
            drop_rate=drop_rate,
            drop_path_rate=drop_path_rate,
            pad_type=pad_type,
            bn_eps=bn_eps,
            bn_momentum=bn_momentum,
            backend=backend,
            config=config,
            device=device,
            dtype=dtype,
        )
        self.feature_info = self.feature_info.select(out_indices)
        self._wanted_stages = tuple(feature["stage"] for feature in self.feature_info)
        initialize_weights(self)

    def forward(self, x: Tensor) -> list[Tensor]:
        """Return one map (N, num_chs, H / reduction, W / reduction) for each entry of `feature_info`, as x in memory.

        Args:
            x: (N, in_chans, H, W), floating, NCHW or channels_last.
        """
        features: list[Tensor] = []
        y = self._stem(x)
        for stage, blocks in enumerate(self.blocks, start=1):
            y = self._run(blocks, y)
            if stage in self._wanted_stages:
                features.append(_in_memory_format_of(x, y))
            if stage == self._wanted_stages[-1]:
                break
        return features


def initialize_weights(module: nn.Module) -> None:
    """Initialise for training from scratch as the released EfficientNet does (its `conv_kernel_initializer`).

    Convolutions: normal, variance 2 / fan_out, where fan_out counts the outputs of one group; norms: weight 1, bias 0;
    linear layers: uniform within 1 / sqrt(out_features); all biases 0. Parts on the meta device have nothing to fill.
    """
    with torch.no_grad():
        for part in module.modules():
            if getattr(part, "weight", None) is not None and part.weight.is_meta:
                continue  # normal_ on the meta device would import torch._dynamo: 1.5 seconds
            if isinstance(part, nn.Conv2d):
                fan_out = math.prod(part.kernel_size) * part.out_channels // part.groups
                part.weight.normal_(0.0, math.sqrt(2.0 / fan_out))
            elif isinstance(part, nn.Linear):
                bound = 1.0 / math.sqrt(part.out_features)
                part.weight.uniform_(-bound, bound)
            elif isinstance(part, nn.BatchNorm2d):
                part.weight.fill_(1.0)
            else:
                continue
            if part.bias is not None:
                part.bias.zero_()


def _classifier(
    features: int, num_classes: int, device: torch.device | str | None, dtype: torch.dtype | None
) -> nn.Module:
    if num_classes < 0:
        raise ValueError(f"num_classes={num_classes} must not be negative; 0 leaves out the classifier")
    return nn.Linear(features, num_classes, device=device, dtype=dtype) if num_classes > 0 else nn.Identity()


def _pooling(global_pool: str, num_classes: int) -> nn.Module:
    pool = GlobalPool(global_pool)
    if pool.is_identity() and num_classes > 0:
        raise ValueError(
            f"global_pool='' leaves maps that a classifier cannot take; num_classes={num_classes} must be 0"
        )
    return pool


def _positions(indices: int | Sequence[int] | None, count: int) -> list[int]:
    """Return positions among `count` maps: the last so many, those named, or all."""
    if indices is None:
        return list(range(count))
    found = list(range(-indices, 0)) if isinstance(indices, int) else list(indices)
    wrong = [i for i in found if not -count <= i < count]
    if wrong or not found:
        raise ValueError(f"indices={indices} must name at least one of the {count} maps, as {-count} to {count - 1}")
    return [i % count for i in found]


def _in_memory_format_of(x: Tensor | fx.Proxy, y: Tensor) -> Tensor:
    """y in channels_last where x is (and could not as well be called NCHW), else contiguous."""
    if isinstance(x, fx.Proxy):
        return y
    if x.is_contiguous(memory_format=torch.channels_last) and not x.is_contiguous():
        return y.contiguous(memory_format=torch.channels_last)
    return y.contiguous()
