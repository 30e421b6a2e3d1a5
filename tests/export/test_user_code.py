"""A user's own code may have any name, and is exported from the command line, from a script and from a notebook.

In processes of their own, since what they import stays imported; each tries many names, since importing torch is slow.
"""

import subprocess
import sys
from pathlib import Path

import pytest
from waiting import PATIENCE

from unroll import bundle

#: The names of our own folders, two of the standard library that export has imported, and a usual one.
NAMES = ("models", "service", "export", "bundle", "examples", "tests", "conformance", "types", "copy", "net")

BLOCK = """
from torch import nn

def block():
    return nn.GRU(3, 4, batch_first=True)
"""

#: {sibling}: how the module imports the block, in its factory and, once more, in forward.
NET = """
from torch import nn

class Net(nn.Module):
    def __init__(self):
        super().__init__()
        {sibling}
        self.rnn = block()

    def forward(self, x):
        {sibling}
        return self.rnn(x)[0]
"""

#: The command, with an export that calls the model and no more: all that is asked is whether its code is found.
COMMAND = """
import sys
import torch
import unroll.cli
import unroll.export.command as command

def export(module, example, **options):
    print("ran", tuple(module(**example).shape), flush=True)

command.export = export
for target in sys.argv[1:]:
    options = ["--input", "x:float32:3", "--name", "n", "--repository", "out", "--random-weights"]
    assert unroll.cli.main(["export", target, *options]) == 0
"""


def run(folder: Path, *arguments: str, stdin: str | None = None) -> str:
    """What a process in `folder` prints. Its own folder is not on its path, as for the command `unroll`."""
    done = subprocess.run(
        [sys.executable, *arguments], cwd=folder, input=stdin, capture_output=True, text=True, timeout=2 * PATIENCE
    )
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout


def write(folder: Path, files: dict[str, str]) -> None:
    for name, text in files.items():
        path = folder / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(text)


@pytest.mark.parametrize(
    ("files", "target"),
    [
        # A module in the current directory, next to the one that it imports.
        (("{name}.py", "{name}_block.py", "from {name}_block import block"), "{name}:Net"),
        # A package that imports by its own name.
        (("{name}/net.py", "{name}/block.py", "from {name}.block import block"), "{name}.net:Net"),
        # A file in a folder, as for `python path/to/{name}.py`.
        (("path/to/{name}.py", "path/to/{name}_block.py", "from {name}_block import block"), "path/to/{name}.py:Net"),
    ],
    ids=["module", "package", "file"],
)
def test_code_of_any_name_from_the_command_line(tmp_path: Path, files: tuple[str, str, str], target: str) -> None:
    # A package that the standard library has already cannot be imported under its name in any program.
    names = NAMES if "." not in target.partition(":")[0] or ".py" in target else NAMES[:7]
    for name in names:
        net, block, sibling = (text.format(name=name) for text in files)
        write(tmp_path, {net: NET.format(sibling=sibling), block: BLOCK})
    printed = run(tmp_path, "-P", "-c", COMMAND, *(target.format(name=name) for name in names))
    assert printed.split("\n").count("ran (2, 16, 4)") == len(names)


def test_a_file_in_a_package_imports_relative_to_it_and_from_its_folder(tmp_path: Path) -> None:
    names = ("models", "service", "tests")
    for name in names:
        write(
            tmp_path / "project" / name,
            {
                "__init__.py": "",
                "inner/__init__.py": "",
                "block.py": BLOCK,
                f"inner/{name}_block.py": BLOCK,
                "inner/net.py": NET.format(sibling="from ..block import block"),
                "inner/beside.py": NET.format(sibling=f"from {name}_block import block"),
            },
        )
    targets = [f"project/{name}/inner/{file}.py:Net" for name in names for file in ("net", "beside")]
    printed = run(tmp_path, "-P", "-c", COMMAND, *targets)
    assert printed.split("\n").count("ran (2, 16, 4)") == len(targets)


#: A user's script: its own packages, and the public API.
SCRIPT = """
import torch
import unroll
from models import Net
from service import scale
import bundle, conformance, examples, export, tests

report = unroll.export(Net(), {"x": torch.randn(2, 7, 3) * scale}, name="net", repository="out")
assert report.manifest.streamable
assert "site-packages" not in export.__file__ and export.width == 4
print(unroll.__version__)
"""


def test_from_a_script(tmp_path: Path) -> None:
    files = {f"{name}.py": "width = 4\n" for name in ("bundle", "conformance", "export", "tests")}
    files |= {"service/__init__.py": "scale = 2.0\n", "examples/__init__.py": ""}
    write(tmp_path, files | {"models.py": NET.format(sibling="from block import block"), "block.py": BLOCK})
    write(tmp_path, {"script.py": SCRIPT})
    assert run(tmp_path, "script.py").strip()
    assert bundle.read(tmp_path / "out/net/1").manifest.streamable


#: A notebook's cells, as ipykernel runs them: one after another in `__main__`, which has no file.
CELLS = [
    "import torch, unroll\nfrom torch import nn",
    NET.format(sibling="from models import block"),
    "def example():\n    return {'x': torch.randn(2, 7, 3)}",
    "report = unroll.export(Net(), example(), name='net', repository='out')\nprint(report)",
]


def test_from_a_notebook(tmp_path: Path) -> None:
    write(tmp_path, {"models.py": BLOCK})
    kernel = f"import sys; sys.path.insert(0, '')\nfor cell in {CELLS!r}:\n    exec(compile(cell, '<cell>', 'exec'))\n"
    assert "streaming yes" in run(tmp_path, "-", stdin=kernel)
    assert bundle.read(tmp_path / "out/net/1").manifest.streamable


def test_what_is_said_where_the_code_is_not_found(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    from unroll.export.__main__ import main

    (tmp_path / "net.py").write_text("nothing = 0\n")
    for target, words in (
        (f"{tmp_path}/other.py:Net", "there is no file"),
        (f"{tmp_path}/net.py:Net", "has no attribute 'Net'"),
        (f"{tmp_path}/net.py", "net.py:FACTORY"),
    ):
        assert main([target, "--input", "x:float32:3", "--name", "n", "--repository", str(tmp_path / "out")]) == 1
        assert words in capsys.readouterr().err
