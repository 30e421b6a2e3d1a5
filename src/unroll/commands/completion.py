"""Completion of commands and options by the shell that the user works in."""

import os
from pathlib import Path

from unroll.commands.options import Failed

#: The file that each shell reads when it starts.
_STARTS = {"bash": "~/.bashrc", "zsh": "~/.zshrc", "fish": "~/.config/fish/completions/unroll.fish"}


def script() -> str:
    """What the shell is to run. Raises Failed for another shell."""
    shell, _ = _shell()
    if shell == "fish":
        return "_UNROLL_COMPLETE=fish_source unroll | source"
    return f'eval "$(_UNROLL_COMPLETE={shell}_source unroll)"'


def install() -> str:
    """Add it to the file that the shell reads when it starts. Returns what was done."""
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
