"""python -m bench.run: what a selection takes, beside the best dense attention there is.

    python -m bench.run [--workload NAME ...] [--threads 1] [--repeats N] [--quick] [--save SHORT]

First equivalence, on the inputs that are timed: no figure comes of a backend that is wrong, and
the exit code says so. Then times, all contenders alternating in one run. `--docs` prints the page
docs/benchmarks.md from the results in bench/results instead.
"""

import argparse
import json
import statistics
import sys
import time
from collections.abc import Callable, Iterable, Sequence
from dataclasses import replace
from datetime import date
from functools import partial
from pathlib import Path
from typing import Any

import torch

from bench import checks, machine
from bench.checks import NotEquivalent, call
from bench.dense import DENSE, requests, truth
from bench.gpu.device import Cpu, Ready
from bench.gpu.timing import Contender, alternate, set_slow_apart
from bench.page import RESULTS, headline, overview, page, workload_tables
from bench.workloads import TIMED, WORKLOADS, Workload, make
from tokenselect import Problem, Selection, SelectionCache, attend, score, select
from tokenselect.dispatch.registry import resolve

SCHEMA = 2
QUICK = ("decode-32k", "decode-128k")
Times = dict[str, list[float]]


def checked(
    problem: Problem, backend: str
) -> tuple[list[Contender], SelectionCache, dict[str, Any]]:
    """Return what to time, once the backend was found right on these inputs, and what was found.

    The cache is the one whose selection is reused. Raises NotEquivalent.
    """
    several = requests(problem)
    exact = truth(several)
    right = checks.check(problem, backend, several, exact)
    selection, told = right.selection, right.checks
    cache = checks.check_reused(problem, backend, exact)
    fresh = partial(call, problem, backend)
    everything = replace(problem, config=replace(problem.config, k=problem.Lk))
    runs: dict[str, tuple[str, Callable[[], object]]] = {
        "fresh": ("selection", fresh),
        "reused": ("selection", partial(fresh, cache)),
        "score": ("stage", partial(score, problem, backend)),
        "select": ("stage", partial(select, right.scores.votes, problem, backend)),
        "attend": ("stage", partial(attend, problem, selection, backend)),
        "everything": ("selection", partial(call, everything, backend)),
    }
    contenders = []
    for dense in DENSE:
        share, reads = exact.share(dense(several)), bytes_read(problem, "dense")
        notes = {"share_of_tolerance": share, "is_baseline": share <= 1, "is_call": dense.is_call}
        ready = Ready(partial(dense, several))
        contenders.append(Contender(dense.name, "dense", ready, reads, notes))
    if not any(one.notes["is_baseline"] for one in contenders):
        raise NotEquivalent("no dense variant is within its tolerance: nothing to compare with")
    for name, (role, run) in runs.items():
        reads = bytes_read(problem, "dense" if name == "everything" else name, selection)
        contenders.append(Contender(name, role, Ready(run), reads))
    found = {
        "checks": {"share_of_tolerance_at_k_all": told["k for everything, share of tolerance"]},
        "retained_mass": {"min": told["retained mass, least"], "mean": told["retained mass, mean"]},
        "attended": int(selection.count.max()),
    }
    return contenders, cache, found


def measure(workload: Workload, backend: str, repeats: int, seconds: float) -> dict[str, Any]:
    """Check and time one workload. Raises NotEquivalent."""
    machine.forget_peak()
    problem = make(workload)
    backend = resolve(backend, problem)
    _progress(f"{workload.name}, {backend}: checking equivalence")
    contenders, cache, found = checked(problem, backend)
    _progress(f"{workload.name}: timing")
    hits = int(cache.hits.sum())
    wall, busy = time.perf_counter(), time.process_time()
    device = Cpu()
    for one in contenders:  # the first call is warm-up
        one.first = one.timed(device.eager, one.ready.run)()
    set_slow_apart(contenders)
    times = alternate(contenders, "eager", device, 2 * seconds, (min(3, repeats), repeats))
    wall, busy = time.perf_counter() - wall, time.process_time() - busy
    if int(cache.hits.sum()) - hits < problem.B * len(times["reused"]):
        raise NotEquivalent("a call that was to reuse its selection made a fresh one")
    return {
        "name": workload.name,
        "inputs": workload.describe(),
        "backend": backend,
        **found,
        "peak_memory_gib": machine.resident("VmHWM") / 2**30,
        "on_cpu": busy / wall,
        "contenders": [_summary(one, times[one.name]) for one in contenders],
        "ratios": ratios(contenders, times),
    }


def bytes_read(problem: Problem, what: str, selection: Selection | None = None) -> int:
    """Return the bytes of the cache, or of the votes, that have to be read; queries aside.

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


# --- times ---


def _summary(contender: Contender, times: list[float]) -> dict[str, Any]:
    return {
        "name": contender.name,
        "kind": contender.role,
        **contender.notes,
        **_spread(times, "_ms"),
        "rounds": len(times),
        "bytes": contender.bytes,
        "gb_per_s": contender.bytes / statistics.median(times) / 1e6,
    }


def ratios(contenders: list[Contender], times: Times) -> list[dict[str, Any]]:
    """Return those of each selection to the fastest baseline, and to the fastest single call.

    Medians of the ratios within a round.
    """

    def fastest(several: Iterable[Contender]) -> str:
        return min(several, key=lambda one: statistics.median(times[one.name])).name

    honest = [one for one in contenders if one.notes.get("is_baseline")]
    calls = [one for one in honest if one.notes["is_call"]]
    baselines = {"best dense": fastest(honest)}
    if calls and fastest(calls) != baselines["best dense"]:
        baselines["best dense call"] = fastest(calls)
    found = []
    for name in ("fresh", "reused"):
        for role, baseline in baselines.items():
            paired = [a / b for a, b in zip(times[name], times[baseline], strict=False)]
            found.append({"of": name, "to": baseline, "role": role, **_spread(paired)})
    return found


def _spread(values: Sequence[float], unit: str = "") -> dict[str, float]:
    found = {"median": statistics.median(values), "min": min(values), "max": max(values)}
    return {f"{name}{unit}": value for name, value in found.items()}


# --- the command ---


def _progress(text: str) -> None:
    print(f"→ {text}", file=sys.stderr, flush=True)


def _arguments(argv: Sequence[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(prog="python -m bench.run", description=__doc__.split("\n")[0])
    add, several = parser.add_argument, f"one of {', '.join(WORKLOADS)}; may be given again"
    add("--workload", action="append", choices=WORKLOADS, metavar="NAME", help=several)
    add("--backend", default="auto", help="the backend to measure (auto: what a call takes)")
    add("--threads", type=int, default=1, help="torch's threads (1)")
    add("--repeats", type=int, default=15, help="rounds at most (15)")
    add("--seconds", type=float, default=10, help="for the rounds of one workload")
    add("--quick", action="store_true", help=f"only {', '.join(QUICK)}, 5 rounds")
    add("--json", type=Path, metavar="PATH", help="write the results there")
    add("--save", metavar="SHORT", help="write bench/results/<date>-<backend>-SHORT.json")
    add("--docs", action="store_true", help="print docs/benchmarks.md, run nothing")
    arguments = parser.parse_args(argv)
    if arguments.quick:
        arguments.workload = arguments.workload or QUICK
        arguments.repeats = min(arguments.repeats, 5)
    arguments.workload = arguments.workload or [workload.name for workload in TIMED]
    return arguments


def main(argv: Sequence[str] | None = None) -> int:
    """Run the benchmark; return the exit code."""
    arguments = _arguments(argv)
    if arguments.docs:
        print(page(), end="")
        return 0
    torch.set_num_threads(arguments.threads)
    _progress("measuring the read bandwidth")
    report: dict[str, Any] = {
        "schema": SCHEMA,
        "date": date.today().isoformat(),
        "command": "python -m bench.run " + " ".join(sys.argv[1:] if argv is None else argv),
        "machine": machine.describe(arguments.threads),
        "workloads": [],
        "not_equivalent": [],
    }
    targets = [arguments.json] if arguments.json else []
    if arguments.save:
        targets.append(RESULTS / f"{report['date']}-{arguments.backend}-{arguments.save}.json")
    print(headline(report), flush=True)
    for name in arguments.workload:
        workload = WORKLOADS[name]
        try:
            result = measure(workload, arguments.backend, arguments.repeats, arguments.seconds)
        except NotEquivalent as error:
            report["not_equivalent"].append(name)
            print(f"\n✗ {name}: not timed. {error}", flush=True)
        else:
            report["workloads"].append(result)
            print(workload_tables(result, report["machine"], is_padded=True), flush=True)
        for target in targets:  # after each, so that a run that is cut off keeps what it has
            target.parent.mkdir(parents=True, exist_ok=True)
            target.write_text(json.dumps(report, indent=1) + "\n", encoding="utf-8")
    print("\n" + overview(report, is_padded=True))
    for target in targets:
        _progress(f"wrote {target}")
    return 1 if report["not_equivalent"] else 0


if __name__ == "__main__":
    sys.exit(main())
