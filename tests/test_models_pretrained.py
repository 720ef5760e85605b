"""timm's published weights: the table of tags, what reaches the model, and the hub's client with its cache.

The hub is a server of the tests on loopback and the client is the real one, with a cache in a temporary folder.
"""

from __future__ import annotations

import builtins
import functools
import importlib.util
import json
import re
import shutil
from collections.abc import Callable, Iterator
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
import torch
from loopback_hub import COMMIT, Hub
from parity import assert_parity
from peer_models import images, in_both_layouts, in_float64, randomise, timm_model
from torch import Tensor

import effkernels
from effkernels.cli import main
from effkernels.models import CheckpointError, HubError, list_models, model_config
from effkernels.models.peers import import_timm
from effkernels.models.preprocessing import Preprocessing
from effkernels.models.pretrained import stem_weight
from effkernels.models.timm_weights import TIMM_WEIGHTS

pytest.importorskip("huggingface_hub", reason="the client library of the hub")
safetensors = pytest.importorskip("safetensors.torch", reason="the format of published weights")

TAGGED = list_models(pretrained=True)
LITE = "efficientnet_lite0"
REPOSITORY = "timm/efficientnet_lite0.ra_in1k"
FILE = f"{REPOSITORY}/model.safetensors"
DOCS = Path(__file__).resolve().parents[1] / "docs/models.md"


@functools.cache
def weights(name: str, **options: Any) -> dict[str, Tensor]:
    """Random weights of a model, under timm's names as ours have them."""
    return randomise(effkernels.create_model(name, device="meta", **options)).state_dict()


def published(name: str, **options: Any) -> bytes:
    """Return a model.safetensors as timm publishes it."""
    return safetensors.save(weights(name, **options), {"format": "pt"})


@pytest.fixture
def timm() -> ModuleType:
    """timm, which the test compares with; skips the test where it is not installed."""
    if importlib.util.find_spec("timm") is None:
        pytest.skip("needs timm, which is compared with: pip install timm")
    return import_timm()


@pytest.fixture
def hub(tmp_path: Path) -> Iterator[Hub]:
    """A hub that has LITE, and this process's client of it, with an empty cache."""
    with Hub() as server, server.client(tmp_path / "home"):
        server.files[FILE] = published(LITE)
        yield server


@pytest.fixture
def no_waiting(monkeypatch: pytest.MonkeyPatch) -> None:
    """Let the client's retries follow each other at once."""
    monkeypatch.setattr("time.sleep", lambda seconds: None)


def cached_files(home: Path) -> list[Path]:
    """Everything under a HF_HOME that a later run could take for weights, or for a part of them."""
    return [file for file in (home / "hub").rglob("*") if file.suffix == ".safetensors" or file.parent.name == "blobs"]


class TestTable:
    def test_tags_and_values_are_timms(self, timm: ModuleType) -> None:
        patterns = ["efficientnet_b[0-7]", "efficientnet_lite?", "tf_efficientnet_b[0-7]", "tf_efficientnet_lite?"]
        assert timm.list_models(patterns, pretrained=True) == TAGGED
        for name in TAGGED:
            theirs, ours = timm.get_pretrained_cfg(name), model_config(name).to_dict()
            for key in (
                "hf_hub_id", "tag", "architecture", "input_size", "test_input_size", "crop_pct", "test_crop_pct",
                "crop_mode", "interpolation", "mean", "std", "num_classes", "pool_size", "first_conv", "classifier",
            ):  # fmt: skip
                assert ours[key] == getattr(theirs, key), (name, key)
        for name, tags in TIMM_WEIGHTS.items():
            assert next(iter(tags)) == timm.get_pretrained_cfg(name).tag  # the default

    def test_data_helpers_of_timm_find_the_input_of_the_weights(self, timm: ModuleType) -> None:
        for name in ("efficientnet_b2.ra_in1k", "tf_efficientnet_b0.ap_in1k", "efficientnet_b5.sw_in12k_ft_in1k"):
            with torch.device("meta"):
                ours, theirs = effkernels.create_model(name), timm.create_model(name)
            for options in ({}, {"use_test_size": True}):
                found = timm.data.resolve_model_data_config(ours, **options)
                assert found == timm.data.resolve_model_data_config(theirs, **options)

    def test_lists(self) -> None:
        assert list_models("efficientnet_b0", pretrained=True) == [
            "efficientnet_b0.ra4_e3600_r224_in1k",
            "efficientnet_b0.ra_in1k",
        ]
        assert list_models("*.ns_jft*", pretrained=True, exclude_filters="*_b[1-7]") == [
            "tf_efficientnet_b0.ns_jft_in1k"
        ]
        assert list_models(pretrained=True, exclude_filters=["tf_*", "*_b?"]) == ["efficientnet_lite0.ra_in1k"]
        assert not set(TAGGED) & set(list_models())
        assert effkernels.list_models is list_models

    def test_classes_of_a_tag(self) -> None:
        model = effkernels.create_model("efficientnet_b5.sw_in12k", device="meta")
        assert model.num_classes == model.config.num_classes == 11821
        assert effkernels.create_model("efficientnet_b5.sw_in12k", num_classes=7, device="meta").num_classes == 7
        assert effkernels.create_model("efficientnet_b5", device="meta").num_classes == 1000

    def test_the_page_lists_every_tag(self) -> None:
        rows = dict(re.findall(r"^\| `(\w+)` \| (`.*`) \|$", DOCS.read_text(encoding="utf-8"), re.MULTILINE))
        assert {name: re.findall(r"`(\w+)`", tags) for name, tags in rows.items()} == {
            name: list(tags) for name, tags in TIMM_WEIGHTS.items()
        }

    def test_the_python_of_the_page_runs(
        self, hub: Hub, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
    ) -> None:
        for tag in TIMM_WEIGHTS["efficientnet_b0"]:
            hub.files[f"timm/efficientnet_b0.{tag}/model.safetensors"] = published("efficientnet_b0")
        (tmp_path / "model.safetensors").write_bytes(published("efficientnet_b0"))
        monkeypatch.chdir(tmp_path)
        blocks = re.findall(r"(?<=```python\n).*?(?=```)", DOCS.read_text(encoding="utf-8"), re.DOTALL)
        assert len(blocks) == 2
        session: dict[str, Any] = {}
        for block in blocks:
            exec(compile(block, "docs/models.md", "exec"), session)
        assert session["model"].config.tag == "ra_in1k"
        assert capsys.readouterr().out == f"{list_models('*_b0', pretrained=True)}\n"

    @pytest.mark.parametrize(
        ("name", "options", "message"),
        [
            ("efficientnet_b0.ra_in2k", {}, "unknown tag 'ra_in2k' of efficientnet_b0: known are ra_in1k, ra4_e3600"),
            ("efficientnet_b7.ra_in1k", {}, "unknown tag 'ra_in1k' of efficientnet_b7: it has none"),
            ("efficientnet-b0.ra_in1k", {}, r"unknown model 'efficientnet-b0.ra_in1k': did you mean efficientnet_b0"),
            ("efficientnet_b7", {}, r"no weights for it; .* are tf_efficientnet_b7.aa_in1k, .*checkpoint_path=FILE"),
            ("efficientnet_b0", {"checkpoint_path": "b0.pth"}, "pretrained=True and checkpoint_path='b0.pth'"),
            ("efficientnet_b0", {"device": "meta"}, "device='meta' was asked for"),
            ("efficientnet_b0", {"in_chans": 0}, "in_chans=0 must be at least 1"),
        ],
    )
    def test_refusals_need_no_hub(self, name: str, options: dict[str, Any], message: str, tmp_path: Path) -> None:
        with Hub() as server, server.client(tmp_path):
            with pytest.raises(ValueError, match=message):
                effkernels.create_model(name, pretrained=True, **options)
            assert server.requests == []


class TestLoading:
    @pytest.mark.parametrize("name", [LITE, "tf_efficientnet_b0.ap_in1k"])
    def test_logits_are_those_of_timms_model(self, hub: Hub, name: str, timm: ModuleType) -> None:
        tagged = name if name in TAGGED else f"{name}.ra_in1k"
        peer, x = timm_model(name.partition(".")[0]), images(1, 46, 61)
        hub.files[f"timm/{tagged}/model.safetensors"] = safetensors.save(peer.state_dict(), {"format": "pt"})
        ours = effkernels.create_model(name, pretrained=True).eval()
        with torch.inference_mode():
            assert_parity(ours(x), in_both_layouts(peer, x), in_float64(peer, x), name)
        assert ours.pretrained_cfg["hf_hub_id"] == f"timm/{tagged}"
        assert ours.config == model_config(tagged)
        assert (ours.pad_type, ours.bn1.eps) == (("same", 1e-3) if name.startswith("tf_") else ("", 1e-5))

    @pytest.mark.parametrize("in_chans", [1, 2, 4, 7])
    def test_another_number_of_image_channels_as_in_timm(
        self, hub: Hub, in_chans: int, tmp_path: Path, timm: ModuleType
    ) -> None:
        (tmp_path / "lite.safetensors").write_bytes(published(LITE))
        overlay = {"file": str(tmp_path / "lite.safetensors")}
        peer = timm.create_model(LITE, pretrained=True, in_chans=in_chans, pretrained_cfg_overlay=overlay)
        ours = effkernels.create_model(LITE, pretrained=True, in_chans=in_chans)
        for key, value in peer.state_dict().items():
            torch.testing.assert_close(ours.state_dict()[key], value, rtol=1e-6, atol=1e-7)
        assert ours.config.input_size == (in_chans, 224, 224)

    def test_a_grey_image_has_the_values_of_its_colour_image(self, hub: Hub) -> None:
        grey, colour = (effkernels.create_model(LITE, pretrained=True, in_chans=c).eval().double() for c in (1, 3))
        x = images(1, 64, 64)[:, :1].double()
        with torch.inference_mode():
            torch.testing.assert_close(grey(x), colour(x.expand(-1, 3, -1, -1)))
        weight = torch.ones(4, 3, 3, 3, dtype=torch.bfloat16)
        assert stem_weight(weight, 1).dtype == torch.bfloat16

    def test_another_number_of_classes_gets_an_initialised_classifier(self, hub: Hub) -> None:
        torch.manual_seed(3)
        fresh = effkernels.create_model(LITE, num_classes=10).state_dict()
        torch.manual_seed(3)
        model = effkernels.create_model(LITE, pretrained=True, num_classes=10)
        wanted = {**weights(LITE), **{key: fresh[key] for key in fresh if key.startswith("classifier")}}
        assert model.classifier.weight.shape == (10, 1280)
        assert model.state_dict().keys() == wanted.keys()
        assert all(torch.equal(value, wanted[key]) for key, value in model.state_dict().items())
        assert model.config.num_classes == 10
        headless = effkernels.create_model(LITE, pretrained=True, num_classes=0).eval()
        assert headless(images(1, 32, 32)).shape == (1, 1280)

    def test_features_dtype_device_and_overrides(self, hub: Hub) -> None:
        peer = weights(LITE)
        features = effkernels.create_model(LITE, pretrained=True, features_only=True, out_indices=(1, 3))
        assert all(torch.equal(value, peer[key]) for key, value in features.state_dict().items())
        model = effkernels.create_model(
            LITE, pretrained=True, dtype=torch.bfloat16, device="cpu", pad_type="same", bn_eps=1e-3
        )
        assert torch.equal(model.conv_stem.weight, peer["conv_stem.weight"].bfloat16())
        assert (model.pad_type, model.bn1.eps, model.training) == ("same", 1e-3, True)

    def test_a_squashed_crop_is_timms(self, timm: ModuleType) -> None:
        PIL, data = pytest.importorskip("PIL.Image"), pytest.importorskip("skimage.data", reason="the photograph")
        config = model_config("efficientnet_b5.sw_in12k_ft_in1k")
        image = PIL.fromarray(data.astronaut()).resize((300, 170))
        for crop_pct in (1.0, 0.9):
            theirs = timm.data.create_transform(
                config.input_size, crop_pct=crop_pct, crop_mode="squash", interpolation="bicubic",
                mean=config.mean, std=config.std,
            )  # fmt: skip
            ours = Preprocessing(448, crop_pct, crop_mode=config.crop_mode)
            assert torch.equal(ours(image), theirs(image))
        with pytest.raises(ValueError, match="crop_mode='border'; allowed: center, squash"):
            Preprocessing(8, crop_mode="border")


class TestClient:
    def test_a_download_is_one_look_and_one_transfer(self, hub: Hub, tmp_path: Path) -> None:
        effkernels.create_model(LITE, pretrained=True)
        assert [method for method, _ in hub.requests] == ["HEAD", "GET"]
        assert hub.requests[0][1] == f"/{REPOSITORY}/resolve/main/model.safetensors"
        snapshot = tmp_path / "home/hub/models--timm--efficientnet_lite0.ra_in1k/snapshots" / COMMIT
        assert (snapshot / "model.safetensors").read_bytes() == published(LITE)

    def test_the_cache_serves_without_a_network(self, hub: Hub, tmp_path: Path) -> None:
        first = effkernels.create_model(LITE, pretrained=True)
        again = effkernels.create_model(LITE, pretrained=True)
        assert [method for method, _ in hub.requests] == ["HEAD", "GET", "HEAD"]
        hub.stop()
        without = effkernels.create_model(f"{LITE}.ra_in1k", pretrained=True)
        with hub.client(tmp_path / "home", HF_HUB_OFFLINE="1"):
            offline = effkernels.create_model(LITE, pretrained=True)
        for model in (again, without, offline):
            assert all(map(torch.equal, model.state_dict().values(), first.state_dict().values()))

    def test_a_new_file_of_the_repository_is_fetched(self, hub: Hub) -> None:
        effkernels.create_model(LITE, pretrained=True)
        changed = {key: value.clone() for key, value in weights(LITE).items()}
        changed["classifier.bias"] += 1
        hub.files[FILE] = safetensors.save(changed)
        # The commit is the same, so the client may keep what it has; another commit is another file.
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr("loopback_hub.COMMIT", "f" * 40)
            model = effkernels.create_model(LITE, pretrained=True)
        assert torch.equal(model.classifier.bias, changed["classifier.bias"])

    def test_offline_without_a_file(self, hub: Hub, tmp_path: Path) -> None:
        with hub.client(tmp_path / "home", HF_HUB_OFFLINE="1"), pytest.raises(HubError) as caught:
            effkernels.create_model(LITE, pretrained=True)
        assert f"model.safetensors of {REPOSITORY} could not be fetched: HF_HUB_OFFLINE is set" in str(caught.value)
        assert str(tmp_path / "home") in str(caught.value)
        assert f"create_model('{LITE}.ra_in1k', checkpoint_path=FILE)" in str(caught.value)
        assert hub.requests == []

    def test_without_a_network_and_without_a_file(self, hub: Hub, no_waiting: None) -> None:
        hub.stop()
        with pytest.raises(HubError) as caught:
            effkernels.create_model(LITE, pretrained=True)
        assert isinstance(caught.value, OSError)
        message = str(caught.value)
        assert "Connection refused" in message
        assert f"fetch {hub.url}/{REPOSITORY}/resolve/main/model.safetensors elsewhere" in message
        assert "checkpoint_path=FILE" in message
        assert "\n" not in message

    def test_the_file_from_elsewhere_is_what_the_message_says(self, hub: Hub, tmp_path: Path) -> None:
        (tmp_path / "model.safetensors").write_bytes(published(LITE))
        given = effkernels.create_model(f"{LITE}.ra_in1k", checkpoint_path=tmp_path / "model.safetensors")
        fetched = effkernels.create_model(LITE, pretrained=True)
        assert given.config == fetched.config
        assert all(map(torch.equal, given.state_dict().values(), fetched.state_dict().values()))

    def test_no_such_repository(self, hub: Hub) -> None:
        with pytest.raises(
            HubError, match=r"of timm/tf_efficientnet_lite0.in1k could not.*RepositoryNotFound"
        ) as caught:
            effkernels.create_model("tf_efficientnet_lite0", pretrained=True)
        assert "\x1b" not in str(caught.value)

    def test_no_such_file(self, hub: Hub) -> None:
        del hub.files[FILE]
        hub.files[f"{REPOSITORY}/config.json"] = b"{}"
        with pytest.raises(HubError, match=r"EntryNotFound.*checkpoint_path=FILE"):
            effkernels.create_model(LITE, pretrained=True)

    def test_what_the_hub_says_reaches_no_terminal_raw(self, hub: Hub) -> None:
        hub.status = 403
        with pytest.raises(HubError, match=r"No entry\\x1b\[31m"):
            effkernels.create_model(LITE, pretrained=True)

    def test_a_hub_in_trouble(self, hub: Hub, no_waiting: None) -> None:
        hub.status = 503
        with pytest.raises(HubError, match="503"):
            effkernels.create_model(LITE, pretrained=True)
        hub.status = 200
        effkernels.create_model(LITE, pretrained=True)

    def test_an_endpoint_that_is_no_hub(self, hub: Hub) -> None:
        hub.status = 204
        with pytest.raises(HubError, match="X-Repo-Commit"):
            effkernels.create_model(LITE, pretrained=True)

    def test_an_interrupted_download_is_not_read_later(self, hub: Hub, no_waiting: None, tmp_path: Path) -> None:
        hub.cut_after = 1_000_000
        with pytest.raises(HubError, match=r"could not be fetched: .*checkpoint_path=FILE"):
            effkernels.create_model(LITE, pretrained=True)
        assert len([method for method, _ in hub.requests if method == "GET"]) > 1  # the client tried to resume
        assert cached_files(tmp_path / "home") == []
        with hub.client(tmp_path / "home", HF_HUB_OFFLINE="1"), pytest.raises(HubError, match="HF_HUB_OFFLINE is set"):
            effkernels.create_model(LITE, pretrained=True)
        hub.cut_after = None
        model = effkernels.create_model(LITE, pretrained=True)
        assert torch.equal(model.classifier.weight, weights(LITE)["classifier.weight"])

    def test_an_interrupt_by_the_user_leaves_nothing(
        self, hub: Hub, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        import huggingface_hub.file_download

        def interrupt(url: str, file: Any, **options: Any) -> None:
            file.write(published(LITE)[:1000])
            raise KeyboardInterrupt

        with monkeypatch.context() as patch:
            patch.setattr(huggingface_hub.file_download, "http_get", interrupt)
            with pytest.raises(KeyboardInterrupt):
                effkernels.create_model(LITE, pretrained=True)
        assert cached_files(tmp_path / "home") == []
        effkernels.create_model(LITE, pretrained=True)

    @pytest.mark.parametrize(
        ("content", "message"),
        [
            (lambda: b"<html>Sign in to the network</html>", "is not a safetensors file"),
            (lambda: published(LITE)[:5000], "is not a safetensors file, or is cut off"),
            (lambda: b"", "is empty"),
            (lambda: safetensors.save({"weight": torch.zeros(3)}), "are of no known EfficientNet"),
            (lambda: published("efficientnet_b0"), "holds the weights of efficientnet_b0"),
            (lambda: published(LITE, num_classes=7), "classifier.weight is .7, 1280. in the file"),
        ],
        ids=["html", "cut", "empty", "other-keys", "other-network", "other-classes"],
    )
    def test_wrong_content_is_refused_and_named(self, hub: Hub, content: Callable[[], bytes], message: str) -> None:
        hub.files[FILE] = content()
        with pytest.raises(CheckpointError, match=message) as caught:
            effkernels.create_model(LITE, pretrained=True)
        assert caught.value.file is not None
        assert caught.value.file.name == "model.safetensors"
        assert "efficientnet_lite0.ra_in1k" in str(caught.value)

    def test_a_damaged_copy_is_fetched_again_as_the_message_says(self, hub: Hub, tmp_path: Path) -> None:
        effkernels.create_model(LITE, pretrained=True)
        (blob,) = (file for file in cached_files(tmp_path / "home") if file.parent.name == "blobs")
        blob.write_bytes(blob.read_bytes()[:5000])
        with pytest.raises(CheckpointError, match="to have it fetched again, delete ") as caught:
            effkernels.create_model(LITE, pretrained=True)
        shutil.rmtree(str(caught.value).rpartition("delete ")[2])
        model = effkernels.create_model(LITE, pretrained=True)
        assert torch.equal(model.classifier.weight, weights(LITE)["classifier.weight"])

    @pytest.mark.parametrize("package", ["huggingface_hub", "safetensors"])
    def test_a_missing_package_is_named_with_its_extra(
        self, package: str, hub: Hub, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        found = builtins.__import__

        def without(name: str, *rest: Any) -> Any:
            if name.partition(".")[0] == package:
                raise ModuleNotFoundError(f"No module named {package!r}", name=package)
            return found(name, *rest)

        monkeypatch.setattr(builtins, "__import__", without)
        with pytest.raises(ImportError, match=rf"{package}: pip install 'effkernels\[models\]'"):
            effkernels.create_model(LITE, pretrained=True)
        assert hub.requests == []


class TestPredict:
    def run(self, capsys: pytest.CaptureFixture[str], *arguments: str) -> tuple[int, str, str]:
        try:
            status = main(["predict", "--example", "--img-size", "64", "--device", "cpu", *arguments])
        except SystemExit as exit_:
            status = int(exit_.code or 0)
        output = capsys.readouterr()
        return status, output.out, output.err

    @pytest.mark.parametrize("model", [LITE, f"{LITE}.ra_in1k"])
    def test_published_weights(self, hub: Hub, capsys: pytest.CaptureFixture[str], model: str) -> None:
        status, out, err = self.run(capsys, "--model", model, "--pretrained", "--json")
        assert status == 0, err
        assert json.loads(out)["weights"] == REPOSITORY
        assert "RANDOM" not in err

    def test_images_are_prepared_as_the_weights_need_it(
        self, hub: Hub, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
    ) -> None:
        """The default tag of B1 has another mean than B1 has by its name."""
        wanted = model_config("efficientnet_b1.ra4_e3600_r240_in1k")
        assert wanted.mean != model_config("efficientnet_b1").mean
        hub.files[f"{wanted.hf_hub_id}/model.safetensors"] = published("efficientnet_b1")
        given: list[Preprocessing] = []

        def record(model: torch.nn.Module, files: Any, *, preprocessing: Preprocessing, **options: Any) -> list[Any]:
            given.append(preprocessing)
            return []

        monkeypatch.setattr("effkernels.engine.predict.classify", record)
        assert self.run(capsys, "--model", "efficientnet_b1", "--pretrained")[0] == 0
        assert given == [Preprocessing.of(wanted, 64)]

    def test_a_tag_alone_fetches_nothing(self, hub: Hub, capsys: pytest.CaptureFixture[str]) -> None:
        status, _, err = self.run(capsys, "--model", f"{LITE}.ra_in1k")
        assert (status, hub.requests) == (0, [])
        assert "RANDOM" in err
        assert "--pretrained" in err

    @pytest.mark.parametrize(
        ("arguments", "message"),
        [
            (["--model", "efficientnet_b7", "--pretrained"], "timm has published no weights for it"),
            (["--model", "efficientnet_b0.ra_in2k"], "unknown tag 'ra_in2k' of efficientnet_b0"),
            (["--pretrained", "--weights", "x.pth"], "not allowed with argument"),
            (["--model", "tf_efficientnet_lite0", "--pretrained"], "checkpoint_path=FILE"),
        ],
    )
    def test_what_cannot_be_had_is_a_usage_error(
        self, hub: Hub, capsys: pytest.CaptureFixture[str], arguments: list[str], message: str
    ) -> None:
        status, out, err = self.run(capsys, *arguments)
        assert (status, out) == (2, "")
        assert message in err
        assert "Traceback" not in err
