"""The compiled library: loaded once, its fields checked, its threads those of torch."""

import ctypes
import os
import struct
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch

from tokenselect.kernels.native import build
from tokenselect.kernels.native.build import CannotBuild

# The fields of `Call` in cpp/call.h: those that are factors; all others are integers or addresses.
FACTORS = frozenset({"select_scale", "scale", "softcap", "rope_scaling", "theta"})


class Library:
    """A compiled library, and which of its paths runs.

    path  a path by name, for tests; None: the widest one that runs here
    """

    def __init__(self, file: Path, path: str | None = None) -> None:
        build.check_own(file)
        self.file = file
        try:
            loaded = ctypes.CDLL(str(file))
            loaded.ts_fields.restype = loaded.ts_path.restype = ctypes.c_char_p
            self.fields = tuple(loaded.ts_fields().decode().split())
            self.paths = _paths(loaded)
            self._run = loaded.ts_run
            loaded.ts_has_tiles.argtypes = [ctypes.c_int64]
        except (OSError, AttributeError) as error:
            raise CannotBuild(f"{file} cannot be loaded: {error}; remove it") from None
        self._run.argtypes, self._run.restype = [ctypes.c_char_p], ctypes.c_int64
        here = [name for name, runs_here in self.paths.items() if runs_here]
        taken = [name for name in here if path in (None, name)]
        if not taken:
            raise CannotBuild(
                f"{file} has kernels for {', '.join(self.paths)}; here run "
                f"{', '.join(here) or 'none of them'}"
            )
        self.path = taken[-1]
        self.number = list(self.paths).index(self.path)
        self.has_tiles = bool(loaded.ts_has_tiles(self.number))
        self._packed = struct.Struct("".join("d" if x in FACTORS else "q" for x in self.fields))
        region = _torch_region()
        self.has_threads = region is not None
        loaded.ts_use_region.argtypes = [ctypes.c_void_p]
        loaded.ts_use_region(region)

    def run(self, values: dict[str, Any]) -> int:
        """Run a call's stages and return 0; or return how many bytes of scratch they need."""
        return launch(self._run, self._packed.pack(*[values[name] for name in self.fields]), values)

    def needs(self, values: dict[str, Any]) -> int:
        """Return how many bytes of scratch a call's stages need at their most."""
        values = values | {"scratch": 0, "scratch_bytes": -1}
        return int(self._run(self._packed.pack(*[values[name] for name in self.fields])))


def launch(function: Any, packed: bytes, kept: dict[str, Any]) -> int:
    """Call the library; `kept` holds what the packed addresses are of."""
    return int(function(packed))


def _paths(loaded: ctypes.CDLL) -> dict[str, bool]:
    """Return the library's paths, from the narrowest to the widest, and whether each runs here."""
    loaded.ts_path.argtypes = [ctypes.c_int64, ctypes.POINTER(ctypes.c_int64)]
    found: dict[str, bool] = {}
    runs_here = ctypes.c_int64()
    while (name := loaded.ts_path(len(found), ctypes.byref(runs_here))) is not None:
        found[name.decode()] = bool(runs_here.value)
    return found


def _torch_region() -> int | None:
    """Return the address of GOMP_parallel in the OpenMP library that torch has loaded.

    LLVM's and Intel's export it too. None if there is none: the kernels then use one thread, since
    a second pool would fight with torch's for the cores.
    """
    try:
        mapped = Path("/proc/self/maps").read_text(errors="surrogateescape").splitlines()
    except OSError:
        return None
    files = {line.split(maxsplit=5)[-1] for line in mapped if "omp" in line}
    of_torch = str(Path(torch.__file__).parent)  # torch.libs lies beside it
    for file in sorted(files, key=lambda file: (not file.startswith(of_torch), file)):
        if os.path.basename(file).startswith(("libgomp", "libomp", "libiomp5")):
            try:
                known = ctypes.CDLL(file, mode=os.RTLD_NOLOAD | os.RTLD_LAZY)
                return ctypes.cast(known.GOMP_parallel, ctypes.c_void_p).value
            except (OSError, AttributeError):
                continue
    return None


def open_library(
    path: str | None = None, make: Callable[[], Path] = build.library
) -> Library | str:
    """Return the library, or why there is none."""
    try:
        return Library(make(), path)
    except CannotBuild as error:
        return str(error)
    except Exception as error:  # whatever it is, "auto" has others
        return f"{type(error).__name__}: {error}"
