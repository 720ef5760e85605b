"""Photographs in, predictions out: decoding, preprocessing, finding files, and what happens to damaged ones."""

from __future__ import annotations

import math
import os
import random
import shutil
from pathlib import Path

import numpy
import PIL.Image
import pytest
import skimage.data
import torch

from benchmarks.fuzz import _images as fuzzed
from effkernels.engine.images import Failure, ImageError, as_rgb, find_images, read_image
from effkernels.engine.predict import Prediction, classify, read_labels
from effkernels.models import create_model, model_config, peers
from effkernels.models.preprocessing import Preprocessing


def photograph(name: str = "astronaut") -> PIL.Image.Image:
    return PIL.Image.fromarray(getattr(skimage.data, name)()).convert("RGB")


@pytest.fixture
def album(tmp_path: Path) -> Path:
    """A folder with photographs as a PNG and a JPEG, one in a folder below, and files that are no images."""
    folder = tmp_path / "album"
    (folder / "below").mkdir(parents=True)
    photograph().resize((128, 128)).save(folder / "astronaut.png")
    photograph("chelsea").resize((113, 75)).save(folder / "cat.JPG", "JPEG")
    photograph("rocket").resize((90, 60)).save(folder / "below" / "rocket.png")
    (folder / "notes.txt").write_text("no image")
    (folder / ".hidden.png").write_bytes(b"")
    return folder


@pytest.fixture(scope="module")
def model() -> torch.nn.Module:
    torch.manual_seed(0)
    return create_model("efficientnet_b0", num_classes=7).eval()


SMALL = Preprocessing(64)


class TestPreprocessing:
    @pytest.mark.parametrize("name", ["efficientnet_b0", "efficientnet_b3", "tf_efficientnet_b4"])
    @pytest.mark.parametrize("size", [(512, 512), (300, 451), (451, 300), (100, 90), (64, 640)])
    def test_equals_timms_evaluation_transform(self, name: str, size: tuple[int, int]) -> None:
        peers.import_timm()
        from timm.data import create_transform

        config = model_config(name)
        image = photograph().resize(size)
        theirs = create_transform(
            config.input_size,
            crop_pct=config.crop_pct,
            interpolation=config.interpolation,
            mean=config.mean,
            std=config.std,
        )(image)
        ours = Preprocessing.of(config)(image)
        assert torch.equal(ours, theirs)

    def test_longer_than_a_panorama_differs_by_roundings(self) -> None:
        wide = photograph().resize((1700, 100))
        plain = Preprocessing(64, crop_pct=1, mean=(0, 0, 0), std=(1, 1, 1))
        expected = photograph().resize((1700, 100)).resize((1088, 64), PIL.Image.Resampling.BICUBIC)
        expected = expected.crop((512, 0, 576, 64))
        difference = plain(wide) * 255 - torch.from_numpy(numpy.array(expected)).permute(2, 0, 1)
        assert difference.abs().max() < 4
        assert difference.abs().mean() < 0.3

    def test_panorama_stays_small(self) -> None:
        image = PIL.Image.new("RGB", (60000, 40), (255, 0, 0))
        tensor = Preprocessing(224, mean=(0, 0, 0), std=(1, 1, 1))(image)
        assert tensor.shape == (3, 224, 224)
        assert torch.equal(tensor[0], torch.ones(224, 224))
        assert torch.equal(tensor[1:], torch.zeros(2, 224, 224))

    def test_single_pixel(self) -> None:
        assert Preprocessing(32)(PIL.Image.new("RGB", (1, 1))).shape == (3, 32, 32)

    def test_size_overrides_the_models(self) -> None:
        config = model_config("efficientnet_b0")
        assert Preprocessing.of(config).img_size == 224
        assert Preprocessing.of(config, 96).img_size == 96

    @pytest.mark.parametrize(
        ("arguments", "message"),
        [
            ({"img_size": 0}, "img_size=0"),
            ({"img_size": 8, "crop_pct": 1.5}, r"crop_pct=1\.5"),
            ({"img_size": 8, "interpolation": "cubic"}, "interpolation='cubic'; allowed: nearest, bilinear, bicubic"),
        ],
    )
    def test_bad_values_are_named(self, arguments: dict[str, object], message: str) -> None:
        with pytest.raises(ValueError, match=message):
            Preprocessing(**arguments)  # type: ignore[arg-type]


class TestReadImage:
    @pytest.mark.parametrize("mode", ["RGB", "L", "LA", "RGBA", "P", "1", "CMYK", "YCbCr"])
    def test_every_mode_becomes_rgb(self, tmp_path: Path, mode: str) -> None:
        file = tmp_path / ("image.jpg" if mode in ("CMYK", "YCbCr") else "image.png")
        photograph().resize((20, 16)).convert(mode).save(file)
        image = read_image(file)
        assert image.mode == "RGB"
        assert image.size == (20, 16)

    def test_colours_survive_cmyk(self, tmp_path: Path) -> None:
        photograph().convert("CMYK").save(tmp_path / "image.jpg", quality=95)
        difference = numpy.asarray(read_image(tmp_path / "image.jpg"), int) - numpy.asarray(photograph(), int)
        assert numpy.abs(difference).mean() < 6

    def test_sixteen_bits_are_scaled_not_clipped(self, tmp_path: Path) -> None:
        grey = numpy.asarray(photograph().convert("L"))
        PIL.Image.fromarray(grey.astype(numpy.uint16) * 257).save(tmp_path / "deep.png")
        assert numpy.array_equal(numpy.asarray(read_image(tmp_path / "deep.png"))[..., 0], grey)

    def test_sixteen_bits_of_netpbm_are_scaled_too(self, tmp_path: Path) -> None:
        """Pillow holds them in 32 bits, and saturates them at 255."""
        for largest, kind in ((65_535, ">u2"), (1023, ">u2"), (255, "u1")):
            values = numpy.array([[0, largest // 3, largest // 2, largest]])
            (tmp_path / "grey.pgm").write_bytes(b"P5 4 1 %d\n" % largest + values.astype(kind).tobytes())
            found = numpy.asarray(read_image(tmp_path / "grey.pgm"))[..., 0].astype(int)
            assert numpy.abs(found - values * 255 / largest).max() <= 1

    @pytest.mark.parametrize(
        "values", [numpy.array([[0, 70_000]], numpy.int32), numpy.array([[0.0, 0.5]], numpy.float32)], ids=["I", "F"]
    )
    def test_depths_of_an_unknown_range_are_refused(self, tmp_path: Path, values: numpy.ndarray) -> None:
        PIL.Image.fromarray(values).save(tmp_path / "deep.tif")
        with pytest.raises(ImageError, match="which values are black and white is not known"):
            read_image(tmp_path / "deep.tif")
        with pytest.raises(ImageError, match=r"mode [IF]\)"):
            as_rgb(PIL.Image.fromarray(values))  # an image that is in no file

    def test_postscript_is_not_handed_to_another_program(self, tmp_path: Path) -> None:
        photograph().resize((8, 8)).save(tmp_path / "page.eps")
        with pytest.raises(ImageError, match="not an image file; known formats are AVIF, BMP"):
            read_image(tmp_path / "page.eps")

    @pytest.mark.parametrize("seed", range(60))
    def test_values_of_the_fuzzer(self, seed: int, tmp_path: Path) -> None:
        """Every depth, byte order and polarity that it knows has the right values or is refused."""
        assert fuzzed.values_case(random.Random(seed), tmp_path)[1] is None
        assert fuzzed.name_case(random.Random(seed), tmp_path)[1] is None

    def test_transparent_palette(self, tmp_path: Path) -> None:
        photograph().resize((8, 8)).convert("P").save(tmp_path / "image.png", transparency=bytes(range(256)))
        assert read_image(tmp_path / "image.png").mode == "RGB"

    def test_orientation_of_the_camera_is_applied(self, tmp_path: Path) -> None:
        upright = photograph().resize((40, 24))
        exif = PIL.Image.Exif()
        exif[0x0112] = 6  # the camera was held so that the file must be turned clockwise
        upright.transpose(PIL.Image.Transpose.ROTATE_90).save(tmp_path / "turned.png", exif=exif)
        assert numpy.array_equal(numpy.asarray(read_image(tmp_path / "turned.png")), numpy.asarray(upright))


class TestFindImages:
    def test_folder_is_searched_in_depth(self, album: Path) -> None:
        files, failures = find_images([str(album)])
        assert [file.name for file in files] == ["astronaut.png", "rocket.png", "cat.JPG"]
        assert failures == []

    def test_glob_file_and_folder_name_a_file_once(self, album: Path) -> None:
        files, failures = find_images([str(album / "*.png"), str(album / "astronaut.png"), str(album)])
        assert [file.name for file in files] == ["astronaut.png", "rocket.png", "cat.JPG"]
        assert failures == []

    def test_deep_glob(self, album: Path) -> None:
        assert [file.name for file in find_images([str(album / "**" / "rocket.*")])[0]] == ["rocket.png"]

    def test_pipes_and_long_names_are_failures(self, tmp_path: Path, model: torch.nn.Module) -> None:
        os.mkfifo(tmp_path / "pipe.png")
        long = str(tmp_path / ("a" * 300))
        files, failures = find_images([str(tmp_path / "pipe.png"), long, "a\0b"])
        assert [failure.file for failure in failures] == [long, "a\0b"]
        assert failures[0].reason == "File name too long"
        (result,) = classify(model, files, preprocessing=SMALL)
        assert isinstance(result, Failure)
        assert result.reason.endswith("pipe.png is a named pipe; a file is needed")

    def test_file_with_magic_characters_is_a_file(self, tmp_path: Path) -> None:
        file = tmp_path / "a[1].png"
        photograph().resize((8, 8)).save(file)
        assert find_images([str(file)]) == ([file], [])

    def test_named_file_is_taken_whatever_its_suffix(self, album: Path) -> None:
        assert find_images([str(album / "notes.txt")])[0] == [album / "notes.txt"]

    def test_what_gives_nothing_is_reported(self, tmp_path: Path) -> None:
        (tmp_path / "empty").mkdir()
        arguments = [str(tmp_path / "missing.png"), str(tmp_path / "*.png"), str(tmp_path / "empty")]
        files, failures = find_images(arguments)
        assert files == []
        assert [failure.file for failure in failures] == arguments
        assert "no such file" in failures[0].reason
        assert "matches nothing" in failures[1].reason
        assert "no images in this folder" in failures[2].reason


class TestClassify:
    def test_probabilities_are_the_models(self, album: Path, model: torch.nn.Module) -> None:
        files, _ = find_images([str(album)])
        results = list(classify(model, files, preprocessing=SMALL, topk=3, batch_size=2))
        with torch.inference_mode():
            expected = torch.softmax(model(torch.stack([SMALL(read_image(file)) for file in files])), 1)
        for file, result, row in zip(files, results, expected, strict=True):
            assert isinstance(result, Prediction)
            assert result.file == str(file)
            values, indices = row.topk(3)
            assert [score.index for score in result.scores] == indices.tolist()
            assert [score.probability for score in result.scores] == pytest.approx(values.tolist(), rel=1e-4)

    @pytest.mark.parametrize("batch_size", [1, 2, 5])
    def test_damaged_files_do_not_stop_the_rest(
        self, album: Path, model: torch.nn.Module, batch_size: int, tmp_path: Path
    ) -> None:
        whole = (album / "astronaut.png").read_bytes()
        (tmp_path / "cut.png").write_bytes(whole[: len(whole) // 2])
        (tmp_path / "empty.png").write_bytes(b"")
        shutil.copy(album / "notes.txt", tmp_path / "text.png")
        files = [tmp_path / "cut.png", album / "astronaut.png", tmp_path / "empty.png", tmp_path / "text.png",
                 album / "cat.JPG"]  # fmt: skip
        results = list(classify(model, files, preprocessing=SMALL, batch_size=batch_size))
        assert [result.file for result in results] == [str(file) for file in files]
        assert [type(result) for result in results] == [Failure, Prediction, Failure, Failure, Prediction]
        assert all(result.reason for result in results if isinstance(result, Failure))

    def test_only_damaged_files(self, tmp_path: Path, model: torch.nn.Module) -> None:
        (tmp_path / "empty.png").write_bytes(b"")
        assert [type(r) for r in classify(model, [tmp_path / "empty.png"], preprocessing=SMALL)] == [Failure]

    def test_labels_and_more_topk_than_classes(self, album: Path, model: torch.nn.Module) -> None:
        labels = [f"class {index}" for index in range(7)]
        (result,) = classify(model, [album / "cat.JPG"], preprocessing=SMALL, topk=50, labels=labels)
        assert isinstance(result, Prediction)
        assert len(result.scores) == 7
        assert math.isclose(sum(score.probability for score in result.scores), 1, rel_tol=1e-5)
        assert all(score.label == f"class {score.index}" for score in result.scores)

    def test_the_models_own_preprocessing_is_the_default(self, album: Path) -> None:
        torch.manual_seed(0)
        tiny = create_model("efficientnet_b0", num_classes=2).eval()
        (result,) = classify(tiny, [album / "cat.JPG"])
        (explicit,) = classify(tiny, [album / "cat.JPG"], preprocessing=Preprocessing(224))
        assert result == explicit

    def test_weights_that_are_not_finite_are_a_failure(self, album: Path) -> None:
        broken = create_model("efficientnet_b0", num_classes=2).eval()
        with torch.no_grad():
            broken.classifier.weight.fill_(math.nan)
        (result,) = classify(broken, [album / "cat.JPG"], preprocessing=SMALL)
        assert isinstance(result, Failure)
        assert "not finite" in result.reason

    def test_autocast(self, album: Path, model: torch.nn.Module) -> None:
        (result,) = classify(model, [album / "cat.JPG"], preprocessing=SMALL, amp_dtype=torch.bfloat16)
        assert isinstance(result, Prediction)

    @pytest.mark.parametrize(
        ("arguments", "message"),
        [
            ({"topk": 0}, "topk=0"),
            ({"batch_size": 0}, "batch_size=0"),
            ({"labels": ["one"]}, "1 labels for a model of 7 classes"),
        ],
    )
    def test_bad_arguments(
        self, album: Path, model: torch.nn.Module, arguments: dict[str, object], message: str
    ) -> None:
        with pytest.raises(ValueError, match=message):
            list(classify(model, [album / "cat.JPG"], preprocessing=SMALL, **arguments))  # type: ignore[arg-type]

    def test_a_model_without_config_needs_preprocessing(self, album: Path) -> None:
        with pytest.raises(ValueError, match="needs a model with a config"):
            list(classify(torch.nn.Conv2d(3, 2, 1), [album / "cat.JPG"]))


def test_read_labels(tmp_path: Path) -> None:
    (tmp_path / "labels.txt").write_text("tench\ngrande échelle\n", encoding="utf-8")
    assert read_labels(tmp_path / "labels.txt") == ["tench", "grande échelle"]
