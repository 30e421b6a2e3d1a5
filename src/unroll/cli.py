"""The command line: `unroll export|inspect|serve|...`. Each command belongs to the package that does the work."""

import sys
from difflib import get_close_matches
from importlib import import_module

from unroll import __version__

#: Module and purpose of each command; imported on demand, because serving must not need torch.
COMMANDS = {
    "export": ("export.__main__", "convert a PyTorch model to a bundle that is proven equal to it"),
    "inspect": ("bundle.inspect", "show a bundle's inputs, outputs, state and parity report"),
    "verify": ("service.verify", "run a bundle on a device of this machine and compare it with PyTorch's outputs"),
    "serve": ("service.serve", "serve a repository of bundles"),
    "stream": ("client.stream_command", "send the rows of a file or of stdin through a session, and print the outputs"),
    "doctor": ("service.doctor.__main__", "check this machine and its installation, and suggest fixes"),
    "store": ("service.commands.store", "check the store of durable sessions"),
    "sessions": ("service.commands.sessions", "list, show, close, export and import the sessions of a store"),
    "demo": ("examples.demo", "stream a real time series through a running server"),
}


#: The packages of the server, and what to install for a package that not every installation has.
_SERVER = {"fastapi", "lmdb", "orjson", "prometheus_client", "pydantic", "pydantic_settings", "redis", "safetensors"}
_SERVER |= {"starlette", "structlog", "uvicorn"}
_INSTALL = (
    {"onnxruntime": "onnxruntime"}
    | dict.fromkeys(("torch", "onnx", "onnxscript"), "torch onnx onnxscript")
    | dict.fromkeys(_SERVER, "'unroll-serve[cpu]'")
)


def main(argv: list[str] | None = None) -> int:
    """Run one command.

    Args:
        argv: The command and its options; `sys.argv[1:]` if None.

    Returns:
        The exit status: 0, or 2 for a command or an option that does not exist; 1 if a package that the command needs
        is missing; otherwise the command's own.
    """
    argv = sys.argv[1:] if argv is None else argv
    if argv and argv[0] in COMMANDS:
        module, _ = COMMANDS[argv[0]]
        try:
            return import_module(f"unroll.{module}").main(argv[1:])
        except ImportError as error:
            print(f"unroll {argv[0]}: {_remedy(error)}; `unroll doctor` checks the installation", file=sys.stderr)
            return 1
    if argv == ["--version"]:
        print(f"unroll {__version__}")
        return 0
    asked_for_help = bool(argv) and argv[0] in {"-h", "--help"}
    if argv and not asked_for_help:
        meant = get_close_matches(argv[0], COMMANDS, 1)
        print(f"unroll: no command {argv[0]!r}{f'; did you mean {meant[0]!r}?' if meant else ''}", file=sys.stderr)
    print("usage: unroll COMMAND [OPTIONS]   (unroll COMMAND --help lists the options)\n")
    for name, (_, purpose) in COMMANDS.items():
        print(f"  {name:<9}{purpose}")
    return 0 if asked_for_help else 2


def _remedy(error: ImportError) -> str:
    """The package that cannot be imported, and how to install it."""
    package = (error.name or "").partition(".")[0]
    if not isinstance(error, ModuleNotFoundError) or package in {"", "unroll"}:
        return f"{package or 'a package'} cannot be imported: {error}"
    install = f"pip install {_INSTALL.get(package, package.replace('_', '-'))}"
    if package == "onnxruntime":
        install += " (with an NVIDIA GPU: pip install 'onnxruntime-gpu[cuda,cudnn]')"
    return f"the package {package} is not installed; {install}"
