"""The machine that is measured: its clock, its graphs, its memory. All that is CUDA's is here.

`Cpu` stands in for a GPU in a dry run: the same methods, a host's clock, and no graphs.
"""

import gc
import os
import platform
import re
import shutil
import subprocess
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple, Protocol

import torch
from torch import Tensor

Run = Callable[[], Any]
Reading = Callable[[], float]  # milliseconds, once the device was synchronised


class Captured(NamedTuple):
    """replay computes again into `result`, the tensors that the captured call returned."""

    replay: Run
    result: Any


class Device(Protocol):
    at: torch.device

    def facts(self) -> dict[str, Any]: ...
    def free_bytes(self) -> int: ...
    def release(self) -> None: ...
    def synchronize(self) -> None: ...
    def eager(self, run: Run) -> Reading: ...
    def queued(self, run: Run) -> Reading: ...
    def capture(self, run: Run) -> Captured: ...


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
        torch.cuda.empty_cache()
        return torch.cuda.mem_get_info(self.at)[0]

    def release(self) -> None:
        gc.collect()
        torch.cuda.empty_cache()

    def synchronize(self) -> None:
        torch.cuda.synchronize(self.at)

    def _flush(self) -> None:
        """Push everything out of the L2 cache. Read after it is written, no line in it is dirty:

        writing those back would be charged to what is timed next.
        """
        self._buffer.add_(1.0)
        torch.sum(self._buffer, dim=0, out=self._sum)

    def eager(self, run: Run) -> Reading:
        """From an idle device to the result: what the host takes to launch counts."""
        self._flush()
        self.synchronize()
        return self._between_events(run)

    def queued(self, run: Run) -> Reading:
        """Launched while the device still flushes: what the host takes to launch is hidden."""
        self._flush()
        return self._between_events(run)

    def _between_events(self, run: Run) -> Reading:
        start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        start.record()
        run()
        end.record()
        return lambda: start.elapsed_time(end)

    def capture(self, run: Run) -> Captured:
        """A CUDA graph of one call. Raises what the call or the capture raises."""
        before, side = torch.cuda.current_stream(self.at), torch.cuda.Stream(self.at)
        side.wait_stream(before)
        with torch.cuda.stream(side):
            for _ in range(3):  # lazy initialisation must not fall into the capture
                run()
        before.wait_stream(side)
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

    def __init__(self, free_bytes: int = 2**31 + 2**25) -> None:
        self.at = torch.device("cpu")
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
            for kept, fresh in zip(tensors(result), tensors(run()), strict=True):
                kept.copy_(fresh)

        return Captured(replay, result)


def tensors(result: Any) -> list[Tensor]:
    """The tensors of what a call returned."""
    return [result] if isinstance(result, Tensor) else list(result)


def host() -> dict[str, Any]:
    """What the figures depend on besides the device."""
    try:
        import triton

        triton_version = triton.__version__
    except ImportError:
        triton_version = None
    return {
        "python": platform.python_version(),
        "torch": torch.__version__,
        "triton": triton_version,
        "platform": platform.platform(),
        "cores": os.cpu_count(),
    }


def _driver() -> str | None:
    if shutil.which("nvidia-smi"):
        query = ["nvidia-smi", "--query-gpu=driver_version", "--format=csv,noheader"]
        done = subprocess.run(query, capture_output=True, text=True, timeout=20)
        if done.returncode == 0 and done.stdout.strip():
            return done.stdout.split()[0]
    try:
        text = Path("/proc/driver/nvidia/version").read_text(encoding="utf-8")
    except OSError:
        return None
    found = re.search(r"\d+\.\d+(\.\d+)?", text)
    return found[0] if found else None
