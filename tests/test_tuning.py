"""The tuned plan: its file, its look-ups, and the measuring that fills it, here with injected times."""

from __future__ import annotations

import os
import re
import stat
import subprocess
import sys
import warnings
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import op_cases
import pytest
import torch
from op_cases import Case
from torch import Tensor

import effkernels
from effkernels import ops, triton
from effkernels.bench import op_timing
from effkernels.ops import backends
from effkernels.triton import tuned_plan
from effkernels.triton.tuned_plan import EVEN, BackendKey, Comparison, Configuration, ConfigurationKey, TunedPlan

GPU = "NVIDIA H200"
CPU = torch.device("cpu")
POINTWISE = BackendKey("pointwise_bn_act", "float32", 8, (1, 1), 1, "silu")


@pytest.fixture(autouse=True)
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    """A cache folder of its own for each test, and a process that has read nothing."""
    monkeypatch.setenv(tuned_plan.VARIABLE, str(tmp_path / "cache"))
    tuned_plan.forget()
    yield tmp_path / "cache"
    tuned_plan.forget()


def a_plan(device: str = GPU, choice: tuple[int, ...] | None = (1, 2)) -> TunedPlan:
    plan = TunedPlan(device)
    plan.configurations[ConfigurationKey("conv_bn_act", "bfloat16", (4, 3))] = Configuration(choice, 5.0, 4.0)
    plan.comparisons[POINTWISE] = {"2x8x5x5": Comparison("triton", {"cuda": 3.0, "triton": 2.0})}
    plan.comparisons[BackendKey("squeeze_excite_gate", "float32", 8, None, 1, "silu")] = {
        "2x8": Comparison(EVEN, {"cuda": 3.0, "triton": 3.0})
    }
    return plan


class TestTheFile:
    def test_gives_back_what_was_recorded(self) -> None:
        file = tuned_plan.record(a_plan())
        assert tuned_plan.read(GPU) == a_plan()
        assert TunedPlan.from_json(file.read_text(), GPU) == a_plan()

    def test_is_one_for_each_device_schema_and_release(self, monkeypatch: pytest.MonkeyPatch) -> None:
        names = {tuned_plan.file_of(GPU).name, tuned_plan.file_of("NVIDIA H100").name}
        for change in ({"schema": 99}, {"effkernels": "9.9"}, {"triton": "9.9"}):
            monkeypatch.setattr(tuned_plan, "_versions", lambda change=change: {**tuning_versions, **change})
            names.add(tuned_plan.file_of(GPU).name)
        assert len(names) == 5
        assert all("/" not in name and " " not in name for name in names)

    def test_the_environment_names_the_folder(self, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
        monkeypatch.setenv(tuned_plan.VARIABLE, str(tmp_path / "told"))
        assert tuned_plan.folder() == tmp_path / "told"
        monkeypatch.delenv(tuned_plan.VARIABLE)
        monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "xdg"))
        assert tuned_plan.folder() == tmp_path / "xdg" / "effkernels"
        monkeypatch.delenv("XDG_CACHE_HOME")
        monkeypatch.setenv("HOME", str(tmp_path))
        assert tuned_plan.folder() == tmp_path / ".cache" / "effkernels"

    def test_that_is_not_there_is_no_reason_to_warn(self) -> None:
        with warnings.catch_warnings():
            warnings.simplefilter("error")
            assert tuned_plan.read(GPU) == TunedPlan(GPU)

    @pytest.mark.parametrize(
        ("change", "says"),
        [
            (lambda text: text[: len(text) // 2], "is ignored: "),
            (lambda text: "", "is ignored: "),
            (lambda text: "[1, 2]", "not a tuned plan"),
            (lambda text: text.replace(GPU, "Tesla T4"), "its device is 'Tesla T4' and not 'NVIDIA H200'"),
            (lambda text: text.replace('"schema": 2', '"schema": 0'), "its schema is 0 and not 2"),
            (lambda text: text.replace('"shape": [4, 3]', '"shape": "4x3"'), "an entry is not as it should be"),
            (lambda text: text.replace('"choice": [1, 2]', '"choice": [1, true]'), "an entry is not as it should be"),
            (lambda text: text.replace('"op": "conv_bn_act", ', ""), "an entry is not as it should be"),
            (lambda text: text.replace('"channels": 8', '"channels": [8]'), "an entry is not as it should be"),
            (lambda text: text.replace('"channels": 8', '"channels": ' + "[" * 100_000), "nested too deep"),
            (lambda text: text.replace("5.0", "1" + "0" * 400), "a whole number of 401 digits is out of range"),
            (lambda text: text.replace("5.0", "1" * 5000), "a whole number of 5000 digits is out of range"),
            (lambda text: text.replace("5.0", "1e400"), "the number 1e400 is out of range"),
            (lambda text: text.replace("5.0", "NaN"), "NaN is not allowed"),
        ],
        ids=[
            "cut off",
            "empty",
            "a list",
            "another device",
            "older",
            "a shape",
            "a choice",
            "no operator",
            "a key",
            "deep",
            "10^400",
            "5,000 digits",
            "1e400",
            "NaN",
        ],
    )
    def test_that_cannot_be_used_is_ignored_with_one_warning_that_names_it(
        self, change: Callable[[str], str], says: str
    ) -> None:
        file = tuned_plan.record(a_plan())
        text = file.read_text()
        file.write_text(change(text))
        assert file.read_text() != text
        with pytest.warns(RuntimeWarning) as warned:
            found = [tuned_plan.read(GPU), tuned_plan.read(GPU)]
        assert found == [TunedPlan(GPU), TunedPlan(GPU)]
        (one,) = warned
        assert str(file) in str(one.message)
        assert says in str(one.message)

    def test_that_is_a_pipe_is_not_waited_for(self) -> None:
        file = tuned_plan.file_of(GPU)
        file.parent.mkdir(parents=True)
        os.mkfifo(file)
        with pytest.warns(RuntimeWarning, match="is ignored: .* is a named pipe"):
            assert tuned_plan.read(GPU) == TunedPlan(GPU)

    def test_of_another_release_is_named(self, monkeypatch: pytest.MonkeyPatch) -> None:
        with monkeypatch.context() as older:
            older.setattr(tuned_plan, "_versions", lambda: {**tuning_versions, "effkernels": "0.0.1"})
            file = tuned_plan.record(a_plan())
        with pytest.warns(RuntimeWarning, match="is not of this release") as warned:
            assert tuned_plan.read(GPU) == TunedPlan(GPU)
        assert str(file) in str(warned[0].message)
        assert tuned_plan.clear(GPU) == [file]
        assert not file.exists()

    def test_grows_and_newer_answers_win(self) -> None:
        tuned_plan.record(a_plan())
        newer = a_plan(choice=None)
        newer.comparisons = {POINTWISE: {"64x8x5x5": Comparison("cuda", {"cuda": 1.0, "triton": 2.0})}}
        tuned_plan.record(newer)
        both = tuned_plan.read(GPU)
        assert both.configurations == newer.configurations
        assert set(both.comparisons[POINTWISE]) == {"2x8x5x5", "64x8x5x5"}
        assert len(both.comparisons) == 2

    def test_a_broken_one_is_replaced(self) -> None:
        file = tuned_plan.record(a_plan())
        file.write_text("{")
        with pytest.warns(RuntimeWarning):
            tuned_plan.record(a_plan())
        assert tuned_plan.read(GPU) == a_plan()
        assert sorted(path.suffix for path in file.parent.iterdir()) == [".json", ".lock"], "nothing is left behind"

    def test_links_are_not_followed(self, tmp_path: Path) -> None:
        """The target of a link in the folder is not written to, whether the link is the file or the lock."""
        file = tuned_plan.file_of(GPU)
        file.parent.mkdir(parents=True, exist_ok=True)
        precious = tmp_path / "precious"
        precious.write_text("precious")
        file.symlink_to(precious)
        with pytest.warns(RuntimeWarning, match="is ignored"):
            tuned_plan.record(a_plan())
        assert not file.is_symlink()
        assert tuned_plan.read(GPU) == a_plan()
        lock = file.with_suffix(".lock")
        lock.unlink()
        lock.symlink_to(precious)
        with pytest.raises(OSError, match=re.escape(lock.name)):
            tuned_plan.record(a_plan())
        assert precious.read_text() == "precious"

    def test_has_the_usual_mode(self) -> None:
        before = os.umask(0o027)
        try:
            file = tuned_plan.record(a_plan())
        finally:
            os.umask(before)
        assert stat.S_IMODE(file.stat().st_mode) == 0o640
        assert stat.S_IMODE(file.with_suffix(".lock").stat().st_mode) == 0o640

    def test_what_a_killed_process_left_is_removed(self) -> None:
        file = tuned_plan.record(a_plan())
        leftover = file.with_name(f".{file.stem[:40]}-0123456789.part{file.suffix}")
        leftover.write_text("half of")
        other = file.with_name(".another-device-0123456789.part.json")
        other.write_text("not of this file")
        tuned_plan.record(a_plan())
        assert (leftover.exists(), other.exists()) == (False, True)

    def test_processes_at_once_lose_nothing_and_show_nothing_half_written(self) -> None:
        program = """
import sys
from effkernels.triton.tuned_plan import Configuration, ConfigurationKey, TunedPlan, record
for number in range(12):
    plan = TunedPlan("NVIDIA H200")
    plan.configurations[ConfigurationKey(sys.argv[1], "float32", (number,))] = Configuration((number,), 2.0, 1.0)
    record(plan)
"""
        writers = [subprocess.Popen([sys.executable, "-c", program, name]) for name in ("a", "b", "c")]
        with warnings.catch_warnings():
            warnings.simplefilter("error")
            while any(writer.poll() is None for writer in writers):
                tuned_plan.read(GPU)
        assert [writer.returncode for writer in writers] == [0, 0, 0]
        found = {(key.op, *key.shape) for key in tuned_plan.read(GPU).configurations}
        assert found == {(name, number) for name in "abc" for number in range(12)}


tuning_versions = dict(tuned_plan._versions())


class TestLookups:
    CANDIDATES = ((9, 9), (1, 2), (3, 4))

    @pytest.fixture(autouse=True)
    def on_a_gpu(self, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.setattr(tuned_plan, "device_name", lambda device: GPU)

    def ask(self, dtype: torch.dtype = torch.bfloat16, shape: tuple[int, ...] = (4, 3)) -> tuple[int, ...] | None:
        return tuned_plan.configuration("conv_bn_act", CPU, dtype, shape, lambda: self.CANDIDATES)

    def test_without_a_file_cost_one_reading_and_no_candidates(self, monkeypatch: pytest.MonkeyPatch) -> None:
        readings = []
        monkeypatch.setattr(tuned_plan, "read", lambda name: readings.append(name) or TunedPlan(name))

        def candidates() -> tuple[tuple[int, ...], ...]:
            raise AssertionError("nothing is to be chosen from")

        for _ in range(3):
            assert tuned_plan.configuration("conv_bn_act", CPU, torch.bfloat16, (4, 3), candidates) is None
        assert readings == [GPU]

    def test_find_what_was_tuned_and_nothing_else(self) -> None:
        tuned_plan.record(a_plan())
        assert self.ask() == (1, 2)
        assert self.ask(torch.float16) is None
        assert self.ask(shape=(4, 4)) is None
        assert tuned_plan.configuration("other", CPU, torch.bfloat16, (4, 3), lambda: self.CANDIDATES) is None

    def test_take_the_default_where_it_was_not_beaten(self) -> None:
        tuned_plan.record(a_plan(choice=None))
        assert self.ask() is None

    def test_never_give_what_is_no_candidate(self) -> None:
        tuned_plan.record(a_plan(choice=(64, 64)))
        with pytest.warns(RuntimeWarning, match=r"\(64, 64\) is no candidate of conv_bn_act \(4, 3\)") as warned:
            found = [self.ask(), self.ask()]
        assert found == [None, None]
        assert len(warned) == 1
        with tuned_plan.answering(lambda lookup: (64, 64)):
            assert self.ask() is None

    def test_can_be_answered_and_listened_to(self) -> None:
        tuned_plan.record(a_plan())
        heard: list[tuned_plan.Lookup] = []
        with tuned_plan.answering(lambda lookup: heard.append(lookup)):
            assert self.ask() is None
        assert heard == [tuned_plan.Lookup(ConfigurationKey("conv_bn_act", "bfloat16", (4, 3)), self.CANDIDATES)]
        with tuned_plan.answering(lambda lookup: (3, 4)):
            assert self.ask() == (3, 4)
        assert self.ask() == (1, 2)

    def test_a_device_that_runs_no_triton_has_no_plan(self, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.undo()
        assert tuned_plan.device_name(torch.device("meta")) is None
        assert tuned_plan.device_name(CPU) == ("triton interpreter" if triton.INTERPRETED else None)


class OnGpu(Tensor):
    """A tensor that says it lives on the first GPU."""

    is_cuda, is_cpu, device = True, False, torch.device("cuda:0")

    def get_device(self) -> int:
        return 0


def on_gpu(*shape: int, dtype: torch.dtype = torch.float32) -> Tensor:
    return torch.zeros(shape, dtype=dtype).as_subclass(OnGpu)


@pytest.fixture
def gpu(monkeypatch: pytest.MonkeyPatch) -> None:
    """A GPU, as far as the choice of a backend is concerned, on which both kinds of kernels run."""
    pytest.importorskip("triton")
    monkeypatch.setattr(backends, "_COMPILED_CUDA", frozenset(backends.OPERATORS) - {"conv_bn_act"})
    monkeypatch.setattr(backends, "_cuda_problems", {0: ""})
    monkeypatch.setattr(backends, "_cuda_runs_on", {})
    monkeypatch.setattr(backends, "_faster_by_triton", {})
    monkeypatch.setattr(backends, "_selected", "auto")
    monkeypatch.setattr(backends._library, "is_loaded", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 1)
    monkeypatch.setattr(tuned_plan, "device_name", lambda device: GPU)


@pytest.mark.usefixtures("gpu")
class TestTheChoiceOfABackend:
    def choose(self, x: Tensor, kernel: int = 1, activation: str = "silu", op: str = "pointwise_bn_act") -> str:
        return backends.choose(op, x, torch.zeros(4, x.shape[1], kernel, kernel), 1, activation)

    def test_is_the_compiled_kernel_where_nothing_is_tuned(self, monkeypatch: pytest.MonkeyPatch) -> None:
        assert self.choose(on_gpu(2, 8, 5, 5)) == "cuda"
        for name in ("can_run_cuda", "can_run_triton", "_read_faster_by_triton"):
            monkeypatch.setattr(backends, name, lambda *a, **k: pytest.fail("asked again after the first call"))
        assert self.choose(on_gpu(2, 16, 5, 5)) == "cuda"

    def test_is_triton_where_it_was_faster(self) -> None:
        tuned_plan.record(a_plan())
        assert self.choose(on_gpu(2, 8, 5, 5)) == "triton"
        assert {self.choose(on_gpu(n, 8, h, w)) for n in (0, 1, 64) for h in (1, 9) for w in (1, 300)} == {"triton"}
        assert self.choose(on_gpu(2, 9, 5, 5)) == "cuda"
        assert self.choose(on_gpu(2, 8, 5, 5, dtype=torch.float16)) == "cuda"
        assert self.choose(on_gpu(2, 8, 5, 5), kernel=3) == "cuda"
        assert self.choose(on_gpu(2, 8, 5, 5), activation="relu") == "cuda"
        assert self.choose(on_gpu(2, 8, 5, 5), op="depthwise_bn_act") == "cuda"

    def test_of_a_forced_backend_stays(self) -> None:
        tuned_plan.record(a_plan())
        with effkernels.backend("cuda"):
            assert self.choose(on_gpu(2, 8, 5, 5)) == "cuda"

    def test_does_not_prefer_what_cannot_run(self, monkeypatch: pytest.MonkeyPatch) -> None:
        tuned_plan.record(a_plan())
        monkeypatch.setattr(backends, "can_run_triton", lambda *a, **k: backends.Decision(False, "no"))
        assert self.choose(on_gpu(2, 8, 5, 5)) == "cuda"

    def test_is_triton_where_there_is_no_compiled_kernel_whatever_was_tuned(self) -> None:
        tuned_plan.record(a_plan())
        assert self.choose(on_gpu(2, 8, 5, 5), op="conv_bn_act") == "triton"

    def test_of_a_tensor_on_the_cpu_reads_nothing(self, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.setattr(tuned_plan, "read", lambda name: pytest.fail("read on the CPU"))
        assert backends.choose("pointwise_bn_act", torch.zeros(1, 8, 2, 2)) in ("cpu", "reference")

    @pytest.mark.parametrize("tuned", [False, True])
    def test_is_made_while_tracing_even_at_the_first_call(self, tuned: bool) -> None:
        """The first call reads the plan: what it fills must not be among what the trace guards."""
        if tuned:
            tuned_plan.record(a_plan())
        seen: list[str] = []

        def compiler(module: torch.fx.GraphModule, inputs: Sequence[Any]) -> Callable[..., tuple[Tensor, ...]]:
            seen.extend(str(node.target) for node in module.graph.nodes if "effkernels" in str(node.target))
            return lambda *arguments: (torch.zeros(1), torch.zeros(1))  # nothing can run

        @torch.compile(backend=compiler, fullgraph=True, dynamic=True)
        def function(like: Tensor) -> tuple[Tensor, Tensor]:
            x = like.new_empty((2, 8, like.shape[0], 5), device="cuda:0")
            weight = like.new_empty((8, 8, 1, 1), device="cuda:0")
            return like + 1, ops.pointwise_bn_act(x, weight, activation="silu", allow_tf32=False)

        if not backends._library.LIBRARY_FILE.exists():
            pytest.skip("needs the compiled library")
        torch._dynamo.reset()
        for size in (3, 4, 7):
            function(torch.zeros(size))
        namespace = "effkernels_triton" if tuned else "effkernels"
        assert seen == [f"{namespace}.pointwise_bn_act.default"], "one graph for all sizes"


def test_backends_that_win_some_calls_of_a_key_and_lose_others_are_not_preferred() -> None:
    def comparisons(*faster: str) -> dict[str, Comparison]:
        return {str(number): Comparison(name, {}) for number, name in enumerate(faster)}

    plan = TunedPlan(GPU)
    for winners, expected in (
        (("triton", EVEN), {POINTWISE: "triton"}),
        (("triton", "cuda"), {}),
        ((EVEN,), {}),
        (("cuda",), {POINTWISE: "cuda"}),
    ):
        plan.comparisons = {POINTWISE: comparisons(*winners)}
        assert plan.faster_backends() == expected


# ------------------------------------------------------------------------------------------- candidates of the families


def _tiles() -> Iterator[tuple[tuple[Any, ...], tuple[tuple[int, ...], ...]]]:
    from effkernels.triton import pointwise

    for images, pixels in ((1, 1), (8, 16), (1, 256 * 3136), (256, 49)):
        for in_channels, out_channels in ((16, 96), (7, 100), (1152, 320), (24, 1)):
            for dtype, exact in ((torch.bfloat16, False), (torch.float32, True), (torch.float32, False)):
                for gated in (False, True):
                    spans = images > 1 and pixels < pointwise.FEWEST_PIXELS_OF_OWN_TILE
                    shape = (images, pixels, in_channels, out_channels, dtype, exact, gated, spans, 132)
                    found = pointwise.candidates(*shape)
                    assert found[0] == pointwise.tile_of(*shape)
                    for tile in found:
                        assert min(tile[:3]) >= 16, "the least that tl.dot takes"
                        moved = tile.stages * (tile.rows + tile.columns) * tile.step * dtype.itemsize
                        assert moved <= pointwise.MOST_SHARED or tile == found[0]
                        assert not exact or pointwise.EXACT_RUN % tile.step == 0
                    yield shape, found


def _cuts() -> Iterator[tuple[tuple[Any, ...], tuple[tuple[int, ...], ...]]]:
    from effkernels.triton import depthwise

    for channels in (1, 7, 24, 96, 1152):
        for size in (1, 7, 112):
            kernels = (
                (3, 3, 1, 1),
                (5, 5, 2, 1),
                (9, 9, 1, 1),
                (3, 3, 1, 2),
                (1, 11, 1, 1),
                (13, 3, 2, 1),
                (13, 13, 1, 1),
            )
            for height, width, stride, dilation in kernels:
                vector = 8 if channels % 8 == 0 else 1
                shape = (channels, size, size, height, width, stride, dilation, vector)
                found = depthwise.candidates(*shape)
                assert found[0] == depthwise.cut_of(*shape)
                assert all(cut.strip == 1 for cut in found) or dilation == 1, "neighbours share no input"
                assert all(32 * cut.warps <= 512 and cut.block % vector == 0 for cut in found)
                yield shape, tuple((cut.lanes, cut.block, cut.warps) for cut in found)


def _stems() -> Iterator[tuple[tuple[Any, ...], tuple[tuple[int, ...], ...]]]:
    from effkernels.triton import conv

    for shape in ((27, 32), (75, 48), (9, 1), (128, 70)):
        found = conv.candidates(*shape)
        assert found[0] == conv.tile_of(*shape)
        assert all(min(tile[:3]) >= 16 for tile in found)
        yield shape, found


@pytest.mark.parametrize("family", [_tiles, _cuts, _stems])
def test_candidates_start_with_the_default_and_are_few_powers_of_two(family: Callable[[], Any]) -> None:
    pytest.importorskip("triton")
    for shape, found in family():
        assert 1 <= len(found) <= 24, f"{shape}: a user waits for every one to compile"
        assert all(size & (size - 1) == 0 for candidate in found for size in candidate if size != 3), shape


def test_candidates_do_not_repeat_themselves() -> None:
    pytest.importorskip("triton")
    from effkernels.triton import conv, depthwise, pointwise

    for found in (
        pointwise.candidates(1, 4096, 96, 24, torch.bfloat16, False, True, False, 132),
        depthwise.candidates(96, 56, 56, 3, 3, 1, 1, 8),
        conv.candidates(27, 32),
    ):
        assert len(found) == len(set(found)) > 4


class TestLaunches:
    @pytest.mark.parametrize("op", triton.FAMILIES)
    @pytest.mark.parametrize("size", [6, 40])
    def test_are_as_many_as_promised(self, size: int, op: str, interpreted: None, one_thread: None) -> None:
        """64 channels of 40 x 40 pixels are more than one program scales."""
        case = Case(op, channels=64 if size == 40 else 8, height=size, width=size, kernel=(3, 3), padding=(1, 1, 1, 1))
        arguments = case.draw()
        with op_timing.triton_launches() as names:
            results = op_cases.run(ops, case, arguments)
        shape = results[0].shape[1:] if results[0].ndim == 4 else ()
        on_chip = "expand_depthwise_kernel" in names or op != "expand_depthwise_squeeze"
        assert len(names) == triton.launches_of(op, *shape, one_pass=on_chip)
        assert triton.launches_of("depthwise_bn_act_se", 64, 32, 32) == 1
        assert triton.launches_of("depthwise_bn_act_se", 64, 32, 33) == 2

    def test_of_no_operator_are_refused(self) -> None:
        with pytest.raises(ValueError, match="no Triton implementation of 'softmax'; allowed: depthwise_bn_act, "):
            triton.launches_of("softmax")


def test_a_user_of_the_operators_never_tunes() -> None:
    """The first call does not import the module that measures."""
    program = """
import sys
import torch
import effkernels
effkernels.create_model("efficientnet_b0").eval()(torch.randn(1, 3, 32, 32))
measuring = ("effkernels.bench.autotune", "effkernels.bench.timing", "effkernels.bench.op_timing")
print([name for name in measuring if name in sys.modules])
"""
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, env=dict(os.environ))
    assert (done.returncode, done.stdout) == (0, "[]\n"), done.stderr
