"""Compile a launch for a GPU that is not here, and read what the kernel takes out of its code."""

import re
import subprocess
import tempfile
import warnings
from dataclasses import dataclass
from typing import Any, NamedTuple

import triton
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource, make_backend
from triton.runtime.jit import create_function_from_signature

from tokenselect.kernels.triton.launch import options as launch_options

KIB = 1024


class Target(NamedTuple):
    """One GPU to compile for.

    shared         bytes of shared memory that one block may take
    registers      32-bit registers that one block may take, all threads together
    tensor_memory  columns
    """

    gpu: GPUTarget
    shared: int
    registers: int = 64 * KIB
    tensor_memory: int = 0


TARGETS = {
    "sm_80": Target(GPUTarget("cuda", 80, 32), 163 * KIB),
    "sm_90": Target(GPUTarget("cuda", 90, 32), 227 * KIB),
    "sm_100": Target(GPUTarget("cuda", 100, 32), 227 * KIB, tensor_memory=512),
    "gfx942": Target(GPUTarget("hip", "gfx942", 64), 64 * KIB, 128 * KIB),
}


def specialised(launch: Any, target: str) -> tuple[ASTSource, Any]:
    """Return what Triton would compile at this launch, and with which options.

    By Triton's own code, up to where it would ask for a device: which integers are 1, which
    arguments are divisible by 16 and which take 64 bits is decided there and differs by version.
    """
    backend = make_backend(TARGETS[target].gpu)
    options = {"debug": False, **launch_options(launch, target)}
    kernel = launch.kernel
    bind = create_function_from_signature(kernel.signature, kernel.params, backend)
    bound, specialization, _ = bind(**launch.args, **launch.constants, **options)
    with warnings.catch_warnings():
        # Triton 3.9 says on first use that a default will change.
        warnings.filterwarnings("ignore", "TRITON_DEFAULT_FP_FUSION is unset")
        parsed, signature, constants, attributes = kernel._pack_args(
            backend, options, bound, specialization, None
        )
    return ASTSource(kernel, signature, constants, attributes), parsed


@dataclass(frozen=True)
class Resources:
    """What one compiled kernel takes.

    registers      of a thread
    spilled        bytes of a thread's stack
    scalars        scalar registers that gfx942 keeps in lanes of vector registers
    shared         bytes of a block's shared memory
    tensor_memory  columns
    load           bits of the widest load from global memory, 0 without one
    matrix         the matrix instructions and their operand's type
    """

    registers: int
    spilled: int
    scalars: int
    shared: int
    tensor_memory: int
    load: int
    matrix: tuple[str, ...]
    num_warps: int
    num_stages: int

    def excess(self, target: Target) -> list[str]:
        """Return what a launch on the target would fail on, or be slow by."""
        threads = self.num_warps * target.gpu.warp_size
        limits = (
            (self.registers * threads, "registers", target.registers),
            (self.shared, "bytes of shared memory", target.shared),
            (self.tensor_memory, "columns of tensor memory", target.tensor_memory),
        )
        spills = [f"spills {self.spilled} bytes, with {self.registers} registers"]
        over = [f"takes {n} {what} of {limit}" for n, what, limit in limits if n > limit]
        return spills * bool(self.spilled) + over


_PTX_LOAD = re.compile(r"\bld(?:\.\w+)*\.global(?:(?:\.|::)\w+)*?(?:\.v(\d))?\.[a-z]+(\d+)\s")
_PTX_COPY = re.compile(r"\bcp\.async\.c[ag]\.shared\.global[^;]*?\],[^;]*?\],\s*(0x[\da-f]+|\d+)")
# A bulk copy moves 16 bytes at a time at least.
_PTX_BULK = re.compile(r"\bcp\.async\.bulk\b[^;]*\.global\b")
_GCN_LOAD = re.compile(r"\b(?:global|buffer|flat)_load_(?:lds_)?([a-wyz]+)(?:x(\d))?")
_GCN_BITS = {"dword": 32, "short": 16, "ushort": 16, "sshort": 16, "ubyte": 8, "sbyte": 8}
_MATRIX = {
    "mma": r"(?<![.\w])mma\.sync\.aligned\.m\d+n\d+k\d+\.row\.col\.\w+\.(\w+)\.",
    "wgmma": r"\bwgmma\.mma_async\.sync\.aligned\.m\d+n\d+k\d+\.\w+\.(\w+)\.",
    "tcgen05": r"\btcgen05\.mma\.[\w.:]*?kind::(\w+)",
    "mfma": r"\bv_mfma_\w*?x\d+x\d+_?([a-z]+\d+)",
}


def resources(compiled: Any) -> Resources:
    """Read what the compiled kernel takes out of its code."""
    metadata = compiled.metadata
    if "ptx" in compiled.asm:
        text, scalars = compiled.asm["ptx"], 0
        registers, spilled = _cubin_usage(compiled.asm["cubin"])
        loads = [int(bits) * int(lanes or 1) for lanes, bits in _PTX_LOAD.findall(text)]
        loads += [8 * int(size, 0) for size in _PTX_COPY.findall(text)]
        loads += [128] * bool(_PTX_BULK.search(text))
    else:
        text = compiled.asm["amdgcn"]
        registers, scalars = _gcn(text, "vgpr_count"), _gcn(text, "sgpr_spill_count")
        # Those spilled into accumulation registers take no stack; they count as 4 bytes all the
        # same.
        stack = _gcn(text, "private_segment_fixed_size")
        spilled = max(stack, 4 * _gcn(text, "vgpr_spill_count"))
        loads = [_GCN_BITS[kind] * int(n or 1) for kind, n in _GCN_LOAD.findall(text)]
    matrix = [f"{kind} {dtype}" for kind, use in _MATRIX.items() for dtype in re.findall(use, text)]
    return Resources(
        registers=registers,
        spilled=spilled,
        scalars=scalars,
        shared=metadata.shared,
        tensor_memory=getattr(metadata, "tmem_size", None) or 0,
        load=max(loads, default=0),
        matrix=tuple(dict.fromkeys(matrix)),
        num_warps=metadata.num_warps,
        num_stages=metadata.num_stages,
    )


def _gcn(text: str, name: str) -> int:
    (value,) = re.findall(rf"^\s*\.{name}:\s*(\d+)$", text, re.MULTILINE)
    return int(value)


def _cubin_usage(cubin: bytes) -> tuple[int, int]:
    """Return registers, and bytes of stack and local memory: what does not fit into registers."""
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(cubin)
        file.flush()
        tool = [triton.knobs.nvidia.cuobjdump.path, "--dump-resource-usage", file.name]
        told = subprocess.run(tool, capture_output=True, text=True, check=True).stdout
    ((registers, stack, local),) = re.findall(r"\bREG:(\d+) STACK:(\d+) .*?LOCAL:(\d+)", told)
    return int(registers), int(stack) + int(local)
