"""unroll.d.mts: TypeScript accepts correct programs, rejects wrong ones, and the module matches its declarations."""

import json
import os
import re
import shutil
import subprocess
from pathlib import Path

import pytest
from waiting import PATIENCE

ROOT = Path(__file__).parents[2]
CLIENT = ROOT / "client"
TSC = shutil.which("tsc", path=f"{ROOT / '.tools' / 'node_modules' / '.bin'}{os.pathsep}{os.environ['PATH']}")
OPTIONS = ("--noEmit", "--strict", "--module", "nodenext", "--target", "es2022", "--lib", "es2022,dom", "--types", "")

#: Prints a module's {class: [members, also inherited ones]}.
MEMBERS = """
const module = await import(process.argv[1]);
const members = (one) => (one ? [...Object.getOwnPropertyNames(one), ...members(Object.getPrototypeOf(one))] : []);
const found = Object.entries(module).map(([name, kind]) => [name, members(kind.prototype)]);
console.log(JSON.stringify(Object.fromEntries(found)));
"""


@pytest.mark.skipif(TSC is None, reason="tsc is not installed; `make deploy-tools` installs it")
def test_a_typescript_program_compiles() -> None:
    command = [str(TSC), *OPTIONS, str(Path(__file__).with_name("usage.mts"))]
    ran = subprocess.run(command, capture_output=True, text=True, timeout=PATIENCE)
    assert (ran.returncode, ran.stdout + ran.stderr) == (0, "")


def test_module_matches_its_type_declarations(node: list[str]) -> None:
    command = [*node, "--input-type=module", "-e", MEMBERS, (CLIENT / "unroll.mjs").as_uri()]
    ran = subprocess.run(command, capture_output=True, text=True, timeout=PATIENCE)
    assert ran.returncode == 0, ran.stderr
    found = json.loads(ran.stdout)
    declared = re.findall(r"^export class (\w+).*?\{(.*?)\}$", (CLIENT / "unroll.d.mts").read_text(), re.M | re.S)
    assert {name for name, _ in declared} == set(found)
    for name, body in declared:
        assert set(re.findall(r"^  (\w+)[(<]", body, re.M)) <= set(found[name]), name
