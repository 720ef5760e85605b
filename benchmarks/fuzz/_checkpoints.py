"""Cases of checkpoint files: hostile contents with a known outcome, files with damaged bytes, and hostile notes."""

from __future__ import annotations

import collections
import copy
import functools
import io
import json
import random
import sys
import warnings
import zipfile
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from effkernels.models import Architecture, CheckpointError, EfficientNet, Stage, load_checkpoint

State = dict[str, Any]
REFUSED = "refused"
_NETWORK = Architecture(8, (Stage(1, 3, 1, 8, 1), Stage(4, 3, 2, 16, 1)), 16)
_HUGE = 2**38  # elements: 1 TiB in float32


@functools.cache
def _template() -> EfficientNet:
    torch.manual_seed(0)
    model = EfficientNet(_NETWORK, num_classes=5)
    for module in model.modules():
        if isinstance(module, nn.BatchNorm2d):
            module.running_mean.normal_()
            module.running_var.uniform_(0.5, 2.0)
    return model.eval()


def _state() -> State:
    """Return the weights of a small network, a copy of its own for each case."""
    return {key: value.clone() for key, value in _template().state_dict().items()}


def _save(content: object, path: Path, **options: Any) -> None:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        limit = sys.getrecursionlimit()
        sys.setrecursionlimit(20_000)  # the pickler's, for what is deep
        try:
            torch.save(content, path, **options)
        finally:
            sys.setrecursionlimit(limit)


# ------------------------------------------------------------------------------ contents, and whether they are weights

Change = Callable[[Tensor], Any]


class _Hiding:
    """Unpickled as a tensor or a dict whose attributes, which a file may set, hide its methods."""

    def __init__(self, *reduced: Any) -> None:
        self.reduced = reduced

    def __reduce__(self) -> tuple[Any, ...]:
        return self.reduced


def _hidden_tensor(tensor: Tensor) -> _Hiding:
    names = ("numel", "detach", "is_floating_point", "element_size", "untyped_storage", "to", "reshape", "dim")
    rebuild, arguments = tensor.__reduce_ex__(2)
    return _Hiding(torch._tensor._rebuild_from_type_v2, (rebuild, Tensor, arguments, dict.fromkeys(names, 3)))


# Of one weight; True: the file still holds the network, and the values are those of the changed tensor.
WEIGHTS: Mapping[str, tuple[Change, bool]] = {
    "float64": (lambda t: t.double(), True),
    "float16": (lambda t: t.half(), True),
    "bfloat16": (lambda t: t.bfloat16(), True),
    "parameter": (nn.Parameter, True),
    "methods hidden": (_hidden_tensor, True),
    "not contiguous": (lambda t: t.clone().unsqueeze(-1).expand(*t.shape, 2).contiguous()[..., 0], True),
    "view of a larger storage": (lambda t: torch.cat([t.flatten(), torch.ones(7)])[: t.numel()].view(t.shape), True),
    "int8": (lambda t: t.to(torch.int8), False),
    "uint8": (lambda t: t.to(torch.uint8), False),
    "int64": (lambda t: t.long(), False),
    "bool": (lambda t: t > 0, False),
    "complex64": (lambda t: t.to(torch.complex64), False),
    "float8": (lambda t: t.to(torch.float8_e4m3fn), False),
    "float8 of five bits": (lambda t: t.to(torch.float8_e5m2), False),
    "sparse": (lambda t: t.to_sparse(), False),
    "sparse rows": (lambda t: torch.eye(4).to_sparse_csr(), False),
    "nested": (lambda t: torch.nested.nested_tensor([t.flatten(), torch.ones(3)]), False),
    "jagged": (lambda t: torch.nested.nested_tensor([torch.ones(2), torch.ones(3)], layout=torch.jagged), False),
    "quantised": (lambda t: torch.quantize_per_tensor(t, 0.1, 0, torch.qint8), False),
    "meta": (lambda t: t.to("meta"), False),
    "expanded to its shape": (lambda t: torch.ones(1).expand(t.shape), False),
    "expanded to 1 TiB": (lambda t: torch.ones(1).expand(_HUGE), False),
    "windows of 1 TiB": (lambda t: torch.ones(2**20).as_strided((2**19, 2**19), (1, 1)), False),
    "expanded classes": (lambda t: torch.ones(1, 16).expand(2**34, 16), False),
    "no elements": (lambda t: torch.ones(0), False),
    "classes without elements": (lambda t: torch.ones(2**40, 0), False),
    "a number": (lambda t: torch.tensor(1.0), False),
    "another shape": (lambda t: torch.ones(*t.shape, 2), False),
    "transposed shape": (lambda t: torch.ones(*reversed((*t.shape, 3))), False),
    "NaN": (lambda t: t * float("nan"), False),
    "infinite": (lambda t: t + float("inf"), False),
    "1e300": (lambda t: t.double() + 1e300, False),
    "not a tensor": (lambda t: [1.0, 2.0], False),
    "nothing": (lambda t: None, False),
}

# Of a whole state_dict; True: it is the network still.
CONTENTS: Mapping[str, tuple[Callable[[State], Any], bool]] = {
    "as it is": (lambda s: s, True),
    "wrapped": (lambda s: {"epoch": 3, "state_dict": s}, True),
    "wrapped thrice": (lambda s: {"model": {"state_dict": {"model": s}}}, True),
    "wrapped a thousand times": (lambda s: functools.reduce(lambda inner, _: {"model": inner}, range(1000), s), True),
    "prefix": (lambda s: {f"module.{key}": value for key, value in s.items()}, True),
    "ordered": (lambda s: collections.OrderedDict(s), True),
    "keys that are numbers": (lambda s: {**s, 3: torch.ones(2), None: 4}, True),
    "no counts": (lambda s: {k: v for k, v in s.items() if not k.endswith("num_batches_tracked")}, True),
    "counts in float16": (lambda s: {k: v.half() if v.dtype == torch.int64 else v for k, v in s.items()}, True),
    "a dict that holds itself": (lambda s: _cycle({}, "state_dict"), False),
    "two dicts that hold each other": (lambda s: _cycle({"model": {}}, "model", "state_dict"), False),
    "methods hidden": (lambda s: _hidden(s), True),
    "empty": (lambda s: {}, False),
    "a list": (lambda s: [s], False),
    "a tensor": (lambda s: torch.ones(3), False),
    "a number of 5,000 digits": (lambda s: 10**5000, False),
    "a string": (lambda s: "weights", False),
    "no tensors": (lambda s: {"state_dict": {"a": 1}}, False),
    "negative variance": (lambda s: {**s, "bn1.running_var": -s["bn1.running_var"]}, False),
    "negative count": (lambda s: {**s, "bn1.num_batches_tracked": torch.tensor(-1)}, False),
    "a bool as count": (lambda s: {**s, "bn1.num_batches_tracked": torch.tensor(True)}, False),
    "a number as count beyond int64": (
        lambda s: {**s, "bn1.num_batches_tracked": torch.tensor(1e300, dtype=torch.float64)},
        False,
    ),
    "a missing weight": (lambda s: {k: v for k, v in s.items() if k != "bn2.weight"}, False),
    "an extra weight": (lambda s: {**s, "blocks.9.9.conv_pw.weight": torch.ones(2)}, False),
    "an extra weight of an evil name": (lambda s: {**s, "\x1b[2J\n\u202ea.weight": torch.ones(2)}, False),
    "a key of 2,000,000 dots": (lambda s: {**s, "." * 2_000_000 + "conv_stem.weight": torch.ones(1)}, False),
    "20,000 networks": (lambda s: {f"a{n}.conv_stem.weight": torch.ones(1) for n in range(20_000)}, False),
    "200,000 tensors": (lambda s: dict.fromkeys(map(str, range(200_000)), torch.ones(1)) | s, False),
    "deep lists": (lambda s: {"state_dict": s, "deep": _deep(500)}, True),
}


def _cycle(content: State, *names: str) -> State:
    inner = content
    for name in names[:-1]:
        inner = inner[name]
    inner[names[-1]] = content
    return content


def _hidden(state: State) -> _Hiding:
    names = ("items", "keys", "get", "values", "__len__")
    return _Hiding(collections.OrderedDict, (), dict.fromkeys(names, 3), None, iter(state.items()))


def _deep(depth: int) -> list[Any]:
    return functools.reduce(lambda inner, _: [inner], range(depth), [])


def content_case(draw: random.Random, folder: Path) -> tuple[str, Path, State | str]:
    """A .pth file of hostile contents, and the state_dict that the model must have then, or that it is refused."""
    state = _state()
    path = folder / "content.pth"
    if draw.random() < 0.4:
        name = draw.choice(list(CONTENTS))
        make, loads = CONTENTS[name]
        expected: State | str = state if loads else REFUSED
        content = make(_state())
    else:
        name = draw.choice(list(WEIGHTS))
        change, loads = WEIGHTS[name]
        key = draw.choice([key for key, value in state.items() if value.is_floating_point()])
        if "classes" in name:
            key = "classifier.weight"
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            changed = change(state[key])
        content = {**state, key: changed}
        expected = REFUSED
        if loads:
            wanted = state[key] if isinstance(changed, _Hiding) else changed
            expected = {**state, key: wanted.detach().float()}
        name = f"{name} ({key})"
    old = draw.random() < 0.2 and "float8" not in name and "nested" not in name
    _save(content, path, _use_new_zipfile_serialization=not old)
    return f"content: {name}{', old format' if old else ''}", path, expected


# ---------------------------------------------------------------------------------------------------- damaged bytes


def damage(draw: random.Random, raw: bytes) -> bytes:
    """Return the bytes with a few bits flipped, or a piece cut off, zeroed, doubled, swapped or replaced."""
    data = bytearray(raw)
    for _ in range(draw.choice((1, 1, 2, 4))):
        at, length = draw.randrange(len(data)), draw.choice((1, 2, 4, 8, 64, 1000))
        kind = draw.randrange(7)
        if kind == 0:
            data[at] ^= 1 << draw.randrange(8)
        elif kind == 1:
            del data[at:]
        elif kind == 2:
            data[at : at + length] = bytes(len(data[at : at + length]))
        elif kind == 3:
            data[at:at] = data[at : at + length]
        elif kind == 4:
            other = draw.randrange(len(data))
            one, two = data[at : at + length], data[other : other + length]
            data[at : at + len(two)], data[other : other + len(one)] = two, one
        elif kind == 5:
            data[at : at + length] = draw.randbytes(length)
        else:
            data[at] = draw.choice((0, 1, 0x7F, 0x80, 0xFF))
        if not data:
            return b"\0"
    return bytes(data)


@functools.cache
def _files() -> dict[str, bytes]:
    found = {}
    for name, options in (("zip", {}), ("old", {"_use_new_zipfile_serialization": False})):
        buffer = io.BytesIO()
        torch.save({"epoch": 3, "state_dict": _state()}, buffer, **options)
        found[name] = buffer.getvalue()
    from safetensors.torch import save

    found["safetensors"] = save(_state(), {"format": "pt", "effkernels": json.dumps({"bn_eps": 1e-3})})
    return found


def _repack(raw: bytes, draw: random.Random) -> bytes:
    """Return an archive with its pickle damaged and its checksums right."""
    out = io.BytesIO()
    with zipfile.ZipFile(io.BytesIO(raw)) as old, zipfile.ZipFile(out, "w") as new:
        for entry in old.infolist():
            data = old.read(entry)
            new.writestr(entry.filename, damage(draw, data) if entry.filename.endswith("data.pkl") else data)
    return out.getvalue()


def damaged_case(draw: random.Random, folder: Path) -> tuple[str, Path, None]:
    """Return a file with damaged bytes, which is refused or loads what PyTorch or safetensors reads in it."""
    form = draw.choice(("zip", "pickle", "pickle", "old", "safetensors", "safetensors"))
    raw = _files()["zip" if form == "pickle" else form]
    if form == "safetensors" and draw.random() < 0.7:  # most of the file is numbers: aim at its header
        size = 8 + int.from_bytes(raw[:8], "little")
        data = damage(draw, raw[:size]) + raw[size:]
    else:
        data = _repack(raw, draw) if form == "pickle" else damage(draw, raw)
    path = folder / f"damaged.{'safetensors' if form == 'safetensors' else 'pth'}"
    path.write_bytes(data)
    return f"damaged: {form}", path, None


# ---------------------------------------------------------------------------------------- notes of a safetensors file

_NUMBERS: tuple[tuple[str, bool], ...] = (
    ("0.001", True), ("1", True), ("null", True), ("0", False), ("-1e-3", False), ("1e300", False), ("1e400", False),
    ("NaN", False), ("Infinity", False), ("true", False), ('"0.001"', False), ("[]", False), ("{}", False),
    ("1" * 5000, False), ("1" + "0" * 400, False),
)  # fmt: skip
_PADDINGS = (
    ('""', True),
    ('"same"', True),
    ("null", True),
    ('"full"', False),
    ("3", False),
    ("[]", False),
    ("true", False),
)
_SIZES = (("224", True), ("null", True), ("0", False), ("-1", False), ("2.5", False), ("1e9", False),
          ("1" + "0" * 30, False), ('"224"', False))  # fmt: skip
_NOTES = ("", "null", "[]", "3", "{", '"text"', "[" * 100_000, '{"bn_eps":' * 50_000, "NaN")


def note_case(draw: random.Random, folder: Path) -> tuple[str, Path, State | str]:
    """Return a safetensors file that notes what its weights mean, rightly or not."""
    from safetensors.torch import save_file

    path = folder / "noted.safetensors"
    if draw.random() < 0.3:
        text, is_right = draw.choice(_NOTES), False
    else:
        parts = {
            "bn_eps": draw.choice(_NUMBERS),
            "bn_momentum": draw.choice(_NUMBERS + (("0", True),) * 3),
            "pad_type": draw.choice(_PADDINGS),
            "native_size": draw.choice(_SIZES),
        }
        if parts["bn_momentum"][0] == "0":
            parts["bn_momentum"] = ("0", True)
        kept = draw.sample(list(parts), draw.randint(1, 2))
        is_right = all(parts[name][1] for name in kept)
        text = "{" + ", ".join(f'"{name}": {parts[name][0]}' for name in kept) + "}"
    state = _state()
    save_file(state, path, {"format": "pt", "effkernels": text})
    return f"note: {text[:60]}", path, state if is_right else REFUSED


# -------------------------------------------------------------------------------------------------------- the one rule


def check(path: Path, expected: State | str | None) -> str | None:
    """Load a file; None if the outcome is right: it loads and equals, or it is refused by the one error.

    Args:
        path: of the file.
        expected: the state_dict wanted, `REFUSED`, or None: what PyTorch or safetensors reads, or refused.
    """
    model = copy.deepcopy(_template())
    before = _snapshot(model)
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            load_checkpoint(model, path)
    except CheckpointError as error:
        if isinstance(expected, dict):
            return f"is refused: {error}"
        if _snapshot(model) != before:
            return "the model was changed by a file that was refused"
        if error.file != path:
            return f"the error has the file {error.file}"
        message = str(error).replace("\n  ", " ")
        return None if message.isprintable() and len(message) < 20_000 else f"the message is {message[:200]!r}"
    except Exception as error:
        return f"escapes as {type(error).__name__}: {str(error)[:200]}"
    if expected == REFUSED:
        return "loads"
    if expected is None:
        expected = _read_otherwise(path)
    return _difference(model, expected)


def _snapshot(model: EfficientNet) -> list[Any]:
    norms = [(m.eps, m.momentum) for m in model.modules() if isinstance(m, nn.BatchNorm2d)]
    return [model.pad_type, norms, [value.tolist() for value in model.state_dict().values()]]


def _read_otherwise(path: Path) -> State:
    if path.suffix == ".safetensors":
        from safetensors.torch import load_file

        return load_file(path)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        content = torch.load(path, weights_only=True)
    while isinstance(content, dict) and "conv_stem.weight" not in content:
        content = next(value for value in content.values() if isinstance(value, dict))
    return content


def _difference(model: EfficientNet, expected: State) -> str | None:
    for key, value in model.state_dict().items():
        wanted = expected.get(key)
        if wanted is None and key.endswith("num_batches_tracked"):
            continue
        if wanted is None or not torch.equal(value, Tensor.to(Tensor.detach(wanted), value.dtype).reshape(value.shape)):
            return f"loads other values of {key}"
        if not torch.isfinite(value).all() or (key.endswith("running_var") and (value < 0).any()):
            return f"loads impossible values of {key}"
    for module in model.modules():
        if isinstance(module, nn.BatchNorm2d) and not 0 < module.eps <= 1:
            return f"loads eps={module.eps}"
    return None
