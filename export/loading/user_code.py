"""Loads a module from the user's own code: `models:Net`, `models.net:Net` or `path/to/net.py:Net`.

Imports resolve as in Python: from the current directory for a dotted name, as with `python -m`; from the file's folder
for a file, as with `python path/to/net.py`, and relative to its package if it is in one.
"""

import importlib
import importlib.util
import inspect
import sys
from collections.abc import Callable, Collection, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from types import MappingProxyType, ModuleType
from typing import Any

from torch import nn

from unroll.export.errors import ExportError, first_line
from unroll.export.loading.random_weights import other_random_numbers, random_tensors
from unroll.export.loading.weight_files import hyper_parameters, is_plain
from unroll.export.loading.weights import load_weights

#: The arguments of a factory without any.
_NONE: Mapping[str, Any] = MappingProxyType({})


@contextmanager
def importable(target: str) -> Iterator[None]:
    """Make the imports of `target` resolvable, including those that run later, in a factory or in forward.

    Args:
        target: `MODULE:FACTORY` or `FILE.py:FACTORY`; anything else is ignored.
    """
    folders = [str(folder) for folder in _folders(target)]
    sys.path[:0] = folders
    try:
        yield
    finally:
        for folder in folders:
            if folder in sys.path:
                sys.path.remove(folder)


def saved_arguments(target: str, weights: Path, given: Collection[str]) -> dict[str, Any]:
    """The factory's arguments in a checkpoint of PyTorch Lightning. Call this within `importable`.

    Args:
        target, weights: as for `from_factory`.
        given: names of arguments that are already known.

    Raises:
        ExportError: checkpoint, if the file cannot be read, or an argument can only be read by running code.
    """
    saved = hyper_parameters(weights)
    try:
        source, _, name = target.rpartition(":")
        taken = inspect.signature(getattr(_imported(source), name)).parameters.values() if saved else ()
    except Exception:  # noqa: BLE001 user code: `from_factory` reports the problem
        return {}
    takes_all = any(each.kind is inspect.Parameter.VAR_KEYWORD for each in taken)
    names = {each.name for each in taken}
    found = {name: value for name, value in saved.items() if (takes_all or name in names) and name not in given}
    for name, value in found.items():
        if not is_plain(value):
            raise ExportError(
                "checkpoint",
                f"{weights} holds the hyper-parameter {name!r} as an object that cannot be read without running code; "
                f"give --arg {name}=VALUE, or name a function that makes the model without it",
            )
    return found


def from_factory(
    target: str,
    weights: Path | None = None,
    arguments: Mapping[str, Any] = _NONE,
    say: Callable[[str], None] = lambda line: None,
) -> nn.Module:
    """Import `target`, call its factory, and load `weights`. Call this within `importable`.

    Args:
        target: `MODULE:FACTORY` or `FILE.py:FACTORY`. FACTORY is a class, a function, or a module.
        weights: a safetensors file, or a file written by torch.save.
        arguments: arguments of the class or function, by name.
        say: called with a line of text if names in the file had to be changed.

    Raises:
        ExportError: checkpoint, if the code cannot be imported, makes no torch.nn.Module, or does not fit the weights.
    """
    module = _made(target, arguments, lambda source, name: getattr(source, name))
    if weights and (how := load_weights(module, weights)):
        say(f"{weights}: read {how}")
    return module


def check_not_random(
    target: str, weights: Path | None, module: nn.Module, arguments: Mapping[str, Any] = _NONE
) -> None:
    """Make the module a second time with other random numbers, to find out whether its weights are random.

    Args:
        target, weights, arguments: as for `from_factory`, which made `module` from them.
        module: the module to check.

    Raises:
        ExportError: checkpoint, if a weight is random, or if the module cannot be made a second time.
    """
    with other_random_numbers():
        try:
            again = _made(target, arguments, _imported_again)
        except ExportError as error:
            raise ExportError(
                "checkpoint",
                f"{error} (when it was made a second time, to find out whether its weights are random; "
                "--random-weights skips this check)",
            ) from error
        if weights:
            load_weights(again, weights)
    if not (names := random_tensors(module, again)):
        return
    more = f" and {len(names) - 3} more" if len(names) > 3 else ""
    found = f"{', '.join(names[:3])}{more}"
    if weights:
        raise ExportError(
            "checkpoint",
            f"{target} fills {found} with random numbers, and {weights} does not hold them; make them buffers, so that "
            "they are saved with the weights, or give --random-weights",
        )
    raise ExportError(
        "checkpoint",
        f"{target} fills {found} with random numbers: it is not trained. Give its weights with --weights FILE, or "
        "export it as it is with --random-weights",
    )


def _made(target: str, arguments: Mapping[str, Any], look_up: Callable[[ModuleType, str], Any]) -> nn.Module:
    source, _, name = target.rpartition(":")
    try:
        factory = look_up(_imported(source), name)
        if isinstance(factory, nn.Module) and arguments:
            raise ExportError("checkpoint", f"{target} is a module, not a class or a function: it takes no --arg")
        module = factory if isinstance(factory, nn.Module) else factory(**arguments)
    except ExportError:
        raise
    except Exception as error:  # user code
        missing = isinstance(error, TypeError) and "missing" in str(error) and "argument" in str(error)
        how = "; give each with --arg NAME=VALUE" if missing else ""
        raise ExportError("checkpoint", f"{target} cannot be loaded: {first_line(error)}{how}") from error
    if not isinstance(module, nn.Module):
        raise ExportError("checkpoint", f"{target} returns a {type(module).__name__}, not a torch.nn.Module")
    return module


def _imported_again(source: ModuleType, name: str) -> Any:
    """A factory unchanged. For a module, run its source file again, and return the module that this creates."""
    factory = getattr(source, name)
    if not isinstance(factory, nn.Module):
        return factory
    spec = source.__spec__
    assert spec is not None
    assert spec.loader is not None
    fresh = sys.modules[spec.name] = importlib.util.module_from_spec(spec)
    try:
        spec.loader.exec_module(fresh)
    finally:
        sys.modules[spec.name] = source
    return getattr(fresh, name)


def _folders(target: str) -> list[Path]:
    source, colon, _ = target.rpartition(":")
    if not colon:
        return []
    if not source.endswith(".py"):
        return [Path.cwd()]
    path = Path(source).resolve()
    _, root = _place(path)
    return list(dict.fromkeys([root, path.parent]))


def _place(path: Path) -> tuple[str, Path]:
    """The dotted name of a file within its packages, and the folder of the outermost package."""
    name, folder = path.stem, path.parent
    while (folder / "__init__.py").is_file():
        name, folder = f"{folder.name}.{name}", folder.parent
    return name, folder


def _imported(source: str) -> ModuleType:
    if source.endswith(".py"):
        return _from_file(Path(source).resolve())
    module = importlib.import_module(source)
    own = Path(*source.split(".")).with_suffix(".py").resolve()
    # Another module may already have the name, such as the standard library's `types`.
    return module if not own.is_file() or _is_from(module, own) else _from_file(own)


def _from_file(path: Path) -> ModuleType:
    if not path.is_file():
        raise ExportError("checkpoint", f"there is no file {path}")
    name, _ = _place(path)
    if "." in name:
        module = importlib.import_module(name)
        if not _is_from(module, path):
            raise ExportError("checkpoint", f"{path} is {name}, and so is {module.__file__}; rename the package")
        return module
    known = sys.modules.get(name)
    if known is not None and _is_from(known, path):
        return known
    return _executed(name if known is None else f"unroll_user_code_{name}", path)


def _executed(name: str, path: Path) -> ModuleType:
    spec = importlib.util.spec_from_file_location(name, path)
    assert spec is not None
    assert spec.loader is not None
    module = sys.modules[name] = importlib.util.module_from_spec(spec)
    try:
        spec.loader.exec_module(module)
    except BaseException:
        del sys.modules[name]
        raise
    return module


def _is_from(module: ModuleType, path: Path) -> bool:
    file = getattr(module, "__file__", None)
    return file is not None and Path(file).resolve() == path
