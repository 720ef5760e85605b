"""Networks of timm, torchvision and a user's own code, scaled as those of effkernels are."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

from effkernels.models.compound import round_filters
from effkernels.models.peers import import_timm
from effkernels.scaling.budget import fit
from effkernels.scaling.catalog import find_network
from effkernels.scaling.families import BASELINES, MOBILENET_V1, MOBILENET_V2, RESNET_50
from effkernels.scaling.files import save_network
from effkernels.scaling.network import Network, Rounding, StagedNetwork, StageRow, scale
from effkernels.scaling.sources import from_builder, from_timm, from_torchvision

# What MobileNetV1 is compounded by in the paper's table 3.
COMPOUND = {"depth": 1.4, "width": 1.2, "resolution": 1.3}


def cost(network: Network) -> tuple[int, int]:
    found = network.cost()
    return found.multiply_adds, found.parameters


def chain(depth: float, width: float, rounding: Rounding) -> nn.Module:
    """Return a user's network: three convolutions at depth 1, ten classes, images of one channel."""
    channels = round_filters(16, width, rounding.divisor)
    layers: list[nn.Module] = [nn.Conv2d(1, channels, 3, 2, 1), nn.ReLU()]
    for _ in range(rounding.layers(2 * depth)):
        layers += [nn.Conv2d(channels, channels, 3, padding=1), nn.BatchNorm2d(channels), nn.ReLU()]
    return nn.Sequential(*layers, nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(channels, 10))


class TestTimm:
    @pytest.mark.parametrize(
        ("name", "own"), [("mobilenetv1_100", MOBILENET_V1), ("mobilenetv2_100", MOBILENET_V2)], ids=lambda value: value
    )
    def test_scaled_by_timm_is_scaled_here(self, name: str, own: StagedNetwork) -> None:
        """Two implementations, one of them not ours, make the same network out of the same factors."""
        assert cost(from_timm(name)) == cost(own)
        assert cost(scale(from_timm(name), **COMPOUND)) == cost(scale(own, **COMPOUND))

    def test_resnet(self) -> None:
        network = from_timm("resnet50")
        assert cost(network) == cost(RESNET_50)
        assert cost(scale(network, depth=2)) == cost(scale(RESNET_50, depth=2))
        wide, own = scale(network, width=2), scale(RESNET_50, width=2)
        assert [row.channels for row in wide.rows()[2:6]] == [row.channels for row in own.rows()[2:]]
        assert wide.rows()[0].channels == 64  # timm has no argument for it

    def test_a_variant_scales_from_its_own_multipliers(self) -> None:
        timm = import_timm()
        with torch.device("meta"):
            b2 = timm.create_model("efficientnet_b2")
        scaled = scale(from_timm("efficientnet_b1"), depth=1.2 / 1.1, width=1.1)
        assert scaled.cost().parameters == sum(p.numel() for p in b2.parameters())

    def test_timm_is_left_as_it_is(self) -> None:
        timm = import_timm()
        before = dict(vars(timm.models.efficientnet))
        scale(from_timm("mobilenetv2_100", drop_rate=0.1), width=1.5).build(num_classes=3, device="meta")
        assert dict(vars(timm.models.efficientnet)) == before

    def test_builds_what_is_asked_for(self) -> None:
        network = scale(from_timm("mobilenetv2_050", resolution=64), width=0.5)
        module = network.build(num_classes=4, in_chans=1, dtype=torch.float64).eval()
        assert module(torch.randn(1, 1, 64, 64, dtype=torch.float64)).shape == (1, 4)

    @pytest.mark.parametrize(
        ("make", "message"),
        [
            (lambda: from_timm("mobilenetv9"), "has no model 'mobilenetv9'"),
            (lambda: from_timm("vgg11"), "timm builds 'vgg11' neither from multipliers nor as a ResNet"),
            (lambda: scale(from_timm("mnasnet_100"), depth=2), "depth=2; timm's _gen_mnasnet_b1 has no multiplier"),
            (
                lambda: scale(from_timm("mobilenetv2_100"), width=2, rounding=Rounding(divisor=16)),
                "allowed: divisor=8, depth='up', which is how timm rounds",
            ),
        ],
    )
    def test_what_timm_cannot_scale_is_said(self, make: Any, message: str) -> None:
        with pytest.raises(ValueError, match=message):
            make()


class TestTorchvision:
    def test_mobilenet_v2(self) -> None:
        network = from_torchvision("mobilenet_v2")
        assert cost(network) == cost(MOBILENET_V2)
        assert cost(scale(network, **COMPOUND)) == cost(scale(MOBILENET_V2, **COMPOUND))
        coarse = Rounding(divisor=32, depth="nearest")
        assert cost(scale(network, width=1.3, depth=1.5, rounding=coarse)) == cost(
            scale(MOBILENET_V2, width=1.3, depth=1.5, rounding=coarse)
        )

    def test_efficientnet(self) -> None:
        assert cost(from_torchvision("efficientnet_b1")) == cost(find_network("efficientnet_b1"))
        assert from_torchvision("efficientnet_b1").resolution == 240
        assert cost(scale(from_torchvision("efficientnet_b0"), 1)) == cost(scale(BASELINES["efficientnet_b0"], 1))

    def test_resnet_is_widened_inside_of_its_bottlenecks(self) -> None:
        network = from_torchvision("resnet50")
        wide = scale(network, width=2)
        assert cost(wide) == cost(from_torchvision("wide_resnet50_2"))
        assert [row.channels for row in wide.rows()] == [row.channels for row in network.rows()]
        assert cost(scale(network, depth=2)) == cost(scale(RESNET_50, depth=2))

    def test_rows(self) -> None:
        assert from_torchvision("resnet18").rows()[:3] == [
            StageRow("Conv2d", 1, 64, 224, 224),
            StageRow("MaxPool2d", 1, 64, 112, 112),
            StageRow("BasicBlock", 2, 64, 56, 56),
        ]

    @pytest.mark.parametrize(
        ("make", "message"),
        [
            (lambda: from_torchvision("resnet51"), "has no classifier 'resnet51'"),
            (lambda: from_torchvision("vgg11"), "torchvision has no arguments to scale 'vgg11' by"),
            (lambda: scale(from_torchvision("resnet18"), width=2), "width=2; allowed: 1, torchvision's basic blocks"),
            (lambda: scale(from_torchvision("mobilenet_v3_small"), depth=2), "depth=2; allowed: 1"),
            (lambda: scale(from_torchvision("mnasnet0_5"), depth=2), "depth=2; allowed: 1"),
            (lambda: from_torchvision("mobilenet_v2").build(in_chans=1), "in_chans=1; allowed: 3"),
        ],
    )
    def test_what_torchvision_cannot_scale_is_said(self, make: Any, message: str) -> None:
        with pytest.raises(ValueError, match=message):
            make()


class TestUsersOwn:
    def test_scales(self) -> None:
        network = from_builder("chain", 12, chain, in_chans=1)
        bigger = scale(network, depth=2, width=1.5, resolution=2)
        assert network.rows()[0] == StageRow("Conv2d", 3, 16, 12, 12)
        assert bigger.rows()[0] == StageRow("Conv2d", 5, 24, 24, 24)
        multiply_adds, parameters = cost(bigger)
        assert multiply_adds == 144 * 24 * 9 + 4 * 144 * 24 * 24 * 9 + 24 * 10
        assert parameters == 24 * 10 + 4 * (24 * 24 * 9 + 3 * 24) + 250
        assert bigger.build()(torch.randn(2, 1, 24, 24)).shape == (2, 10)
        assert scale(scale(network, width=1.5), width=2) == scale(network, width=3)

    def test_fits_a_budget(self) -> None:
        network = from_builder("chain", 12, chain, in_chans=1)
        found = fit(network, max_multiply_adds=3 * network.cost().multiply_adds)
        assert network.cost().multiply_adds < found.cost.multiply_adds <= 3 * network.cost().multiply_adds

    def test_gets_classes_and_channels_where_it_takes_them(self) -> None:
        def linear(depth: float, width: float, rounding: Rounding, num_classes: int, in_chans: int) -> nn.Module:
            return nn.Sequential(nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(in_chans, num_classes))

        network = from_builder("linear", 8, linear)
        assert network.cost(num_classes=7, in_chans=5).parameters == 5 * 7 + 7
        assert network.build(num_classes=2)(torch.randn(1, 3, 8, 8)).shape == (1, 2)

    def test_what_is_no_builder_is_refused(self) -> None:
        with pytest.raises(TypeError, match=r"build must take \(depth, width, rounding\): too many positional"):
            from_builder("x", 8, lambda depth: nn.Identity())
        with pytest.raises(ValueError, match="build returned int"):
            from_builder("x", 8, lambda depth, width, rounding: 5)  # type: ignore[arg-type,return-value]
        with pytest.raises(ValueError, match="resolution=0"):
            from_builder("x", 0, chain)


class TestFindNetwork:
    def test_every_form(self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        assert find_network("mobilenet_v2") is MOBILENET_V2
        assert find_network("efficientnet_b3").resolution == 300
        assert find_network("torchvision:resnet18").name == "torchvision resnet18"
        save_network(MOBILENET_V1, tmp_path / "saved.json")
        assert find_network(str(tmp_path / "saved.json")) == MOBILENET_V1
        (tmp_path / "their_networks.py").write_text(
            "from effkernels.scaling import MOBILENET_V2, scale\n"
            "number = 5\n"
            "def small():\n    return scale(MOBILENET_V2, -1)\n"
        )
        monkeypatch.chdir(tmp_path)
        assert find_network("their_networks:small") == scale(MOBILENET_V2, -1)
        with pytest.raises(ValueError, match="their_networks:number is a int; needed: a StagedNetwork"):
            find_network("their_networks:number")
        with pytest.raises(ValueError, match="their_networks has no large"):
            find_network("their_networks:large")

    @pytest.mark.parametrize(
        ("text", "message"),
        [
            ("resnet", "network 'resnet' is not known; allowed: efficientnet_b0, mobilenet_v1"),
            ("efficientnet_b9", "variant 'efficientnet_b9'; allowed: b0, b1"),
            ("nowhere:net", "No module named 'nowhere'"),
            ("nowhere.json", "nowhere.json: "),
        ],
    )
    def test_what_is_not_there_is_said(self, text: str, message: str) -> None:
        with pytest.raises(ValueError, match=message):
            find_network(text)
