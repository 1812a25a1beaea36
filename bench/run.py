"""python -m bench.run: what a selection takes, beside the best dense attention there is.

    python -m bench.run [--workload NAME ...] [--threads 1] [--repeats N] [--quick] [--save SHORT]

First equivalence, on the inputs that are timed: no figure comes of a backend that is wrong, and
the exit code says so. Then times, both sides alternating in one run. `--docs` prints the page
docs/benchmarks.md from the results in bench/results instead.
"""

import argparse
import json
import os
import platform
import re
import statistics
import subprocess
import sys
import time
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, replace
from datetime import date
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

import tokenselect
from bench.dense import DENSE, Request, Truth, requests, truth, votes
from bench.page import RESULTS, page
from bench.workloads import TIMED, WORKLOADS, Workload, make
from tokenselect import Problem, Selection, SelectionCache

SCHEMA = 1
QUICK = ("decode-32k", "decode-128k")
GIB = 2**30

# Dense attention over everything, by a backend, widens the whole cache: do it on a prefix.
_CHECK_TOKENS = 32 * 1024
# The largest entry of a row of rounding errors, beside their root mean square.
_PEAK = 4.0
# Reused selections come from a call with the same queries, one step earlier.
_THETA = 0.5


class NotEquivalent(Exception):
    """The backend's result is not what it has to be; its time would mean nothing."""


# --- one workload ---


@dataclass(frozen=True)
class Call:
    """A workload's `attention` on one backend, with what was changed for one measurement."""

    problem: Problem
    backend: str

    def __call__(self, cache: SelectionCache | None = None) -> Tensor:
        p = self.problem
        out: Tensor = tokenselect.attention(p.q, p.k_cache, p.v_cache, **self._arguments(cache))
        return out

    def with_info(
        self, cache: SelectionCache | None = None
    ) -> tuple[Tensor, tokenselect.AttentionInfo]:
        p, arguments = self.problem, self._arguments(cache) | {"return_info": True}
        out: tuple[Tensor, tokenselect.AttentionInfo]
        out = tokenselect.attention(p.q, p.k_cache, p.v_cache, **arguments)
        return out

    def one_step_earlier(self) -> "Call":
        p = self.problem
        return replace(self, problem=replace(p, cache_seqlens=p.cache_seqlens - p.Lq))

    def _arguments(self, cache: SelectionCache | None) -> dict[str, Any]:
        p = self.problem
        tables = {"cache_seqlens": p.cache_seqlens, "block_table": p.block_table}
        return {**p.config, **tables, "cache": cache, "backend": self.backend}


@dataclass(frozen=True)
class Side:
    """One thing to time. bytes: what it has to read of the cache."""

    name: str
    kind: str  # "dense", "selection" or "stage"
    run: Callable[[], object]
    bytes: int
    notes: dict[str, Any]


def measure(workload: Workload, backend: str, repeats: int, seconds: float) -> dict[str, Any]:
    """Check and time one workload. Raises NotEquivalent."""
    _reset_peak_memory()
    _progress(f"{workload.name}: drawing inputs")
    problem = make(workload)
    several = requests(problem)
    _progress(f"{workload.name}: checking equivalence")
    call = Call(problem, backend)
    exact = truth(several)
    everything = check_everything(call)
    selection, mass = check_fresh(call, several, exact)
    cache = check_reused(call, exact)

    sides = _dense_sides(problem, several, exact)
    votes_ = tokenselect.score(problem, backend).votes
    read = partial(bytes_read, problem)
    sides += [
        Side("fresh", "selection", call, read("fresh", selection), {}),
        Side("reused", "selection", partial(call, cache), read("reused", selection), {}),
        _stage("score", partial(tokenselect.score, problem, backend), read("score")),
        _stage("select", partial(tokenselect.select, votes_, problem, backend), read("select")),
        _stage(
            "attend",
            partial(tokenselect.attend, problem, selection, backend),
            read("attend", selection),
        ),
    ]
    _progress(f"{workload.name}: timing")
    hits = int(cache.hits.sum())
    wall, busy = time.perf_counter(), time.process_time()
    times = alternate(sides, repeats, seconds)
    wall, busy = time.perf_counter() - wall, time.process_time() - busy
    if int(cache.hits.sum()) - hits < problem.B * len(times["reused"]):
        raise NotEquivalent("a call that was to reuse its selection selected afresh")
    return {
        "name": workload.name,
        "inputs": workload.describe(),
        "backend": backend,
        "checks": {"share_of_budget_at_k_all": everything, "checked_rows": len(exact.rows)},
        "retained_mass": {"min": float(mass.min()), "mean": float(mass.mean())},
        "attended": int(selection.count.max()),
        "peak_memory_gib": _peak_memory(),
        "on_cpu": busy / wall,
        "sides": [_summary(side, times[side.name]) for side in sides],
        "ratios": _ratios(sides, times),
    }


def _dense_sides(problem: Problem, several: list[Request], exact: Truth) -> list[Side]:
    """Each dense call, its error measured on these inputs."""
    sides = []
    for dense in DENSE:
        share = exact.share(dense(several))
        notes = {"share_of_budget": share, "is_baseline": share <= 1, "is_call": dense.is_call}
        reads = bytes_read(problem, "dense")
        sides.append(Side(dense.name, "dense", partial(dense, several), reads, notes))
    if not any(side.notes["is_baseline"] for side in sides):
        raise NotEquivalent("no dense call meets its error budget: nothing to compare with")
    return sides


def _stage(name: str, run: Callable[[], object], reads: int) -> Side:
    return Side(name, "stage", run, reads, {})


def bytes_read(problem: Problem, what: str, selection: Selection | None = None) -> int:
    """Bytes of the cache, or of the votes, that have to be read; queries and results aside.

        dense            Hkv * n * (D + Dv) * itemsize       every key, every value
        score            Hkv * n * D * itemsize              every key, once
        select           R * S * n * 4                       every vote
        attend, reused   Hkv * m * (D + Dv) * itemsize       the m tokens attended to
        fresh            score + attend

    summed over the requests.
    """
    p, item = problem, problem.k_cache.element_size()
    n = int(problem.cache_seqlens.sum())
    if what == "dense":
        return p.Hkv * n * (p.D + p.Dv) * item
    if what == "score":
        return p.Hkv * n * p.D * item
    if what == "select":
        return p.R * p.S * n * 4
    if selection is None:
        raise ValueError(f"what {what!r} reads depends on the selection")
    attended = int(selection.count.sum()) * (p.Hkv // p.S) * (p.D + p.Dv) * item
    return attended + (bytes_read(p, "score") if what == "fresh" else 0)


# --- equivalence ---


def check_everything(call: Call) -> float:
    """With a budget for all tokens, the result is dense attention: the error's share of its budget.

    On a prefix of the workload's own inputs, so that it fits in memory.
    """
    p = call.problem
    n = p.cache_seqlens.clamp(max=_CHECK_TOKENS)
    prefix = replace(p, cache_seqlens=n, config=replace(p.config, k=int(n.max())))
    share = truth(requests(prefix)).share(replace(call, problem=prefix)())
    if share > 1:
        raise NotEquivalent(
            f"attention(k={prefix.config.k}) on {call.backend}, k for everything, is {share:.3g} x "
            "the error budget away from dense attention in float64"
        )
    return share


def check_fresh(call: Call, several: list[Request], exact: Truth) -> tuple[Selection, Tensor]:
    """A fresh selection holds the best tokens there are, and its result is as near as it must be.

    Returns the selection and the retained mass (B, Hq, rows).
    """
    p = call.problem
    out, info = call.with_info()
    mass = _check_bound("a fresh selection", out, info, exact)
    told = info.retained_mass
    if p.Lq == 1 and not ((told - mass[:, :, 0]).abs() <= 1e-4).all():
        raise NotEquivalent("retained_mass is not the share of the softmax that was retained")
    for b, request in enumerate(several):
        for s, share in enumerate(votes(request).unflatten(0, (p.S, -1)).sum(1)):
            candidates = slice(*p.config.regions(len(share), p.Lq))
            chosen = info.selection.positions[b, s, : int(info.selection.count[b, s])].long()
            taken = torch.zeros_like(share).index_fill_(0, chosen, 1)[candidates]
            best = share[candidates].topk(min(p.config.k, len(taken))).values.sum()
            if float((share[candidates] * taken).sum()) < float(best) * (1 - 1e-5):
                raise NotEquivalent(f"the selection of request {b} is not the one with most votes")
    return info.selection, mass


def check_reused(call: Call, exact: Truth) -> SelectionCache:
    """A cache filled one step earlier is hit, and what comes of it is as near as it must be."""
    p = call.problem
    cache = SelectionCache(theta=_THETA, max_reuse=max(64, p.Lq))
    call.one_step_earlier()(cache)
    out, info = call.with_info(cache)
    if not info.reused.all():
        raise NotEquivalent("the selection of one step earlier was not reused")
    _check_bound("a reused selection", out, info, exact)
    return cache


def _check_bound(what: str, out: Tensor, info: tokenselect.AttentionInfo, exact: Truth) -> Tensor:
    """|out - dense| <= 2 * (1 - mass) * max |v| for every head, but for rounding; the mass."""
    mass = torch.exp(info.lse[:, :, exact.rows].double() - exact.lse)
    error = (out[:, :, exact.rows].double() - exact.out).abs().amax(-1)
    slack = 2**-18 + (1 - mass).clamp(min=0)  # the lse are float32
    bound = 2 * slack * exact.largest[..., 0] + _PEAK * exact.budget
    if not ((mass <= 1 + 1e-4) & (error <= bound)).all():
        raise NotEquivalent(
            f"{what} is up to {float((error / bound).max()):.3g} x the bound "
            "2 * (1 - mass) * max |v| away from dense attention"
        )
    return mass.clamp(max=1)


# --- times ---


def alternate(sides: Sequence[Side], repeats: int, seconds: float) -> dict[str, list[float]]:
    """Seconds of each side, round by round, every other round in reverse order.

    A first call of each is warm-up. Fewer rounds where they would take longer than `seconds`, but
    three at least. A dense side five times slower than the fastest is timed once, before them.
    """
    first = {side.name: _timed(side.run) for side in sides}
    limit = 5 * min(first[side.name] for side in sides if side.kind == "dense")
    slow = {side.name for side in sides if side.kind == "dense" and first[side.name] > limit}
    a_round = sum(took for name, took in first.items() if name not in slow)
    times: dict[str, list[float]] = {name: [first[name]] if name in slow else [] for name in first}
    for i in range(max(3, min(repeats, int(seconds / a_round)))):
        for side in sides if i % 2 == 0 else reversed(sides):
            if side.name not in slow:
                times[side.name].append(_timed(side.run))
    return times


def _timed(run: Callable[[], object]) -> float:
    start = time.perf_counter()
    run()
    return time.perf_counter() - start


def _summary(side: Side, times: list[float]) -> dict[str, Any]:
    milliseconds = [1e3 * t for t in times]
    return {
        "name": side.name,
        "kind": side.kind,
        **side.notes,
        **_spread(milliseconds, "_ms"),
        "rounds": len(times),
        "bytes": side.bytes,
        "gb_per_s": side.bytes / statistics.median(times) / 1e9,
    }


def _ratios(sides: list[Side], times: dict[str, list[float]]) -> list[dict[str, Any]]:
    """Of each selection to the fastest honest dense side, and to the fastest single call.

    Medians of the ratios within a round.
    """
    honest = [side for side in sides if side.notes.get("is_baseline")]
    best = _fastest(honest, times)
    rivals = [("best dense", best)]
    calls = [side for side in honest if side.notes["is_call"]]
    if calls and _fastest(calls, times) != best:
        rivals.append(("best dense call", _fastest(calls, times)))
    found = []
    for name in ("fresh", "reused"):
        for role, rival in rivals:
            paired = [a / b for a, b in zip(times[name], times[rival], strict=False)]
            found.append({"of": name, "to": rival, "role": role, **_spread(paired)})
    return found


def _fastest(sides: Iterable[Side], times: dict[str, list[float]]) -> str:
    return min(sides, key=lambda side: statistics.median(times[side.name])).name


def _spread(values: Sequence[float], unit: str = "") -> dict[str, float]:
    return {
        f"median{unit}": statistics.median(values),
        f"min{unit}": min(values),
        f"max{unit}": max(values),
    }


# --- the machine ---


def read_bandwidth(size: int = GIB // 2) -> float:
    """GB/s of the fastest way found to read a buffer far larger than any cache, written before."""
    words = torch.arange(size // 8)
    floats = words.view(torch.float32)
    floats.fill_(1.5)
    methods = (words.sum, floats.sum, floats.amax, lambda: torch.dot(floats, floats))
    return max(size / _timed(method) for _ in range(5) for method in methods) / 1e9


def machine(threads: int) -> dict[str, Any]:
    return {
        "cpu": _cpu(),
        "cores": os.cpu_count(),
        "threads": threads,
        "isa": torch.backends.cpu.get_cpu_capability(),
        "read_gb_per_s": read_bandwidth(),
        "load_at_start": os.getloadavg()[0],
        "python": platform.python_version(),
        "torch": torch.__version__,
        "tokenselect": tokenselect.__version__,
        "commit": _commit(),
    }


def _cpu() -> str:
    """Model name, and on x86 family and model, as virtual machines tend to hide the name."""
    try:
        lines = Path("/proc/cpuinfo").read_text(encoding="utf-8").splitlines()
    except OSError:
        return platform.processor() or platform.machine()
    facts = dict(re.split(r"\s*:\s*", line, maxsplit=1) for line in lines if ":" in line)
    name = facts.get("model name", platform.machine())
    if "cpu family" in facts:
        name += f" (family {facts['cpu family']}, model {facts['model']})"
    return name


def _commit() -> str | None:
    command = ["git", "-C", str(Path(__file__).parent), "describe", "--always", "--dirty"]
    try:
        return subprocess.run(command, capture_output=True, text=True, check=True).stdout.strip()
    except (OSError, subprocess.CalledProcessError):
        return None


def _reset_peak_memory() -> None:
    try:
        Path("/proc/self/clear_refs").write_text("5", encoding="utf-8")
    except OSError:
        return


def _peak_memory() -> float | None:
    """GiB that this process held at most since the reset; None where Linux does not tell."""
    try:
        status = Path("/proc/self/status").read_text(encoding="utf-8")
    except OSError:
        return None
    found = re.search(r"VmHWM:\s*(\d+) kB", status)
    return int(found[1]) * 1024 / GIB if found else None


# --- the report ---


def table(result: dict[str, Any], read_gb_per_s: float) -> str:
    """One workload's figures, for the terminal."""
    mass, checks = result["retained_mass"], result["checks"]
    lines = [
        f"{result['name']}: {result['inputs']}",
        f"  {result['attended']} tokens attended to; retained mass {mass['min']:.3f} at least, "
        f"{mass['mean']:.3f} in the mean of heads; k for everything: "
        f"{checks['share_of_budget_at_k_all']:.2f} of the error budget",
        f"  {'':30} {'ms':>9} {'min to max':>19} {'MB':>8} {'GB/s':>6} {'of read':>8} error/budget",
    ]
    for side in result["sides"]:
        name = f"  {side['name']}" if side["kind"] == "stage" else side["name"]
        line = (
            f"  {name:30} {side['median_ms']:9.2f} {side['min_ms']:9.2f} {side['max_ms']:9.2f} "
            f"{side['bytes'] / 1e6:8.1f} {side['gb_per_s']:6.1f} "
            f"{side['gb_per_s'] / read_gb_per_s:8.0%}"
        )
        if side["kind"] == "dense":
            line += f" {side['share_of_budget']:6.2f}"
            if not side["is_baseline"]:
                line += f"  not a baseline: error {side['share_of_budget']:.1f} x the budget"
        lines.append(line)
    for ratio in result["ratios"]:
        label = f"{ratio['of']} / {ratio['role']} ({ratio['to']})"
        lines.append(
            f"  {label:58} {ratio['median']:6.3f}  ({ratio['min']:.3f} to {ratio['max']:.3f})"
        )
    last = f"  {result['on_cpu']:.2f} threads ran at a time"
    if result["peak_memory_gib"] is not None:
        last += f"; peak memory {result['peak_memory_gib']:.1f} GiB, checks included"
    lines.append(last)
    return "\n".join(lines)


def _progress(text: str) -> None:
    print(f"→ {text}", file=sys.stderr, flush=True)


def _arguments(argv: Sequence[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(prog="python -m bench.run", description=__doc__.split("\n")[0])
    parser.add_argument(
        "--workload",
        action="append",
        choices=WORKLOADS,
        metavar="NAME",
        help=f"one of {', '.join(WORKLOADS)}; may be given more than once",
    )
    parser.add_argument("--backend", default="cpu", help="the backend to measure (cpu)")
    parser.add_argument("--threads", type=int, default=1, help="torch's threads (1)")
    parser.add_argument("--repeats", type=int, default=15, help="rounds at most (15)")
    parser.add_argument("--seconds", type=float, default=10, help="for the rounds of one workload")
    parser.add_argument("--quick", action="store_true", help=f"only {', '.join(QUICK)}, 5 rounds")
    parser.add_argument("--json", type=Path, metavar="PATH", help="write the results there")
    parser.add_argument(
        "--save", metavar="SHORT", help="write them to bench/results/<date>-<backend>-SHORT.json"
    )
    parser.add_argument("--docs", action="store_true", help="print docs/benchmarks.md, run nothing")
    arguments = parser.parse_args(argv)
    if arguments.quick:
        arguments.workload = arguments.workload or QUICK
        arguments.repeats = min(arguments.repeats, 5)
    arguments.workload = arguments.workload or [workload.name for workload in TIMED]
    return arguments


def main(argv: Sequence[str] | None = None) -> int:
    arguments = _arguments(argv)
    if arguments.docs:
        print(page(), end="")
        return 0
    torch.set_num_threads(arguments.threads)
    _progress("measuring the read bandwidth")
    host = machine(arguments.threads)
    today = date.today().isoformat()
    print(
        f"{host['cpu']}, {host['cores']} cores, {host['threads']} thread(s), {host['isa']}; "
        f"torch {host['torch']}, python {host['python']}; {today}; "
        f"read bandwidth {host['read_gb_per_s']:.1f} GB/s; load {host['load_at_start']:.1f}",
        flush=True,
    )
    results, failed = [], []
    for name in arguments.workload:
        try:
            result = measure(
                WORKLOADS[name], arguments.backend, arguments.repeats, arguments.seconds
            )
        except NotEquivalent as error:
            failed.append(name)
            print(f"\n✗ {name}: not timed. {error}", flush=True)
            continue
        results.append(result)
        print("\n" + table(result, host["read_gb_per_s"]), flush=True)
    report = {
        "schema": SCHEMA,
        "date": today,
        "command": "python -m bench.run " + " ".join(sys.argv[1:] if argv is None else argv),
        "machine": host,
        "workloads": results,
        "not_equivalent": failed,
    }
    targets = [arguments.json] if arguments.json else []
    if arguments.save:
        targets.append(RESULTS / f"{today}-{arguments.backend}-{arguments.save}.json")
    for target in targets:
        target.parent.mkdir(parents=True, exist_ok=True)
        target.write_text(json.dumps(report, indent=1) + "\n", encoding="utf-8")
        _progress(f"wrote {target}")
    return 1 if failed else 0


if __name__ == "__main__":
    sys.exit(main())
