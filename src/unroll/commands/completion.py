"""Shell completion for commands and options."""

import os
from pathlib import Path

from unroll.commands.options import Failed

#: The start-up file of each shell.
_STARTS = {"bash": "~/.bashrc", "zsh": "~/.zshrc", "fish": "~/.config/fish/completions/unroll.fish"}


def script() -> str:
    """The line for the shell's start-up file. Raises Failed for an unsupported shell."""
    shell, _ = _shell()
    if shell == "fish":
        return "_UNROLL_COMPLETE=fish_source unroll | source"
    return f'eval "$(_UNROLL_COMPLETE={shell}_source unroll)"'


def install() -> str:
    """Add the line to the shell's start-up file. Returns a message for the user."""
    shell, file = _shell()
    before = file.read_text("utf-8") if file.exists() else ""
    if script() not in before:
        file.parent.mkdir(parents=True, exist_ok=True)
        file.write_text(f"{before.rstrip()}\n{script()}\n".lstrip(), "utf-8")
    return f"{file} lets {shell} complete commands and options of `unroll`, from the next shell on"


def _shell() -> tuple[str, Path]:
    shell = Path(os.environ.get("SHELL", "")).name
    if shell not in _STARTS:
        raise Failed(f"$SHELL is none of {', '.join(_STARTS)}")
    return shell, Path(_STARTS[shell]).expanduser()
