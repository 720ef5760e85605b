"""The plain network of a case: the architecture out of ordinary PyTorch modules, with the case's weights.

For one of this package's networks it is timm's where timm is installed, otherwise this package's with every operator on
the reference backend, with the weights of ``check.sample_model``; for any other model it is that model, with the
weights of ``samples.sample_foreign``.
"""

from __future__ import annotations

import copy

from torch import Tensor, nn

import effkernels
from effkernels.bench.check import sample_model
from effkernels.bench.network_case import NetworkCase
from effkernels.bench.samples import sample_foreign
from effkernels.models import peers


class _OnReference(nn.Module):
    """A model of this package with every operator in plain PyTorch, whatever the backend in force."""

    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        self.model = model

    def forward(self, images: Tensor) -> Tensor:
        with effkernels.backend("reference"):
            return self.model(images)  # type: ignore[no-any-return]


def timm_model(case: NetworkCase) -> nn.Module:
    model: nn.Module = peers.import_timm().create_model(case.model).eval()
    model.load_state_dict(sample_model(case.model, case.seed).state_dict())
    return model


def timm_missing(case: NetworkCase) -> str | None:
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
    if timm_missing(case) is None:
        return timm_model(case), "timm", ("timm",)
    return _OnReference(copy.deepcopy(sample_model(case.model, case.seed))), "reference", ()
