"""Recognises model files and reads weights from them, without running code from a file."""

import pickletools
import zipfile
from collections import OrderedDict
from collections.abc import Mapping
from pathlib import Path
from typing import Any, Literal

import safetensors
import safetensors.torch
import torch
from torch.serialization import get_unsafe_globals_in_checkpoint, safe_globals

from unroll.export.errors import ExportError, first_line

#: script: TorchScript. program: a program of torch.export. saved: written by torch.save.
FileKind = Literal["script", "program", "saved", "safetensors"]

#: For models of other frameworks.
_REWRITE = (
    "write the model as a PyTorch module, copy the weights into it, and export that: docs/coming-from.md says how"
)
_SAVE = 'torch.save(model.state_dict(), "weights.pt")'


def kind_of(path: Path) -> FileKind:
    """Recognise a file by its content. Raises ExportError(checkpoint) for any other file, describing it."""
    if not path.is_file():
        raise ExportError("checkpoint", _folder(path) if path.is_dir() else f"there is no file {path}")
    if zipfile.is_zipfile(path):
        with zipfile.ZipFile(path) as archive:
            names = ["/" + name for name in archive.namelist()]
        if any("/code/" in name for name in names) and any(name.endswith("/constants.pkl") for name in names):
            return "script"
        if any(name.endswith(("/archive_format", "/serialized_exported_program.json")) for name in names):
            return "program"
        if any(name.endswith("/data.pkl") for name in names):
            return "saved"
    with path.open("rb") as file:
        head = file.read(64)
    if head[8:9] == b"{":
        return "safetensors"
    if head.startswith(b"\x80") and head[1:2] <= b"\x05":
        return "saved"
    raise ExportError("checkpoint", f"{path} {_described(path, head)}")


def _folder(path: Path) -> str:
    saved = (path / "saved_model.pb").is_file()
    return f"{path} is a TensorFlow SavedModel; {_REWRITE}" if saved else f"{path} is a folder"


def _described(path: Path, head: bytes) -> str:
    if not head:
        return "is empty"
    if path.suffix == ".keras" or head.startswith(b"\x89HDF"):
        return f"is a Keras file; {_REWRITE}"
    if path.suffix == ".onnx":
        return f"is an ONNX graph, from which the hidden state cannot be lifted; {_REWRITE}"
    if head[4:8] == b"TFL3":
        return f"is a TensorFlow Lite model; {_REWRITE}"
    if zipfile.is_zipfile(path):
        return "is an archive that torch.save did not write"
    if head.startswith(b"PK"):
        return "is damaged: its end is missing; copy it again"
    if head.startswith(b"version https://git-lfs"):
        return "is a Git LFS pointer instead of the file; run `git lfs pull`"
    return "is no PyTorch model or weights file: neither torch.save, torch.jit.save nor safetensors wrote it"


def read_weights(path: Path) -> Mapping[str, Any]:
    """Read a file of weights: tensors by name, or a checkpoint that contains such a mapping.

    Raises:
        ExportError: checkpoint, for any other file, with a remedy.
    """
    match kind_of(path):
        case "script":
            raise ExportError(
                "checkpoint",
                f"{path} is a TorchScript program with its own code; export it without --weights and MODULE: "
                f"unroll export {path} --input NAME:DTYPE:SHAPE",
            )
        case "program":
            raise program_refusal(path)
        case "safetensors":
            try:
                return safetensors.torch.load_file(path)
            except (safetensors.SafetensorError, OSError) as error:
                raise ExportError("checkpoint", f"{path} is a damaged safetensors file: {first_line(error)}") from error
        case "saved":
            return _saved(path)


def hyper_parameters(path: Path) -> dict[str, Any]:
    """The hyper-parameters in a checkpoint of PyTorch Lightning; empty for other files.

    Raises:
        ExportError: checkpoint, as for `read_weights`.
    """
    found = _saved(path).get("hyper_parameters") if kind_of(path) == "saved" else None
    return {name: value for name, value in found.items() if name.isidentifier()} if isinstance(found, Mapping) else {}


def is_plain(value: Any) -> bool:
    """Is the value complete, without a `_StandIn` for an object that cannot be read?"""
    if isinstance(value, Mapping):
        return not isinstance(value, OrderedDict) and all(map(is_plain, value.values()))
    return not isinstance(value, (list, tuple, set)) or all(map(is_plain, value))


def program_refusal(path: Path) -> ExportError:
    return ExportError(
        "checkpoint",
        f"{path} is a program of torch.export, and reading it can run code hidden in it; if you trust it, load it with "
        "torch.export.load and pass the program to unroll.export",
    )


def check_script(path: Path) -> None:
    """Raise ExportError(checkpoint), with a remedy, for a file that is not TorchScript."""
    match "program" if path.suffix == ".pt2" else kind_of(path):
        case "script":
            return
        case "program":
            raise program_refusal(path)
        case "saved":
            _saved(path)
    raise ExportError(
        "checkpoint",
        f"{path} holds weights without the model's code; name the class, or a function that makes the model: "
        f"unroll export MODULE:CLASS --weights {path} --input NAME:DTYPE:SHAPE",
    )


class _StandIn:
    """Replaces an object that is not a tensor by a dictionary, which receives the object's state."""

    def __new__(cls, *args: Any, **kwargs: Any) -> Any:
        return OrderedDict()


def _saved(path: Path) -> Mapping[str, Any]:
    names = _foreign(path)
    try:
        with safe_globals([(_StandIn, name) for name in names]):
            content = torch.load(path, map_location="cpu", weights_only=True)
    except Exception as error:  # a damaged file may raise anything
        if not names and zipfile.is_zipfile(path):
            raise ExportError("checkpoint", f"{path} is damaged: {first_line(error)}") from error
        raise ExportError(
            "checkpoint",
            f"{path} holds objects that cannot be read without running code{_listed(names)}, which export does not do; "
            f"load it yourself, save the weights with {_SAVE}, and use that file",
        ) from error
    if hasattr(content, "_modules"):
        raise whole_module(path)
    if not isinstance(content, Mapping):
        raise ExportError("checkpoint", f"{path} holds a {type(content).__name__}, not weights by name")
    return content


def whole_module(path: Path) -> ExportError:
    """The refusal of a pickled module."""
    with zipfile.ZipFile(path) as archive:
        (data,) = (name for name in archive.namelist() if name.endswith("/data.pkl"))
        cls = next(str(arg) for code, arg, _ in pickletools.genops(archive.read(data)) if code.name == "GLOBAL")
    module, _, name = cls.partition(" ")
    return ExportError(
        "checkpoint",
        f"{path} is a pickled module of the class {module}.{name}, and reading it runs code; if you trust it, "
        f"load it with torch.load(..., weights_only=False), save its weights with {_SAVE}, and run: "
        f"unroll export {module}:{name} --weights weights.pt --input NAME:DTYPE:SHAPE",
    )


def _foreign(path: Path) -> list[str]:
    """The globals that a torch.save file needs in addition to tensors; empty if they are not known."""
    try:
        return sorted(get_unsafe_globals_in_checkpoint(path))
    except ValueError:
        return []


def _listed(names: list[str]) -> str:
    return f" ({', '.join(names[:5])}{f' and {len(names) - 5} more' if len(names) > 5 else ''})" if names else ""
