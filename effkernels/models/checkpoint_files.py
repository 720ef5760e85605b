"""Checkpoint files of any network: read without running anything in them, and the network found among a trainer's keys.

A .pth file is read by `torch.load(weights_only=True)`, a .safetensors file by safetensors; neither runs pickled code.
What is read is not trusted either: `effkernels.models.checkpoint_tensors` looks at each tensor before its values are.
"""

from __future__ import annotations

import argparse
import functools
import pickle
import re
import threading
import warnings
import zipfile
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from effkernels.files import check_regular, printable
from effkernels.models.checkpoint_tensors import (
    CheckpointError,
    check_values,
    enumerated,
    file_of,
    plain_tensor,
)

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
# More networks in one file than this are not separated, and no key of a network is longer or has more words.
_MOST_NETWORKS = 16
_LONGEST_KEY = 1000
_MOST_TENSORS = 100_000

_safe_globals_lock = threading.Lock()


@dataclass(frozen=True)
class NetworkTensors:
    """A network among the tensors of a file.

    Attributes:
        tensors: of the network, without the prefix.
        prefix: at the start of every key of the network, with its dot; "": none.
        beside: keys of other tensors, which are left out. Those that are known to be a trainer's are not listed.
        metadata: texts that a safetensors file notes beside its tensors.
    """

    tensors: dict[str, Tensor]
    prefix: str = ""
    beside: tuple[str, ...] = ()
    metadata: Mapping[str, str] = field(default_factory=dict)

    def note(self) -> str | None:
        """Return a sentence on what is left out; None if nothing is."""
        if not self.beside:
            return None
        return (
            f"the tensors under {self.prefix!r} are read as the network, and {len(self.beside)} others are left out: "
            f"{enumerated(list(self.beside))}"
        )


@dataclass(frozen=True)
class _Content:
    """The content of a file: plain values, and the texts that a safetensors file stores beside its tensors."""

    values: Any
    metadata: Mapping[str, str] = field(default_factory=dict)


def read_file(file: str | Path, starts: Callable[[str], bool], *, use_ema: bool = True) -> NetworkTensors:
    """Return the network in a .pth or .safetensors file; a warning names the tensors beside it, which are left out.

    Args:
        file: path of the file.
        starts: whether a key, without any prefix, is the one by which the network is found.
        use_ema: prefer averaged weights where the file has both.

    Raises:
        OSError: no such file, or one that the system does not open.
        CheckpointError: empty, not a checkpoint, one with pickled code in it, one of several networks, or one of
            tensors that are not plain (sparse, quantised, expanded, ...) or have values that no network has.
    """
    path = Path(file)
    content = _read(path)
    tensors = _unwrap(path, content.values, starts, use_ema)
    found = network_tensors(tensors, path, starts, use_ema=use_ema)
    checked = {key: plain_tensor(key, tensor, path) for key, tensor in found.tensors.items()}
    check_values(checked, path)
    if (left_out := found.note()) is not None:
        warnings.warn(f"{printable(path)}: {left_out}", stacklevel=3)
    return NetworkTensors(checked, found.prefix, found.beside, content.metadata)


def _read(path: Path) -> _Content:
    name = printable(path)
    if path.is_dir():
        raise CheckpointError(f"{name} is a folder; a .pth or .safetensors file is needed", file=path)
    size = check_regular(path).st_size
    if size == 0:
        raise CheckpointError(f"{name} is empty", file=path)
    if path.suffix == ".safetensors":
        return _read_safetensors(path)
    _check_archive(path, size)
    return _Content(_read_torch(path))


def network_tensors(
    tensors: Mapping[str, Tensor], where: str | Path, starts: Callable[[str], bool], *, use_ema: bool = True
) -> NetworkTensors:
    """Return the tensors of a network without what wrappers and trainers put in front of their keys and beside them.

    The prefix is what precedes the key that `starts` knows, whatever it is: "module." (DataParallel,
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
    if len(tensors) > _MOST_TENSORS:
        raise CheckpointError(
            f"{printable(where)} holds {len(tensors)} tensors; no network has more than {_MOST_TENSORS}",
            file=file_of(where),
        )
    for key in tensors:
        if len(key) > _LONGEST_KEY:
            raise CheckpointError(
                f"{printable(where)}: the key {printable(key[:80])}... has {len(key)} characters; allowed: "
                f"{_LONGEST_KEY}",
                file=file_of(where),
                key=key,
            )
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
    """Return what precedes each key that `starts` knows."""
    found: list[str] = []
    for key in tensors:
        cuts = [0, *(match.end() for match in re.finditer(r"\.", key))]
        prefixes = [key[:cut] for cut in cuts if starts(key[cut:])]
        if prefixes:
            # Hugging Face's "efficientnet." may be in front or not: the prefix under which more of the tensors are.
            count = {prefix: sum(one.startswith(prefix) for one in tensors) for prefix in prefixes}
            best = max(prefixes, key=lambda prefix: (count[prefix], -len(prefix)))
            if best not in found:
                found.append(best)
            if len(found) > _MOST_NETWORKS:
                break
    return found


def _choose(prefixes: list[str], where: str | Path, use_ema: bool) -> str:
    if len(prefixes) == 1:
        return prefixes[0]
    averaged = [prefix for prefix in prefixes if _AVERAGED.search(prefix)]
    wanted = averaged if use_ema else [prefix for prefix in prefixes if prefix not in averaged]
    if len(wanted) == 1:
        return wanted[0]
    names = enumerated([repr(prefix) for prefix in prefixes], " and ")
    count = f"more than {_MOST_NETWORKS}" if len(prefixes) > _MOST_NETWORKS else str(len(prefixes))
    raise CheckpointError(
        f"{printable(where)} holds {count} networks, whose keys begin with {names}: keep the tensors of one of them",
        file=file_of(where),
    )


@functools.cache
def _harmless_globals() -> tuple[Any, ...]:
    """Return the classes and functions beside torch's own that make plain values only: argparse.Namespace and NumPy's
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


def _check_archive(path: Path, size: int) -> None:
    """Refuse an archive whose entries say that they hold more than the file: they would be unpacked into memory."""
    try:
        with zipfile.ZipFile(path) as archive:
            inside = sum(entry.file_size for entry in archive.infolist())
    except Exception:  # not an archive, or a damaged one: PyTorch says what it is
        return
    if inside > size:
        raise CheckpointError(
            f"{printable(path)} has {size} bytes and says that it holds {inside}: it is compressed, which PyTorch's "
            "files are not, or made up. Save it again: torch.save(torch.load(FILE, weights_only=True), NEW_FILE)",
            file=path,
        )


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
    except CheckpointError:
        raise
    except (
        Exception
    ) as error:  # what a damaged file lets PyTorch's reader raise has no end: AssertionError, TypeError...
        if "TorchScript" in str(error):
            raise CheckpointError(
                f"{printable(path)} is a TorchScript archive, which holds code and is never run. Save the weights "
                "alone: torch.save(torch.jit.load(FILE).state_dict(), NEW_FILE)",
                file=path,
            ) from error
        raise _damaged(path, "a PyTorch checkpoint", error) from error


def _damaged(path: Path, wanted: str, error: Exception) -> CheckpointError:
    return CheckpointError(
        f"{printable(path)} is not {wanted}, or is cut off ({_first_line(error)}); compare its size with the "
        "original's, and fetch or save it again",
        file=path,
    )


def _not_opened(path: Path, error: pickle.UnpicklingError) -> CheckpointError:
    try:
        names = torch.serialization.get_unsafe_globals_in_checkpoint(path)
    except Exception:  # a file of before PyTorch 1.6, or a damaged one
        names = re.findall(r"GLOBAL ([\w.]+)", str(error))
    if not names:
        return CheckpointError(
            f"{printable(path)} is not a file of tensors: it is no PyTorch checkpoint, or it holds pickled objects, "
            f"which are never run. Save model.state_dict() instead of the model. ({_first_line(error)})",
            file=path,
        )
    # torch's own come in the train of the others.
    names = sorted(set(names), key=lambda name: (name.startswith(("torch.", "builtins.", "__builtin__.")), name))
    return CheckpointError(
        f"{printable(path)} holds pickled objects, which are never run: {enumerated(names)}. Save model.state_dict() "
        "instead of the model, or of a file whose origin you trust the weights alone: "
        "torch.save(torch.load(FILE, weights_only=False)['state_dict'], NEW_FILE)",
        file=path,
    )


def _read_safetensors(path: Path) -> _Content:
    try:
        from safetensors import safe_open
    except ModuleNotFoundError as error:
        raise ImportError(
            f"{printable(path)}: reading .safetensors needs the package safetensors: pip install 'effkernels[models]'"
        ) from error
    try:
        with safe_open(path, framework="pt") as file:
            metadata = dict(file.metadata() or {})
            return _Content({key: file.get_tensor(key) for key in file.keys()}, metadata)  # noqa: SIM118
    except Exception as error:  # SafetensorError, and what a type that PyTorch does not have lets its reader raise
        raise _damaged(path, "a safetensors file", error) from error


def _first_line(error: Exception) -> str:
    text = str(error).strip()
    return printable(text.splitlines()[0][:200]) if text else type(error).__name__


def _entries(content: Any) -> dict[Any, Any] | None:
    """Return the entries of a dict, None of anything else.

    As dict itself gives them: a file can give an OrderedDict attributes that hide its methods.
    """
    return dict(dict.items(content)) if isinstance(content, dict) else None


def _tensors_of(content: Mapping[Any, Any]) -> dict[str, Tensor]:
    return {key: value for key, value in content.items() if isinstance(key, str) and isinstance(value, Tensor)}


def _unwrap(path: Path, content: Any, starts: Callable[[str], bool], use_ema: bool) -> dict[str, Tensor]:
    """Return the tensors of a file, in whatever dict of it they are."""
    wrappers = (*_EMA_WRAPPERS, *_WRAPPERS) if use_ema else (*_WRAPPERS, *_EMA_WRAPPERS)
    entries = _entries(content)
    if entries is None:
        raise CheckpointError(
            f"{printable(path)} holds a {type(content).__name__}; a dict of tensors is needed", file=path
        )
    opened = {id(content)}
    while True:
        inner = next((entries[name] for name in wrappers if isinstance(entries.get(name), dict)), None)
        tensors = _tensors_of(entries)
        if inner is None and not tensors:
            inner = _only_network(path, entries, starts)
        if inner is None:
            break
        if id(inner) in opened:
            raise CheckpointError(
                f"{printable(path)} holds a dict that holds itself; save model.state_dict()", file=path
            )
        opened.add(id(inner))
        entries = _entries(inner) or {}
    if not tensors:
        raise CheckpointError(
            f"{printable(path)} holds no tensors under any of the known names ({', '.join(wrappers)}); save "
            "model.state_dict(), or a dict with it under one of them",
            file=path,
        )
    return tensors


def _only_network(path: Path, content: Mapping[Any, Any], starts: Callable[[str], bool]) -> dict[Any, Any] | None:
    """Return the one dict of tensors among the entries of a file, or the one of them that holds the network."""
    inside: dict[str, dict[Any, Any]] = {}
    for name, value in content.items():
        entries = _entries(value)
        if entries is not None and (tensors := _tensors_of(entries)):
            inside[str(name)] = tensors
    if len(inside) > 1:
        inside = {name: tensors for name, tensors in inside.items() if _prefixes(tensors, starts)}
    if len(inside) > 1:
        names = enumerated([repr(name) for name in inside], " and ")
        raise CheckpointError(
            f"{printable(path)} holds {len(inside)} networks, under {names}: keep one of them", file=path
        )
    return next(iter(inside.values()), None)
