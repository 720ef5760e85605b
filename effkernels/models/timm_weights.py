"""The weights that timm publishes on the Hugging Face hub for the registered names: tags, and what each one expects.

The repository of a tag is `timm/NAME.TAG`. `tests/test_models_pretrained.py` compares the table with timm's own.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import replace
from types import MappingProxyType
from typing import Any

from effkernels.models.config import ModelConfig


def _square(size: int, crop_pct: float = 0.875, test_size: int | None = None, **others: Any) -> dict[str, Any]:
    """Training input of size x size pixels; timm tests at test_size without a border."""
    values = {"input_size": (3, size, size), "crop_pct": crop_pct, **others}
    if test_size is not None:
        values |= {"test_input_size": (3, test_size, test_size), "test_crop_pct": 1.0}
    return values


_HALF = {"mean": (0.5, 0.5, 0.5), "std": (0.5, 0.5, 0.5)}

# Tag -> what differs from the config of the name without a tag. The first tag is the default.
_TENSORFLOW: dict[str, dict[str, Any]] = {"ns_jft_in1k": {}, "ap_in1k": _HALF, "aa_in1k": {}, "in1k": {}}
_TENSORFLOW_B5: dict[str, dict[str, Any]] = {
    "ns_jft_in1k": {}, "ap_in1k": _HALF, "ra_in1k": {}, "aa_in1k": {}, "in1k": {},
}  # fmt: skip
_TENSORFLOW_B7: dict[str, dict[str, Any]] = {"ns_jft_in1k": {}, "ap_in1k": _HALF, "ra_in1k": {}, "aa_in1k": {}}

TIMM_WEIGHTS: Mapping[str, Mapping[str, Mapping[str, Any]]] = MappingProxyType(
    {
        "efficientnet_b0": {"ra_in1k": {}, "ra4_e3600_r224_in1k": _square(224, 0.9, 256, **_HALF)},
        "efficientnet_b1": {
            "ra4_e3600_r240_in1k": _square(240, 0.9, 288, **_HALF),
            "ft_in1k": _square(224, test_size=256),
        },
        "efficientnet_b2": {"ra_in1k": _square(256, test_size=288)},
        "efficientnet_b3": {"ra2_in1k": _square(288, test_size=320)},
        "efficientnet_b4": {"ra2_in1k": _square(320, test_size=384)},
        "efficientnet_b5": {
            "sw_in12k_ft_in1k": _square(448, 1.0, crop_mode="squash"),
            "sw_in12k": _square(416, 0.95, num_classes=11821),
        },
        "efficientnet_lite0": {"ra_in1k": {}},
        **{f"tf_efficientnet_b{i}": _TENSORFLOW for i in range(5)},
        "tf_efficientnet_b5": _TENSORFLOW_B5,
        "tf_efficientnet_b6": {"ns_jft_in1k": {}, "ap_in1k": _HALF, "aa_in1k": {}},
        "tf_efficientnet_b7": _TENSORFLOW_B7,
        **{f"tf_efficientnet_lite{i}": {"in1k": {}} for i in range(5)},
    }
)
"""Name -> tag -> fields of `ModelConfig` that differ from the config of the name without a tag."""


def timm_weights(config: ModelConfig) -> Iterator[ModelConfig]:
    """Yield the config of each of timm's weights for a name, the default first; nothing where timm has none."""
    for tag, values in TIMM_WEIGHTS.get(config.name, {}).items():
        yield replace(config, tag=tag, hf_hub_id=f"timm/{config.name}.{tag}", **values)
