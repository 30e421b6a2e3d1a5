"""Builds the stub library: `cuda.c`, plus a function for every other symbol that onnxruntime's CUDA provider needs."""

import mmap
import re
import shutil
import subprocess
from collections import defaultdict
from pathlib import Path

#: All are the same library. The loader identifies a file by its inode and loads it once.
_FILES = (
    "libcuda.so.1",
    "libcudart.so.13",
    "libcublas.so.13",
    "libcublasLt.so.13",
    "libcudnn.so.9",
    "libcufft.so.12",
    "libcurand.so.10",
    "libnvrtc.so.13",
)
#: Symbols that the provider looks up at run time instead of importing.
_LOOKED_UP = re.compile(rb"\0((?:cudnn|cufft|nvrtc)[A-Z]\w{3,60})(?=\0)")


def missing() -> str | None:
    """Return why the library cannot be built or found on this machine, or an empty string."""
    if Path("/proc/driver/nvidia/version").exists():
        return "needs a machine without an NVIDIA driver"
    tools = [tool for tool in ("gcc", "nm") if shutil.which(tool) is None]
    return f"needs {' and '.join(tools)}" if tools else None


def build(provider: Path, folder: Path) -> None:
    """Write the libraries to the folder. provider: `libonnxruntime_providers_cuda.so`."""
    versions = _imports(provider)
    with provider.open("rb") as file, mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ) as content:
        names = {name.decode() for name in _LOOKED_UP.findall(content)}.union(*versions.values())
    rest = folder / "rest.c"
    rest.write_text(
        "int stub_succeed(const char *), stub_create(const char *, void **);\n" + "".join(map(_function, sorted(names)))
    )
    script = folder / "versions"
    script.write_text("".join(f"{version} {{ {'; '.join(own)}; }};\n" for version, own in versions.items() if version))
    options = ["-O1", "-w", "-shared", "-fPIC", f"-Wl,--version-script={script}"]
    source = Path(__file__).with_name("cuda.c")
    subprocess.run(["gcc", *options, "-o", str(folder / "stub.so"), str(source), str(rest)], check=True)
    for name in _FILES:
        (folder / name).symlink_to("stub.so")


def _imports(provider: Path) -> dict[str, list[str]]:
    """Return CUDA's functions by requested symbol version, which is the library's name; `` for none."""
    command = ["nm", "--dynamic", "--undefined-only", str(provider)]
    versions: dict[str, list[str]] = defaultdict(list)
    for line in subprocess.run(command, capture_output=True, text=True, check=True).stdout.splitlines():
        name, _, version = line.split()[-1].partition("@")
        if name.startswith(("cu", "__cuda")):
            versions[version].append(name)
    return versions


def _function(name: str) -> str:
    if "Create" in name:
        return f'__attribute__((weak)) int {name}(void **handle) {{ return stub_create("{name}", handle); }}\n'
    return f'__attribute__((weak)) int {name}(void) {{ return stub_succeed("{name}"); }}\n'
