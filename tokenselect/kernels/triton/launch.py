"""What the stages share on the host: memory, launches, and which machine this is."""

import math
from collections.abc import Callable, Sequence
from functools import cache
from typing import Any, NamedTuple

import numpy
import torch
import triton
import triton.language as tl
from torch import Tensor

from tokenselect import scratch
from tokenselect.contract import Problem
from tokenselect.errors import InvalidProblem
from tokenselect.kernels.triton.configs import TABLE
from tokenselect.kernels.triton.tables import Tables, tables

# In Triton's interpreter (TRITON_INTERPRET=1 when triton was imported) kernels run on the CPU.
INTERPRETED = bool(triton.knobs.runtime.interpret)


class Launch(NamedTuple):
    """One kernel to run, with all its arguments.

    args holds runtime arguments by name, constants the compile-time ones. In the place of a tensor
    that a problem lacks is any other; a constant says that it is not to be read.
    """

    kernel: Any
    grid: tuple[int, ...]
    args: dict[str, Any]
    constants: dict[str, Any]
    num_warps: int
    num_stages: int


class Step(NamedTuple):
    """A recorded launch: without its tensors, which it takes by number.

    pick      picks the kernel's arguments, in order, from a recording's tensors and constants
    options   Triton's own options
    compiled  the compiled kernel, for each way in which the tensors may be aligned
    """

    kernel: Any
    grid: tuple[int, ...]
    pick: Callable[[Sequence[Any]], tuple[Any, ...]]
    options: dict[str, Any]
    compiled: dict[bytes, Any]


class Part(NamedTuple):
    """A tensor's place in a larger block of memory, which is cheaper to make than the tensor."""

    address: int
    block: Tensor
    shape: tuple[int, ...]
    dtype: torch.dtype

    def data_ptr(self) -> int:
        return self.address

    def tensor(self) -> Tensor:
        first = self.address - self.block.data_ptr()
        size = math.prod(self.shape) * self.dtype.itemsize
        return self.block[first : first + size].view(self.dtype).view(self.shape)


def run(
    steps: Sequence[Step],
    tensors: Sequence[Tensor | Part | None],
    constants: Sequence[Any],
    device: torch.device,
) -> None:
    """Launch the steps in order, on the tensors' device, without waiting for it."""
    if INTERPRETED:
        # The interpreter's numpy would warn of every intended inf and NaN.
        with numpy.errstate(all="ignore"):
            for step in steps:
                step.kernel[step.grid](*step.pick((*tensors, *constants)), **step.options)
        return
    addresses = [0 if x is None else x.data_ptr() for x in tensors]
    # Triton compiles for this, and for what is equal in all calls that share a recording.
    aligned = bytes([address % 16 == 0 for address in addresses])
    located = (*addresses, *constants)
    is_watched = _is_watched()
    with torch.cuda.device(device):
        stream = triton.runtime.driver.active.get_current_stream(device.index)
        for step in steps:
            compiled = step.compiled.get(aligned)
            if compiled is None or is_watched:
                there = [x.tensor() if isinstance(x, Part) else x for x in tensors]
                arguments = step.pick((*there, *constants))
                step.compiled[aligned] = step.kernel[step.grid](*arguments, **step.options)
                continue
            # As Triton's JITFunction.run ends, without its hooks; addresses may replace tensors.
            compiled.run(
                *(step.grid[0], 1, 1, stream, compiled.function, compiled.packed_metadata),
                *(None, None, None),
                *step.pick(located),
            )


def _is_watched() -> bool:
    """Return whether every launch has to go through Triton: for profilers, and on AMD's GPUs,
    where Triton compiles for the size of a tensor's memory too.
    """
    runtime = triton.knobs.runtime
    for hook in (runtime.launch_enter_hook, runtime.launch_exit_hook):
        # A chain of hooks may have none.
        if hook is not None and getattr(hook, "calls", True):
            return True
    return torch.version.hip is not None


def options(one: Launch, arch: str) -> dict[str, Any]:
    """Return a launch's options for Triton, on an architecture of `TABLE`."""
    # Fusion is named, since Triton's default for it is about to change.
    chosen = {"num_warps": one.num_warps, "num_stages": one.num_stages, "enable_fp_fusion": True}
    if TABLE[arch].dependent_launch:
        chosen |= {"PDL": True, "launch_pdl": True}
    return chosen


# All memory that the kernels write to comes from here, uninitialised.
empty = scratch.empty


class Asked(NamedTuple):
    """Memory that launches ask for, at an offset in one block; None: a tensor of its own."""

    shape: tuple[int, ...]
    dtype: torch.dtype
    offset: int | None


def memory(asked: Sequence[Asked], block_size: int, device: torch.device) -> list[Tensor | Part]:
    """Return uninitialised memory, what lies between kernels in one block of block_size bytes.

    In the interpreter all are tensors of their own, around which tests can see a stray write.
    """
    if INTERPRETED:
        return [empty(one.shape, one.dtype, device) for one in asked]
    block = empty((block_size,), torch.uint8, device)
    first = block.data_ptr()
    return [
        empty(shape, dtype, device) if offset is None else Part(first + offset, block, shape, dtype)
        for shape, dtype, offset in asked
    ]


class Source:
    """Where a stage's launches get memory and tables from."""

    def empty(self, shape: tuple[int, ...], dtype: torch.dtype, device: torch.device) -> Tensor:
        return empty(shape, dtype, device)

    def tables(self, inv_freq: Tensor, limit: int, at: int) -> Tables:
        return tables(inv_freq, limit, at)


SOURCE = Source()


@cache
def arch(device: torch.device) -> str:
    """Return the architecture whose sizes fit this device: a name in `configs.TABLE`."""
    if INTERPRETED:
        return "interpreter"
    if torch.version.hip is not None:
        return "gfx942"
    major, minor = torch.cuda.get_device_capability(device)
    if major < 8:
        raise InvalidProblem(
            f"{torch.cuda.get_device_name(device)} has compute capability {major}.{minor}",
            "the triton backend needs 8.0 or newer",
            "pass backend='reference', or move the tensors to the CPU",
        )
    # All others have the shared memory of sm_86: sm_89 and sm_120 among them.
    named = {(8, 0): "sm_80", (9, 0): "sm_90", (10, 0): "sm_100", (10, 3): "sm_100"}
    return named.get((major, minor), "sm_86")


def padded(size: int) -> int:
    """Round a size up to one that a matrix unit takes: a power of two, at least 16."""
    return max(16, int(triton.next_power_of_2(size)))


def dot_dtype(dtype: torch.dtype) -> tl.dtype:
    """Return the dtype in which rows as cached are multiplied.

    The interpreter is wrong on products of bfloat16.
    """
    if dtype == torch.bfloat16:
        return tl.float32 if INTERPRETED else tl.bfloat16
    return tl.float16 if dtype == torch.float16 else tl.float32


def is_wide(*tensors: Tensor) -> bool:
    """Return whether offsets along one dimension of any tensor take more than 31 bits."""
    spans = (n * stride for x in tensors for n, stride in zip(x.shape, x.stride(), strict=True))
    return max(spans) >= 2**31


def softcap(problem: Problem) -> float:
    """Return the softcap as kernels divide by it: a normal float32, or 1 if there is none."""
    return 1.0 if problem.softcap is None else max(problem.softcap, torch.finfo(torch.float32).tiny)


def strides(name: str, tensor: Tensor, dims: str | Sequence[str]) -> dict[str, int]:
    """Return a tensor's strides as arguments: `stride_`, name and the dimension's name."""
    return {f"stride_{name}{dim}": tensor.stride(i) for i, dim in enumerate(dims)}


def cache_arguments(problem: Problem, cache: Tensor) -> dict[str, Any]:
    """Return what `device.locate` takes of a cache, contiguous (one page per request) or paged."""
    table = problem.block_table
    page, head, row = (0, 2, 1) if table is not None else (0, 1, 2)
    return {
        "table_ptr": problem.cache_seqlens if table is None else table,
        "page_size": problem.page_size,
        "n_pages": cache.shape[0],
        "stride_page": cache.stride(page),
        "stride_row": cache.stride(row),
        "stride_head": cache.stride(head),
        "stride_d": cache.stride(3),
        "stride_table_b": 0 if table is None else table.stride(0),
        "stride_table_page": 0 if table is None else table.stride(1),
    }
