"""``effkernels train`` as a user sees it: files, messages, exit status, and what `predict` makes of the weights."""

from __future__ import annotations

import argparse
import json
from dataclasses import fields
from pathlib import Path

import pytest
import torch
from full_disk import small_disk
from training_runs import MODEL, NAME, arguments_for, assert_same_weights, log_of, make_folder, numbers_of, status_of

import effkernels
from effkernels.commands import train as command
from effkernels.models import load_checkpoint, registry
from effkernels.models.peers import import_torchvision
from effkernels.models.preprocessing import Preprocessing
from effkernels.train import TrainOptions
from effkernels.train import training as training_module
from effkernels.train.data import load_data
from effkernels.train.loading import training_transform

import_torchvision()  # image folders and augmentation are its; a plain import fails beside a CPU-only torch

FILES = {"checkpoint.pt", "log.jsonl", "plot.png", "model.safetensors", "labels.txt"}


@pytest.fixture(autouse=True)
def _small_network(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(registry._MODELS, NAME, MODEL)


@pytest.fixture(scope="module")
def photos(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_folder(tmp_path_factory.mktemp("photos"))


def test_folder_to_predictions(photos: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    output = tmp_path / "run"
    assert status_of([*arguments_for(photos, output, "--epochs", "6"), "--json"]) == 0
    captured = capsys.readouterr()
    report = json.loads(captured.out)
    assert {file.name for file in output.iterdir()} == FILES
    assert report["accuracy"] == 1.0
    assert (output / "labels.txt").read_text() == "blue\ngreen\nred\n"
    assert "images/s" in captured.err
    assert "GiB" in captured.err
    records = log_of(output)
    assert [record["epoch"] for record in records] == [1, 2, 3, 4, 5, 6]
    assert records[-1]["accuracy"] == report["accuracy"]
    assert records[-1]["train_loss"] < records[0]["train_loss"]

    words = report["predict"].split()
    assert words[:2] == ["effkernels", "predict"]
    images = [str(photos / name / "003.png") for name in ("red", "blue")]
    at = words.index("IMAGE")
    assert status_of([*words[1:at], *images, *words[at + 1 :], "--json", "--device", "cpu"]) == 0
    predictions = json.loads(capsys.readouterr().out)["predictions"]
    assert [prediction["scores"][0]["label"] for prediction in predictions] == ["red", "blue"]


@pytest.mark.slow
def test_digits_reach_97_percent(tmp_path: Path) -> None:
    more = ["--epochs", "5", "--batch-size", "32", "--lr", "5e-3"]
    assert status_of(arguments_for("digits", tmp_path, *more)) == 0
    accuracies = [record["accuracy"] for record in log_of(tmp_path)]
    assert accuracies[-1] >= 0.97, accuracies


def test_folders_train_and_val(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    make_folder(tmp_path / "data" / "train", 8)
    make_folder(tmp_path / "data" / "val", 2)
    data = load_data(TrainOptions(str(tmp_path / "data"), "-"))
    assert (len(data.train.labels), len(data.evaluation.labels)) == (24, 6)
    assert data.classes == ("blue", "green", "red")
    (tmp_path / "data" / "val" / "red").rename(tmp_path / "data" / "val" / "rot")
    assert status_of(arguments_for(tmp_path / "data", tmp_path / "run")) == 2
    assert "train and val need the same class folders; only one has red, rot" in capsys.readouterr().err


def test_each_class_is_held_out_alike(photos: Path) -> None:
    data = load_data(TrainOptions(str(photos), "-", val_split=0.25))
    assert sorted(data.evaluation.labels) == [0] * 6 + [1] * 6 + [2] * 6
    names = [[part.name(index) for index in range(len(part.labels))] for part in (data.train, data.evaluation)]
    assert len(set(names[0]) | set(names[1])) == len(names[0]) + len(names[1]) == 72


def test_images_that_cannot_be_read_are_skipped_and_named(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    for part, count in (("train", 8), ("val", 4)):
        folder = make_folder(tmp_path / "data" / part, count)
        (folder / "red" / "000.png").write_bytes(b"no image")
        whole = (folder / "blue" / "001.png").read_bytes()
        (folder / "blue" / "001.png").write_bytes(whole[: len(whole) // 2])
    output = tmp_path / "run"
    assert status_of(arguments_for(tmp_path / "data", output, "--epochs", "2")) == 0
    captured = capsys.readouterr()
    skipped = [line for line in captured.err.splitlines() if line.startswith("train: skipped ")]
    assert len(skipped) == 4, "each is named once, not in each epoch"
    assert all(any(name in line for line in skipped) for name in ("train/red/000.png", "val/blue/001.png"))
    assert [record["skipped"] for record in log_of(output)] == [4, 4]
    assert "4 images could not be read" in captured.out


def test_no_image_that_can_be_read(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    make_folder(tmp_path / "data", 8)
    for file in (tmp_path / "data").rglob("*.png"):
        file.write_bytes(b"")
    assert status_of(arguments_for(tmp_path / "data", tmp_path / "run", "--epochs", "2")) == 1
    assert "no image to train with can be read" in capsys.readouterr().err


def test_an_empty_class_folder_is_refused(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (make_folder(tmp_path / "data", 4) / "empty").mkdir()
    assert status_of(arguments_for(tmp_path / "data", tmp_path / "run")) == 2
    message = capsys.readouterr().err
    assert f"--data {tmp_path / 'data'}" in message
    assert "empty" in message


@pytest.mark.parametrize(
    ("more", "message"),
    [
        (["--epochs", "0"], "'0' is not a whole number of at least 1"),
        (["--batch-size", "1"], "--batch-size 1: allowed: a whole number of at least 2"),
        (["--batch-size", "500"], "--batch-size 500: allowed: 2 to 57, the images of an epoch"),
        (["--lr", "0"], "--lr 0.0: allowed: a finite number above 0"),
        (["--lr", "nan"], "--lr nan: allowed: a finite number above 0"),
        (["--opt", "lion"], "invalid choice: 'lion'"),
        (["--smoothing", "1"], "--smoothing 1.0: allowed: 0 to less than 1"),
        (["--drop-path", "-0.1"], "--drop-path -0.1: allowed: 0 to less than 1"),
        (["--model-ema-decay", "1"], "--model-ema-decay 1.0: allowed: 0 to less than 1"),
        (["--warmup-epochs", "40"], "--warmup-epochs 40.0: allowed: 0 to less than epochs=30"),
        (["--scale", "0"], "--scale 0.0: allowed: above 0, at most 1"),
        (["--val-split", "0.999"], "--val-split 0.999: of a class with 24 images none is left"),
        (["--workers", "-1"], "--workers -1: allowed: a whole number of at least 0"),
        (["--seed", "-1"], "--seed -1: allowed: a whole number from 0 to 4294967295"),
        (["--num-classes", "2"], "--num-classes 2: allowed: at least 3, the classes of the data"),
        (["--model", "efficientnet_b9"], "--model efficientnet_b9: unknown model"),
        (["--data", "nowhere"], "--data nowhere: no such folder; allowed: a folder of class folders, or digits"),
        (["--weights", "nowhere.pth"], "--weights nowhere.pth: No such file"),
        (["--weights", "a.pth", "--pretrained"], "--weights a.pth: allowed: weights or pretrained, not both"),
        (["--pretrained"], f"--pretrained: create_model('{NAME}', pretrained=True)"),
        (["--device", "tpu"], "--device tpu: not a device; allowed: cpu, cuda, cuda:N"),
        (["--sync-bn"], "--sync-bn: PyTorch has such norms on GPUs alone"),
    ],
)
def test_wrong_arguments(
    more: list[str], message: str, photos: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert status_of(arguments_for(photos, tmp_path / "run", *more)) == 2
    captured = capsys.readouterr()
    assert message in captured.err
    assert captured.out == ""


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ([], "--data is needed"),
        (["--data", "digits"], "--output is needed"),
        (["--resume", "nowhere"], "--resume nowhere: No such file"),
        (["--resume", "nowhere", "--lr", "1"], "--lr 1.0: a training goes on as it was begun; allowed: --data"),
    ],
)
def test_arguments_that_are_missing(
    arguments: list[str], message: str, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    assert status_of(["train", *arguments]) == 2
    assert message in capsys.readouterr().err


def test_every_option_has_a_flag() -> None:
    parser = argparse.ArgumentParser()
    command.add_arguments(parser)
    flags = {action.dest for action in parser._actions}
    assert {field.name for field in fields(TrainOptions)} == flags - {"help", "json", "force", "resume"}


def test_a_training_is_not_overwritten_without_force(
    photos: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "log.jsonl").write_text("{}\n")
    assert status_of(arguments_for(photos, tmp_path)) == 2
    assert "log.jsonl exist; --force overwrites, --resume goes on" in capsys.readouterr().err
    assert (tmp_path / "log.jsonl").read_text() == "{}\n"
    assert status_of(arguments_for(photos, tmp_path, "--force", "--epochs", "1")) == 0
    assert len(log_of(tmp_path)) == 1


@pytest.mark.parametrize(
    "more",
    [
        ["--opt", "sgd", "--precision", "amp", "--model-ema-decay", "0.9", "--clip-grad", "1"],
        ["--opt", "rmsprop", "--precision", "amp_float16", "--augment", "randaugment", "--drop-path", "0.2"],
        ["--augment", "trivialaugment", "--workers", "2", "--num-classes", "5"],
        ["--augment", "none", "--warmup-epochs", "0"],
    ],
    ids=lambda more: " ".join(more[:4]),
)
def test_recipes(more: list[str], photos: Path, tmp_path: Path) -> None:
    assert status_of(arguments_for(photos, tmp_path, "--epochs", "3", *more)) == 0
    records = log_of(tmp_path)
    assert min(record["train_loss"] for record in records[1:]) < records[0]["train_loss"]
    classes = len((tmp_path / "labels.txt").read_text().splitlines())
    assert load_checkpoint(NAME, tmp_path / "model.safetensors").num_classes == classes


def test_the_written_weights_are_the_averaged_ones(photos: Path, tmp_path: Path) -> None:
    assert status_of(arguments_for(photos, tmp_path, "--epochs", "2", "--model-ema-decay", "0.5")) == 0
    state = torch.load(tmp_path / "checkpoint.pt", weights_only=True)
    written = load_checkpoint(NAME, tmp_path / "model.safetensors").state_dict()
    # A checkpoint of a training is one that load_checkpoint reads, too.
    read = load_checkpoint(NAME, tmp_path / "checkpoint.pt").state_dict()
    for key, value in written.items():
        assert torch.equal(value, state["model_ema"][f"module.{key}"]), key
        assert torch.equal(value, read[key]), key
    assert not torch.equal(written["classifier.weight"], state["model"]["classifier.weight"])


def test_augmentation_none_is_the_evaluation(photos: Path) -> None:
    preprocessing = Preprocessing.of(MODEL.config)
    assert training_transform(TrainOptions("digits", "-", augment="none"), preprocessing) is preprocessing


def test_a_loss_that_is_no_number_ends_the_training(
    photos: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    more = ["--lr", "1e30", "--opt", "sgd", "--epochs", "3"]
    assert status_of(arguments_for(photos, tmp_path, *more)) == 1
    message = capsys.readouterr().err
    assert "epoch 1: the loss is nan" in message
    assert "a lower --lr" in message
    assert "no checkpoint was written yet" in message


class TestFineTuning:
    @pytest.fixture
    def weights(self, tmp_path: Path) -> Path:
        torch.manual_seed(3)
        model = effkernels.create_model(NAME, num_classes=3)
        torch.save({"state_dict": model.state_dict()}, tmp_path / "weights.pth")
        return tmp_path / "weights.pth"

    @pytest.mark.parametrize("classes", [3, 4])
    def test_the_classifier_is_fresh_where_the_classes_differ(
        self, classes: int, weights: Path, photos: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
    ) -> None:
        # So small a rate leaves the weights as they were read.
        more = ["--weights", str(weights), "--num-classes", str(classes), "--lr", "1e-30", "--epochs", "1",
                "--weight-decay", "0"]  # fmt: skip
        assert status_of(arguments_for(photos, tmp_path / "run", *more)) == 0
        says = capsys.readouterr().err
        given = torch.load(weights, weights_only=True)["state_dict"]
        trained = load_checkpoint(NAME, tmp_path / "run" / "model.safetensors").state_dict()
        assert torch.equal(trained["blocks.1.0.conv_pw.weight"], given["blocks.1.0.conv_pw.weight"])
        if classes == 3:
            assert "all weights are those of" in says
            assert torch.equal(trained["classifier.weight"], given["classifier.weight"])
        else:
            assert f"the classifier is fresh: {weights} has 3 classes, and 4 are wanted" in says
            assert trained["classifier.weight"].shape[0] == 4

    def test_meaning_of_the_weights_is_kept(self, photos: Path, tmp_path: Path) -> None:
        """Padding and eps that a file notes are in the trained file, also after a training that was stopped."""
        model = effkernels.create_model(NAME, num_classes=3, pad_type="same", bn_eps=1e-3)
        effkernels.export_model(model, tmp_path / "given.safetensors", "safetensors", batch_size=1)
        output = tmp_path / "run"
        more = ["--weights", str(tmp_path / "given.safetensors"), "--epochs", "1"]
        assert status_of(arguments_for(photos, output, *more)) == 0
        (output / "model.safetensors").unlink()
        assert status_of(["train", "--resume", str(output)]) == 0
        trained = load_checkpoint(NAME, output / "model.safetensors")
        assert (trained.pad_type, trained.bn1.eps) == ("same", 1e-3)


class TestFullDisk:
    def test_the_last_checkpoint_stays_and_the_training_goes_on(
        self, photos: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
    ) -> None:
        """The disk is full from the second epoch on, and has room again when the training is resumed."""
        whole = tmp_path / "whole"
        assert status_of(arguments_for(photos, whole, "--epochs", "3")) == 0
        capsys.readouterr()
        output = tmp_path / "run"
        saved = training_module.Training._save
        full = small_disk(300)

        def save_then_fill(training: training_module.Training) -> None:
            saved(training)
            if len(training.history) == 1:
                full.__enter__()

        monkeypatch.setattr(training_module.Training, "_save", save_then_fill)
        try:
            status = status_of(arguments_for(photos, output, "--epochs", "3"))
        finally:
            full.__exit__(None, None, None)
        captured = capsys.readouterr()
        assert status == 1
        assert f"{output / 'checkpoint.pt'}: File too large; the training goes on" in captured.err
        assert f"not written: {output / 'model.safetensors'}: File too large" in captured.err
        assert "accuracy" in captured.out, "the result is said"
        assert {file.name for file in output.iterdir()} <= FILES, "no half of a file is left"
        assert torch.load(output / "checkpoint.pt", weights_only=True)["epoch"] == 1

        assert status_of(["train", "--resume", str(output)]) == 0
        assert numbers_of(output) == numbers_of(whole)
        assert_same_weights(output, whole)


def test_without_torchvision(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], photos: Path
) -> None:
    def missing() -> None:
        raise ImportError

    monkeypatch.setattr("effkernels.train.data.import_torchvision", missing)
    monkeypatch.setattr("effkernels.train.loading.import_torchvision", missing)
    assert status_of(arguments_for(photos, tmp_path / "a")) == 2
    assert ": image folders need torchvision: pip install 'effkernels[train]'" in capsys.readouterr().err
    assert status_of(arguments_for("digits", tmp_path / "b")) == 2
    assert "--augment basic: torchvision is needed: pip install 'effkernels[train]'" in capsys.readouterr().err
