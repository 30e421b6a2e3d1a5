"""The command `unroll`: runs one command, and suggests an installation if a package is missing."""

import sys
from importlib import import_module

#: The server's packages, and the installation that provides each optional package.
_SERVER = {"fastapi", "lmdb", "orjson", "prometheus_client", "pydantic", "redis", "safetensors"}
_SERVER |= {"starlette", "structlog", "uvicorn"}
_INSTALL = (
    {"onnxruntime": "onnxruntime"}
    | dict.fromkeys(("torch", "onnx", "onnxscript"), "torch onnx onnxscript")
    | dict.fromkeys(("click", "rich"), "'unroll-serve[cli]'")
    | dict.fromkeys(_SERVER, "'unroll-serve[cpu]'")
)


def main(argv: list[str] | None = None) -> int:
    """Run one command.

    Args:
        argv: The command and its options; `sys.argv[1:]` if None.

    Returns:
        The exit status: that of the command; 2 for an unknown command or option; 1 if a required package is missing.
    """
    argv = sys.argv[1:] if argv is None else argv
    name = f"unroll {argv[0]}" if argv and argv[0].isalpha() else "unroll"
    try:
        program = import_module("unroll.commands.program")  # needs click, which a client-only installation lacks
        try:
            command = program.parse(argv or ["--help"])
            if isinstance(command, int):
                return command if argv else 2
            return command.run()
        except program.UsageError as error:
            print(error, file=sys.stderr)
            return 2
        except program.Failed as error:
            for line in str(error).splitlines():
                print(f"{name}: {line}", file=sys.stderr)
            return error.status
    except KeyboardInterrupt:
        return 130
    except ImportError as error:
        print(f"{name}: {_remedy(error)}", file=sys.stderr)
        return 1


def _remedy(error: ImportError) -> str:
    """Name the package that cannot be imported, and how to install it."""
    package = (error.name or "").partition(".")[0]
    if not isinstance(error, ModuleNotFoundError) or package in {"", "unroll"}:
        return f"{package or 'a package'} cannot be imported: {error}; `unroll doctor` checks the installation"
    install = f"pip install {_INSTALL.get(package, package.replace('_', '-'))}"
    if package == "onnxruntime":
        install += " (with an NVIDIA GPU: pip install 'onnxruntime-gpu[cuda,cudnn]')"
    checks = "" if package in {"click", "rich"} else "; `unroll doctor` checks the installation"
    return f"the package {package} is not installed; {install}{checks}"
