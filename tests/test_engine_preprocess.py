"""Photographs on the engine's device against Pillow, and what an engine reads from a model's configuration."""

from __future__ import annotations

import copy
import io
import types
from typing import Any

import numpy
import PIL.Image
import pytest
import skimage.data
import torch
from engine_models import Sum
from torch import Tensor, nn

import effkernels
from effkernels.engine import InferenceEngine
from effkernels.engine.preprocess import preprocessing_of, transform
from effkernels.models import create_model, peers
from effkernels.models.model_input import input_size_of, stated_input_size
from effkernels.models.preprocessing import Preprocessing

SIZES = [(512, 512), (300, 451), (451, 300), (100, 90), (64, 640), (224, 256), (256, 256)]
PANORAMAS = [(1700, 60), (100, 1700), (3000, 61), (40, 1024)]


def photograph(size: tuple[int, int] | None = None) -> PIL.Image.Image:
    image = PIL.Image.fromarray(skimage.data.astronaut())
    return image if size is None else image.resize(size)


def pixels(image: PIL.Image.Image) -> Tensor:
    return torch.from_numpy(numpy.array(image))


def levels_apart(result: Tensor, wanted: Tensor, how: Preprocessing) -> Tensor:
    """Return the differences of two inputs as levels of 255."""
    return ((result.float() - wanted) * torch.tensor(how.std)[:, None, None]).abs() * 255


class TestTransform:
    @pytest.mark.parametrize("interpolation", ["nearest", "bilinear", "bicubic", "lanczos"])
    @pytest.mark.parametrize("size", SIZES, ids=str)
    def test_a_photograph_is_as_pillow_makes_it(self, interpolation: str, size: tuple[int, int]) -> None:
        """Up to one level of 255, where a weighted sum falls on the other side of a half."""
        how, image = Preprocessing(224, interpolation=interpolation), photograph(size)
        apart = levels_apart(transform(pixels(image)[None], how, integers=False)[0], how(image), how)
        assert apart.max() < (1.001 if interpolation != "nearest" else 0.001)

    @pytest.mark.parametrize("size", [*SIZES, *PANORAMAS], ids=str)
    def test_a_squashed_photograph_is_as_pillow_makes_it_across_and_then_down(self, size: tuple[int, int]) -> None:
        """In one call Pillow 13 goes down first where that side shrinks more; its two calls here fix the order."""
        how, image = Preprocessing(224, 0.95, crop_mode="squash"), photograph(size)
        (side, _), _ = how.placement(*image.size)
        across = image.resize((side, image.height), PIL.Image.Resampling.BICUBIC)
        found, wanted = transform(pixels(image)[None], how, integers=False)[0], how(across)
        assert levels_apart(found, wanted, how).max() < 1.001
        assert levels_apart(found, how(image), how).mean() < 0.2

    @pytest.mark.parametrize("interpolation", ["bilinear", "bicubic"])
    @pytest.mark.parametrize("size", SIZES, ids=str)
    def test_in_integers_on_the_cpu(self, interpolation: str, size: tuple[int, int]) -> None:
        """The weights are rounded too: two levels where an image is enlarged, and seldom."""
        how, image = Preprocessing(224, interpolation=interpolation), photograph(size)
        apart = levels_apart(transform(pixels(image)[None], how)[0], how(image), how)
        assert apart.max() < 2.001
        assert (apart > 0.5).float().mean() < 0.01

    @pytest.mark.parametrize("size", PANORAMAS, ids=str)
    def test_a_panorama_differs_by_roundings(self, size: tuple[int, int]) -> None:
        how, image = Preprocessing(224), photograph(size)
        for integers in (False, None):
            apart = levels_apart(transform(pixels(image)[None], how, integers=integers)[0], how(image), how)
            assert apart.max() < 3.001
            assert apart.mean() < 0.2

    def test_a_panorama_stays_small(self) -> None:
        how = Preprocessing(224, mean=(0, 0, 0), std=(1, 1, 1))
        long = torch.full((1, 40, 200_000, 3), 255, dtype=torch.uint8)
        assert torch.equal(transform(long, how), torch.ones(1, 3, 224, 224))

    def test_images_of_a_batch_do_not_meet(self) -> None:
        how = Preprocessing(64)
        batch = torch.stack([pixels(photograph((90, 80))), torch.zeros(80, 90, 3, dtype=torch.uint8)])
        result = transform(batch, how)
        for row in range(2):
            assert torch.equal(result[row], transform(batch[row : row + 1], how)[0])

    def test_statistics_must_fit_the_channels(self) -> None:
        with pytest.raises(ValueError, match=r"mean=.* has 3 channels, and the images have 1"):
            transform(torch.zeros(1, 9, 9, 1, dtype=torch.uint8), Preprocessing(8))


class Same(nn.Module):
    """Returns its input."""

    def forward(self, x: Tensor) -> Tensor:
        return x


@pytest.fixture(scope="module")
def engine() -> InferenceEngine:
    return InferenceEngine(Same(), input_size=64, batch_sizes=(1, 4), optimize=False)


class TestPreprocess:
    def test_every_form_of_images_gives_the_same(self, engine: InferenceEngine) -> None:
        image = photograph((100, 90))
        array = numpy.array(image)
        wanted = Preprocessing(64)(image)
        frozen = array.copy()
        frozen.setflags(write=False)
        for one in (image, array, frozen, array[::-1][::-1], torch.from_numpy(array), array.repeat(2, 1)[:, ::2]):
            result = engine.preprocess([one])
            assert result.shape == (1, 3, 64, 64)
            assert levels_apart(result[0], wanted, Preprocessing(64)).max() < 1.001
        for batch in (array[None], torch.from_numpy(array)[None]):
            assert torch.equal(engine.preprocess(batch), result)

    def test_sizes_may_differ_and_stay_in_order(self, engine: InferenceEngine) -> None:
        sizes = [(100, 90), (64, 64), (100, 90), (33, 200), (64, 64)]
        photographs = [photograph().rotate(10 * turn).resize(size) for turn, size in enumerate(sizes)]
        result = engine.preprocess(photographs)
        for row, image in zip(result, photographs, strict=True):
            assert torch.equal(row, engine.preprocess([image])[0])

    @pytest.mark.parametrize("mode", ["L", "RGBA", "P", "CMYK", "1"])
    def test_every_mode_becomes_rgb(self, engine: InferenceEngine, mode: str) -> None:
        image = photograph((70, 70)).convert(mode)
        assert torch.equal(engine.preprocess([image]), engine.preprocess([image.convert("RGB")]))

    def test_grey_models_get_grey_images(self) -> None:
        how = Preprocessing(32, mean=(0.5,), std=(0.25,))  # type: ignore[arg-type]
        grey = InferenceEngine(Same(), input_size=(1, 32, 32), batch_sizes=(1,), optimize=False, preprocessing=how)
        image = photograph((50, 40)).convert("L")
        assert torch.equal(grey.preprocess([image]), grey.preprocess(numpy.array(image)[None, :, :, None]))

    def test_the_result_has_the_engines_dtype_and_layout(self) -> None:
        half = InferenceEngine(Same(), input_size=64, batch_sizes=(1,), optimize=False, dtype=torch.float16)
        result = half.preprocess([photograph((100, 90))])
        assert result.dtype == torch.float16
        assert result.is_contiguous(memory_format=torch.channels_last)
        assert torch.equal(half(result), result)

    def test_no_images(self, engine: InferenceEngine) -> None:
        for none in ([], numpy.zeros((0, 9, 9, 3), numpy.uint8)):
            assert engine.preprocess(none).shape == (0, 3, 64, 64)

    @pytest.mark.parametrize(
        ("given", "error", "message"),
        [
            (photograph((8, 8)), TypeError, "one PIL image; allowed: a sequence"),
            (numpy.zeros((8, 8, 3), numpy.uint8), ValueError, r"shape \(8, 8, 3\); allowed: \(N, H, W, C\) with 3"),
            (numpy.zeros((1, 8, 8, 3), numpy.float32), TypeError, "dtype torch.float32; allowed: torch.uint8"),
            ([numpy.zeros((8, 8, 3), numpy.uint8), "x.png"], TypeError, "image 1: an image is str; allowed: PIL"),
            ([numpy.zeros((8, 8, 4), numpy.uint8)], ValueError, r"image 0: .*\(8, 8, 4\); allowed: \(H, W, C\) with 3"),
            ([numpy.zeros((0, 8, 3), numpy.uint8)], ValueError, "image 0: .*at least one pixel"),
            (7, TypeError, "an image is int"),
        ],
    )
    def test_what_is_no_image_is_named(
        self, engine: InferenceEngine, given: Any, error: type[Exception], message: str
    ) -> None:
        with pytest.raises(error, match=message):
            engine.preprocess(given)

    def test_a_damaged_image_is_named(self, engine: InferenceEngine) -> None:
        file = io.BytesIO()
        photograph().save(file, "JPEG")
        damaged = PIL.Image.open(io.BytesIO(file.getvalue()[:5000]))
        with pytest.raises(OSError, match=r"preprocess: image 1: .*truncated"):
            engine.preprocess([photograph((9, 9)), damaged])

    def test_an_engine_without_preprocessing_says_why(self) -> None:
        oblong = InferenceEngine(Sum(), input_size=(8, 6), batch_sizes=(1,), optimize=False)
        assert "square" in oblong.report.preprocessing
        with pytest.raises(ValueError, match="makes square inputs, and the engine's input is 8 x 6; give"):
            oblong.preprocess([photograph((9, 9))])
        assert isinstance(oblong.submit(photograph((9, 9))).exception(60), ValueError)
        assert oblong(torch.ones(1, 3, 8, 6)).item() == 144.0

    def test_a_given_preprocessing_must_fit(self) -> None:
        with pytest.raises(ValueError, match=r"preprocessing\.img_size=32, and the engine's input is 64 x 64"):
            InferenceEngine(Same(), input_size=64, optimize=False, preprocessing=Preprocessing(32))


def with_attributes(channels: int = 3, **attributes: Any) -> nn.Module:
    model = nn.Conv2d(channels, 1, 1)
    for name, value in attributes.items():
        setattr(model, name, value)
    return model


class TestConfigurations:
    def test_effkernels(self) -> None:
        model = create_model("efficientnet_b4", device="meta")
        assert input_size_of(model, None, owner="InferenceEngine") == (3, 380, 380)
        assert preprocessing_of(model, (3, 380, 380))[0] == Preprocessing.of(model.config)

    def test_timm(self) -> None:
        timm = peers.import_timm()
        model = timm.create_model("tf_efficientnet_es", pretrained=False)
        config = model.pretrained_cfg
        size = input_size_of(model, None, owner="InferenceEngine")
        how, source = preprocessing_of(model, size)
        assert size == tuple(config["input_size"])
        assert how == Preprocessing(
            size[1], config["crop_pct"], config["interpolation"], tuple(config["mean"]), tuple(config["std"])
        )
        assert "configuration" in source

    def test_hugging_face(self) -> None:
        model = with_attributes(4, config=types.SimpleNamespace(image_size=128, num_channels=4))
        assert input_size_of(model, None, owner="InferenceEngine") == (4, 128, 128)
        model = with_attributes(config=types.SimpleNamespace(image_size=[192, 160], num_channels=3))
        assert input_size_of(model, None, owner="InferenceEngine") == (3, 192, 160)
        processor = types.SimpleNamespace(image_mean=[0.1, 0.2, 0.3], image_std=[0.4, 0.5, 0.6])
        served = InferenceEngine(
            with_attributes(config=types.SimpleNamespace(image_size=32, num_channels=3)),
            batch_sizes=(1,), optimize=False, preprocessing=processor,
        )  # fmt: skip
        assert served._preprocessing == Preprocessing(32, mean=(0.1, 0.2, 0.3), std=(0.4, 0.5, 0.6))

    def test_lukemelas(self) -> None:
        model = with_attributes(_global_params=types.SimpleNamespace(image_size=240))
        assert input_size_of(model, None, owner="InferenceEngine") == (3, 240, 240)

    def test_everybody_reads_the_same_size(self) -> None:
        """The engine, `optimize_` and `export` ask one function."""
        model = nn.Sequential(nn.Conv2d(3, 128, 3, padding=1), nn.BatchNorm2d(128)).eval()
        model.config = types.SimpleNamespace(image_size=[48, 32], num_channels=3)
        assert effkernels.optimize_(copy.deepcopy(model)).input_size == (3, 48, 32)
        assert InferenceEngine(model, batch_sizes=(1,)).report.input_size == (3, 48, 32)
        with pytest.raises(ValueError, match="image_size=None, and the model states 48 x 32"):
            effkernels.export_model(model, "model.onnx", format="onnx")

    def test_channels_are_the_networks_where_the_configuration_is_of_the_weights(self) -> None:
        model = peers.import_timm().create_model("efficientnet_b0", in_chans=1)
        assert model.pretrained_cfg["input_size"] == (3, 224, 224)
        assert input_size_of(model, None, owner="InferenceEngine") == (1, 224, 224)

    @pytest.mark.parametrize("stated", ["large", (224, 224.0), (0, 5), True, [[3, 4]]])
    def test_a_size_that_is_none_counts_as_not_stated(self, stated: Any) -> None:
        assert stated_input_size(with_attributes(config=types.SimpleNamespace(image_size=stated))) is None

    def test_no_configuration(self) -> None:
        model = with_attributes()
        with pytest.raises(ValueError, match="Conv2d does not say what input it takes; give input_size"):
            input_size_of(model, None, owner="InferenceEngine")
        assert input_size_of(nn.Sequential(nn.Conv2d(5, 1, 1)), 96, owner="InferenceEngine") == (5, 96, 96)
        how, source = preprocessing_of(model, (3, 96, 96))
        assert how == Preprocessing(96)
        assert source.startswith("ImageNet defaults")

    @pytest.mark.parametrize(
        ("given", "wanted"), [(96, (3, 96, 96)), ((96, 64), (3, 96, 64)), ((1, 96, 64), (1, 96, 64))]
    )
    def test_input_size_overrides(self, given: Any, wanted: tuple[int, ...]) -> None:
        assert input_size_of(create_model("efficientnet_b0", device="meta"), given, owner="InferenceEngine") == wanted

    def test_a_squashed_crop_of_the_configuration(self) -> None:
        model = create_model("efficientnet_b5.sw_in12k_ft_in1k", device="meta")
        assert preprocessing_of(model, (3, 448, 448))[0] == Preprocessing(448, 1.0, crop_mode="squash")

    def test_another_crop_is_refused(self) -> None:
        model = with_attributes(pretrained_cfg={"crop_mode": "border", "input_size": (3, 32, 32)})
        with pytest.raises(ValueError, match="crop_mode='border' of the model's configuration; allowed: center"):
            preprocessing_of(model, (3, 32, 32))
