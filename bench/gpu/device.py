"""The machine that is measured: its clock, its graphs, its memory. All that is CUDA's is here.

`Cpu` stands in for a GPU in a dry run: the same methods, a host's clock, and no graphs.
"""

import gc
import os
import platform
import subprocess
import time
from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from typing import Any, NamedTuple

import torch
from torch import Tensor

from bench.checks import NotEquivalent

Run = Callable[[], Any]
Reading = Callable[[], float]  # milliseconds, once the device was synchronised


class Ready(NamedTuple):
    """run is run and timed inside around(), whose cost is not timed."""

    run: Run
    around: Callable[[], AbstractContextManager[Any]] = nullcontext


class Captured(NamedTuple):
    """replay computes again into `result`, the tensors that the captured call returned."""

    replay: Run
    result: Any


class Cuda:
    """The first visible NVIDIA GPU."""

    def __init__(self) -> None:
        self.at = torch.device("cuda", 0)
        torch.cuda.set_device(self.at)
        size = max(256 * 2**20, 4 * torch.cuda.get_device_properties(self.at).L2_cache_size)
        self._buffer = torch.zeros(size // 4, device=self.at)
        self._sum = torch.zeros((), device=self.at)

    def facts(self) -> dict[str, Any]:
        properties = torch.cuda.get_device_properties(self.at)
        return {
            "device": properties.name,
            "capability": f"{properties.major}.{properties.minor}",
            "multiprocessors": properties.multi_processor_count,
            "l2_bytes": properties.L2_cache_size,
            "memory_bytes": properties.total_memory,
            "free_bytes": self.free_bytes(),
            "driver": _driver(),
            "cuda": torch.version.cuda,
            "cudnn": torch.backends.cudnn.version(),
        }

    def free_bytes(self) -> int:
        self.release()
        return torch.cuda.mem_get_info(self.at)[0]

    def release(self) -> None:
        gc.collect()
        torch.cuda.empty_cache()

    def synchronize(self) -> None:
        torch.cuda.synchronize(self.at)

    def _flush(self) -> None:
        """Push everything out of the L2 cache.

        The buffer is read after it is written, so that no line in the cache is dirty: writing those
        back would be charged to what is timed next.
        """
        self._buffer.add_(1.0)
        torch.sum(self._buffer, dim=0, out=self._sum)

    def eager(self, run: Run) -> Reading:
        """Time from an idle device to the result: what the host takes to launch counts."""
        self._flush()
        self.synchronize()
        return self._between_events(run)

    def queued(self, run: Run) -> Reading:
        """Time what is launched while the device still flushes: launching is hidden."""
        self._flush()
        return self._between_events(run)

    def _between_events(self, run: Run) -> Reading:
        start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        start.record()
        run()
        end.record()
        return lambda: start.elapsed_time(end)

    def capture(self, run: Run) -> Captured:
        """Make a CUDA graph of one call. Raises what the call or the capture raises."""
        before, other = torch.cuda.current_stream(self.at), torch.cuda.Stream(self.at)
        other.wait_stream(before)
        with torch.cuda.stream(other):
            for _ in range(3):  # lazy initialisation must not fall into the capture
                run()
        before.wait_stream(other)
        self.synchronize()
        graph = torch.cuda.CUDAGraph()
        try:
            with torch.cuda.graph(graph):
                result = run()
        except BaseException:
            torch.cuda.set_stream(before)  # a capture that breaks off leaves its own in place
            raise
        return Captured(graph.replay, result)


class Cpu:
    """A stand-in for dry runs. What it calls a graph is the call itself."""

    at = torch.device("cpu")

    def __init__(self, free_bytes: int = 2**31 + 2**25) -> None:
        self._free_bytes = free_bytes

    def facts(self) -> dict[str, Any]:
        return {"device": "dry run", "driver": None, "free_bytes": self._free_bytes}

    def free_bytes(self) -> int:
        return self._free_bytes

    def release(self) -> None:
        gc.collect()

    def synchronize(self) -> None:
        pass

    def eager(self, run: Run) -> Reading:
        start = time.perf_counter()
        run()
        took = 1e3 * (time.perf_counter() - start)
        return lambda: took

    queued = eager

    def capture(self, run: Run) -> Captured:
        result = run()

        def replay() -> None:
            for kept, recomputed in zip(tensors(result), tensors(run()), strict=True):
                kept.copy_(recomputed)

        return Captured(replay, result)


Device = Cuda | Cpu


def device_for(dry: bool) -> Device:
    if dry:
        torch.set_num_threads(1)
        return Cpu()
    return Cuda()


def facts(dry: bool) -> dict[str, Any]:
    """Return what the figures depend on, of the device and of its host."""
    device = device_for(dry)
    # A device that cannot add is better found now than as a mystery later.
    assert float(torch.ones(8, device=device.at).sum()) == 8.0
    try:
        import triton

        triton_version = triton.__version__
    except ImportError:
        triton_version = None
    return device.facts() | {
        "python": platform.python_version(),
        "torch": torch.__version__,
        "triton": triton_version,
        "platform": platform.platform(),
        "cores": os.cpu_count(),
    }


def _driver() -> str | None:
    query = ["nvidia-smi", "--query-gpu=driver_version", "--format=csv,noheader"]
    try:
        done = subprocess.run(query, capture_output=True, text=True, timeout=20, check=True)
    except (OSError, subprocess.SubprocessError):
        return None
    return next(iter(done.stdout.split()), None)


def tensors(result: Any) -> list[Tensor]:
    """Return the tensors of what a call returned."""
    return [result] if isinstance(result, Tensor) else list(result)


def nearness(backend: str, at: torch.device) -> float:
    """Return how near a plan has to be to a call, for `hold`: 0 but on the CPU of a dry run.

    There, the cpu backend's plans go over the whole capacity, in another order than its calls.
    """
    return 0.0 if at.type != "cpu" or backend == "triton" else 0.05


def hold(what: str, got: Any, right: Any, near: float = 0.0) -> None:
    """Raise NotEquivalent unless two results are bitwise the same, or `near` as a share of it."""
    for a, b in zip(tensors(got), tensors(right), strict=True):
        if (a.shape, a.dtype) != (b.shape, b.dtype):
            raise NotEquivalent(f"{what}: {a.shape} {a.dtype}, not {b.shape} {b.dtype}")
        if near and a.is_floating_point():
            largest = float(b.float().nan_to_num(0.0, 0.0, 0.0).abs().max())
            far = (a.float() - b.float()).abs().masked_fill(a == b, 0.0)
            if not (far <= near * largest).all():
                raise NotEquivalent(f"{what} is {float(far.max()):.3g} away, of {largest:.3g}")
        elif not bits(a).equal(bits(b)):
            other = bits(a) != bits(b)
            first = tuple(other.nonzero()[0].tolist())
            raise NotEquivalent(
                f"{what}: {int(other.sum())} of {other.numel()} values differ, the first at "
                f"{first}: {a[first].item()!r}, not {b[first].item()!r}"
            )


def bits(x: Tensor) -> Tensor:
    """View the bits of a tensor as integers."""
    sizes = {1: torch.int8, 2: torch.int16, 4: torch.int32, 8: torch.int64}
    return x.contiguous().view(sizes[x.element_size()])
