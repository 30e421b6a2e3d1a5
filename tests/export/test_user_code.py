"""User code may have any name, and can be exported from the command line, a script or a notebook.

Imports persist in a process, so each test uses child processes. Importing torch is slow, so one process imports it and
forks the rest, and each child tries many names.
"""

import json
import subprocess
import sys
from pathlib import Path

import pytest
from waiting import PATIENCE

from unroll import bundle, cli

#: This project's folders, two standard library modules that export imports, and a common name.
NAMES = ("models", "service", "export", "bundle", "examples", "tests", "conformance", "types", "copy", "net")

BLOCK = """
from torch import nn

def block():
    return nn.GRU(3, 4, batch_first=True)
"""

#: {sibling}: the statement that imports the block, in the constructor and again in forward.
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

#: Runs the command in each folder, in a process that has imported no code from it. The patched export only calls the
#: model, to show that its code is found.
COMMAND = """
import json, os, sys
import torch
import unroll.cli
import unroll.export.command as command

def export(module, example, **options):
    print("ran", os.path.basename(os.getcwd()), tuple(module(**example).shape), flush=True)

command.export = export
options = ["--input", "x:float32:3", "--name", "n", "--repository", "out", "--random-weights"]
for folder, targets in json.loads(sys.argv[1]).items():
    if os.fork() == 0:
        os.chdir(folder)
        os._exit(any(unroll.cli.main(["export", target, *options]) for target in targets))
    assert os.wait()[1] == 0, folder
"""


def run(folder: Path, *arguments: str, stdin: str | None = None) -> str:
    """Return the output of a process in `folder`, which is not on its path, as with the `unroll` command."""
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


#: By layout: the model's file, the imported file, the import statement, and the target.
LAYOUTS = {
    # A module in the current directory, next to the imported one.
    "module": ("{name}.py", "{name}_block.py", "from {name}_block import block", "{name}:Net"),
    # A package with absolute imports.
    "package": ("{name}/net.py", "{name}/block.py", "from {name}.block import block", "{name}.net:Net"),
    # A file in a folder, as for `python path/to/{name}.py`.
    "file": (
        "path/to/{name}.py",
        "path/to/{name}_block.py",
        "from {name}_block import block",
        "path/to/{name}.py:Net",
    ),
    # A file in a package: with relative imports, and with imports from its own folder.
    "relative": ("{name}/inner/net.py", "{name}/block.py", "from ..block import block", "{name}/inner/net.py:Net"),
    "beside": (
        "{name}/inner/net.py",
        "{name}/inner/{name}_block.py",
        "from {name}_block import block",
        "{name}/inner/net.py:Net",
    ),
}


def test_command_finds_code_of_any_name(tmp_path: Path) -> None:
    targets = {}
    for layout, texts in LAYOUTS.items():
        # No program can import a package with the name of a standard library package.
        names = NAMES if layout in {"module", "file"} else NAMES[:7]
        targets[layout] = [texts[3].format(name=name) for name in names]
        for name in names:
            net, block, sibling, _ = (text.format(name=name) for text in texts)
            write(tmp_path / layout, {net: NET.format(sibling=sibling), block: BLOCK})
            if layout in {"relative", "beside"}:
                write(tmp_path / layout / name, {"__init__.py": "", "inner/__init__.py": ""})
    printed = run(tmp_path, "-P", "-c", COMMAND, json.dumps(targets)).split("\n")
    for layout, asked in targets.items():
        assert printed.count(f"ran {layout} (2, 16, 4)") == len(asked), layout


#: A user's script with local packages and the public API.
SCRIPT = """
import torch
import unroll
from models import Net
from service import scale
import bundle, conformance, examples, export, tests

net = Net()
{export}
assert "site-packages" not in export.__file__ and export.width == 4
print(unroll.__version__)
"""


#: The export in the script: one that succeeds, and a quicker one that is refused once `unroll.export` is imported.
EXPORTED = (
    'assert unroll.export(net, {"x": torch.randn(2, 7, 3) * scale}, name="net", repository="out").manifest.streamable'
)
REFUSED = """
try:
    unroll.export(net, {"x": net(torch.randn(2, 7, 3) * scale)[..., 0]}, name="net", repository="out")
except unroll.ExportError as error:
    assert error.code == "forward_failed", error
"""


@pytest.mark.long
@pytest.mark.parametrize("export", [REFUSED, EXPORTED], ids=["refused", "exported"])
def test_script_may_export_its_own_code(export: str, tmp_path: Path) -> None:
    files = {f"{name}.py": "width = 4\n" for name in ("bundle", "conformance", "export", "tests")}
    files |= {"service/__init__.py": "scale = 2.0\n", "examples/__init__.py": ""}
    write(tmp_path, files | {"models.py": NET.format(sibling="from block import block"), "block.py": BLOCK})
    write(tmp_path, {"script.py": SCRIPT.format(export=export)})
    assert run(tmp_path, "script.py").strip()
    assert (tmp_path / "out/net/1").exists() == (export == EXPORTED)


#: A notebook's cells as ipykernel runs them: in order, in `__main__`, without a file.
CELLS = [
    "import torch, unroll\nfrom torch import nn",
    NET.format(sibling="from models import block"),
    "def example():\n    return {'x': torch.randn(2, 7, 3)}",
    "report = unroll.export(Net(), example(), name='net', repository='out')\nprint(report)",
]


@pytest.mark.long
def test_notebook_may_export_its_own_code(tmp_path: Path) -> None:
    write(tmp_path, {"models.py": BLOCK})
    kernel = f"import sys; sys.path.insert(0, '')\nfor cell in {CELLS!r}:\n    exec(compile(cell, '<cell>', 'exec'))\n"
    assert "streaming yes" in run(tmp_path, "-", stdin=kernel)
    assert bundle.read(tmp_path / "out/net/1").manifest.streamable


def test_missing_code_gets_a_helpful_message(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "net.py").write_text("nothing = 0\n")
    for target, words in (
        (f"{tmp_path}/other.py:Net", "there is no file"),
        (f"{tmp_path}/net.py:Net", "has no attribute 'Net'"),
        (f"{tmp_path}/net.py", "net.py:FACTORY"),
    ):
        assert (
            cli.main(["export", target, "--input", "x:float32:3", "--name", "n", "--repository", str(tmp_path / "out")])
            == 1
        )
        assert words in capsys.readouterr().err
