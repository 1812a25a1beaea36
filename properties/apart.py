"""python -m properties.apart aarch64 | threads: every law on kernels in a process of their own.

aarch64  compiled for 64-bit Arm, in QEMU's emulation; needs g++-aarch64-linux-gnu and
         qemu-user-static, as Debian calls them
threads  compiled with ThreadSanitizer

The stages run here, as always; only the library runs there, with three threads, on memory that both
share. It takes minutes.
"""

import ctypes
import mmap
import re
import shutil
import struct
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any, NamedTuple, cast

import torch
from torch import Tensor

import conftest  # noqa: F401  # registers the profiles
from properties import test_reuse
from properties.guard import watched
from properties.native import SMALL
from properties.sanitized import hold
from tokenselect import register
from tokenselect.kernels.native import backend as native
from tokenselect.kernels.native import build, stages
from tokenselect.kernels.native.library import FACTORS, Library


class Kind(NamedTuple):
    """compiler  command and flags; emulator: what the program is an argument of, if anything"""

    compiler: tuple[str, ...]
    emulator: tuple[str, ...]


KINDS = {
    "aarch64": Kind(("aarch64-linux-gnu-g++", "-static"), ("qemu-aarch64-static",)),
    # With its addresses drawn at random, the sanitizer of g++ 12 does not start on every Linux.
    "threads": Kind(("g++", "-g", "-fsanitize=thread"), ("setarch", "-R")),
}
SHARED = 2**29  # bytes that the caller and the process share
GAP = 64  # bytes between tensors there, and their alignment

# Where the memory of each tensor lies whose address was asked for: (address, bytes).
_memory: dict[int, tuple[int, int]] = {}
_data_ptr = Tensor.data_ptr


def _noted(x: Tensor) -> int:
    storage, address = x.untyped_storage(), _data_ptr(x)
    _memory[address] = storage.data_ptr(), storage.nbytes()
    return address


class Apart:
    """Stands in for a Library: copies what a call names to shared memory, and back."""

    path, number, has_threads, has_tiles = "baseline", 0, True, True

    def __init__(self, kind: Kind, where: Path) -> None:
        program, shared = where / "apart", where / "memory"
        sources = [Path(__file__).with_suffix(".cpp")]
        sources += [build.SOURCES / f"{name}.cpp" for name in ("kernels", "entry", "threads")]
        subprocess.run(
            [*kind.compiler, *build.FLAGS, *SMALL, "-pthread", f"-I{build.SOURCES}",
             "-DTS_PATH=baseline", "-DTS_HAS_baseline", *map(str, sources), "-o", str(program)],
            check=True,
        )  # fmt: skip
        with shared.open("wb") as file:
            file.truncate(SHARED)
        self._process = subprocess.Popen(
            [*kind.emulator, str(program), str(shared), str(SHARED)],
            stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True,
        )  # fmt: skip
        with shared.open("r+b") as file:
            self._shared = mmap.mmap(file.fileno(), SHARED)
        self._here = ctypes.addressof(ctypes.c_char.from_buffer(self._shared))
        self.fields = tuple(self._said().split())
        self._there = int(self._said())
        self._packed = struct.Struct("".join("d" if x in FACTORS else "q" for x in self.fields))
        header = (build.SOURCES / "call.h").read_text()
        self._addresses = re.findall(r"X\((?:const )?\w+\*, (\w+)\)", header)

    def _said(self) -> str:
        assert self._process.stdout is not None
        line = self._process.stdout.readline()
        assert line, f"the process ended: {self._process.wait()}"
        return line.strip()

    def run(self, values: dict[str, Any]) -> int:
        values, end = dict(values), -(-self._packed.size // GAP) * GAP
        placed: dict[tuple[int, int], int] = {}
        for name in self._addresses:
            if values[name]:
                memory = start, size = _memory[values[name]]
                if memory not in placed:
                    placed[memory] = end
                    end += GAP + -(-size // GAP) * GAP
                    assert end < SHARED, "more memory than is shared"
                    ctypes.memmove(self._here + placed[memory], start, size)
                values[name] += self._there + placed[memory] - start
        self._packed.pack_into(self._shared, 0, *(values[name] for name in self.fields))
        assert self._process.stdin is not None
        self._process.stdin.write("\n")
        self._process.stdin.flush()
        result = int(self._said())
        for (start, size), at in placed.items():
            ctypes.memmove(start, self._here + at, size)
        return result

    def needs(self, values: dict[str, Any]) -> int:
        return self.run(values | {"scratch": 0, "scratch_bytes": -1})

    def end(self) -> int:
        """End the process, and return its exit code, which tells what a sanitizer found."""
        assert self._process.stdin is not None
        self._process.stdin.close()
        return self._process.wait()


def main(kind: Kind) -> int:
    for tool in (kind.compiler[0], *kind.emulator[:1]):
        if shutil.which(tool) is None:
            print(f"{tool} is not there")
            return 1
    Tensor.data_ptr = _noted  # type: ignore[method-assign]
    torch.set_num_threads(3)
    stages._LEAST, stages._KEPT, stages._ALONE = 0, -1, 0  # type: ignore[misc]
    with tempfile.TemporaryDirectory() as where:
        library = Apart(kind, Path(where))
        backend = watched(native.backend(cast(Library, library), "native-apart"), stages)
        register(backend.name, backend)
        for Lq, theta in ((1, 0.9), (3, 0.9), (3, -1.0)):
            test_reuse.test_steps_leave_what_the_reference_leaves(backend, Lq, theta)
        return hold(backend, examples=10) or library.end()


if __name__ == "__main__":
    sys.exit(main(KINDS[sys.argv[1]]))
