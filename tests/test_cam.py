"""Class activation maps: the definition, whose models have them, the figure, and the command."""

from __future__ import annotations

import copy
import json
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy
import PIL.Image
import pytest
import skimage.data
import torch
from called_operators import CalledOperators
from parity import assert_parity
from peer_models import images, lukemelas_model, randomise, small, small_timm_b0, torchvision_model
from torch import Tensor, nn

import effkernels
from effkernels.cam import class_activation_map, normalised, peaks, upsampled
from effkernels.cam.digits import DIGITS_NETWORK, hide_digits, look_at_digits, train_on_digits
from effkernels.cam.figure import MOST_ROWS, Panel, save_grid
from effkernels.cam.networks import COMPARED, scalings
from effkernels.cli import main
from effkernels.scaling import MOBILENET_V1, RESNET_50, save_network, scale

THIN = scale(RESNET_50, width=0.125, depth=0.25)


class Pooled(nn.Module):
    """A convolution, a pooling, a linear classifier."""

    def __init__(self, pool: Callable[[Tensor], Tensor], bias: bool = True) -> None:
        super().__init__()
        generator = torch.Generator().manual_seed(0)
        self.conv = nn.Conv2d(3, 6, 3, stride=2)
        self.fc = nn.Linear(6, 5, bias=bias)
        with torch.no_grad():
            for parameter in self.parameters():
                parameter.normal_(0, 0.5, generator=generator)
        self.pool = pool

    def forward(self, x: Tensor) -> Tensor:
        return self.fc(self.pool(self.conv(x)))


def mean(x: Tensor) -> Tensor:
    return x.mean((2, 3))


def plain(**options: Any) -> nn.Module:
    return Pooled(mean, **options).eval()


# A model, its features in that library's own words, and its classifier's name.
MODELS: dict[str, tuple[Callable[[], nn.Module], Callable[[Any, Tensor], Tensor], str]] = {
    "effkernels": (small, lambda m, x: m.forward_features(x), "classifier"),
    "timm": (small_timm_b0, lambda m, x: m.forward_features(x), "classifier"),
    "torchvision": (lambda: torchvision_model("mobilenet_v2"), lambda m, x: m.features(x), "classifier.1"),
    "lukemelas": (lambda: lukemelas_model("b0"), lambda m, x: m.extract_features(x), "_fc"),
    "MobileNetV1": (lambda: randomise(MOBILENET_V1.build(num_classes=9)), lambda m, x: m.stages(x), "classifier"),
    "ResNet": (lambda: randomise(THIN.build(num_classes=9)), lambda m, x: m.stages(x), "classifier"),
    "channels last": (
        lambda: Pooled(lambda x: x.permute(0, 2, 3, 1).contiguous().mean((1, 2))).eval(),
        lambda m, x: m.conv(x),
        "fc",
    ),
}


class TestDefinition:
    @pytest.mark.parametrize("name", MODELS)
    def test_weights_times_features_whose_mean_is_the_logit(self, name: str) -> None:
        build, features_of, classifier = MODELS[name]
        model = copy.deepcopy(build()).double()
        x = images(2, 65, 96).double()
        maps, classes, probabilities = class_activation_map(model, x)
        linear = model.get_submodule(classifier)
        with torch.no_grad():
            logits, features = model(x), features_of(model, x)
        assert torch.equal(classes, logits.argmax(1))
        for image, of_class in enumerate(classes.tolist()):
            weights = linear.weight[of_class].detach()
            wanted = sum(weights[k] * features[image, k] for k in range(features.shape[1]))
            torch.testing.assert_close(maps[image], wanted, rtol=0, atol=1e-11 * float(wanted.abs().max()))
            torch.testing.assert_close(maps[image].mean() + linear.bias[of_class], logits[image, of_class])
            torch.testing.assert_close(probabilities[image], logits[image].softmax(0)[of_class])

    @pytest.mark.parametrize("classes", [3, [1, 4], torch.tensor([1, 4]), (0, 0), torch.tensor(2)])
    def test_of_the_classes_asked_for(self, classes: Any) -> None:
        model, x = plain().double(), images(2, 9, 9).double()
        maps, chosen, probabilities = class_activation_map(model, x, classes)
        wanted = torch.as_tensor(classes).expand(2)
        assert torch.equal(chosen, wanted)
        assert torch.equal(probabilities, model(x).softmax(1)[[0, 1], wanted])
        for image in range(2):
            (alone,), _, _ = class_activation_map(model, x[image : image + 1], int(wanted[image]))
            torch.testing.assert_close(maps[image], alone)

    def test_without_a_bias_the_mean_is_the_logit(self) -> None:
        model, x = plain(bias=False).double(), images(2, 9, 9).double()
        maps, classes, _ = class_activation_map(model, x)
        torch.testing.assert_close(maps.mean((1, 2)), model(x).gather(1, classes[:, None])[:, 0])

    def test_the_model_is_left_as_it_was(self) -> None:
        model = plain()
        maps, _, probabilities = class_activation_map(model, images(1, 9, 9))
        assert not maps.requires_grad
        assert not probabilities.requires_grad
        assert all(parameter.grad is None for parameter in model.parameters())
        assert not any(part._forward_hooks or part._forward_pre_hooks for part in model.modules())

    def test_logits_in_an_object(self) -> None:
        class Answer(nn.Module):
            def __init__(self, model: nn.Module) -> None:
                super().__init__()
                self.model = model

            def forward(self, x: Tensor) -> Any:
                return type("Output", (), {"logits": self.model(x)})()

        x = images(1, 9, 9)
        assert torch.equal(class_activation_map(Answer(plain()).eval(), x).maps, class_activation_map(plain(), x).maps)


class TestPrecision:
    @pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
    @pytest.mark.parametrize("name", ["effkernels", "MobileNetV1"])
    def test_as_exact_as_pytorch(self, name: str, dtype: torch.dtype) -> None:
        model = copy.deepcopy(MODELS[name][0]()).to(dtype)
        x = images(2, 65, 96).to(dtype)
        maps = class_activation_map(model, x, 3).maps
        with effkernels.backend("reference"):
            same_dtype = class_activation_map(model, x, 3).maps
        truth = class_activation_map(copy.deepcopy(model).double(), x.double(), 3).maps
        assert maps.dtype == torch.float32
        assert_parity(maps, same_dtype, truth, "maps")

    def test_under_autocast(self) -> None:
        model, x = small(), images(2, 65, 96)
        with torch.autocast("cpu", dtype=torch.bfloat16):
            maps = class_activation_map(model, x, 3).maps
        exact = class_activation_map(model, x, 3).maps
        assert maps.shape == exact.shape
        assert float((maps - exact).norm() / exact.norm()) < 0.1


@pytest.mark.parametrize("name", ["timm", "torchvision"])
def test_optimised_models_have_the_same_maps_and_stay_fused(name: str) -> None:
    model = copy.deepcopy(MODELS[name][0]())
    x = images(2, 65, 96)
    truth = class_activation_map(copy.deepcopy(model).double(), x.double(), 7).maps
    wide = class_activation_map(
        copy.deepcopy(model).to(memory_format=torch.channels_last), x.contiguous(memory_format=torch.channels_last), 7
    )
    same_dtype = [class_activation_map(model, x, 7).maps, wide.maps]
    effkernels.optimize_(model)
    with torch.no_grad(), CalledOperators() as unwatched:
        model(x)
    with CalledOperators() as watched:
        maps = class_activation_map(model, x, 7).maps
    # Of two images the classifier goes through an operator, too; watched it is the linear layer that the maps need.
    assert watched.namespaces["effkernels"] == unwatched.namespaces["effkernels"] - 1 > 30
    assert_parity(maps, same_dtype, truth, "maps")


class TestRefusals:
    @pytest.mark.parametrize(
        ("model", "message"),
        [
            (lambda: plain().train(), r"training mode; needed: eval mode"),
            (lambda: Pooled(lambda x: x.amax((2, 3))).eval(), "of Pooled takes 6 values that are not the mean"),
            (lambda: Pooled(lambda x: torch.relu(mean(x))).eval(), "not the mean over all positions"),
            (lambda: Pooled(lambda x: x[:, :, 0, 0]).eval(), "not the mean over all positions"),
            (lambda: torchvision_model("mobilenet_v3_small"), "MobileNetV3 takes 1024 values that are not the mean"),
            (lambda: nn.Sequential(plain(), nn.Softmax(1)).eval(), "does not return what its last linear layer"),
            (lambda: nn.Conv2d(3, 5, 3).eval(), "does not return what its last linear layer"),
        ],
    )
    def test_models_without_maps(self, model: Callable[[], nn.Module], message: str) -> None:
        with pytest.raises(ValueError, match=message):
            class_activation_map(model(), images(2, 33, 33))

    def test_a_single_position_is_no_map(self) -> None:
        with pytest.raises(ValueError, match="a single position in so small an image"):
            class_activation_map(plain(), images(1, 3, 3))

    def test_another_convolution_after_the_pooling(self) -> None:
        """As in timm's MobileNetV3: the classifier's input is the mean of a map, of a single position."""
        head = nn.Conv2d(6, 6, 1)
        model = Pooled(lambda x: head(mean(x)[:, :, None, None]).flatten(1)).eval()
        with pytest.raises(ValueError, match="layers between pooling and classifier"):
            class_activation_map(model, images(1, 9, 9))

    @pytest.mark.parametrize(
        ("classes", "message"),
        [
            (5, "classes=5; allowed: 0 to 4"),
            (-1, "classes=-1; allowed: 0 to 4"),
            ([0, 5], r"classes=\[0, 5\]; allowed: 0 to 4"),
            ([0], "1 classes for 2 images"),
            (0.5, "allowed: whole numbers"),
            ([[0, 1]], "allowed: whole numbers"),
        ],
    )
    def test_classes(self, classes: Any, message: str) -> None:
        with pytest.raises(ValueError, match=message):
            class_activation_map(plain(), images(2, 9, 9), classes)

    @pytest.mark.parametrize("shape", [(3, 9, 9), (0, 3, 9, 9)])
    def test_images(self, shape: tuple[int, ...]) -> None:
        with pytest.raises(ValueError, match=r"images has shape \([0-9, ]*\); needed: \(N, C, H, W\)"):
            class_activation_map(plain(), torch.zeros(shape))

    def test_weights_that_are_not_finite(self) -> None:
        model = plain()
        nn.init.constant_(model.fc.bias, float("nan"))
        with pytest.raises(ValueError, match="logits are not finite"):
            class_activation_map(model, images(1, 9, 9))


def test_maps_for_display() -> None:
    maps = torch.stack([torch.arange(12.0).reshape(3, 4) - 5, torch.full((3, 4), 2.0)])
    shown = normalised(maps)
    assert torch.equal(shown[0], torch.arange(12.0).reshape(3, 4) / 11)
    assert torch.equal(shown[1], torch.zeros(3, 4))
    large = upsampled(maps, (12, 16))
    assert large.shape == (2, 12, 16)
    assert torch.equal(large[1], torch.full((12, 16), 2.0))
    assert float(large[0, -1, -1]) == float(large.max()) == 6
    assert peaks(maps)[0].tolist() == [pytest.approx(3.5 / 4), pytest.approx(2.5 / 3)]
    torch.testing.assert_close(large[0].mean(), maps[0].mean())  # the map is symmetric about its centre


def coloured(file: Path) -> numpy.ndarray:
    """Return where a picture is neither white nor grey."""
    with PIL.Image.open(file) as opened:
        pixels = numpy.asarray(opened.convert("RGB")).astype(int)
    return pixels.max(2) - pixels.min(2) > 24


def runs(line: numpy.ndarray, longer_than: int = 100) -> int:
    """Runs of True, from `longer_than` pixels on."""
    edges = numpy.flatnonzero(numpy.diff(numpy.concatenate([[0], line.astype(int), [0]])))
    return int((edges[1::2] - edges[::2] > longer_than).sum())


class TestFigure:
    def panel(self, heat: bool = True) -> Panel:
        picture = torch.tensor([0.9, 0.2, 0.1]).expand(20, 20, 3)
        return Panel(picture, torch.full((20, 20), 0.8) if heat else None, "caption")

    def test_every_panel_is_there(self, tmp_path: Path) -> None:
        file = tmp_path / "grid.png"
        save_grid(file, ["picture", "one", "two"], [[self.panel(False), self.panel(), self.panel()]] * 2)
        filled = coloured(file)
        assert runs(filled.mean(0) > 0.5) == 3
        assert runs(filled[:, : filled.shape[1] // 3].mean(1) > 0.5) == 2

    @pytest.mark.parametrize("suffix", ["pdf", "svg"])
    def test_other_formats(self, tmp_path: Path, suffix: str) -> None:
        save_grid(tmp_path / f"grid.{suffix}", ["one"], [[self.panel()]])
        assert (tmp_path / f"grid.{suffix}").stat().st_size > 1000

    def test_refusals(self, tmp_path: Path) -> None:
        with pytest.raises(ValueError, match=f"0 rows; allowed: 1 to {MOST_ROWS}"):
            save_grid(tmp_path / "grid.png", ["one"], [])
        with pytest.raises(ValueError, match="a row has 1 panels, and there are 2 titles"):
            save_grid(tmp_path / "grid.png", ["one", "two"], [[self.panel()]])


def test_the_networks_of_figure_7() -> None:
    baseline, deeper, wider, finer, compound = scalings(MOBILENET_V1)
    layers = [sum(row.layers for row in network.rows()) for network in (baseline, deeper, wider, finer, compound)]
    channels = [network.rows()[-1].channels for network in (baseline, deeper, wider, finer, compound)]
    assert layers == [14, 1 + 4 * 13, 14, 14, 1 + 2 + 3 + 3 + 9 + 3]
    assert channels == [1024, 1024, 2048, 1024, 1232]
    assert [network.resolution for network in (baseline, deeper, wider, finer, compound)] == [224, 224, 224, 448, 291]
    assert [network.resolution for network in scalings(MOBILENET_V1, 64)] == [64, 64, 64, 128, 83]


def run(capsys: pytest.CaptureFixture[str], *arguments: str | Path) -> tuple[int, str, str]:
    """Exit status, standard output, standard error of `effkernels cam`."""
    try:
        status = main(["cam", *map(str, arguments)])
    except SystemExit as exit_:
        status = int(exit_.code or 0)
    output = capsys.readouterr()
    return status, output.out, output.err


@pytest.fixture
def album(tmp_path: Path) -> Path:
    folder = tmp_path / "album"
    folder.mkdir()
    for name in ("chelsea", "coffee"):
        PIL.Image.fromarray(getattr(skimage.data, name)()).resize((96, 72)).save(folder / f"{name}.jpg")
    return folder


@pytest.fixture
def saved(tmp_path: Path) -> Path:
    """A folder with a small network, network.json, and weights for it and its scalings: 0.pth to 4.pth, 7 classes."""
    save_network(DIGITS_NETWORK, tmp_path / "network.json")
    for number, network in enumerate(scalings(DIGITS_NETWORK)):
        torch.manual_seed(number)
        torch.save(network.build(num_classes=7).state_dict(), tmp_path / f"{number}.pth")
    return tmp_path


class TestCommand:
    def test_a_photograph_and_weights(self, capsys: pytest.CaptureFixture[str], album: Path, tmp_path: Path) -> None:
        torch.manual_seed(0)
        model = effkernels.create_model("efficientnet_b0", num_classes=7).eval()
        torch.save(model.state_dict(), tmp_path / "b0.pth")
        (tmp_path / "labels.txt").write_text("ant\nbee\ncat, tabby\ndog\nelk\nfox\nbee\n")
        arguments = (album / "chelsea.jpg", "--weights", tmp_path / "b0.pth", "--labels", tmp_path / "labels.txt",
                     "--img-size", "96", "--class", "Tabby", "--output", tmp_path / "map.png")  # fmt: skip
        status, out, err = run(capsys, *arguments, "--json")
        assert status == 0
        assert "RANDOM" not in err
        report = json.loads(out)
        (found,) = report["maps"]
        assert (found["index"], found["label"], found["file"]) == (2, "cat, tabby", str(album / "chelsea.jpg"))
        from effkernels.engine.images import read_image
        from effkernels.models import model_config
        from effkernels.models.preprocessing import Preprocessing

        image = Preprocessing.of(model_config("efficientnet_b0"), 96)(read_image(album / "chelsea.jpg"))
        maps, _, probabilities = class_activation_map(model, image[None], 2)
        assert found["map"] == maps[0].tolist()
        assert found["probability"] == probabilities.item()
        assert all(0 < coordinate < 1 for coordinate in found["peak"])
        assert runs(coloured(tmp_path / "map.png").mean(0) > 0.3) == 2
        before = (tmp_path / "map.png").read_bytes()
        status, _, err = run(capsys, *arguments)
        assert (status, "map.png exists; --force overwrites it" in err) == (2, True)
        assert (tmp_path / "map.png").read_bytes() == before
        status, _, err = run(capsys, *arguments[:-4], "--class", "bee", *arguments[-2:], "--force")
        assert (status, "classes 1, 6 have that name" in err) == (2, True)

    def test_compare(self, capsys: pytest.CaptureFixture[str], album: Path, saved: Path) -> None:
        weights = [saved / f"{number}.pth" for number in range(5)]
        arguments = (album, "--model", saved / "network.json", "--compare", "--output", saved / "map.png", "--json")
        status, out, err = run(capsys, *arguments, "--weights", *weights)
        assert status == 0
        assert "RANDOM" not in err
        report = json.loads(out)
        assert [network["name"] for network in report["networks"]] == [factors.name for factors in COMPARED]
        assert [network["image_size"] for network in report["networks"]] == [64, 64, 64, 128, 83]
        assert [network["weights"] for network in report["networks"]] == [str(file) for file in weights]
        costs = [network["multiply_adds"] for network in report["networks"]]
        assert costs == [network.cost(num_classes=7).multiply_adds for network in scalings(DIGITS_NETWORK)]
        files = [str(album / name) for name in ("chelsea.jpg", "coffee.jpg") for _ in COMPARED]
        assert [one["file"] for one in report["maps"]] == files
        assert [len(one["map"]) for one in report["maps"][:5]] == [8, 8, 8, 16, 11]
        assert max(one["index"] for one in report["maps"]) < 7
        filled = coloured(saved / "map.png")
        assert runs(filled.mean(0) > 0.5) == 6
        assert runs(filled[:, filled.shape[1] // 3 :].mean(1) > 0.3) == 2

    def test_random_weights_are_said_to_be(
        self, capsys: pytest.CaptureFixture[str], album: Path, tmp_path: Path
    ) -> None:
        file = tmp_path / "map.svg"
        status, out, err = run(capsys, album, "--model", "mobilenet_v1", "--img-size", "64", "--output", file)
        assert status == 0
        assert "the weights are RANDOM and the maps mean nothing" in err
        assert "chelsea.jpg" in out
        assert f"{replace(MOBILENET_V1, resolution=64).cost().multiply_adds / 1e6:.1f} MFLOPs" in out
        assert "RANDOM WEIGHTS" in file.read_text()

    def test_a_damaged_file_does_not_stop_the_rest(
        self, capsys: pytest.CaptureFixture[str], album: Path, saved: Path
    ) -> None:
        (album / "damaged.png").write_bytes(b"no image")
        options = ("--model", saved / "network.json", "--weights", saved / "0.pth", "--output", saved / "map.png")
        status, out, err = run(capsys, album, *options, "--json")
        report = json.loads(out)
        assert status == 1
        assert [Path(one["file"]).name for one in report["maps"]] == ["chelsea.jpg", "coffee.jpg"]
        assert [Path(one["file"]).name for one in report["failures"]] == ["damaged.png"]
        assert "damaged.png" in err

    @pytest.mark.parametrize(
        ("arguments", "message"),
        [
            ((), "no IMAGE given"),
            (("ALBUM", "--model", "efficientnet_b99"), "efficientnet_b99"),
            (("ALBUM", "--model", "alexnet", "--compare"), "network 'alexnet' is not known; allowed:"),
            (("ALBUM", "--class", "cat"), "--class cat: a name needs --labels FILE"),
            (("ALBUM", "--class", "cat", "--labels", "LABELS"), "--class cat: no such label"),
            (("ALBUM", "--labels", "nowhere.txt"), "--labels nowhere.txt"),
            (("ALBUM", "--epochs", "3"), "--epochs: allowed only with --digits"),
            (("ALBUM", "--output", "map.jpeg2000"), "--output map.jpeg2000: the name must end in one of"),
            (("ALBUM", "--output", "nowhere/map.png"), "there is no folder nowhere"),
            (("ALBUM", "--compare", "--weights", "a.pth"), "1 files for 5 networks, in this order: baseline, deeper"),
            (("ALBUM", "--weights", "a.pth", "b.pth"), "2 files for 1 network"),
            (("ALBUM", "--weights", "nowhere.pth"), "--weights: "),
            (("ALBUM", "--weights", "0.pth"), "of no known EfficientNet"),
            (("ALBUM", "--model", "NETWORK", "--weights", "1.pth"), "does not fit DigitsNet: unexpected"),
            (("ALBUM", "--model", "NETWORK", "--weights", "2.pth"), "does not fit DigitsNet: of another shape"),
            (("ALBUM", "--model", "NETWORK", "--weights", "0.pth", "--class", "7"), "classes=7; allowed: 0 to 6"),
            (("ALBUM", "--model", "NETWORK", "--weights", "0.pth", "--labels", "LABELS"), "1 lines for a model of 7"),
            (("--digits", "ALBUM"), "is not a whole number of at least 1"),
            (("ALBUM", "--digits", "2"), "--digits with IMAGE"),
            (("--digits", "2", "--model", "mobilenet_v1"), "--digits with --model mobilenet_v1"),
            (("--digits", "2", "--class", "ten"), "--class ten: no such label"),
            (("--digits", "1000"), "one figure holds at most 64"),
        ],
    )
    def test_wrong_arguments_are_named(
        self,
        capsys: pytest.CaptureFixture[str],
        album: Path,
        saved: Path,
        monkeypatch: pytest.MonkeyPatch,
        arguments: tuple[str, ...],
        message: str,
    ) -> None:
        (saved / "labels.txt").write_text("ant\n")
        places = {"ALBUM": str(album), "LABELS": "labels.txt", "NETWORK": "network.json"}
        monkeypatch.chdir(saved)
        status, out, err = run(capsys, *(places.get(word, word) for word in arguments))
        assert (status, out) == (2, "")
        assert message in err
        assert not (saved / "cam.png").exists()


class TestDigits:
    def test_where_they_are_hidden(self) -> None:
        hidden = hide_digits(False, torch.Generator().manual_seed(0))
        again = hide_digits(False, torch.Generator().manual_seed(0))
        assert torch.equal(hidden.pictures, again.pictures)
        assert (len(hidden.classes), hidden.pictures.shape[1:]) == (297, (64, 64))
        assert float(hidden.boxes.min()) >= 0
        assert float(hidden.boxes.max()) <= 1
        # The box is where the picture is brighter than elsewhere, fragments or not.
        across = (torch.arange(64) + 0.5) / 64
        left, top, right, bottom = (edge[:, None] for edge in hidden.boxes.T)
        columns, rows = (across > left) & (across < right), (across > top) & (across < bottom)
        inside = rows[:, :, None] & columns[:, None, :]
        brighter = (hidden.pictures * inside).sum((1, 2)) / inside.sum((1, 2)) > hidden.pictures.mean((1, 2))
        assert bool(brighter.all())

    def test_the_command_trains_and_draws(self, capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
        file = tmp_path / "map.png"
        status, out, err = run(capsys, "--digits", "2", "--epochs", "1", "--output", file, "--json")
        assert status == 0
        assert "train baseline: epoch 1 of 1" in err
        report = json.loads(out)
        assert report["networks"][0]["weights"] == "trained here"
        assert 0 <= report["networks"][0]["accuracy"] <= 1
        assert 0.15 < report["networks"][0]["digit_area"] < 0.25
        assert [one["file"] for one in report["maps"]] == ["picture 0: a 1", "picture 1: a 7"]
        assert file.stat().st_size > 1000

    @pytest.mark.slow
    def test_maps_sit_on_the_digit(self) -> None:
        model = train_on_digits(DIGITS_NETWORK, epochs=5)
        found = look_at_digits(model, hide_digits(False, torch.Generator().manual_seed(1)), 64)
        assert found["accuracy"] > 0.5
        assert found["peak_on_digit"] > 3 * found["digit_area"]
