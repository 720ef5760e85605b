"""Models by what a user types: every form gives a classifier, every wrong form a line that says what is allowed."""

from __future__ import annotations

import copy
import pickle
from pathlib import Path

import numpy
import PIL.Image
import pytest
import skimage.data
import torch
from peer_models import randomise
from torch import nn

import effkernels
from effkernels.models import CheckpointError, HubError, create_model
from effkernels.models.peers import import_timm, import_torchvision, import_transformers
from effkernels.models.sources import (
    LogitsOnly,
    ModelSource,
    find_model,
    input_size_of_source,
    unwrapped,
)

FILE = """
from torch import nn
from beside import CLASSES

class Small(nn.Module):
    def __init__(self, channels=3):
        super().__init__()
        self.stem = nn.Conv2d(channels, 8, 3, 2, 1, bias=False)
        self.norm = nn.BatchNorm2d(8)
        self.head = nn.Linear(8, CLASSES)

    def forward(self, images):
        return self.head(self.norm(self.stem(images)).relu().mean((2, 3)))

def small():
    return Small()

def grey():
    return Small(1)

def wide(channels):
    return Small(channels)

def number():
    return 3

def broken():
    raise RuntimeError("no such luck")
"""
SMALL_HF = {"hidden_sizes": [16, 32], "depths": [1, 1], "embedding_size": 8, "layer_type": "basic", "num_labels": 5}


@pytest.fixture
def file(tmp_path: Path) -> Path:
    (tmp_path / "beside.py").write_text("CLASSES = 7\n")
    path = tmp_path / "networks.py"
    path.write_text(FILE)
    return path


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """A small model of Hugging Face with weights, as its library saves it."""
    transformers = import_transformers()
    torch.manual_seed(0)
    model = transformers.ResNetForImageClassification(transformers.ResNetConfig(**SMALL_HF)).eval()
    model.save_pretrained(tmp_path / "saved")
    return tmp_path / "saved"


def logits(source: ModelSource, model: nn.Module, size: int = 64) -> torch.Tensor:
    with torch.inference_mode():
        return model(torch.randn(2, input_size_of_source(source, model)[0], size, size))


class TestForms:
    @pytest.mark.parametrize(
        ("text", "library", "size", "classes"),
        [
            ("efficientnet_b1", "effkernels", (3, 240, 240), 1000),
            ("efficientnet_b0.ra_in1k", "effkernels", (3, 224, 224), 1000),
            ("timm:mobilenetv3_small_050", "timm", (3, 224, 224), 1000),
            ("timm:tf_efficientnet_b0.ns_jft_in1k", "timm", (3, 224, 224), 1000),
            ("torchvision:efficientnet_b2", "torchvision", (3, 288, 288), 1000),
            ("hf:mobilenet_v2", "hf", (3, 224, 224), 2),
        ],
    )
    def test_libraries(self, text: str, library: str, size: tuple[int, int, int], classes: int) -> None:
        source = find_model(text)
        assert (source.library, source.input_size, source.text) == (library, size, text)
        assert source.is_own == (library == "effkernels")
        model = source.build()
        assert not model.training
        assert logits(source, model).shape == (2, classes)

    def test_function_of_a_file(self, file: Path) -> None:
        source = find_model(f"{file}:small")
        model = source.build()
        assert source.library == "file"
        assert input_size_of_source(source) == (3, 224, 224)
        assert logits(source, model).shape == (2, 7)
        assert isinstance(pickle.loads(pickle.dumps(model)), type(model))
        assert find_model(f"{file}:grey").build().__class__ is model.__class__, "the file is run once"

    def test_channels_of_a_model_that_states_nothing(self, file: Path) -> None:
        source = find_model(f"{file}:grey")
        assert input_size_of_source(source, source.build()) == (1, 224, 224)

    def test_a_configuration_of_hugging_face_needs_no_weights(self, folder: Path) -> None:
        (folder / "model.safetensors").unlink()
        source = find_model(f"hf:{folder}")
        assert logits(source, source.build()).shape == (2, 5)
        with pytest.raises(HubError, match="the weights could not be fetched"):
            source.build(pretrained=True)

    def test_weights_of_hugging_face(self, folder: Path) -> None:
        transformers = import_transformers()
        ours = find_model(f"hf:{folder}").build(pretrained=True)
        theirs = transformers.AutoModelForImageClassification.from_pretrained(folder).eval()
        images = torch.randn(2, 3, 64, 64)
        with torch.inference_mode():
            assert torch.equal(ours(images), theirs(images).logits)

    def test_what_optimize_is_for(self) -> None:
        inner = nn.Conv2d(3, 4, 1)
        assert unwrapped(LogitsOnly(inner)) is inner
        assert unwrapped(inner) is inner


class TestCheckpoints:
    def test_of_the_same_model(self, file: Path, tmp_path: Path) -> None:
        for text in (f"{file}:small", "timm:mobilenetv3_small_050", "hf:mobilenet_v2"):
            source = find_model(text)
            trained = unwrapped(source.build())
            torch.save({"state_dict": trained.state_dict()}, tmp_path / "weights.pth")
            loaded = unwrapped(source.build(checkpoint=tmp_path / "weights.pth"))
            for key, value in trained.state_dict().items():
                assert torch.equal(loaded.state_dict()[key], value)

    def test_of_this_packages_network_any_librarys(self, tmp_path: Path) -> None:
        theirs = import_torchvision().models.efficientnet_b0(weights=None)
        torch.save(randomise(theirs).state_dict(), tmp_path / "b0.pth")
        loaded = find_model("efficientnet_b0").build(checkpoint=tmp_path / "b0.pth")
        assert torch.equal(loaded.get_parameter("classifier.weight"), theirs.classifier[1].weight)

    def test_of_another_model(self, file: Path, tmp_path: Path) -> None:
        source = find_model(f"{file}:small")
        state = source.build().state_dict()
        narrow = torch.ones(4, 3, 3, 3)
        changed = {
            "no head.bias": {key: value for key, value in state.items() if key != "head.bias"},
            "unknown extra": {**state, "extra": torch.zeros(1)},
            r"stem.weight is \(4, 3, 3, 3\), the model's is \(8, 3, 3, 3\)": {**state, "stem.weight": narrow},
        }  # fmt: skip
        for message, wrong in changed.items():
            torch.save(wrong, tmp_path / "wrong.pth")
            with pytest.raises(CheckpointError, match=message):
                source.build(checkpoint=tmp_path / "wrong.pth")

    def test_one_source_of_weights(self) -> None:
        with pytest.raises(ValueError, match=r"pretrained=True and checkpoint='x\.pth'; allowed: one of them"):
            find_model("efficientnet_b0").build(pretrained=True, checkpoint="x.pth")


class TestErrors:
    @pytest.mark.parametrize(
        ("text", "message"),
        [
            ("efficientnet_b9", "unknown model 'efficientnet_b9': did you mean efficientnet_b"),
            ("resnet50", "models of others: timm:NAME, torchvision:NAME, hf:NAME, FILE.py:FUNCTION"),
            ("timm:mobilnetv3_small_050", "has no model 'mobilnetv3_small_050': did you mean mobilenetv3_small_050"),
            ("timm:efficientnet_b0.bogus", "Invalid pretrained tag"),
            ("torchvision:resnet5", "has no classifier 'resnet5': did you mean resnet"),
            ("torchvision:fcn_resnet50", "has no classifier 'fcn_resnet50'"),
            ("hf:efficientnett", "no kind of image classifier: did you mean efficientnet"),
            ("networks.py", "which function of the file"),
            ("nowhere.py:small", "there is no file nowhere.py"),
        ],
    )
    def test_names(self, text: str, message: str) -> None:
        with pytest.raises(ValueError, match=message) as error:
            find_model(text)
        assert "\n" not in str(error.value)

    @pytest.mark.parametrize(
        ("function", "message"),
        [
            ("smal", "has no function 'smal'; it has broken, grey, number, small, wide"),
            ("wide", "must work without arguments: missing a required argument: 'channels'"),
            ("number", "returned int; needed: torch.nn.Module"),
            ("broken", "raised RuntimeError: no such luck"),
        ],
    )
    def test_functions(self, file: Path, function: str, message: str) -> None:
        with pytest.raises(ValueError, match=message):
            find_model(f"{file}:{function}").build()

    def test_a_file_that_fails(self, tmp_path: Path) -> None:
        (tmp_path / "failing.py").write_text("import no_such_package\n")
        with pytest.raises(ValueError, match="its file raised ModuleNotFoundError: No module named 'no_such_package'"):
            find_model(f"{tmp_path / 'failing.py'}:model")

    def test_functions_have_no_published_weights(self, file: Path) -> None:
        with pytest.raises(ValueError, match="there are no published ones"):
            find_model(f"{file}:small").build(pretrained=True)
        with pytest.raises(ValueError, match="a kind of model has no published weights"):
            find_model("hf:resnet").build(pretrained=True)

    def test_a_folder_without_configuration(self, tmp_path: Path) -> None:
        with pytest.raises(ValueError, match=r"the folder has no config\.json"):
            find_model(f"hf:{tmp_path}")

    def test_a_kind_that_classifies_no_images(self, tmp_path: Path) -> None:
        import_transformers().BertConfig().save_pretrained(tmp_path)
        with pytest.raises(ValueError, match="transformers has no image classifier of the kind 'bert'"):
            find_model(f"hf:{tmp_path}")

    def test_without_a_network(self, monkeypatch: pytest.MonkeyPatch) -> None:
        def refuse(name: str) -> None:
            raise OSError("We couldn't connect to the hub to load the files.\nCheck your internet connection.")

        monkeypatch.setattr(import_transformers().AutoConfig, "from_pretrained", refuse)
        with pytest.raises(
            HubError, match="hf:owner/name: its configuration could not be read: We couldn't connect"
        ) as error:
            find_model("hf:owner/name")  # fmt: skip
        assert "\n" not in str(error.value)

    def test_without_the_library(self, monkeypatch: pytest.MonkeyPatch) -> None:
        def absent() -> None:
            raise ImportError("timm is not installed")

        monkeypatch.setattr("effkernels.models.sources.import_timm", absent)
        find_model.cache_clear()
        with pytest.raises(ImportError, match="timm is not installed"):
            find_model("timm:mobilenetv3_small_050")


class TestPreprocessing:
    """Images become what the model's own library makes of them."""

    image = PIL.Image.fromarray(skimage.data.astronaut()).resize((300, 260))

    @pytest.mark.parametrize("name", ["mobilenetv3_large_100", "efficientnet_b1.ra4_e3600_r240_in1k"])
    def test_timm(self, name: str) -> None:
        timm = import_timm()
        config = timm.data.resolve_data_config(timm.get_pretrained_cfg(name).to_dict())
        theirs = timm.data.create_transform(**config)(self.image)
        ours = find_model(f"timm:{name}").preprocessing()(self.image)
        # One step of the 256 that a pixel has, over the standard deviation.
        assert (ours - theirs).abs().max() <= 1.01 / 255 / 0.22

    @pytest.mark.parametrize("name", ["mobilenet_v2", "efficientnet_b4", "resnet18"])
    def test_torchvision(self, name: str) -> None:
        transform = import_torchvision().models.get_model_weights(name).DEFAULT.transforms()
        transform.antialias = True
        theirs = transform(self.image)
        ours = find_model(f"torchvision:{name}").preprocessing()(self.image)
        assert (ours - theirs).abs().max() <= 1.01 / 255 / 0.22

    def test_hugging_face(self, folder: Path) -> None:
        transformers = import_transformers()
        image = self.image.resize((300, 300))  # the middle of a crop is rounded differently where it is half a pixel
        for processor in (
            transformers.ConvNextImageProcessor(size={"shortest_edge": 64}),
            transformers.EfficientNetImageProcessor(size={"height": 96, "width": 96}, resample=3),
            transformers.MobileNetV2ImageProcessor(),
        ):
            processor.save_pretrained(folder)
            find_model.cache_clear()
            ours = find_model(f"hf:{folder}").preprocessing()
            theirs = processor(image, return_tensors="pt")["pixel_values"][0]
            assert (ours.img_size,) * 2 == tuple(theirs.shape[1:])
            std = torch.tensor(ours.std)[:, None, None]
            assert ((ours(image) - theirs) * std).abs().max() <= 1.01 / 255 / min(ours.std) * max(ours.std)

    def test_another_size(self, file: Path) -> None:
        assert find_model(f"{file}:small").preprocessing(96).img_size == 96
        assert find_model("timm:mobilenetv3_small_050").preprocessing(64)(self.image).shape == (3, 64, 64)


def test_a_copy_can_be_optimized(file: Path) -> None:
    model = find_model(f"{file}:small").build()
    optimized = copy.deepcopy(model)
    assert effkernels.optimize_(optimized).fused == 1
    images = torch.from_numpy(numpy.random.default_rng(0).standard_normal((2, 3, 32, 32), dtype=numpy.float32))
    with torch.inference_mode():
        torch.testing.assert_close(optimized(images), model(images))


def test_weights_are_those_of_the_generator() -> None:
    models = []
    for create in (find_model("efficientnet_b0").build, lambda: create_model("efficientnet_b0")):
        torch.manual_seed(3)
        models.append(create())
    assert all(torch.equal(a, b) for a, b in zip(*(model.parameters() for model in models), strict=True))
