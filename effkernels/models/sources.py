"""Models by what a user types: ours, another library's, or what a function in a file returns.

`find_model` reads the text and looks the name up; nothing is built or downloaded before `ModelSource.build`, but the
configuration of a repository of the Hugging Face hub, which says what network it is.
"""

from __future__ import annotations

import difflib
import functools
import hashlib
import importlib.util
import inspect
import sys
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from types import ModuleType
from typing import Any

from torch import Tensor, nn

from effkernels.files import check_regular, parse_json, printable, read_text
from effkernels.models.checkpoint_files import read_file
from effkernels.models.checkpoint_tensors import CheckpointError, enumerated
from effkernels.models.model_input import stated_input_size
from effkernels.models.peers import import_timm, import_torchvision, import_transformers
from effkernels.models.preprocessing import CROP_MODES, Preprocessing
from effkernels.models.pretrained import HubError
from effkernels.models.registry import create_model, load_checkpoint, model_config

FORMS = "a name of effkernels.list_models(), timm:NAME, torchvision:NAME, hf:NAME, FILE.py:FUNCTION"
# Pixels of a side for a model that does not say what images it was designed for.
DEFAULT_SIZE = 224


class LogitsOnly(nn.Module):
    """A model of Hugging Face whose forward returns the logits alone, as all other classifiers do."""

    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        self.model = model

    @property
    def config(self) -> Any:
        """The model's own configuration."""
        return self.model.config

    def forward(self, images: Tensor) -> Tensor:
        """Logits, (N, classes), of images (N, C, H, W)."""
        return self.model(images).logits  # type: ignore[no-any-return]


def unwrapped(model: nn.Module) -> nn.Module:
    """Return the model that `optimize_` and `load_state_dict` are for: what `LogitsOnly` holds, any other as it is."""
    return model.model if isinstance(model, LogitsOnly) else model


@dataclass(frozen=True)
class ModelSource:
    """A model that a text names.

    Attributes:
        text: as the user wrote it; tables and rows name the model so.
        library: "effkernels", "timm", "torchvision", "hf" or "file".
        input_size: (channels, height, width) of the images it was designed for; None: a model of a file, which says
            so once it is built, if at all.
        make: builds it; called with whether published weights are wanted.
        read_preprocessing: returns how images become its input, for images of a number of pixels or of its own.
        packages: distributions that it comes from.
    """

    text: str
    library: str
    input_size: tuple[int, int, int] | None
    make: Callable[[bool], nn.Module]
    read_preprocessing: Callable[[int | None], Preprocessing]
    packages: tuple[str, ...] = ()

    @property
    def is_own(self) -> bool:
        """Return whether it is one of this package's networks."""
        return self.library == "effkernels"

    def build(self, *, pretrained: bool = False, checkpoint: str | Path | None = None) -> nn.Module:
        """Return the model in eval mode, on the CPU; images (N, C, H, W) go in and logits (N, classes) come out.

        Args:
            pretrained: with the weights that its library publishes, downloaded if they are not in its cache; else
                they are drawn at random, from PyTorch's generator. A function of a file returns what it likes.
            checkpoint: a .pth or .safetensors file of weights. For one of this package's networks of any library that
                `load_checkpoint` reads, for another one the state dict of this very model.

        Raises:
            ValueError: there are no published weights, or what builds it raised an error; the message says which.
            HubError: (an OSError) they could not be fetched.
            ImportError: a package that is needed for it is not installed.
            CheckpointError: the file does not fit the model.
        """
        if checkpoint is None:
            return self.make(pretrained).eval()
        if pretrained:
            raise ValueError(f"{self.text}: pretrained=True and checkpoint={str(checkpoint)!r}; allowed: one of them")
        if self.is_own:
            return load_checkpoint(self.text, checkpoint).eval()
        model = self.make(False)
        load_weights(unwrapped(model), checkpoint)
        return model.eval()

    def preprocessing(self, img_size: int | None = None) -> Preprocessing:
        """Return how images become the model's input, at its own size or another one.

        Raises:
            ValueError: the model wants something that `Preprocessing` does not do.
        """
        return self.read_preprocessing(img_size)


@functools.lru_cache(maxsize=64)
def find_model(text: str) -> ModelSource:
    """Return the model that a text names.

    Args:
        text: one of `FORMS`. NAME after hf: is a folder with a config.json, a repository of the hub ("owner/name"), or
            a kind of model ("efficientnet"), in the size that transformers gives it. FUNCTION takes no argument and
            returns a torch.nn.Module; the file is run.

    Raises:
        ValueError: nothing of that name; the message says what is allowed.
        ImportError: the library is not installed.
        HubError: (an OSError) a configuration is not in the hub's cache and could not be fetched.
    """
    library, colon, name = text.partition(":")
    if colon and library in _LIBRARIES:
        return _LIBRARIES[library](text, name)
    file, colon, function = text.rpartition(":")
    if colon and file.endswith(".py"):
        return _of_file(text, file, function)
    if text.endswith(".py"):
        raise ValueError(f"model {printable(text)!r}: which function of the file? needed: FILE.py:FUNCTION")
    try:
        config = model_config(text)
    except ValueError as error:
        raise ValueError(f"{error}; models of others: timm:NAME, torchvision:NAME, hf:NAME, FILE.py:FUNCTION") from None
    return ModelSource(
        text, "effkernels", config.input_size, functools.partial(create_model, text),
        functools.partial(Preprocessing.of, config),
    )  # fmt: skip


def load_weights(model: nn.Module, file: str | Path) -> None:
    """Load a checkpoint file of a model's own state dict into it, in place.

    Raises:
        OSError: the file cannot be read.
        CheckpointError: it is no checkpoint, or has other keys or shapes than the model; the model is unchanged.
    """
    own = model.state_dict()
    first = next(iter(own), "")
    found = read_file(file, first.__eq__).tensors
    path = Path(file)
    absent, left_over = [key for key in own if key not in found], [key for key in found if key not in own]
    if absent or left_over:
        parts = [f"no {enumerated(absent)}"] if absent else []
        parts += [f"unknown {enumerated(left_over)}"] if left_over else []
        raise CheckpointError(f"{printable(path)} is not of this {type(model).__name__}: {'; '.join(parts)}", file=path)
    for key, tensor in found.items():
        if tensor.shape != own[key].shape:
            raise CheckpointError(
                f"{printable(path)}: {key} is {tuple(tensor.shape)}, the model's is {tuple(own[key].shape)}",
                file=path, key=key,
            )  # fmt: skip
    model.load_state_dict(found)


def known(library: str, version: str, name: str, names: Sequence[str], what: str = "model") -> None:
    """Refuse a name that another library does not have.

    Raises:
        ValueError: the message offers the nearest ones.
    """
    if name not in names:
        near = difflib.get_close_matches(name, names, n=3, cutoff=0.5)
        hint = f"did you mean {', '.join(near)}?" if near else f"{library} lists the names of its models"
        raise ValueError(f"{library} {version} has no {what} {name!r}: {hint}")


# ---------------------------------------------------------------------------------------------------------------- timm


def check_timm(name: str) -> ModuleType:
    """Return timm, which has a model of that name.

    Raises:
        ValueError: it has none.
        ImportError: timm is not installed.
    """
    timm = import_timm()
    if not timm.is_model(name):
        known("timm", timm.__version__, name, timm.list_models())
    return timm


def _of_timm(text: str, name: str) -> ModelSource:
    timm = check_timm(name)
    try:
        config = timm.get_pretrained_cfg(name)
    except RuntimeError as error:  # an unknown tag
        raise ValueError(f"{text}: {_first_line(error)}") from error

    def make(pretrained: bool) -> nn.Module:
        if not pretrained:
            return timm.create_model(name)  # type: ignore[no-any-return]
        try:
            return timm.create_model(name, pretrained=True)  # type: ignore[no-any-return]
        except (RuntimeError, OSError) as error:
            raise _no_weights(text, error) from error

    def preprocessing(img_size: int | None) -> Preprocessing:
        if config is None:
            return Preprocessing(img_size or DEFAULT_SIZE)
        if config.crop_mode not in CROP_MODES:
            raise ValueError(f"{text}: timm crops its images by {config.crop_mode!r}; allowed: {', '.join(CROP_MODES)}")
        return Preprocessing(
            img_size or config.input_size[-1], config.crop_pct, config.interpolation, config.mean, config.std,
            config.crop_mode,
        )  # fmt: skip

    size = None if config is None else tuple(config.input_size)
    return ModelSource(text, "timm", size, make, preprocessing, ("timm",))


# --------------------------------------------------------------------------------------------------------- torchvision


def check_torchvision(name: str) -> ModuleType:
    """Return torchvision, which has a classifier of that name.

    Raises:
        ValueError: it has none.
        ImportError: torchvision is not installed.
    """
    torchvision = import_torchvision()
    names = torchvision.models.list_models(module=torchvision.models)
    known("torchvision", torchvision.__version__, name, names, "classifier")
    return torchvision


def _of_torchvision(text: str, name: str) -> ModelSource:
    torchvision = check_torchvision(name)
    published = torchvision.models.get_model_weights(name)
    transform = published.DEFAULT.transforms() if len(published) else None

    def make(pretrained: bool) -> nn.Module:
        if pretrained and not len(published):
            raise ValueError(f"{text}: torchvision has published no weights for it")
        more = {"init_weights": True} if name in ("googlenet", "inception_v3") and not pretrained else {}
        try:
            model: nn.Module = torchvision.models.get_model(name, weights="DEFAULT" if pretrained else None, **more)
        except OSError as error:
            raise _no_weights(text, error) from error
        return model

    def preprocessing(img_size: int | None) -> Preprocessing:
        if transform is None:
            return Preprocessing(img_size or DEFAULT_SIZE)
        size = transform.crop_size[0]
        return Preprocessing(
            img_size or size, _share(size, transform.resize_size[0]), transform.interpolation.value,
            tuple(transform.mean), tuple(transform.std),
        )  # fmt: skip

    size = DEFAULT_SIZE if transform is None else transform.crop_size[0]
    return ModelSource(text, "torchvision", (3, size, size), make, preprocessing, ("torchvision",))


# -------------------------------------------------------------------------------------------------------- transformers


def _of_transformers(text: str, name: str) -> ModelSource:
    transformers = import_transformers()
    config = _configuration(transformers, text, name)
    kinds = transformers.AutoModelForImageClassification
    if type(config) not in kinds._model_mapping:
        raise ValueError(f"{text}: transformers has no image classifier of the kind {config.model_type!r}")
    is_kind = name == config.model_type and not Path(name).is_dir()

    def make(pretrained: bool) -> nn.Module:
        if pretrained and is_kind:
            raise ValueError(f"{text}: a kind of model has no published weights; name a repository, hf:OWNER/NAME")
        if not pretrained:
            return LogitsOnly(kinds.from_config(config))
        try:
            return LogitsOnly(kinds.from_pretrained(name))
        except (OSError, ValueError) as error:
            raise _no_weights(text, error) from error

    size = getattr(config, "image_size", None) or DEFAULT_SIZE
    height, width = size if isinstance(size, (list, tuple)) else (size, size)
    shape = (int(getattr(config, "num_channels", None) or 3), int(height), int(width))

    def preprocessing(img_size: int | None) -> Preprocessing:
        found = {} if is_kind else _preprocessor(transformers, name)
        return _preprocessing_of(found, img_size, shape[-1])

    return ModelSource(text, "hf", shape, make, preprocessing, ("transformers",))


def _configuration(transformers: ModuleType, text: str, name: str) -> Any:
    from transformers.models.auto.modeling_auto import MODEL_FOR_IMAGE_CLASSIFICATION_MAPPING_NAMES as KINDS

    folder = Path(name)
    if name in KINDS and not folder.is_dir():
        return transformers.AutoConfig.for_model(name)
    if folder.is_dir() and not (folder / "config.json").is_file():
        raise ValueError(f"{text}: the folder has no config.json")
    if not folder.is_dir() and "/" not in name:
        near = difflib.get_close_matches(name, KINDS, n=3, cutoff=0.5)
        hint = f"did you mean {', '.join(near)}?" if near else f"kinds: {', '.join(KINDS)}"
        raise ValueError(f"{text} is no folder, no OWNER/NAME of the hub and no kind of image classifier: {hint}")
    try:
        return transformers.AutoConfig.from_pretrained(name)
    except ValueError as error:
        raise ValueError(f"{text}: {_first_line(error)}") from error
    except OSError as error:
        raise HubError(f"{text}: its configuration could not be read: {_first_line(error)}") from error


def _preprocessor(transformers: ModuleType, name: str) -> dict[str, Any]:
    """Return what a model's preprocessor_config.json says, an empty dict where there is none."""
    file = transformers.utils.cached_file(
        name, "preprocessor_config.json", _raise_exceptions_for_missing_entries=False,
        _raise_exceptions_for_connection_errors=False,
    )  # fmt: skip
    if file is None:
        return {}
    found = parse_json(read_text(file))
    return found if isinstance(found, dict) else {}


_RESAMPLINGS = {0: "nearest", 1: "lanczos", 2: "bilinear", 3: "bicubic"}  # Pillow's numbers


def _preprocessing_of(found: dict[str, Any], img_size: int | None, default: int) -> Preprocessing:
    """Return the preprocessing that a preprocessor_config.json describes."""
    own = Preprocessing(default)
    resized, crop = _side(found.get("size")), _side(found.get("crop_size"))
    crops = crop is not None and found.get("do_center_crop", False)
    size = crop if crops else resized
    mean, std = tuple(found.get("image_mean") or own.mean), tuple(found.get("image_std") or own.std)
    if found.get("include_top"):  # transformers' EfficientNet divides by it twice, as the network was trained
        std = tuple(value * value for value in std)
    share = own.crop_pct if size is None else 1.0
    if crops and size and resized and size <= resized:
        share = _share(size, resized)
    share = found.get("crop_pct") or share  # ConvNeXT's name for it
    keeps_ratio = crops or (isinstance(found.get("size"), dict) and "shortest_edge" in found["size"])
    return Preprocessing(
        img_size or size or default, share, _RESAMPLINGS.get(found.get("resample", 3), "bicubic"), mean, std,
        "center" if keeps_ratio or not found else "squash",
    )  # fmt: skip


def _side(size: Any) -> int | None:
    if isinstance(size, dict):
        size = size.get("shortest_edge") or size.get("height")
    return size if isinstance(size, int) and size >= 1 else None


# --------------------------------------------------------------------------------------------- a function in a file


def _of_file(text: str, file: str, function: str) -> ModelSource:
    module = _run_file(text, file)
    builder = getattr(module, function, None)
    functions = sorted(
        name
        for name, value in vars(module).items()
        if inspect.isfunction(value) and value.__module__ == module.__name__ and not name.startswith("_")
    )
    if not callable(builder):
        raise ValueError(f"{printable(text)}: the file has no function {function!r}; it has {enumerated(functions)}")
    try:
        inspect.signature(builder).bind()
    except TypeError as error:
        raise ValueError(f"{printable(text)}: the function must work without arguments: {error}") from error

    def make(pretrained: bool) -> nn.Module:
        if pretrained:
            raise ValueError(f"{printable(text)}: its function decides on the weights; there are no published ones")
        try:
            model = builder()
        except Exception as error:  # anybody's code
            raise ValueError(f"{printable(text)} raised {type(error).__name__}: {_first_line(error)}") from error
        if not isinstance(model, nn.Module):
            raise ValueError(f"{printable(text)} returned {type(model).__name__}; needed: torch.nn.Module")
        return model

    def preprocessing(img_size: int | None) -> Preprocessing:
        return Preprocessing(img_size or DEFAULT_SIZE)

    return ModelSource(text, "file", None, make, preprocessing)


def _run_file(text: str, file: str) -> ModuleType:
    """Return a user's file as a module, run once in this process; files beside it can be imported."""
    path = Path(file)
    try:
        check_regular(path)
    except FileNotFoundError as error:
        raise ValueError(f"{printable(text)}: there is no file {printable(path)}") from error
    except OSError as error:
        raise ValueError(f"{printable(text)}: {error.strerror or error}") from error
    path = path.resolve()
    # A name of its own: the file may be called as a module of Python, and a class in it must be found to be pickled.
    name = f"_effkernels_model_{hashlib.sha256(str(path).encode()).hexdigest()[:16]}"
    if name in sys.modules:
        return sys.modules[name]
    spec = importlib.util.spec_from_file_location(name, path)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules[name] = module
    sys.path.insert(0, str(path.parent))
    try:
        spec.loader.exec_module(module)
    except Exception as error:  # anybody's code
        del sys.modules[name]
        raise ValueError(f"{printable(text)}: its file raised {type(error).__name__}: {_first_line(error)}") from error
    finally:
        sys.path.remove(str(path.parent))
    return module


# -------------------------------------------------------------------------------------------------------------- shared


def input_size_of_source(source: ModelSource, model: nn.Module | None = None) -> tuple[int, int, int]:
    """Return the (channels, height, width) of a source's images; a model of a file is built for it if it is not given.

    `DEFAULT_SIZE` square, with the channels of the first convolution, where nobody says.
    """
    if source.input_size is not None:
        return source.input_size
    return _stated_size(source) if model is None else _stated_by(model)


@functools.lru_cache(maxsize=16)
def _stated_size(source: ModelSource) -> tuple[int, int, int]:
    return _stated_by(source.build())


def _stated_by(model: nn.Module) -> tuple[int, int, int]:
    stated = stated_input_size(model)
    if stated is not None:
        return stated
    first = next((module for module in model.modules() if isinstance(module, nn.Conv2d)), None)
    return (3 if first is None else first.in_channels), DEFAULT_SIZE, DEFAULT_SIZE


def _share(crop: int, resized: int) -> float:
    """Return the `crop_pct` for which exactly `resized` pixels come out: half a pixel more, which is rounded down."""
    return crop / (resized + 0.5)


def _no_weights(text: str, error: BaseException) -> Exception:
    """Return the error for published weights that could not be had."""
    if isinstance(error, OSError):
        return HubError(f"{text}: the weights could not be fetched: {_first_line(error)}")
    return ValueError(f"{text}: {_first_line(error)}")


def _first_line(error: BaseException) -> str:
    lines = [line.strip() for line in str(error).splitlines() if line.strip()]
    return printable(lines[0][:300]) if lines else type(error).__name__


_LIBRARIES: dict[str, Callable[[str, str], ModelSource]] = {
    "timm": _of_timm,
    "torchvision": _of_torchvision,
    "hf": _of_transformers,
}
