"""The file that a training goes on from."""

from __future__ import annotations

import io
import pickle
from pathlib import Path
from typing import Any

import torch

from effkernels.files import check_regular, printable, replacing

FORMAT = "effkernels training 1"
FILE_NAME = "checkpoint.pt"


def save_checkpoint(file: Path, state: dict[str, Any]) -> None:
    """Write the state of a training; there is the old file or the whole new one.

    Its entries "model" and "model_ema" are where `load_checkpoint` looks for weights.

    Raises:
        OSError: the folder cannot be written to, or the disk is full.
    """
    content = io.BytesIO()  # torch.save into a file reports a full disk as a RuntimeError without its reason
    torch.save({"format": FORMAT, **state}, content)
    with replacing(file) as part:
        part.write_bytes(content.getbuffer())


def read_training(file: Path) -> dict[str, Any]:
    """Return the state that `save_checkpoint` wrote; no pickled code is run.

    Raises:
        OSError: no such file.
        ValueError: not such a file, or a damaged one.
    """
    check_regular(file)
    try:
        state = torch.load(file, map_location="cpu", weights_only=True)
    except OSError:
        raise
    except (Exception, pickle.UnpicklingError) as error:  # a damaged file lets PyTorch's reader raise many types
        raise ValueError(f"{printable(file)} is not a checkpoint of a training, or is damaged") from error
    if not isinstance(state, dict) or state.get("format") != FORMAT:
        found = state.get("format") if isinstance(state, dict) else type(state).__name__
        raise ValueError(f"{printable(file)} is not a checkpoint of a training: format={found!r}; allowed: {FORMAT!r}")
    return state
