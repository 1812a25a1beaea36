"""The machine that a benchmark runs on: its name, its memory, and the source that it runs."""

import os
import platform
import re
import resource
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import torch

import tokenselect

_STATUS, _CLEAR_REFS = Path("/proc/self/status"), Path("/proc/self/clear_refs")


def describe(threads: int) -> dict[str, Any]:
    """Return what a result says of its machine."""
    return {
        "cpu": cpu(),
        "cores": os.cpu_count(),
        "threads": threads,
        "isa": torch.backends.cpu.get_cpu_capability(),
        "read_gb_per_s": read_bandwidth(),
        "load_at_start": os.getloadavg()[0],
        "python": platform.python_version(),
        "torch": torch.__version__,
        "tokenselect": tokenselect.__version__,
        "commit": commit(),
    }


def cpu() -> str:
    """Return the name, and on x86 family and model: virtual machines tend to hide the name."""
    try:
        lines = Path("/proc/cpuinfo").read_text(encoding="utf-8").splitlines()
    except OSError:
        return platform.processor() or platform.machine()
    facts = dict(re.split(r"\s*:\s*", line, maxsplit=1) for line in lines if ":" in line)
    name = facts.get("model name", platform.machine())
    if "cpu family" in facts:
        name += f" (family {facts['cpu family']}, model {facts['model']})"
    return name


def commit() -> str | None:
    """Return the checkout's commit; None without git."""
    command = ["git", "-C", str(Path(__file__).parent), "describe", "--always", "--dirty"]
    try:
        return subprocess.run(command, capture_output=True, text=True, check=True).stdout.strip()
    except (OSError, subprocess.CalledProcessError):
        return None


def read_bandwidth(size: int = 2**29) -> float:
    """Return GB/s of the fastest way found to read a buffer far larger than any CPU cache."""
    words = torch.arange(size // 8)
    floats = words.view(torch.float32)
    floats.fill_(1.5)
    seconds = []
    for read in 5 * (words.sum, floats.sum, floats.amax, lambda: torch.dot(floats, floats)):
        start = time.perf_counter()
        read()
        seconds.append(time.perf_counter() - start)
    return size / min(seconds) / 1e9


def resident(name: str) -> int:
    """Return bytes of memory in use ("VmRSS"), or the most since `forget_peak` ("VmHWM").

    Where there is no /proc, only the most that the process ever used is known.
    """
    if not _STATUS.exists():
        unit = 1 if sys.platform == "darwin" else 1024
        return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit
    (kib,) = re.findall(rf"^{name}:\s*(\d+) kB", _STATUS.read_text(encoding="utf-8"), re.MULTILINE)
    return int(kib) * 1024


def forget_peak() -> None:
    """Let the peak of `resident` start anew, where the system allows."""
    try:
        _CLEAR_REFS.write_text("5", encoding="utf-8")
    except OSError:
        return
