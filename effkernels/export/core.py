"""`export_model`: from a network to a checked file."""

from __future__ import annotations

import copy
import filecmp
import os
import shutil
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from torch import nn

from effkernels import _library
from effkernels.export.folder import working_folder
from effkernels.export.formats import DEFAULT_OPSET, FORMATS, OPSETS, ExportError, Format, Job
from effkernels.export.sizes import DYNAMIC_IMAGE, Sizes
from effkernels.export.verify import verify
from effkernels.models.model_input import input_size_of, pretrained_config

DTYPES: tuple[torch.dtype, ...] = (torch.float32, torch.bfloat16, torch.float16)
_COMPILED = "effkernels::"  # operators that the library brings; all others of ours are Triton's and need Python


@dataclass(frozen=True)
class Exported:
    """A file that was written and checked.

    Attributes:
        file: written.
        format: of `FORMATS`.
        bytes: of the file.
        library: the operator library beside it, without which it does not load; None if it needs none.
        operators: of that library that it calls.
        input_shape: (batch, channels, height, width), "1:64" for a range.
        dtype: of the input.
        checked: input shapes it was run with before it was left on disk.
        error, limit: how far its results are from float64 and how far they may be, where nearest to too far; relative.
    """

    file: Path
    format: str
    bytes: int
    library: Path | None
    operators: tuple[str, ...]
    input_shape: str
    dtype: str
    checked: tuple[tuple[int, int, int, int], ...]
    error: float
    limit: float

    def to_dict(self) -> dict[str, Any]:
        """Return the attributes as what JSON has."""
        return {**asdict(self), "file": str(self.file), "library": None if self.library is None else str(self.library)}


def export_model(
    model: nn.Module,
    output: str | Path,
    format: str,
    *,
    batch_size: int | tuple[int, int] = (1, 64),
    image_size: int | tuple[int, int] | str | None = None,
    dtype: torch.dtype = torch.float32,
    device: torch.device | str = "cpu",
    opset: int | None = None,
    overwrite: bool = False,
) -> Exported:
    """Write a network to a file that runs without this package, after checking that it computes the same.

    The file is run at several input sizes and held against float64 by the rule of `effkernels.ops.parity` (at most
    twice PyTorch's own error in that dtype). It appears under its name only if it passes.

    Args:
        model: of `create_model`, or any network of images that torch.export can trace. It is copied and not changed;
            exported is what it computes in eval mode.
        output: file to write; its suffix must be the format's.
        format: "aoti": a package compiled by AOTInductor, which runs in C++ without Python and calls the fused
            operators of the library that is copied beside it; "pt2": the program of torch.export, with the same
            library; "onnx": standard ONNX operators in one file; "safetensors": the weights and their meaning.
        batch_size: images in a call: a number, or (smallest, largest).
        image_size: pixels of either side: a number, (smallest, largest) with height and width each on its own,
            "dynamic" for `DYNAMIC_IMAGE`; None: the model's own size, 224 where it names none.
        dtype: of weights and input: float32, bfloat16 or float16; ONNX files are float32.
        device: "cpu" or "cuda"; packages and programs run on that kind of device only.
        opset: version of the ONNX operators, 18 to 23; None: 20.
        overwrite: replace existing files.

    Returns:
        What was written and how it was checked.

    Raises:
        ValueError: an argument that is not allowed, or not for this format; the message names it.
        ImportError: a package that the format needs is missing; the message names the extra that brings it.
        FileExistsError, FileNotFoundError: the file exists already, or its folder does not.
        ExportError: the network cannot be exported, or the file does not compute the same. Nothing is left on disk.
    """
    file, device = Path(output), torch.device(device)
    kind = _format(format)
    _check_arguments(kind, format, file, dtype, device, opset, overwrite)
    config = pretrained_config(model)
    channels, height, width = input_size_of(model, None, owner="export_model", default=224)
    if image_size is None:
        if height != width:
            raise ValueError(
                f"image_size=None, and the model states {height} x {width}; allowed: a number, (smallest, largest), "
                "'dynamic'"
            )
        image_size = height
    elif isinstance(image_size, str):
        if image_size != "dynamic":
            raise ValueError(f"image_size={image_size!r}; allowed: a number, (smallest, largest), 'dynamic', None")
        image_size = DYNAMIC_IMAGE
    if any(tensor.is_meta for tensor in model.state_dict().values()):
        raise ValueError("model is on the meta device and has no weights; allowed: a model on cpu or cuda")
    missing = kind.missing()
    if missing:
        raise ImportError(f"format={format!r}: {missing}")
    prepared = copy.deepcopy(model).eval().requires_grad_(False).to(device=device, dtype=dtype)
    # In a folder of its own beside the target: the file has its final name, and is moved in one step.
    with working_folder(file.parent) as folder:
        job = Job(
            model=prepared,
            name=str(config.get("name") or config.get("architecture") or type(model).__name__),
            sizes=Sizes.of(batch_size, image_size, channels),
            dtype=dtype,
            device=device,
            file=folder / file.name,
            opset=DEFAULT_OPSET if opset is None else opset,
            on_reference=kind.on_reference,
        )
        traced = format != "safetensors"
        if traced:
            _check_operators(job)
        run = kind.write(job)
        parity = verify(run, prepared, job.sizes, dtype, device)
        if not parity.ok:
            raise ExportError(
                f"{job.name} as {format} differs from the network: error {parity.error:.2g}, limit {parity.limit:.2g}"
            )
        library = _copy_library(folder, file.parent, overwrite) if traced and job.operators else None
        os.replace(job.file, file)
    return Exported(
        file=file,
        format=format,
        bytes=file.stat().st_size,
        library=library,
        operators=job.operators if traced else (),
        input_shape=job.description["input_shape"],
        dtype=job.description["dtype"],
        checked=parity.shapes,
        error=parity.error,
        limit=parity.limit,
    )


def _format(name: str) -> Format:
    if name not in FORMATS:
        raise ValueError(f"format={name!r}; allowed: {', '.join(FORMATS)}")
    return FORMATS[name]


def _check_arguments(
    kind: Format,
    name: str,
    file: Path,
    dtype: torch.dtype,
    device: torch.device,
    opset: int | None,
    overwrite: bool,
) -> None:
    if file.suffix != kind.suffix:
        raise ValueError(f"output={str(file)!r}; allowed for format={name!r}: a name that ends in {kind.suffix}")
    if not file.parent.is_dir():
        raise FileNotFoundError(f"output={str(file)!r}: there is no folder {file.parent}")
    if file.is_dir():
        raise ValueError(f"output={str(file)!r} is a folder; allowed: a file")
    if file.exists() and not overwrite:
        raise FileExistsError(f"output={str(file)!r} exists already; overwrite=True (--force) replaces it")
    allowed = (torch.float32,) if name == "onnx" else DTYPES
    if dtype not in allowed:
        raise ValueError(f"dtype={dtype}; allowed for format={name!r}: {', '.join(map(str, allowed))}")
    if device.type not in ("cpu", "cuda") or (kind.any_device and device.type != "cpu"):
        everywhere = ", whose files run on any device" if kind.any_device else ""
        raise ValueError(
            f"device={str(device)!r}; allowed for format={name!r}{everywhere}: "
            f"{'cpu' if kind.any_device else 'cpu, cuda'}"
        )
    if device.type == "cuda" and not torch.cuda.is_available():
        raise ValueError(f"device={str(device)!r}: torch {torch.__version__} finds no GPU; allowed here: cpu")
    if opset is not None and name != "onnx":
        raise ValueError(f"opset={opset} is for format='onnx', not {name!r}")
    if opset is not None and opset not in OPSETS:
        raise ValueError(f"opset={opset}; allowed: {OPSETS[0]} to {OPSETS[-1]}")


def _check_operators(job: Job) -> None:
    """Refuse a graph whose operators would be missing where the file runs."""
    if job.on_reference and job.operators:
        raise ExportError(f"{job.name}: {', '.join(job.operators)} are still in a graph that should be plain PyTorch")
    python = [name for name in job.operators if not name.startswith(_COMPILED)]
    if python:
        raise ExportError(
            f"{job.name}: {', '.join(python)} are Triton kernels, which need Python where the file runs, because the "
            f"compiled library does not run here: {_library.load_error() or 'see effkernels info'}. Under "
            f"effkernels.backend('reference') plain PyTorch is exported"
        )


def _copy_library(folder: Path, target: Path, overwrite: bool) -> Path:
    """Return the operator library in `target`; what is the same is left alone."""
    library = target / _library.LIBRARY_FILE.name
    if library.exists() and filecmp.cmp(library, _library.LIBRARY_FILE, shallow=False):
        return library
    if library.exists() and not overwrite:
        raise FileExistsError(f"{library} exists already and is another build; overwrite=True (--force) replaces it")
    shutil.copy2(_library.LIBRARY_FILE, folder)
    os.replace(folder / library.name, library)
    return library
