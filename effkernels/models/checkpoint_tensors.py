"""Check the tensors of a checkpoint, in this order: kind, dtype and shape, and only then the values.

The order is what keeps a hostile file harmless: a file of a kilobyte can hold a tensor of 256 GiB, expanded from one
number, and whatever looks at its values first allocates them.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from pathlib import Path

import torch
from torch import Tensor, nn

from effkernels.files import printable

_LISTED = 8
_LONGEST_LISTED = 200
_COUNT = "num_batches_tracked"
_FLOATS = (torch.float32, torch.float64, torch.float16, torch.bfloat16)
_INTEGERS = (torch.int64, torch.int32, torch.int16, torch.int8, torch.uint8)
_KINDS = (Tensor, nn.Parameter)


class CheckpointError(ValueError):
    """A file that is not a checkpoint, or not one of this model; the message says what differs and what to do.

    Attributes:
        file: that was read; None if the tensors come from no file.
        key: of the tensor in question; None if it is not about one.
    """

    def __init__(self, message: str, *, file: str | Path | None = None, key: str | None = None) -> None:
        super().__init__(message)
        self.file = None if file is None else Path(file)
        self.key = key


def enumerated(entries: list[str], separator: str = ", ") -> str:
    """Return the first few of many keys, for a message."""
    more = len(entries) - _LISTED
    shown = [
        printable(entry if len(entry) <= _LONGEST_LISTED else f"{entry[:_LONGEST_LISTED]}...")
        for entry in entries[:_LISTED]
    ]
    return separator.join(shown) + (f" and {more} more" if more > 0 else "")


def file_of(where: str | Path) -> Path | None:
    """Return the file that tensors come from; None for a text that says otherwise where they come from."""
    return where if isinstance(where, Path) else None


def plain_tensor(key: str, tensor: Tensor, where: str | Path) -> Tensor:
    """Return a file's tensor without gradient and attributes, its kind checked by `check_structure`; no copy.

    A file can give a tensor attributes, which would hide its methods from those who ask for its shape later.
    """
    if type(tensor) not in _KINDS:
        raise _refused(key, where, f"is a {type(tensor).__name__}", "save it as a plain torch.Tensor")
    check_structure(key, tensor, where)
    if tensor.device.type != "cpu":
        raise _refused(key, where, f"is on the device {tensor.device.type!r} and has no values", "save its weights")
    return Tensor.detach(tensor)


def check_structure(key: str, tensor: Tensor, where: str | Path) -> None:
    """Refuse what is no plain array of numbers, before anything asks for its values.

    Args:
        key: of the tensor.
        tensor: in any state.
        where: it comes from, for the message; a path is also the error's `file`.

    Raises:
        CheckpointError: sparse, nested, quantised, or with more elements than are stored.
    """
    if tensor.is_quantized:
        raise _refused(key, where, f"is quantised ({_name(tensor.dtype)})", "save tensor.dequantize()")
    if tensor.is_nested:
        raise _refused(key, where, "is a nested tensor", "save plain tensors")
    if tensor.layout != torch.strided:
        raise _refused(key, where, f"has the layout {_name(tensor.layout)}", "save tensor.to_dense()")
    if tensor.device.type == "meta" or type(tensor) not in _KINDS:
        return
    try:
        stored = Tensor.untyped_storage(tensor).nbytes()
    except Exception as error:
        raise _refused(key, where, "has no storage", "save its weights") from error
    if Tensor.numel(tensor) * Tensor.element_size(tensor) > stored:
        shape = tuple(tensor.shape)
        held = stored // Tensor.element_size(tensor)
        raise _refused(
            key, where, f"of shape {shape} is expanded from {held} stored numbers", "save tensor.contiguous()"
        )


def check_dtypes(
    tensors: Mapping[str, Tensor], where: str | Path, wanted: Callable[[str], torch.dtype | None] | None = None
) -> None:
    """Refuse numbers that are no weights: a float8 or int8 code means nothing without its scale.

    Args:
        tensors: key -> tensor.
        where: they come from.
        wanted: the dtype that the model has for a key, None for a key that it has not; by default counts of batches are
            whole numbers and everything else is floating.

    Raises:
        CheckpointError: neither float32, float64, float16 nor bfloat16 where the model has floating numbers; not whole
            numbers where it has those, or another dtype than the model's bool or complex ones. Counts of batches may be
            floating too, as they are after a cast of a whole state_dict.
    """
    for key, tensor in tensors.items():
        default = torch.int64 if key.rpartition(".")[2] == _COUNT else torch.float32
        dtype = default if wanted is None else wanted(key)
        if dtype is None:
            continue
        if dtype.is_floating_point:
            allowed: tuple[torch.dtype, ...] = _FLOATS
        elif dtype in _INTEGERS:
            allowed = _INTEGERS + (_FLOATS if key.rpartition(".")[2] == _COUNT else ())
        else:
            allowed = (dtype,)
        if tensor.dtype not in allowed:
            names = ", ".join(_name(one) for one in allowed)
            advice = f"allowed: {names}"
            if dtype.is_floating_point and not tensor.dtype.is_complex:
                advice += "; multiply the numbers by their scale and save them so"
            raise _refused(key, where, f"has the dtype {_name(tensor.dtype)}", advice)


def check_values(tensors: Mapping[str, Tensor], where: str | Path) -> None:
    """Refuse values that no network has; tensors on the meta device have none.

    Raises:
        CheckpointError: values that are not finite, negative variances (`running_var`) or counts of batches.
    """
    for key, tensor in tensors.items():
        if tensor.is_meta or not tensor.numel() or tensor.dtype not in _FLOATS + _INTEGERS:
            continue
        if tensor.dtype in _FLOATS and not torch.isfinite(tensor).all():
            count = int((~torch.isfinite(tensor)).sum())
            raise _refused(key, where, f"has {count} of {tensor.numel()} values that are NaN or infinite", _FETCH)
        leaf = key.rpartition(".")[2]
        if leaf in ("running_var", _COUNT) and bool((tensor < 0).any()):
            what = "variances" if leaf == "running_var" else "counts"
            raise _refused(key, where, f"has negative {what}, the least {float(tensor.min()):.4g}", _FETCH)


def check_range(tensors: Mapping[str, Tensor], state: Mapping[str, Tensor], where: str | Path) -> None:
    """Refuse finite values that the model's dtype cannot hold: 1e300 in float64 would become infinite in float32.

    Args:
        tensors: key -> tensor, all of whose keys the model has.
        state: the model's state_dict.
        where: the tensors come from.

    Raises:
        CheckpointError: a value beyond the largest of the model's dtype.
    """
    for key, tensor in tensors.items():
        dtype = state[key].dtype
        if not tensor.numel() or tensor.dtype == dtype or not tensor.is_floating_point():
            continue
        limit = torch.finfo(dtype).max if dtype.is_floating_point else float(torch.iinfo(dtype).max)
        if torch.finfo(tensor.dtype).max > limit and (largest := float(tensor.abs().max())) > limit:
            raise _refused(
                key, where, f"has a value of {largest:.4g}", f"the model's {_name(dtype)} ends at {limit:.4g}"
            )


def check_fit(tensors: Mapping[str, Tensor], state: Mapping[str, Tensor], where: str | Path, name: str) -> None:
    """Refuse tensors that are not those of a model of any kind: keys, shapes, dtypes, and the range of the values.

    Args:
        tensors: key -> tensor.
        state: the model's state_dict; it may be on the meta device.
        where: the tensors come from.
        name: of the model, for the message.

    Raises:
        CheckpointError: with the first keys that differ.
    """
    problems = {
        "missing": [key for key in state if key not in tensors],
        "unexpected": [key for key in tensors if key not in state],
        "of another shape": [key for key in state if key in tensors and tensors[key].shape != state[key].shape],
    }
    found = "; ".join(f"{title} ({len(keys)}): {enumerated(keys)}" for title, keys in problems.items() if keys)
    if found:
        first = next(key for keys in problems.values() for key in keys)
        raise CheckpointError(
            f"{printable(where)} does not fit {printable(name)}: {found}", file=file_of(where), key=first
        )
    check_dtypes(tensors, where, lambda key: state[key].dtype)
    check_range(tensors, state, where)


_FETCH = "the file is damaged or of a training that diverged: take another"


def _refused(key: str, where: str | Path, problem: str, advice: str) -> CheckpointError:
    message = f"{printable(where)}: {enumerated([key])} {problem}; {advice}"
    return CheckpointError(message, file=file_of(where), key=key)


def _name(word: object) -> str:
    return str(word).removeprefix("torch.")
