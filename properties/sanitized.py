"""python -m properties.sanitized LIBRARY: every law on a library that watches itself.

The sanitizers' runtime has to be loaded first, by LD_PRELOAD; it ends the process at a mistake.
"""

import ctypes
import sys
from pathlib import Path

import torch

from tokenselect import Backend, register
from tokenselect.conformance import laws  # noqa: F401  # registers them
from tokenselect.conformance.laws.law import LAWS
from tokenselect.conformance.laws.verdict import seeded, verdict
from tokenselect.kernels.native import backend as native
from tokenselect.kernels.native import stages
from tokenselect.kernels.native.library import Library


def main(file: str) -> int:
    torch.set_num_threads(1)
    asan, memory = ctypes.CDLL(None), torch.empty(64, dtype=torch.uint8)
    asan.__asan_region_is_poisoned.restype = ctypes.c_void_p
    behind = ctypes.c_void_p(memory.data_ptr() + 64)
    assert asan.__asan_region_is_poisoned(behind, ctypes.c_size_t(1)), "tensors are not watched"
    # Scratch of the very size, new at each call: its end is the end of an allocation.
    stages._LEAST, stages._KEPT = 0, -1  # type: ignore[misc]
    backend = native.backend(Library(Path(file)), "native-sanitized")
    register(backend.name, backend)
    return hold(backend, examples=5)


def hold(backend: Backend, examples: int) -> int:
    """Try every law on its examples and so many more; return how many laws did not hold."""
    wrong, passed = [], 0
    for law in LAWS:
        found = verdict(law, backend, seeded(examples))
        print(law.name, found.became, flush=True)
        passed += found.became == "passed"
        if found.became == "failed":
            wrong.append(f"{law.name}: {found.error}")
    if not passed:
        wrong.append("no law ran")
    print("\n".join(wrong) or "laws held")
    return len(wrong)


if __name__ == "__main__":
    sys.exit(main(sys.argv[1]))
