"""Tools of PyTorch and timm on an optimised model: the values of the plain one, and what of it still runs fused."""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
import torch
import torch.distributed as dist
from optimize_network import assert_as_before, is_fused, programs
from peer_models import images, timm_model, torchvision_model
from torch import nn
from torch.nn.utils import prune

import effkernels

X = (2, 64, 64)


@pytest.fixture(scope="module")
def base() -> nn.Module:
    return torchvision_model("mobilenet_v3_small")


@pytest.fixture
def plain(base: nn.Module) -> nn.Module:
    return copy.deepcopy(base)


@pytest.fixture
def model(base: nn.Module) -> nn.Module:
    model = copy.deepcopy(base)
    assert effkernels.optimize_(model, input_size=64).fused == 13
    with torch.no_grad():
        model(images(*X))
    return model


@pytest.fixture
def one_process(tmp_path: Path) -> Iterator[None]:
    if not dist.is_available() or not dist.is_gloo_available():
        pytest.skip("this PyTorch has no gloo")
    dist.init_process_group("gloo", init_method=f"file://{tmp_path}/store", rank=0, world_size=1)
    yield
    dist.destroy_process_group()


def convolutions(model: nn.Module) -> list[nn.Conv2d]:
    return [module for module in model.modules() if isinstance(module, nn.Conv2d)]


def assert_close(model: nn.Module, plain: nn.Module) -> None:
    x = images(*X)
    with torch.no_grad():
        torch.testing.assert_close(model(x), plain(x), rtol=1e-3, atol=1e-4)


def test_pruning_afterwards_is_honoured_and_can_be_made_permanent(model: nn.Module, plain: nn.Module) -> None:
    for one in (model, plain):
        for conv in convolutions(one):
            prune.l1_unstructured(conv, "weight", 0.3)
    assert_as_before(model, plain, images(*X))
    for one in (model, plain):
        for conv in convolutions(one):
            prune.remove(conv, "weight")
    assert_as_before(model, plain, images(*X))
    block = next(one for one in programs(model) if one is not model and convolutions(one)[0].in_channels == 16)
    assert is_fused(block, images(1, 9, 9, channels=16))


def test_pruning_before_is_the_reason(plain: nn.Module) -> None:
    for conv in convolutions(plain):
        prune.l1_unstructured(conv, "weight", 0.3)
    x = images(*X)
    with torch.no_grad():
        wanted = plain(x)
        report = effkernels.optimize_(plain, input_size=64)
        torch.testing.assert_close(plain(x), wanted, rtol=1e-4, atol=1e-4)
    assert report.fused == 0
    assert {block.reason for block in report.blocks} == {"a hook is attached to it"}


@pytest.mark.filterwarnings("ignore::DeprecationWarning", "ignore:.*quantize_per_tensor.*")
def test_dynamic_quantisation_finds_the_linear_layers(model: nn.Module, plain: nn.Module) -> None:
    quantised = [torch.ao.quantization.quantize_dynamic(one, {nn.Linear}, dtype=torch.qint8) for one in (model, plain)]
    counts = [sum("quantized" in type(module).__module__ for module in one.modules()) for one in quantised]
    assert counts[0] == counts[1] > 0
    assert len(programs(quantised[0])) == len(programs(model))
    x = images(*X)
    with torch.no_grad():
        torch.testing.assert_close(quantised[0](x), quantised[1](x), rtol=1e-2, atol=1e-2)


@pytest.mark.filterwarnings("ignore::DeprecationWarning", "ignore::UserWarning")
def test_fx_quantisation_puts_its_observers_where_it_would(model: nn.Module, plain: nn.Module) -> None:
    from torch.ao.quantization import get_default_qconfig_mapping
    from torch.ao.quantization.quantize_fx import prepare_fx

    mapping = get_default_qconfig_mapping(torch.backends.quantized.engine)
    prepared = [prepare_fx(one, mapping, (images(*X),)) for one in (model, plain)]
    assert str(prepared[0].graph) == str(prepared[1].graph)


def test_a_feature_extractor_has_the_nodes_of_the_plain_model(model: nn.Module, plain: nn.Module) -> None:
    from torchvision.models.feature_extraction import create_feature_extractor, get_graph_node_names

    assert get_graph_node_names(model) == get_graph_node_names(plain)
    x = images(*X)
    with torch.no_grad():
        found, wanted = (create_feature_extractor(one, ["features.4"])(x)["features.4"] for one in (model, plain))
    torch.testing.assert_close(found, wanted, rtol=1e-4, atol=1e-5)


def _averaged(model: nn.Module) -> nn.Module:
    return torch.optim.swa_utils.AveragedModel(model)


def _ema(model: nn.Module) -> nn.Module:
    from effkernels.models.peers import import_timm

    import_timm()
    from timm.utils import ModelEmaV3

    return ModelEmaV3(model).module


@pytest.mark.parametrize("wrap", [_averaged, _ema, nn.DataParallel])
@pytest.mark.parametrize("first", [True, False])
def test_wrappers_run_the_fused_blocks(base: nn.Module, wrap: Callable[[nn.Module], nn.Module], first: bool) -> None:
    model = copy.deepcopy(base)
    if first:
        wrapped = wrap(model).eval()
        assert effkernels.optimize_(wrapped, input_size=64).fused == 13
    else:
        effkernels.optimize_(model, input_size=64)
        wrapped = wrap(model).eval()
        assert len(programs(wrapped)) == len(programs(model))
    assert_as_before(wrapped, wrap(copy.deepcopy(base)).eval(), images(*X))


def test_distributed_data_parallel_of_one_process(base: nn.Module, one_process: None) -> None:
    wrapped = nn.parallel.DistributedDataParallel(copy.deepcopy(base))
    assert effkernels.optimize_(wrapped, input_size=64).fused == 13
    assert_close(wrapped, base)


def test_fully_shard_before_is_the_reason_and_after_runs_fused(
    model: nn.Module, plain: nn.Module, one_process: None
) -> None:
    from torch.distributed.fsdp import fully_shard

    sharded = fully_shard(copy.deepcopy(plain))
    report = effkernels.optimize_(sharded, input_size=64)
    assert {block.reason for block in report.blocks} == {"its weights are no plain tensors but DTensor"}
    assert_close(sharded, plain)
    assert_close(fully_shard(model), plain)
    assert effkernels.restore_(model) == 13
    assert_close(model, plain)


def test_checkpointing_gives_the_gradients_of_the_plain_model(model: nn.Module, plain: nn.Module) -> None:
    from torch.utils.checkpoint import checkpoint

    gradients = []
    for run in (lambda x: checkpoint(model, x, use_reentrant=False), plain):
        x = images(*X).requires_grad_()
        run(x).sum().backward()
        gradients.append(x.grad)
    torch.testing.assert_close(*gradients, rtol=1e-3, atol=1e-4)


def test_hooks_of_attribution_methods_see_what_they_saw(model: nn.Module, plain: nn.Module) -> None:
    seen: list[list[torch.Tensor]] = []
    for one in (model, plain):
        found: list[torch.Tensor] = []
        conv = convolutions(one)[-2]
        hooks = [
            conv.register_forward_hook(lambda module, args, output, to=found: to.append(output.detach())),
            conv.register_full_backward_hook(lambda module, inputs, outputs, to=found: to.append(outputs[0])),
        ]
        one(images(*X))[:, 3].sum().backward()
        for hook in hooks:
            hook.remove()
        seen.append(found)
    torch.testing.assert_close(seen[0], seen[1], rtol=1e-3, atol=1e-4)
    assert_as_before(model, plain, images(*X))


def test_other_parameters_by_functional_call(model: nn.Module, plain: nn.Module) -> None:
    others = {name: 1.01 * value.detach() for name, value in model.named_parameters()}
    x = images(*X)
    with torch.no_grad():
        found = torch.func.functional_call(model, others, (x,))
        plain.load_state_dict(others, strict=False)
        torch.testing.assert_close(found, plain(x), rtol=1e-3, atol=1e-4)


def test_another_classifier_of_timm() -> None:
    model = timm_model("mobilenetv3_small_050")
    plain = copy.deepcopy(model)
    effkernels.optimize_(model, input_size=64)
    for classes in (7, 0):
        for one in (model, plain):
            torch.manual_seed(0)
            one.reset_classifier(classes)
        assert_as_before(model, plain, images(*X))
