"""Wrappers of trainers around the weights in a file are removed, or named; nothing in a file is run."""

from __future__ import annotations

import argparse
import subprocess
import sys
import threading
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy
import pytest
import torch
from peer_models import small_timm_b0
from torch import Tensor, nn
from torch.optim.swa_utils import AveragedModel, get_ema_multi_avg_fn

import effkernels
from effkernels.models import CheckpointError, load_checkpoint, read_checkpoint
from effkernels.models.layouts import LAYOUTS
from effkernels.models.peers import import_timm

State = dict[str, Tensor]


@pytest.fixture(scope="module")
def state() -> State:
    """timm's B0; shared, so take copies to change it."""
    return small_timm_b0().state_dict()


def save(content: object, folder: Path, name: str = "weights.pth", **options: Any) -> Path:
    torch.save(content, folder / name, **options)
    return folder / name


def assert_loads(file: Path, wanted: State, **options: Any) -> None:
    """Loaded by name and into a model, the weights are these, and nothing is warned of."""
    found = load_checkpoint("efficientnet_b0", file, **options).state_dict()
    assert found.keys() == wanted.keys()
    assert all(torch.equal(found[key], wanted[key]) for key in wanted)


def prefixed(state: State, prefix: str) -> State:
    return {prefix + key: value for key, value in state.items()}


class TestPrefixes:
    @pytest.mark.parametrize("use_buffers", [False, True])
    def test_averaged_model(self, state: State, tmp_path: Path, use_buffers: bool) -> None:
        model = effkernels.create_model("efficientnet_b0")
        model.load_state_dict(state)
        averaged = AveragedModel(model, multi_avg_fn=get_ema_multi_avg_fn(0.9), use_buffers=use_buffers)
        averaged.update_parameters(model)
        assert "n_averaged" in averaged.state_dict()
        assert_loads(save(averaged.state_dict(), tmp_path), averaged.module.state_dict())
        assert_loads(save({"model_ema": averaged.state_dict()}, tmp_path), averaged.module.state_dict())

    @pytest.mark.parametrize(
        "prefix",
        ["module.", "model.", "net.", "backbone.", "_orig_mod.", "model.module.", "net.model._orig_mod.", "a.b.c.d."],
    )
    @pytest.mark.parametrize("layout", LAYOUTS, ids=lambda layout: layout.name)
    def test_any_prefix_of_every_key(self, state: State, tmp_path: Path, layout, prefix: str) -> None:
        named, _ = effkernels.convert_state_dict(state, "timm", layout.name)
        back, _ = effkernels.convert_state_dict(prefixed(named, prefix), None, "timm")
        assert all(torch.equal(back[key], state[key]) for key in state)
        if prefix in ("net.", "model.module."):
            checkpoint = read_checkpoint(save({"state_dict": prefixed(named, prefix)}, tmp_path))
            assert checkpoint.layout is layout
            assert checkpoint.tensors.keys() == named.keys()

    def test_lightning(self, state: State, tmp_path: Path) -> None:
        content = {
            "epoch": 2,
            "global_step": 300,
            "pytorch-lightning_version": "2.5.0",
            "state_dict": prefixed(state, "model."),
            "loops": {"fit_loop": {"state_dict": {}}},
            "callbacks": {"ModelCheckpoint{'monitor': 'loss'}": {"best_model_score": torch.tensor(0.5)}},
            "optimizer_states": [{"state": {0: {"step": torch.tensor(1.0)}}, "param_groups": []}],
            "lr_schedulers": [],
            "hyper_parameters": {"lr": 0.1},
        }
        assert_loads(save(content, tmp_path, "epoch=2.ckpt"), state)

    def test_tensors_beside_the_network_are_named(self, state: State, tmp_path: Path) -> None:
        content = {**prefixed(state, "model."), "criterion.weight": torch.ones(1000), "n_averaged": torch.tensor(3)}
        with pytest.warns(
            UserWarning, match=r"under 'model\.' are read as the network, and 1 others .*: criterion\.weight$"
        ):
            model = load_checkpoint("efficientnet_b0", save({"state_dict": content}, tmp_path))
        assert torch.equal(model.conv_stem.weight, state["conv_stem.weight"])
        with pytest.warns(UserWarning, match=r"state_dict: .* left out: criterion\.weight$"):
            effkernels.convert_state_dict(content, None, "torchvision")

    def test_a_backbone_with_another_head(self, state: State, tmp_path: Path) -> None:
        trunk = {key: value for key, value in state.items() if not key.startswith("classifier")}
        content = {**prefixed(trunk, "backbone."), "head.weight": torch.ones(7, 1280), "head.bias": torch.ones(7)}
        with pytest.warns(UserWarning, match=r"2 others are left out: head\.weight, head\.bias"):
            model = load_checkpoint("efficientnet_b0", save(content, tmp_path))
        assert model.num_classes == 0

    def test_values_beside_the_network_may_be_infinite(self, state: State, tmp_path: Path) -> None:
        content = {**prefixed(state, "model."), "best_loss": torch.tensor(torch.inf)}
        with pytest.warns(UserWarning, match="best_loss"):
            load_checkpoint("efficientnet_b0", save(content, tmp_path))

    def test_compiled_stages(self, state: State, tmp_path: Path) -> None:
        """torch.compile of a part of the network puts its name into the middle of the keys."""
        content = {key.replace("blocks.2.", "blocks.2._orig_mod."): value for key, value in state.items()}
        assert content.keys() != state.keys()
        assert_loads(save(content, tmp_path), state)

    @pytest.mark.parametrize("prefix", ["model_ema.module.", "ema_model.", "averaged.module."])
    def test_an_averaged_copy_beside_the_network(self, state: State, tmp_path: Path, prefix: str) -> None:
        other = {key: torch.zeros_like(value) for key, value in state.items()}
        for raw in ("model.", ""):
            content = {**prefixed(other, raw), **prefixed(state, prefix), "averaged.n_averaged": torch.tensor(1)}
            file = save({"state_dict": content}, tmp_path)
            assert_loads(file, state)
            assert_loads(file, other, use_ema=False)

    def test_two_networks_with_nothing_to_choose_by(self, state: State, tmp_path: Path) -> None:
        file = save({**prefixed(state, "student."), **prefixed(state, "teacher.")}, tmp_path)
        with pytest.raises(
            CheckpointError, match=r"holds 2 networks, whose keys begin with 'student\.' and 'teacher\.'"
        ):
            read_checkpoint(file)

    def test_two_libraries_mixed(self, state: State, tmp_path: Path) -> None:
        named, _ = effkernels.convert_state_dict(state, "timm", "torchvision")
        with pytest.raises(CheckpointError, match=r"unexpected \(358\): features\.0"):
            load_checkpoint("efficientnet_b0", save({**state, **named}, tmp_path))

    @pytest.mark.parametrize("name", ["net", "weights", "generator"])
    def test_the_one_dict_of_tensors_in_a_file(self, state: State, tmp_path: Path, name: str) -> None:
        content = {"acc": 93.1, name: prefixed(state, "module."), "metrics": {"loss": torch.ones(3)}}
        assert_loads(save(content, tmp_path), state)

    def test_two_dicts_of_a_network(self, state: State, tmp_path: Path) -> None:
        with pytest.raises(CheckpointError, match="holds 2 networks, under 'student' and 'teacher': keep one of them"):
            read_checkpoint(save({"student": state, "teacher": state, "epoch": 3}, tmp_path))


class TestSaverOfTimm:
    @pytest.fixture(scope="class")
    def model(self) -> nn.Module:
        model = import_timm().create_model("efficientnet_b0", num_classes=3)
        return model.eval()

    def saved(self, model: nn.Module, folder: Path, args: argparse.Namespace, metric: Any) -> Path:
        """Return a file of timm's own saver, after a step of the optimizer, with a gradient scaler."""
        from timm.utils import CheckpointSaver, NativeScaler

        optimizer = torch.optim.SGD(model.parameters(), lr=0.0, momentum=0.9)
        for parameter in model.parameters():
            parameter.grad = torch.zeros_like(parameter)
        optimizer.step()
        saver = CheckpointSaver(
            model, optimizer, args=args, amp_scaler=NativeScaler(), checkpoint_dir=str(folder), recovery_dir=str(folder)
        )
        saver.save_checkpoint(1, metric=metric)
        saver.save_checkpoint(2, metric=metric)
        return folder / "model_best.pth.tar"

    @pytest.mark.parametrize("metric", [71.5, numpy.float64(71.5), numpy.float32(71.5), numpy.int64(3)], ids=str)
    def test_is_read_with_what_it_keeps_beside_the_weights(self, model: nn.Module, tmp_path: Path, metric: Any) -> None:
        args = argparse.Namespace(model="efficientnet_b0", lr=numpy.float32(0.1), mean=[0.5], amp=True, nested={"a": 1})
        file = self.saved(model, tmp_path, args, metric)
        assert_loads(file, model.state_dict())

    def test_what_else_is_in_it_is_named_and_not_run(self, model: nn.Module, tmp_path: Path) -> None:
        args = argparse.Namespace(model="efficientnet_b0", started=Mischief(tmp_path / "was-run"))
        file = self.saved(model, tmp_path, args, 71.5)
        with pytest.raises(CheckpointError) as error:
            read_checkpoint(file)
        assert "never run: test_models_checkpoint_files.leave_a_trace" in str(error.value)
        assert "argparse" not in str(error.value)
        assert "torch.save(torch.load(FILE, weights_only=False)['state_dict'], NEW_FILE)" in str(error.value)
        assert not (tmp_path / "was-run").exists()

    @pytest.mark.parametrize("zipped", [True, False])
    def test_old_and_new_formats(self, state: State, tmp_path: Path, zipped: bool) -> None:
        content = {"state_dict": state, "args": argparse.Namespace(lr=0.1), "metric": numpy.float64(3.0)}
        assert_loads(save(content, tmp_path, _use_new_zipfile_serialization=zipped), state)
        content["metric"] = Mischief(tmp_path / "was-run")
        file = save(content, tmp_path, _use_new_zipfile_serialization=zipped)
        with pytest.raises(CheckpointError, match=r"never run: test_models_checkpoint_files\.leave_a_trace\. Save"):
            read_checkpoint(file)
        assert not (tmp_path / "was-run").exists()

    def test_files_of_the_other_numpy(self, state: State, tmp_path: Path) -> None:
        """NumPy 1 wrote numpy.core where NumPy 2 writes numpy._core."""
        file = save({"state_dict": state, "metric": numpy.float64(3.0)}, tmp_path, _use_new_zipfile_serialization=False)
        content = file.read_bytes()
        names = b"cnumpy.core.multiarray\n", b"cnumpy._core.multiarray\n"
        assert any(name in content for name in names)
        for name in names:
            for other in names:
                content = content.replace(other, name)
            file.write_bytes(content)
            assert_loads(file, state)

    def test_the_process_allows_no_more_than_before(self, state: State, tmp_path: Path) -> None:
        """Also where several threads read at once."""
        before = set(torch.serialization.get_safe_globals())
        files = [save({"state_dict": state, "args": argparse.Namespace(n=n)}, tmp_path, f"{n}.pth") for n in range(4)]
        failed: list[BaseException] = []

        def read(file: Path) -> None:
            try:
                read_checkpoint(file)
            except BaseException as error:
                failed.append(error)

        threads = [threading.Thread(target=read, args=(file,)) for file in files]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
        assert failed == []
        assert set(torch.serialization.get_safe_globals()) == before


def leave_a_trace(file: Path) -> None:
    file.touch()


class Mischief:
    """Something that runs code when a file of it is unpickled."""

    def __init__(self, file: Path) -> None:
        self.file = str(file)

    def __reduce__(self) -> tuple[Callable, tuple[str]]:
        return leave_a_trace, (self.file,)


def test_a_pickled_model_is_named(tmp_path: Path) -> None:
    with pytest.raises(
        CheckpointError, match=r"never run: effkernels\.models\.\S+, .* and \d+ more\. Save model\.state_"
    ):
        read_checkpoint(save(effkernels.create_model("efficientnet_b0"), tmp_path))


def test_a_torchscript_archive_is_named(tmp_path: Path) -> None:
    torch.jit.save(torch.jit.script(nn.ReLU()), tmp_path / "scripted.pt")
    with pytest.raises(CheckpointError, match=r"is a TorchScript archive.*torch\.jit\.load\(FILE\)\.state_dict\(\)"):
        read_checkpoint(tmp_path / "scripted.pt")


def test_files_without_numpy_scalars_need_no_numpy(state: State, tmp_path: Path) -> None:
    file = save({"state_dict": prefixed(state, "model.")}, tmp_path)
    code = (
        "import sys; sys.modules['numpy'] = None; from effkernels.models import read_checkpoint; "
        f"read_checkpoint({str(file)!r})"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
