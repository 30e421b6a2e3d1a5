"""Shared libraries: which ones a file needs, and where this process's loader finds them."""

import ctypes
import os
from mmap import ACCESS_READ, mmap
from pathlib import Path
from struct import iter_unpack, unpack_from

_LOADED_SEGMENT, _DYNAMIC_SEGMENT = 1, 2
_NEEDED, _STRINGS = 1, 5
_RTLD_DI_LINKMAP = 2


def needed(file: Path) -> list[str]:
    """Return the names of the libraries that a file needs. Raises ValueError if it is not a 64-bit ELF file."""
    with file.open("rb") as opened, mmap(opened.fileno(), 0, access=ACCESS_READ) as elf:
        if elf[:6] != b"\x7fELF\x02\x01":
            raise ValueError(f"{file} is not a 64-bit ELF file")
        [table] = unpack_from("<Q", elf, 0x20)
        size, count = unpack_from("<HH", elf, 0x36)
        # Per segment: kind, flags, offset in the file, address when loaded, (unused), bytes in the file.
        segments = [unpack_from("<IIQQQQ", elf, table + i * size) for i in range(count)]
        [(start, length)] = [(s[2], s[5]) for s in segments if s[0] == _DYNAMIC_SEGMENT]
        entries = list(iter_unpack("<qQ", elf[start : start + length]))
        address = dict(entries)[_STRINGS]
        [strings] = [
            address - s[3] + s[2] for s in segments if s[0] == _LOADED_SEGMENT and s[3] <= address < s[3] + s[5]
        ]
        starts = [strings + value for tag, value in entries if tag == _NEEDED]
        return [elf[start : elf.find(b"\0", start)].decode() for start in starts]


class _LinkMap(ctypes.Structure):
    _fields_ = (("address", ctypes.c_void_p), ("name", ctypes.c_char_p))


def find(name: str) -> str | None:
    """Return the file that the loader loads for a library, with links followed; None if it finds none."""
    library = load(name)
    return path_of(library) if library else None


def load(name: str) -> ctypes.CDLL | None:
    """Load a library, or return the loaded one; None if it or a library that it needs is missing."""
    try:
        return ctypes.CDLL(name)
    except OSError:
        return None


def path_of(library: ctypes.CDLL) -> str:
    found = ctypes.POINTER(_LinkMap)()
    ctypes.CDLL(None).dlinfo(ctypes.c_void_p(library._handle), _RTLD_DI_LINKMAP, ctypes.byref(found))
    return os.path.realpath(os.fsdecode(found.contents.name))
