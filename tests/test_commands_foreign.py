"""Commands with models of other libraries and of a user's file, and why one cannot serve where it cannot."""

from __future__ import annotations

import json
from pathlib import Path

import PIL.Image
import pytest
import skimage.data
import torch
from peer_models import randomise, timm_model
from test_cli import run, run_json

from effkernels.bench.foreign import fused_on_meta
from effkernels.bench.op_calls import calls_of
from effkernels.models.sources import find_model
from effkernels.plan.launches import plan_network

TIMM, TORCHVISION, HF = "timm:mobilenetv3_small_050", "torchvision:mobilenet_v2", "hf:mobilenet_v2"
FILE = """
import torch
from torch import nn

def features():
    return nn.Sequential(nn.Conv2d(3, 8, 3, 2, 1, bias=False), nn.BatchNorm2d(8), nn.SiLU())

def small():
    torch.manual_seed(0)
    return nn.Sequential(*features(), nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(8, 5))

def square(size=40):
    return nn.Sequential(nn.Flatten(), nn.Linear(3 * size * size, 4))
"""


@pytest.fixture
def file(tmp_path: Path) -> Path:
    path = tmp_path / "networks.py"
    path.write_text(FILE)
    return path


@pytest.fixture
def photo(tmp_path: Path) -> Path:
    path = tmp_path / "photo.png"
    PIL.Image.fromarray(skimage.data.chelsea()).resize((80, 60)).save(path)
    return path


class TestPredict:
    @pytest.mark.parametrize("model", [TIMM, TORCHVISION, HF])
    def test_libraries(self, capsys: pytest.CaptureFixture[str], photo: Path, model: str) -> None:
        status, out, err = run(
            capsys, "predict", photo, "--model", model, "--img-size", "64", "--device", "cpu", "--json"
        )
        report = json.loads(out)
        assert status == 0
        assert f"the weights of {model} are RANDOM" in err
        assert (report["model"], report["weights"]) == (model, None)
        assert len(report["predictions"][0]["scores"]) == (2 if model == HF else 5)

    def test_classes_are_those_of_the_plain_model(
        self, capsys: pytest.CaptureFixture[str], photo: Path, tmp_path: Path
    ) -> None:
        plain = timm_model("mobilenetv3_small_050")
        torch.save(plain.state_dict(), tmp_path / "weights.pth")
        arguments = ("predict", photo, "--model", TIMM, "--weights", tmp_path / "weights.pth", "--device", "cpu")
        status, report = run_json(capsys, *arguments)
        with torch.inference_mode():
            image = find_model(TIMM).preprocessing()(PIL.Image.open(photo).convert("RGB"))
            expected = plain(image[None]).softmax(1).topk(5)
        scores = report["predictions"][0]["scores"]
        assert status == 0
        assert [score["index"] for score in scores] == expected.indices[0].tolist()
        assert [score["probability"] for score in scores] == pytest.approx(expected.values[0].tolist(), rel=1e-3)

    def test_a_function_brings_its_weights(self, capsys: pytest.CaptureFixture[str], photo: Path, file: Path) -> None:
        (file.parent / "labels.txt").write_text("a\nb\nc\nd\ne\n")
        arguments = ("predict", photo, "--model", f"{file}:small", "--device", "cpu")
        status, _, err = run(capsys, *arguments, "--labels", file.parent / "labels.txt")
        assert status == 0
        assert "RANDOM" not in err
        (file.parent / "labels.txt").write_text("a\nb\n")
        status, _, err = run(capsys, *arguments, "--labels", file.parent / "labels.txt")
        assert status == 2
        assert "2 lines for a model of 5 classes" in err

    def test_no_classifier(self, capsys: pytest.CaptureFixture[str], photo: Path, file: Path) -> None:
        status, _, err = run(capsys, "predict", photo, "--model", f"{file}:features", "--device", "cpu")
        assert status == 2
        assert "a classifier is needed, whose result is one tensor, (images, classes)" in err
        status, _, err = run(capsys, "predict", photo, "--model", f"{file}:square", "--device", "cpu")
        assert status == 2
        assert "takes no images of 3 x 224 x 224" in err


class TestExplain:
    @pytest.mark.usefixtures("compiled")
    @pytest.mark.parametrize("model", [TIMM, TORCHVISION, HF])
    def test_fused_operators_are_planned(self, capsys: pytest.CaptureFixture[str], model: str) -> None:
        """In float32: in 16-bit types nearly all blocks of such small images share a launch."""
        flags = ("--img-size", "64", "--batch-size", "2", "--precision", "float32", "--json")
        status, out, err = run(capsys, "explain", model, *flags)
        launches = json.loads(out)["launches"]
        assert status == 0
        assert "as optimize_ leaves it on this machine's CPU" in err
        assert sum(launch["op"].startswith("effkernels::") for launch in launches) >= 15
        assert not any("batch_norm" in launch["op"] for launch in launches), "every norm is fused"

    @pytest.mark.usefixtures("compiled")
    @pytest.mark.parametrize("model", [TIMM, TORCHVISION])
    def test_a_training_step_moves_fewer_bytes_than_before(
        self, capsys: pytest.CaptureFixture[str], model: str
    ) -> None:
        status, out, err = run(capsys, "explain", model, "--train", "--img-size", "64", "--batch-size", "16", "--json")
        report = json.loads(out)
        assert status == 0
        assert 'as optimize_(model, mode="training") leaves it' in err
        assert (report["model"], report["img_size"]) == (model, 64)
        assert any(row["op"] == "effkernels::training_depthwise" for row in report["fused"]["rows"])
        assert not any(row["op"].startswith("effkernels") for row in report["plain"]["rows"])
        assert report["share_of_bytes"] < 0.8
        assert report["share_of_saved"] < 0.6
        status, _, err = run(capsys, "explain", model, "--train", "--recompute", "expand")
        assert status == 2
        assert "--recompute is for a model of effkernels.list_models()" in err

    @pytest.mark.usefixtures("compiled")
    def test_plan_of_a_network(self) -> None:
        network, report = fused_on_meta(find_model(TIMM), (3, 64, 64), torch.bfloat16)
        assert all(parameter.is_meta for parameter in network.parameters())
        assert report.fused > 10
        one, two = (plan_network(network, (3, 64, 64), name="a", batch_size=batch) for batch in (1, 2))
        assert two.totals.flops == 2 * one.totals.flops
        with pytest.raises(ValueError, match=r"input_size=\(3, 64, 32\); allowed: squares"):
            plan_network(network, (3, 64, 32), name="a")


class TestTune:
    @pytest.mark.usefixtures("compiled")
    @pytest.mark.parametrize("model", [TIMM, HF])
    def test_calls_are_those_of_the_optimized_model(self, model: str) -> None:
        calls = calls_of(model, 64)
        assert {"depthwise_bn_act", "pointwise_bn_act"} <= {call.op for call in calls}
        assert all(call.batch == 1 for call in calls)


class TestExport:
    @pytest.mark.usefixtures("compiled")
    def test_the_fused_operators_are_exported(self, capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
        plain = randomise(find_model(TORCHVISION).build())
        torch.save(plain.state_dict(), tmp_path / "weights.pth")
        arguments = ("--checkpoint", tmp_path / "weights.pth", "--output", tmp_path / "model.pt2", "--image-size", "64")
        status, out, err = run(
            capsys, "export", "--model", TORCHVISION, "--format", "pt2", *arguments, "--batch-size", "2", "--json"
        )
        assert status == 0
        assert f"export: optimize_ fused 19 of 19 blocks of {TORCHVISION}" in err
        assert "effkernels::pointwise_bn_act" in json.loads(out)["operators"]
        images = torch.randn(2, 3, 64, 64)
        with torch.inference_mode():
            exported = torch.export.load(tmp_path / "model.pt2").module()(images)
            torch.testing.assert_close(exported, plain(images), rtol=1e-3, atol=1e-4)

    def test_safetensors_are_for_this_packages_networks(
        self, capsys: pytest.CaptureFixture[str], tmp_path: Path
    ) -> None:
        arguments = ("--format", "safetensors", "--output", tmp_path / "model.safetensors")
        status, _, err = run(capsys, "export", "--model", TIMM, *arguments)
        assert status == 2
        assert "format='safetensors' is for classifiers of create_model" in err


@pytest.mark.parametrize(
    "command", [("predict", "x.png", "--model"), ("bench", "--model"), ("explain",), ("tune", "--model"),
                ("export", "--format", "pt2", "--output", "x.pt2", "--model")],
)  # fmt: skip
@pytest.mark.parametrize(
    ("model", "message"),
    [
        ("timm:mobilenetv9", "has no model 'mobilenetv9'"),
        ("torchvision:mobilenet_v9", "has no classifier 'mobilenet_v9'"),
        ("hf:mobilenet_v9", "no kind of image classifier"),
        ("nowhere.py:model", "there is no file nowhere.py"),
    ],
)
def test_the_same_words_everywhere(
    capsys: pytest.CaptureFixture[str], command: tuple[str, ...], model: str, message: str
) -> None:
    status, out, err = run(capsys, *command, model)
    assert (status, out) == (2, "")
    assert err.startswith(f"effkernels {command[0]}: {'MODEL' if command[0] == 'explain' else '--model'}: ")
    assert message in err
