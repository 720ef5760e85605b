"""`InferenceEngine`: batches of any size, recorded calls, new weights, memory, and its end."""

from __future__ import annotations

import copy
import gc
import json
import os
import pickle
import sys
import threading
import types
from collections import OrderedDict, namedtuple
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import parity
import pytest
import torch
from engine_models import SIZE, Returning, Sum, images, small_network, sum_engine
from torch import Tensor, nn

import effkernels
from effkernels.engine import InferenceEngine
from effkernels.models import peers

SIZES = (1, 2, 4)
Pair = namedtuple("Pair", ["first", "second"])


@pytest.fixture(scope="module")
def features() -> nn.Module:
    """A network without classifier, whose CPU kernels give the same bits at any batch size."""
    return small_network(classes=0)


@pytest.fixture(scope="module")
def engine(features: nn.Module) -> InferenceEngine:
    return InferenceEngine(features, batch_sizes=SIZES, input_size=SIZE)


class TestRun:
    @pytest.mark.parametrize("count", [0, 1, 2, 3, 4, 7, 9])
    def test_any_batch_size_gives_the_bits_of_the_model(
        self, engine: InferenceEngine, features: nn.Module, count: int, compiled: None
    ) -> None:
        x = images(count)
        with torch.inference_mode():
            wanted = features(x)
        assert torch.equal(engine(x), wanted)

    @pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
    @pytest.mark.parametrize("channels_last", [False, True])
    def test_a_bucket_gives_the_bits_of_the_model(self, dtype: torch.dtype, channels_last: bool) -> None:
        """With a classifier too: what is padded has no say in the rows that count."""
        model = small_network()
        memory_format = torch.channels_last if channels_last else torch.contiguous_format
        served = InferenceEngine(model, dtype=dtype, batch_sizes=(4,), input_size=SIZE, memory_format=memory_format)
        x = images(6)
        with torch.inference_mode():
            padded = torch.cat([x, torch.zeros(2, *x.shape[1:])]).to(dtype).contiguous(memory_format=memory_format)
            wanted = torch.cat([model.to(dtype)(part) for part in padded.split(4)])[:6]
        result = served(x)
        assert result.dtype == dtype
        assert torch.equal(result, wanted)

    @pytest.mark.parametrize("others", [0.0, float("nan"), float("inf"), 1e4])
    def test_a_result_is_that_of_its_image_alone(self, others: float) -> None:
        served = InferenceEngine(small_network(), batch_sizes=(4,), input_size=SIZE)
        x = images(4)
        wanted = served(x)
        for row in range(4):
            mixed = torch.full_like(x, others)
            mixed[row] = x[row]
            assert torch.equal(served(mixed)[row], wanted[row])

    def test_padding_is_zeros(self) -> None:
        """Not what the memory held before: a model that mixes its rows would see it."""
        served = sum_engine(Returning(lambda x: x + x.sum()), batch_sizes=(8,))
        for count in (8, 3, 1):
            x = torch.ones(count, 3, 2, 2)
            assert torch.equal(served(x), x + 12 * count)

    def test_every_layout_and_dtype_of_images(self, engine: InferenceEngine) -> None:
        x = images(3).bfloat16().float()  # values that all of these dtypes have
        wanted = engine(x)
        wide = torch.zeros(3, 3, SIZE, 2 * SIZE)
        wide[..., ::2] = x
        for same in (x.to(memory_format=torch.channels_last), x.bfloat16(), x.double(), wide[..., ::2]):
            assert torch.equal(engine(same), wanted)

    def test_surroundings_do_not_matter(self, engine: InferenceEngine) -> None:
        x = images(2)
        wanted = engine(x)
        with torch.autocast("cpu", torch.bfloat16), torch.enable_grad():
            result = engine(x.requires_grad_())
        assert torch.equal(result, wanted)
        assert not result.requires_grad

    def test_images_stay_as_they_are(self) -> None:
        x = images(4, size=2)
        before = x.clone()
        served = sum_engine(nn.Flatten(), batch_sizes=(1, 4))  # its result is a view of its input
        for count in (1, 3, 4):
            served(x[:count]).fill_(7.0)  # a plain tensor, although the model ran in inference mode
        assert torch.equal(x, before)

    @pytest.mark.parametrize(
        ("given", "error", "message"),
        [
            ([1.0], TypeError, r"images are list; allowed: a floating tensor \(N, 3, 64, 64\)"),
            (torch.zeros(1, 3, 64, 64, dtype=torch.uint8), TypeError, "dtype torch.uint8;.*go through preprocess"),
            (torch.zeros(3, 64, 64), ValueError, r"shape \(3, 64, 64\); allowed: a floating tensor \(N, 3, 64, 64\)"),
            (torch.zeros(2, 1, 64, 64), ValueError, r"shape \(2, 1, 64, 64\)"),
            (torch.zeros(2, 3, 64, 65), ValueError, r"shape \(2, 3, 64, 65\)"),
            (torch.zeros(2, 3, 64, 64, device="meta"), ValueError, "on meta; allowed: cpu"),
        ],
    )
    def test_what_is_no_input_is_named(
        self, engine: InferenceEngine, given: Any, error: type[Exception], message: str
    ) -> None:
        before = engine.stats()
        with pytest.raises(error, match=message):
            engine(given)
        assert engine.stats() == before

    def test_threads_do_not_meet(self, engine: InferenceEngine) -> None:
        inputs = [images(count, seed) for seed, count in enumerate((1, 3, 4, 5, 2, 6))]
        wanted = [engine(x) for x in inputs]
        with ThreadPoolExecutor(6) as pool:
            for _ in range(3):
                assert all(map(torch.equal, pool.map(engine, inputs), wanted))

    def test_batches_and_fill_are_counted(self) -> None:
        served = sum_engine()
        assert served.stats().mean_fill is None
        served(images(7, size=2))  # 4 + 4, one of them padded
        stats = served.stats()
        assert (stats.batches, stats.images, stats.mean_fill) == (2, 7, 7 / 8)


class TestOutputs:
    @pytest.mark.parametrize("count", [0, 1, 5])
    def test_structures_are_kept(self, count: int) -> None:
        def everything(x: Tensor) -> Any:
            return {
                "logits": x.sum((2, 3)),
                "maps": [x, (x[:, :1] * 2).long()],
                "nothing": None,
                "pair": Pair(x.mean((1, 2, 3)), OrderedDict(a=x.amax(1))),
            }

        x = images(count, size=2)
        result, wanted = sum_engine(Returning(everything))(x), everything(x)
        assert list(result) == list(wanted)
        assert result["nothing"] is None
        assert isinstance(result["pair"], Pair)
        assert torch.allclose(result["logits"], wanted["logits"])
        for name in (0, 1):
            assert torch.equal(result["maps"][name], wanted["maps"][name])
        assert torch.allclose(result["pair"].first, wanted["pair"].first)
        assert torch.equal(result["pair"].second["a"], wanted["pair"].second["a"])

    @pytest.mark.parametrize(
        ("function", "error", "message"),
        [
            (lambda x: (x, "text"), TypeError, "output holds str; allowed: tensors"),
            (lambda x: x.sum(), ValueError, r"batch of 1 holds a tensor of shape \(\)"),
            (lambda x: (x, x.new_zeros(3, 2)), ValueError, r"batch of 1 holds a tensor of shape \(3, 2\)"),
            (lambda x: x.new_zeros(1, 2), ValueError, r"batch of 4 holds a tensor of shape \(1, 2\)"),
            (lambda x: [None], ValueError, "holds no tensor"),
        ],
    )
    def test_what_cannot_be_cut_into_images_is_refused(
        self, function: Any, error: type[Exception], message: str
    ) -> None:
        with pytest.raises(error, match=message):
            sum_engine(Returning(function))


class TestPreparation:
    def test_the_model_stays_as_it_is(self) -> None:
        model = small_network().train()
        before = copy.deepcopy(model.state_dict())
        InferenceEngine(model, dtype=torch.bfloat16, batch_sizes=(1,), input_size=SIZE)(images(1))
        assert all(module.training for module in model.modules())
        assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())

    def test_the_model_meets_what_was_asked_for(self) -> None:
        seen = []

        def look(x: Tensor) -> Tensor:
            seen.append((tuple(x.shape), x.dtype, x.is_contiguous(memory_format=torch.channels_last)))
            assert torch.is_inference_mode_enabled()
            return x.sum((1, 2, 3))

        served = sum_engine(Returning(look), dtype=torch.float16, input_size=(5, 6, 4), batch_sizes=(2, 3))
        seen.clear()
        served(images(4, channels=5, size=8)[..., :6, :4])
        assert seen == [((2, 5, 6, 4), torch.float16, True), ((2, 5, 6, 4), torch.float16, True)]

    def test_an_engine_may_be_made_in_inference_mode(self) -> None:
        model = Sum()
        with torch.inference_mode():
            served = sum_engine(model)
        model.weight.data.fill_(3.0)
        served.refresh()
        assert served(torch.ones(1, 3, 2, 2)).item() == 36.0

    def test_buckets_may_be_prepared_later(self) -> None:
        served = sum_engine(warm_up=False)
        assert [bucket.runner for bucket in served.report.buckets] == ["not prepared", "not prepared"]
        served(images(3, size=2))
        assert [bucket.runner for bucket in served.report.buckets] == ["not prepared", "eager"]

    def test_other_models_are_optimized(self, monkeypatch: pytest.MonkeyPatch) -> None:
        """On the copy, after the norms were folded; and the same again for new weights."""
        calls: list[tuple[str, nn.Module]] = []
        fake = types.ModuleType("effkernels.optimize")

        def fold_bn_(model: nn.Module) -> int:
            calls.append(("fold", model))
            model.weight.mul_(10.0)  # type: ignore[operator, union-attr]
            return 2

        def optimize_(model: nn.Module) -> Any:
            calls.append(("optimize", model))
            return types.SimpleNamespace(fused=5)

        fake.fold_bn_, fake.optimize_ = fold_bn_, optimize_  # type: ignore[attr-defined]
        monkeypatch.setitem(sys.modules, "effkernels.optimize", fake)
        model = Sum()
        served = sum_engine(model, optimize=True, fold_norms=True)
        assert [name for name, _ in calls] == ["fold", "optimize"]
        assert all(given is not model for _, given in calls)
        assert (served.report.optimized, served.report.norms_folded) == ("5 blocks fused", 2)
        model.weight.data.fill_(3.0)
        served.refresh()
        assert served(torch.ones(1, 3, 2, 2)).item() == 360.0

    def test_a_model_of_timm(self) -> None:
        """Optimized, held against float64 like everything else, and new weights reach what is fused."""
        model = peers.import_timm().create_model("mobilenetv3_small_050", num_classes=10).eval()
        served = InferenceEngine(model, batch_sizes=(1, 2), input_size=SIZE)
        assert served.report.optimized.endswith("blocks fused")
        assert {bucket.runner for bucket in served.report.buckets} == {"recorded"}
        assert not served.report.optimized.startswith("0")
        x = images(3)
        for factor in (1.0, 1.05):
            with torch.no_grad():
                for parameter in model.parameters():
                    parameter.mul_(factor)
                plain = [model(given) for given in (x, x.contiguous(memory_format=torch.channels_last))]
                truth = copy.deepcopy(model).double()(x.double())
            served.refresh()
            parity.assert_parity(served(x), plain, truth)

    def test_the_report_may_be_read_while_buckets_appear(self, features: nn.Module) -> None:
        served = InferenceEngine(features, batch_sizes=range(1, 7), input_size=32, warm_up=False)
        done = threading.Event()

        def read() -> int:
            count = 0
            while not done.is_set():
                assert len(served.report.buckets) == 6
                assert served.memory_bound_bytes > 0
                count += 1
            return count

        with ThreadPoolExecutor(3) as pool:
            readers = [pool.submit(read) for _ in range(3)]
            try:
                for count in range(1, 7):
                    served(images(count, size=32))
            finally:
                done.set()
            assert all(reader.result(60) > 0 for reader in readers)
        assert {bucket.runner for bucket in served.report.buckets} == {"recorded"}

    def test_the_report_says_everything(self, engine: InferenceEngine) -> None:
        report = engine.report
        assert "own" in report.optimized
        assert [bucket.batch for bucket in report.buckets] == list(SIZES)
        assert {(bucket.runner, bucket.reason) for bucket in report.buckets} == {("recorded", "")}
        assert json.loads(report.to_json())["buckets"][2]["batch"] == 4
        for word in ("EfficientNet on cpu, float32, channels_last, input 3x64x64", "batch 4: recorded", "weights 1"):
            assert word in str(report)

    @pytest.mark.parametrize(
        ("arguments", "error", "message"),
        [
            ({"batch_sizes": ()}, ValueError, "at least one"),
            ({"batch_sizes": (0,)}, ValueError, "0 is not allowed"),
            ({"batch_sizes": 4}, TypeError, r"batch_sizes=4; allowed: several of int"),
            ({"batch_sizes": "14"}, TypeError, "batch_sizes='14'; allowed"),
            ({"batch_sizes": (1 << 60,)}, ValueError, "batch_sizes=.* of input_size=.*fits into memory"),
            ({"max_latency_ms": -1}, ValueError, "max_latency_ms=-1"),
            ({"max_latency_ms": float("inf")}, ValueError, r"max_latency_ms=inf; allowed: 0 to 86400000 \(a day\)"),
            ({"max_latency_ms": float("nan")}, ValueError, "max_latency_ms=nan"),
            ({"max_latency_ms": 1e15}, ValueError, "max_latency_ms=1000000000000000.0"),
            ({"max_latency_ms": 10**400}, ValueError, "max_latency_ms=1000"),
            ({"max_latency_ms": "2"}, TypeError, "max_latency_ms='2'; allowed: a number of milliseconds"),
            ({"max_queue": 0}, ValueError, "max_queue=0"),
            ({"max_queue": 1.5}, TypeError, "max_queue=1.5; allowed: int"),
            ({"max_memory_bytes": float("nan")}, TypeError, "max_memory_bytes=nan; allowed: int"),
            ({"max_memory_bytes": -1}, ValueError, "max_memory_bytes=-1; allowed: at least 1"),
            ({"cuda_graph": "false"}, TypeError, "cuda_graph='false'; allowed: True, False"),
            ({"optimize": None}, TypeError, "optimize=None; allowed: True, False"),
            ({"fold_norms": 1}, TypeError, "fold_norms=1; allowed: True, False"),
            ({"warm_up": "no"}, TypeError, "warm_up='no'; allowed: True, False"),
            ({"dtype": torch.int8}, ValueError, r"dtype=torch\.int8"),
            ({"dtype": torch.complex64}, ValueError, r"dtype=torch\.complex64; allowed: torch.float32"),
            ({"dtype": torch.float8_e4m3fn}, ValueError, r"dtype=torch\.float8_e4m3fn"),
            ({"dtype": "float32"}, TypeError, "dtype='float32'; allowed: torch.dtype"),
            ({"device": "gpu"}, ValueError, "device='gpu': Expected one of cpu"),
            ({"device": 0}, TypeError, "device=0; allowed: torch.device"),
            ({"input_size": True}, ValueError, "input_size=True; allowed: PIXELS"),
            ({"input_size": 2.0}, ValueError, "input_size=2.0; allowed: PIXELS"),
            ({"input_size": 0}, ValueError, "input_size=0; allowed: PIXELS"),
            ({"memory_format": torch.channels_last_3d}, ValueError, "memory_format=torch.channels_last_3d"),
            ({"device": "meta"}, ValueError, "device=meta holds no values"),
            ({"input_size": (1, 2, 3, 4)}, ValueError, "input_size=.*allowed: PIXELS"),
            ({"input_size": None}, ValueError, "Sum does not say what input it takes"),
            ({"preprocessing": "imagenet"}, TypeError, "preprocessing is str; allowed"),
        ],
    )
    def test_bad_arguments_are_named(self, arguments: dict[str, Any], error: type[Exception], message: str) -> None:
        with pytest.raises(error, match=message):
            sum_engine(**arguments)

    @pytest.mark.skipif(torch.cuda.is_available(), reason="this machine has a GPU")
    def test_a_missing_gpu_is_named(self) -> None:
        with pytest.raises(ValueError, match=r"device=cuda, but PyTorch .* sees no GPU"):
            sum_engine(device="cuda")

    def test_a_model_must_be_a_module_that_can_be_copied(self) -> None:
        with pytest.raises(TypeError, match=r"model is function; allowed: torch.nn.Module"):
            InferenceEngine(images)  # type: ignore[arg-type]
        model = Sum()
        model.lock = threading.Lock()
        with pytest.raises(TypeError, match="Sum cannot be copied: cannot pickle"):
            sum_engine(model)


class TestMemory:
    def test_activations_are_counted_where_they_are_made(self) -> None:
        """By hand: a, b, c and d are alive when d is made; then all but d are given back, and e comes."""

        def forward(x: Tensor) -> Tensor:
            a = x + 1  # 48 bytes an image
            b = a.repeat(1, 10, 1, 1)  # 480
            c = b.sum((1, 2, 3))  # 4
            d = c + 1  # 4
            del a, b, c
            return d.view(-1, 1).expand(-1, 40) * 2  # 160

        served = sum_engine(Returning(forward), batch_sizes=(2, 8))
        report = served.report
        assert report.weight_bytes == 0
        assert report.activation_bytes == 8 * (48 + 480 + 4 + 4)
        assert report.buffer_bytes == 8 * (48 + 160)
        assert served.memory_bound_bytes == report.activation_bytes + report.buffer_bytes
        assert report.buckets[0].memory_bytes == served.memory_bound_bytes // 4

    def test_weights_are_counted_once(self) -> None:
        layer = nn.Conv2d(3, 3, 1)
        served = sum_engine(nn.Sequential(layer, layer))
        assert served.report.weight_bytes == 4 * (9 + 3)

    def test_a_network(self, engine: InferenceEngine, features: nn.Module) -> None:
        weights = sum(value.nbytes for value in features.state_dict().values())
        bounds = [bucket.memory_bytes for bucket in engine.report.buckets]
        assert engine.report.weight_bytes == weights
        assert bounds == sorted(bounds)
        assert engine.memory_bound_bytes == bounds[-1] > weights

    def test_buckets_beyond_the_limit_are_refused(self) -> None:
        bounds = [bucket.memory_bytes for bucket in sum_engine(batch_sizes=(1, 2, 4, 8)).report.buckets]
        served = sum_engine(batch_sizes=(1, 2, 4, 8), max_memory_bytes=bounds[1])
        assert [bucket.runner for bucket in served.report.buckets] == ["eager", "eager", "refused", "refused"]
        assert served.report.buckets[2].reason == f"above max_memory_bytes={bounds[1]}"
        assert served.memory_bound_bytes == bounds[1]
        model = served._prepared._model
        assert isinstance(model, Sum)
        assert {shape[0] for shape in model.calls} == {1, 2}, "a refused bucket is not tried"
        assert served(torch.ones(5, 3, 2, 2)).tolist() == [[12.0]] * 5

    def test_a_limit_below_the_smallest_bucket(self) -> None:
        with pytest.raises(ValueError, match=r"max_memory_bytes=10, and a batch of 1 needs [0-9]+ bytes"):
            sum_engine(max_memory_bytes=10)


class TestEnd:
    def test_a_closed_engine_says_so(self) -> None:
        with sum_engine() as served:
            served(torch.ones(1, 3, 2, 2))
        served.close()
        for call in (
            lambda: served(torch.ones(1, 3, 2, 2)),
            lambda: served.submit(torch.ones(3, 2, 2)),
            lambda: served.preprocess([]),
            lambda: served.refresh(Sum()),
        ):
            with pytest.raises(RuntimeError, match="the engine is closed"):
                call()
        assert served.stats().images == 1

    @pytest.mark.parametrize("copied", [pickle.dumps, copy.copy, copy.deepcopy])
    def test_an_engine_is_not_copied(self, engine: InferenceEngine, copied: Any) -> None:
        with pytest.raises(TypeError, match=r"cannot be pickled or copied: .* Pickle the model"):
            copied(engine)

    @pytest.mark.skipif(not hasattr(os, "fork"), reason="this system has no fork")
    def test_a_forked_child_is_told(self) -> None:
        served = sum_engine()
        served.submit(torch.ones(3, 2, 2)).result(60)  # its thread runs
        child = os.fork()
        if child == 0:
            status = 1
            try:
                served.submit(torch.ones(3, 2, 2))
            except RuntimeError as error:
                served.close()  # returns: there is no thread to wait for
                status = 0 if "do not survive a fork" in str(error) else 2
            finally:
                os._exit(status)
        assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == 0
        assert served.submit(torch.ones(3, 2, 2)).result(60).item() == 12.0

    def test_an_engine_without_references_ends(self) -> None:
        served = sum_engine()
        future = served.submit(torch.ones(3, 2, 2))
        worker = served._batcher._worker
        del served
        assert future.result(60).item() == 12.0, "what it took is answered first"
        assert worker is not None
        for _ in range(600):
            gc.collect()
            if worker.done.acquire(timeout=0.1):
                break
        assert worker.identity is None

    def test_the_package_has_it(self) -> None:
        assert effkernels.InferenceEngine is InferenceEngine
