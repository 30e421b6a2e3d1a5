"""The command line: `unroll export|inspect|serve|...`. Each command belongs to the package that does the work."""

import sys
from importlib import import_module

#: Imported on demand: serving must not need torch.
COMMANDS = {
    "export": ("export.__main__", "turn a PyTorch model into a bundle, proven equal"),
    "inspect": ("bundle.inspect", "say what a bundle takes, gives and keeps, and what was proven of it"),
    "verify": ("service.verify", "run a bundle on a device of this machine and compare it with PyTorch's answers"),
    "serve": ("service.__main__", "serve a repository of bundles"),
    "doctor": ("service.doctor.__main__", "say what this machine can serve with, and what to do about the rest"),
    "demo": ("examples.demo", "stream a real series through a running server"),
}


def main(argv: list[str] | None = None) -> int:
    argv = sys.argv[1:] if argv is None else argv
    if not argv or argv[0] in {"-h", "--help"} or argv[0] not in COMMANDS:
        if argv and argv[0] not in {"-h", "--help"}:
            print(f"unroll: no command {argv[0]!r}", file=sys.stderr)
        print("usage: unroll COMMAND [OPTIONS]   (unroll COMMAND --help tells more)\n")
        for name, (_, purpose) in COMMANDS.items():
            print(f"  {name:<8}{purpose}")
        return 0 if argv and argv[0] in {"-h", "--help"} else 2
    module, _ = COMMANDS[argv[0]]
    return import_module(module).main(argv[1:])


if __name__ == "__main__":
    raise SystemExit(main())
