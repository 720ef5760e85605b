"""Checkpoint files of any network: read without running anything in them, and the network found among a trainer's keys.

A .pth file is read by `torch.load(weights_only=True)`, a .safetensors file by safetensors; neither runs pickled code.
"""

from __future__ import annotations

import argparse
import functools
import pickle
import re
import threading
import warnings
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

# Where training scripts put the weights inside a file, the averaged ones first.
_EMA_WRAPPERS = ("state_dict_ema", "model_ema", "ema_state_dict")
_WRAPPERS = ("state_dict", "model_state_dict", "model")
# What PyTorch's own wrappers (torch.compile, FSDP, activation checkpointing) put into the name of a module, anywhere in
# a network. No library calls a module so.
_WRAPPER_MODULES = frozenset({"_orig_mod", "_fsdp_wrapped_module", "_checkpoint_wrapped_module"})
# What DataParallel and AveragedModel put in front of every key.
_MODULE = "module."
# Tensors that trainers keep beside the weights: AveragedModel's count of updates.
_TRAINER_KEYS = frozenset({"n_averaged"})
# A word of a prefix that says that the weights under it are averaged.
_AVERAGED = re.compile(r"(^|[._])(ema|swa|averaged?)([._]|$)")
_LISTED = 8

_safe_globals_lock = threading.Lock()


class CheckpointError(ValueError):
    """A file that is not a checkpoint, or not one of this model; the message says what differs."""


@dataclass(frozen=True)
class NetworkTensors:
    """A network among the tensors of a file.

    Attributes:
        tensors: of the network, without the prefix.
        prefix: that stands in front of every key of the network, with its dot; "": none.
        beside: keys of other tensors, which are left out. Those that are known to be a trainer's are not listed.
    """

    tensors: dict[str, Tensor]
    prefix: str = ""
    beside: tuple[str, ...] = ()

    def note(self) -> str | None:
        """A sentence on what is left out; None where nothing is."""
        if not self.beside:
            return None
        return (
            f"the tensors under {self.prefix!r} are read as the network, and {len(self.beside)} others are left out: "
            f"{enumerated(list(self.beside))}"
        )


def read_file(file: str | Path, starts: Callable[[str], bool], *, use_ema: bool = True) -> NetworkTensors:
    """The network in a .pth or .safetensors file; a warning names the tensors beside it, which are left out.

    Args:
        file: path of the file.
        starts: whether a key, without any prefix, is the one by which the network is found.
        use_ema: prefer averaged weights where the file has both.

    Raises:
        FileNotFoundError: no such file.
        CheckpointError: empty, not a checkpoint, one with pickled code in it, one of several networks, or one with
            values that are not finite.
    """
    path = Path(file)
    if path.is_dir():
        raise CheckpointError(f"{path} is a folder; a .pth or .safetensors file is needed")
    if path.stat().st_size == 0:
        raise CheckpointError(f"{path} is empty")
    content = _read_safetensors(path) if path.suffix == ".safetensors" else _read_torch(path)
    tensors = _unwrap(path, content, starts, use_ema)
    found = network_tensors(tensors, str(path), starts, use_ema=use_ema)
    check_finite(found.tensors, str(path))
    if (left_out := found.note()) is not None:
        warnings.warn(f"{path}: {left_out}", stacklevel=3)
    return found


def network_tensors(
    tensors: Mapping[str, Tensor], where: str, starts: Callable[[str], bool], *, use_ema: bool = True
) -> NetworkTensors:
    """The tensors of a network without what wrappers and trainers put in front of their keys and beside them.

    The prefix is what stands in front of the key that `starts` knows, whatever it is: "module." (DataParallel,
    AveragedModel), "model." (Lightning), "backbone.", several of them. Without such a key a "module." in front of every
    key is taken off.

    Args:
        tensors: key -> tensor.
        where: they come from, for the message.
        starts: whether a key, without any prefix, is the one by which the network is found.
        use_ema: of two networks, prefer the one whose prefix says that it is averaged.

    Raises:
        CheckpointError: several networks, with nothing to choose by.
    """
    tensors = {key: value for key, value in tensors.items() if key.rpartition(".")[2] not in _TRAINER_KEYS}
    bare = {".".join(word for word in key.split(".") if word not in _WRAPPER_MODULES): key for key in tensors}
    if len(bare) == len(tensors):
        tensors = {name: tensors[key] for name, key in bare.items()}
    prefixes = _prefixes(tensors, starts)
    if not prefixes:
        while tensors and all(key.startswith(_MODULE) for key in tensors):
            tensors = {key.removeprefix(_MODULE): value for key, value in tensors.items()}
        return NetworkTensors(tensors)
    prefix = _choose(prefixes, where, use_ema)
    others = tuple(one for one in prefixes if one != prefix and not prefix.startswith(one))
    found, beside = {}, []
    for key, value in tensors.items():
        if others and key.startswith(others):
            continue
        if key.startswith(prefix):
            found[key.removeprefix(prefix)] = value
        elif not any(key.startswith(one) for one in prefixes):
            beside.append(key)
    return NetworkTensors(found, prefix, tuple(beside))


def _prefixes(tensors: Mapping[str, Tensor], starts: Callable[[str], bool]) -> list[str]:
    """What stands in front of each key that `starts` knows."""
    found: list[str] = []
    for key in tensors:
        cuts = [0, *(match.end() for match in re.finditer(r"\.", key))]
        prefixes = [key[:cut] for cut in cuts if starts(key[cut:])]
        if prefixes:
            # Hugging Face's "efficientnet." may stand in front or not: the prefix under which more of the tensors are.
            count = {prefix: sum(one.startswith(prefix) for one in tensors) for prefix in prefixes}
            best = max(prefixes, key=lambda prefix: (count[prefix], -len(prefix)))
            if best not in found:
                found.append(best)
    return found


def _choose(prefixes: list[str], where: str, use_ema: bool) -> str:
    if len(prefixes) == 1:
        return prefixes[0]
    averaged = [prefix for prefix in prefixes if _AVERAGED.search(prefix)]
    wanted = averaged if use_ema else [prefix for prefix in prefixes if prefix not in averaged]
    if len(wanted) == 1:
        return wanted[0]
    names = " and ".join(repr(prefix) for prefix in prefixes)
    raise CheckpointError(
        f"{where} holds {len(prefixes)} networks, whose keys begin with {names}: keep the tensors of one of them"
    )


def enumerated(entries: list[str]) -> str:
    """The first few of many keys, for a message."""
    more = len(entries) - _LISTED
    return ", ".join(entries[:_LISTED]) + (f" and {more} more" if more > 0 else "")


def check_finite(tensors: Mapping[str, Tensor], where: str) -> None:
    """Refuse values that are not finite; tensors on the meta device have none.

    Raises:
        CheckpointError: with the first key that has some; the message begins with `where`.
    """
    for key, tensor in tensors.items():
        if tensor.is_floating_point() and not tensor.is_meta and not torch.isfinite(tensor).all():
            count = int((~torch.isfinite(tensor)).sum())
            raise CheckpointError(f"{where}: {key} has {count} of {tensor.numel()} values that are NaN or infinite")


@functools.cache
def _harmless_globals() -> tuple[Any, ...]:
    """Classes and functions beside torch's own that make plain values and run nothing: argparse.Namespace and NumPy's
    numbers, which timm's saver keeps beside the weights (the arguments of the run, its metric).
    """
    found: list[Any] = [argparse.Namespace]
    try:
        import numpy
    except ImportError:
        return tuple(found)
    number = numpy.float64(0.0).__reduce__()[0]
    # NumPy 1 and 2 call the function's module otherwise.
    found += [(number, "numpy.core.multiarray.scalar"), (number, "numpy._core.multiarray.scalar"), numpy.dtype]
    return (*found, *dict.fromkeys(type(numpy.dtype(code)) for code in "?bhilqBHILQefd"))


def _read_torch(path: Path) -> Any:
    try:
        try:
            return torch.load(path, map_location="cpu", weights_only=True)
        except pickle.UnpicklingError:
            # The list of what may be opened is the process's: one file at a time, and only those that need it.
            with _safe_globals_lock, torch.serialization.safe_globals(list(_harmless_globals())):
                try:
                    return torch.load(path, map_location="cpu", weights_only=True)
                except pickle.UnpicklingError as error:
                    raise _not_opened(path, error) from error
    except (EOFError, RuntimeError, ValueError, KeyError, IndexError, UnicodeDecodeError) as error:
        if isinstance(error, CheckpointError):
            raise
        if "TorchScript" in str(error):
            raise CheckpointError(
                f"{path} is a TorchScript archive, which holds code and is never run. Save the weights alone: "
                "torch.save(torch.jit.load(FILE).state_dict(), NEW_FILE)"
            ) from error
        raise CheckpointError(f"{path} is not a PyTorch checkpoint, or is cut off ({_first_line(error)})") from error


def _not_opened(path: Path, error: pickle.UnpicklingError) -> CheckpointError:
    try:
        names = torch.serialization.get_unsafe_globals_in_checkpoint(path)
    except (ValueError, RuntimeError, EOFError, pickle.UnpicklingError):  # a file of before PyTorch 1.6
        names = re.findall(r"GLOBAL ([\w.]+)", str(error))
    if not names:
        return CheckpointError(
            f"{path} is not a file of tensors: it is no PyTorch checkpoint, or it holds pickled objects, which are "
            f"never run. Save model.state_dict() instead of the model. ({_first_line(error)})"
        )
    # torch's own come in the train of the others.
    names = sorted(set(names), key=lambda name: (name.startswith(("torch.", "builtins.", "__builtin__.")), name))
    return CheckpointError(
        f"{path} holds pickled objects, which are never run: {enumerated(names)}. Save model.state_dict() instead of "
        "the model, or of a file whose origin you trust the weights alone: "
        "torch.save(torch.load(FILE, weights_only=False)['state_dict'], NEW_FILE)"
    )


def _read_safetensors(path: Path) -> Any:
    try:
        from safetensors import SafetensorError
        from safetensors.torch import load_file
    except ModuleNotFoundError as error:
        raise ImportError(
            f"{path}: reading .safetensors needs the package safetensors: pip install 'effkernels[models]'"
        ) from error
    try:
        return load_file(path)
    except (SafetensorError, OSError, ValueError) as error:
        raise CheckpointError(f"{path} is not a safetensors file, or is cut off ({_first_line(error)})") from error


def _first_line(error: Exception) -> str:
    text = str(error).strip()
    return text.splitlines()[0][:200] if text else type(error).__name__


def _tensors_of(content: Mapping[Any, Any]) -> dict[str, Tensor]:
    return {key: value for key, value in content.items() if isinstance(key, str) and isinstance(value, Tensor)}


def _unwrap(path: Path, content: Any, starts: Callable[[str], bool], use_ema: bool) -> dict[str, Tensor]:
    """The tensors of a file, in whatever dict of it they are."""
    wrappers = (*_EMA_WRAPPERS, *_WRAPPERS) if use_ema else (*_WRAPPERS, *_EMA_WRAPPERS)
    while isinstance(content, Mapping):
        inner = next((content[name] for name in wrappers if isinstance(content.get(name), Mapping)), None)
        if inner is None and not _tensors_of(content):
            inner = _only_network(path, content, starts)
        if inner is None:
            break
        content = inner
    if not isinstance(content, Mapping):
        raise CheckpointError(f"{path} holds a {type(content).__name__}; a dict of tensors is needed")
    tensors = _tensors_of(content)
    if not tensors:
        raise CheckpointError(f"{path} holds no tensors under any of the known names ({', '.join(wrappers)})")
    return tensors


def _only_network(path: Path, content: Mapping[Any, Any], starts: Callable[[str], bool]) -> Mapping[str, Tensor] | None:
    """The one dict of tensors among the entries of a file, or the one of them that holds the network."""
    inside = {
        str(name): tensors
        for name, value in content.items()
        if isinstance(value, Mapping) and (tensors := _tensors_of(value))
    }
    if len(inside) > 1:
        inside = {name: tensors for name, tensors in inside.items() if _prefixes(tensors, starts)}
    if len(inside) > 1:
        names = " and ".join(repr(name) for name in inside)
        raise CheckpointError(f"{path} holds {len(inside)} networks, under {names}: keep one of them")
    return next(iter(inside.values()), None)
