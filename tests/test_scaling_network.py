"""Equations 1 and 2: a network as stages, what it costs, scaled in any dimension, and fitted into a budget."""

from __future__ import annotations

import copy
import json
import os
import pickle
import subprocess
import sys
import weakref
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn
from torch.utils.flop_counter import FlopCounterMode

from effkernels import scaling
from effkernels.models.compound import EFFICIENTNET, CompoundScaling
from effkernels.scaling.budget import ALONG, Budget, fit
from effkernels.scaling.counting import count
from effkernels.scaling.families import BASELINES, EFFICIENTNET_B0, MOBILENET_V2, RESNET_50, build_sequential
from effkernels.scaling.files import load_network, network_to_dict, save_network
from effkernels.scaling.network import Rounding, Stage, StagedNetwork, StageRow, scale

TINY = StagedNetwork(
    "tiny",
    16,
    (
        Stage("conv", 1, 8, 2, options={"activation": "relu"}, deepens=False),
        Stage("inverted_residual", 2, 16, 2, 5, {"expansion": 6, "activation": "silu", "se_ratio": 0.25}),
        Stage("bottleneck", 1, 32, 2, options={"expansion": 4}),
    ),
    build_sequential,
)


class TestCost:
    def test_by_hand(self) -> None:
        """A 3x3 convolution, 3 to 8 channels on 4x4 pixels, norm, ReLU, mean, classifier of 5."""
        one = StagedNetwork("one", 4, (Stage("conv", 1, 8, options={"activation": "relu"}),), build_sequential)
        cost = one.cost(num_classes=5)
        assert cost.multiply_adds == 4 * 4 * 8 * (3 * 3 * 3) + 8 * 5
        assert cost.parameters == 8 * 27 + 2 * 8 + (8 * 5 + 5)
        image, convolved, activated, pooled = 3 * 16, 8 * 16, 8 * 16, 8
        assert cost.activation_bytes == 4 * (image + convolved + activated + pooled)

    @pytest.mark.parametrize("inplace", [False, True])
    def test_what_is_computed_in_place_is_kept_once(self, inplace: bool) -> None:
        layers = [nn.Conv2d(3, 4, 1), nn.BatchNorm2d(4), nn.ReLU(inplace), nn.Conv2d(4, 4, 1)]
        cost = count(nn.Sequential(*layers).to("meta"), (3, 5, 5))
        # The image, the norm's input, the ReLU's result (saved by two); not the norm's result, not the last result.
        assert cost.activation_bytes == 4 * 25 * (3 + 4 + 4)

    def test_views_and_tensors_of_several_users_are_kept_once(self) -> None:
        class Fork(nn.Module):
            def __init__(self) -> None:
                super().__init__()
                self.left, self.right = nn.Conv2d(3, 3, 1, device="meta"), nn.Conv2d(3, 3, 1, device="meta")
                self.classifier = nn.Linear(75, 2, device="meta")

            def forward(self, x: Tensor) -> Tensor:
                y = (self.left(x) + self.right(x.contiguous())).flatten(1)
                return self.classifier(y) + self.classifier(y.view_as(y))

        # The image once for both convolutions, their sum once for both products; an addition needs nothing.
        assert count(Fork(), (3, 5, 5)).activation_bytes == 4 * (75 + 75)

    def test_batch_statistics_are_no_activations(self) -> None:
        norm = count(nn.BatchNorm2d(64).to("meta"), (64, 2, 2))
        assert norm.activation_bytes == 4 * 64 * 4

    @pytest.mark.parametrize("network", [TINY, replace(MOBILENET_V2, resolution=32)], ids=lambda network: network.name)
    def test_multiply_adds_are_half_the_flops_of_a_real_forward(self, network: StagedNetwork) -> None:
        module = network.build(num_classes=7).eval()
        with torch.no_grad(), FlopCounterMode(display=False) as counter:  # through the fused operators' formulas
            module(torch.randn(2, 3, network.resolution, network.resolution))
        assert network.cost(num_classes=7).multiply_adds == counter.get_total_flops() // 4
        assert network.cost(num_classes=7).parameters == sum(p.numel() for p in module.parameters())

    def test_no_file_is_left(self) -> None:
        """An activation saves its own result; the graph must not live on as a cycle through it."""

        class Mark:
            pass

        marks = []

        def mark(module: nn.Module, arguments: tuple[Tensor, ...], result: Tensor) -> None:
            own = Mark()
            assert result.grad_fn is not None
            result.grad_fn.metadata["mark"] = own
            marks.append(weakref.ref(own))

        layer = nn.ReLU()
        layer.register_forward_hook(mark)
        count(nn.Sequential(nn.Conv2d(2, 2, 1), layer, nn.Conv2d(2, 2, 1)).to("meta"), (2, 4, 4))
        assert [own() for own in marks] == [None]

    def test_memory_is_asked_for_on_the_meta_device(self) -> None:
        with pytest.raises(ValueError, match=r"0\.weight is not on the meta device"):
            count(nn.Sequential(nn.Conv2d(3, 4, 1)), (3, 5, 5))


class TestStages:
    def test_equation_1(self) -> None:
        assert [(row.operator, row.layers, row.channels, row.height, row.width) for row in TINY.rows()] == [
            ("conv", 1, 8, 16, 16),
            ("inverted_residual", 2, 16, 8, 8),
            ("bottleneck", 1, 32, 4, 4),
        ]

    @pytest.mark.parametrize("resolution", [16, 17, 33])
    def test_sizes_are_those_of_a_forward(self, resolution: int) -> None:
        network = replace(TINY, resolution=resolution)
        module: Any = network.build(device="meta").eval()
        entered = []
        for stage in module.stages:
            stage.register_forward_pre_hook(lambda _, arguments: entered.append(arguments[0].shape[2]))
        with torch.no_grad():
            module(torch.empty(1, 3, resolution, resolution, device="meta"))
        assert [row.height for row in network.rows()] == entered

    def test_stages_are_frozen_and_travel(self) -> None:
        options = {"expansion": 6, "activation": "silu"}
        stage = Stage("inverted_residual", 2, 16, options=options)
        options["expansion"] = 1
        assert stage.options["expansion"] == 6
        with pytest.raises(TypeError):
            stage.options["expansion"] = 1  # type: ignore[index]
        for copied in (pickle.loads(pickle.dumps(TINY)), copy.deepcopy(TINY)):
            assert copied == TINY
            assert copied.stages[1].options == TINY.stages[1].options

    def test_names_do_not_distinguish_networks(self) -> None:
        assert scale(TINY, depth=1.5) == scale(TINY, depth=1.4, name="another")
        assert scale(TINY, depth=1.5) != scale(TINY, depth=2.1)

    def test_a_file_gives_back_the_network(self, tmp_path: Path) -> None:
        for network in (TINY, scale(EFFICIENTNET_B0, 1)):
            save_network(network, tmp_path / "network.json")
            loaded = load_network(tmp_path / "network.json")
            assert (loaded, loaded.name) == (network, network.name)

    def test_a_file_that_is_none_is_refused(self, tmp_path: Path) -> None:
        file = tmp_path / "network.json"
        for text, message in (
            ("[1]", "not a saved network: format='list'"),
            ("{", "Expecting"),
            ('{"format": "effkernels staged network 1", "builder": "os.system"}', "builder='os.system'; allowed: seq"),
        ):
            file.write_text(text)
            with pytest.raises(ValueError, match=message) as caught:
                load_network(file)
            assert str(file) in str(caught.value)
        with pytest.raises(ValueError, match=r"nowhere\.json"):
            load_network(tmp_path / "nowhere.json")
        with pytest.raises(ValueError, match="its builder is not one of"):
            network_to_dict(replace(TINY, builder=lambda network, **options: nn.Identity()))

    @pytest.mark.parametrize(
        ("make", "message"),
        [
            (lambda: Stage("conv", 0, 8), "layers=0; allowed: 1 or more"),
            (lambda: Rounding(divisor=0), "divisor=0"),
            (lambda: Rounding(depth="sideways"), "depth='sideways'; allowed: up, nearest, down"),
            (lambda: replace(TINY, stages=(Stage("magic", 1, 8),)).build(), "operator='magic'; allowed: conv"),
            (lambda: scale(TINY, 1, depth=2), "phi alone, or factors alone"),
            (lambda: scale(TINY, width=0), "width=0; allowed: finite and above 0"),
            (lambda: scale(TINY, float("nan")), "phi=nan; allowed: finite"),
        ],
    )
    def test_what_makes_no_sense_is_refused(self, make: Any, message: str) -> None:
        with pytest.raises(ValueError, match=message):
            make()


class TestScale:
    def test_each_factor_scales_only_its_dimension(self) -> None:
        def seen(network: StagedNetwork) -> tuple[int, list[int], list[int]]:
            return network.resolution, [s.layers for s in network.stages], [s.channels for s in network.stages]

        assert seen(scale(TINY, depth=2)) == (16, [1, 4, 2], [8, 16, 32])  # the stem is never repeated
        assert seen(scale(TINY, width=2)) == (16, [1, 2, 1], [16, 32, 64])
        assert seen(scale(TINY, resolution=1.5)) == (24, [1, 2, 1], [8, 16, 32])

    def test_phi_is_equation_3(self) -> None:
        by_phi = scale(TINY, 2, scaling=CompoundScaling(1.3, 1.2, 1.1))
        assert by_phi == scale(TINY, depth=1.3**2, width=1.2**2, resolution=1.1**2)
        assert scale(TINY, 0) == TINY
        assert scale(TINY, 1) == scale(TINY, 1, scaling=EFFICIENTNET)

    @settings(max_examples=50)
    @given(factor=st.floats(0.2, 4), divisor=st.sampled_from([1, 4, 8, 32]), depth=st.sampled_from(["up", "down"]))
    def test_rounding(self, factor: float, divisor: int, depth: str) -> None:
        rounding = Rounding(divisor, depth, resolution=8)
        network = scale(TINY, depth=factor, width=factor * 1.01, resolution=factor, rounding=rounding)
        assert network.resolution % 8 == 0
        assert abs(network.resolution - 16 * factor) <= 8
        for stage, own in zip(network.stages, TINY.stages, strict=True):
            assert stage.channels % divisor == 0
            assert stage.layers >= 1
            if own.deepens:
                distance = stage.layers - own.layers * factor
                assert -1e-6 <= distance < 1 if depth == "up" else distance > -1 or stage.layers == 1

    def test_a_width_of_1_keeps_channels_that_are_no_multiple(self) -> None:
        odd = replace(TINY, stages=(Stage("conv", 1, 13, options={"activation": "relu"}),))
        assert scale(odd, depth=2).stages[0].channels == 13

    @pytest.mark.parametrize("name", sorted(BASELINES))
    def test_every_baseline_runs_scaled(self, name: str) -> None:
        small = scale(BASELINES[name], depth=1.2, width=0.3, resolution=40 / 224)
        module = small.build(num_classes=6, in_chans=1).eval()
        with torch.inference_mode():
            assert module(torch.randn(2, 1, 40, 40)).shape == (2, 6)


class TestBudget:
    @pytest.mark.parametrize("along", ALONG)
    def test_the_next_larger_network_is_outside(self, along: str) -> None:
        budget = Budget(multiply_adds=5 * TINY.cost().multiply_adds)
        found = fit(TINY, budget, along=along)
        assert not budget.exceeded(found.cost)
        assert found.cost == found.network.cost()
        assert found.limited_by == ("multiply_adds",)
        assert (found.phi is not None) == (along == "compound")
        step = 2**0.005
        bigger = {
            "compound": {"phi": (found.phi or 0) + 0.006},
            "depth": {"depth": found.depth * step},
            "width": {"width": found.width * step},
            "resolution": {"resolution": found.resolution * step},
        }[along]
        assert budget.exceeded(scale(TINY, **bigger).cost()) == ["multiply_adds"]

    def test_a_baseline_above_the_budget_shrinks(self) -> None:
        base = TINY.cost()
        found = fit(TINY, max_multiply_adds=base.multiply_adds / 3, max_activation_bytes=base.activation_bytes / 2)
        assert found.cost.multiply_adds <= base.multiply_adds / 3
        assert found.cost.activation_bytes <= base.activation_bytes / 2
        assert found.phi is not None
        assert found.phi < 0

    def test_the_tightest_limit_decides(self) -> None:
        base = TINY.cost()
        found = fit(TINY, max_multiply_adds=100 * base.multiply_adds, max_parameters=2 * base.parameters)
        assert found.limited_by == ("parameters",)

    @pytest.mark.parametrize(
        ("arguments", "message"),
        [
            ({}, "no constraint"),
            ({"max_multiply_adds": 1e6, "along": "sideways"}, "along='sideways'; allowed: compound, depth"),
            ({"max_multiply_adds": -1}, "multiply_adds=-1"),
            ({"max_parameters": 1e6, "along": "resolution"}, "scaling tiny along resolution never reaches parameters"),
            ({"max_multiply_adds": 1}, "tiny exceeds multiply_adds=1 however small"),
            ({"max_multiply_adds": 1e6, "tolerance": 0}, "tolerance=0; allowed: above 0"),
            ({"max_multiply_adds": 1e6, "budget": Budget(1e6)}, "allowed: one of them"),
            ({"max_multiply_adds": 1e6, "scaling": CompoundScaling(1, 1, 1)}, "does not grow"),
        ],
    )
    def test_what_cannot_be_fitted_is_said(self, arguments: dict[str, Any], message: str) -> None:
        with pytest.raises(ValueError, match=message):
            fit(TINY, **arguments)


def test_everything_public_is_there() -> None:
    for name in scaling.__all__:
        assert getattr(scaling, name) is not None
    assert set(scaling.__all__) <= set(dir(scaling))
    with pytest.raises(AttributeError, match="has no attribute 'nothing'"):
        _ = scaling.nothing


def test_the_networks_are_imported_when_they_are_asked_for() -> None:
    code = (
        "import sys, effkernels; early = 'effkernels.scaling.families' in sys.modules;"
        "from effkernels.scaling import MOBILENET_V2; print(early, MOBILENET_V2.name)"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert done.stdout == "False MobileNetV2\n", done.stderr


def test_resnet_is_that_of_the_paper() -> None:
    assert RESNET_50.rows()[2:] == [
        StageRow("bottleneck", 3, 256, 56, 56),
        StageRow("bottleneck", 4, 512, 56, 56),
        StageRow("bottleneck", 6, 1024, 28, 28),
        StageRow("bottleneck", 3, 2048, 14, 14),
    ]


class TestHostileFiles:
    """A network file is refused before anything is built of it, with the field, its value and what is allowed."""

    @pytest.mark.parametrize(
        ("change", "message"),
        [
            ({"layers": 1e9}, r"stages: layers=1000000000\.0; allowed: whole numbers from 1 to 4096"),
            ({"layers": 10**9}, "stages: layers=1000000000; allowed"),
            ({"layers": 4096}, "tiny: 4098 layers; allowed: 4096 in all stages"),
            ({"layers": True}, "stages: layers=True; allowed"),
            ({"channels": 2**40}, "stages: channels="),
            ({"kernel_size": 0}, "stages: kernel_size=0; allowed"),
            ({"stride": -1}, "stages: stride=-1; allowed"),
            ({"deepens": 3}, "stages: deepens=3; allowed: true, false"),
            ({"options": {"expansion": 1e9, "activation": "silu"}}, "stages: options: expansion="),
            ({"options": {"expansion": [1], "activation": "silu"}}, "stages: options: expansion="),
            ({"options": {"activation": "nothing", "expansion": 6}}, "cannot be built"),
            ({"options": {"expansion": 6, "activation": "silu", "unknown": 1}}, "cannot be built"),
            ({"operator": "unknown"}, "cannot be built"),
            ({"unknown": 1}, "lacks a field or has one that is not known"),
        ],
    )
    def test_stages(self, change: dict[str, Any], message: str, tmp_path: Path) -> None:
        values = network_to_dict(TINY)
        values["stages"][1] |= change
        (tmp_path / "network.json").write_text(json.dumps(values))
        with pytest.raises(ValueError, match=message) as error:
            load_network(tmp_path / "network.json")
        assert str(error.value).startswith(str(tmp_path / "network.json"))

    @pytest.mark.parametrize(
        ("text", "message"),
        [
            ("[" * 100_000, "nested too deep"),
            ('{"format": ' + "1" * 5000 + "}", "5000 digits"),
            ("\xff", "not a saved network|Expecting"),
            ("[]", "not a saved network: format='list'"),
        ],
    )
    def test_contents(self, text: str, message: str, tmp_path: Path) -> None:
        (tmp_path / "network.json").write_text(text)
        with pytest.raises(ValueError, match=message):
            load_network(tmp_path / "network.json")

    @pytest.mark.parametrize("change", [{"stages": None}, {"stages": [3]}, {"stages": 3}, {"resolution": 2**40}])
    def test_fields(self, change: dict[str, Any], tmp_path: Path) -> None:
        (tmp_path / "network.json").write_text(json.dumps(network_to_dict(TINY) | change))
        with pytest.raises(ValueError, match=r"network\.json: "):
            load_network(tmp_path / "network.json")

    def test_a_pipe_is_not_waited_for(self, tmp_path: Path) -> None:
        os.mkfifo(tmp_path / "network.json")
        with pytest.raises(ValueError, match="is a named pipe"):
            load_network(tmp_path / "network.json")

    def test_scaling_has_the_same_limit(self) -> None:
        with pytest.raises(ValueError, match="layers; allowed: 4096 in all stages"):
            scale(TINY, depth=1e9)
