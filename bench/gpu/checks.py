"""The checks that come before any figure, each in a process of its own, all at the same time.

A check has passed, failed, not finished in time, or been skipped. Skipped is said loudly and lets
the figures through; failed and not finished do not. What they run is here too:
python -m bench.gpu.checks NAME [--dry-run] ...

facts        what device this is, as JSON on the last line
rules        tokenselect.check, or one part of its kinds of problem
determinism  a call repeated: every tensor bitwise the same each time
small        a few small calls of every layout, also planned, for compute-sanitizer to watch
graphs       plans and CUDA graphs at the sizes that are timed: properties/test_graphs.py
models       small models in transformers: stock's tokens, and those of a CPU
"""

import argparse
import contextlib
import importlib.util
import json
import os
import re
import shutil
import signal
import subprocess
import sys
import time
import xml.etree.ElementTree as ET
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor, as_completed
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor

import tokenselect
from bench.checks import NotEquivalent
from bench.gpu import device as devices
from bench.gpu.cases import CHUNK, MAIN, K, case, cases
from bench.gpu.device import device_for, hold
from bench.workloads import TINY, make
from tokenselect import Problem, SelectConfig, SelectionCache, check
from tokenselect.conformance.devices import on
from tokenselect.dispatch.registry import load, named

ROOT = Path(__file__).parents[2]
INTERPRETED = {"TRITON_INTERPRET": "1"}  # kernels on the CPU, of a dry run
_ALONE = 8.0  # seconds; beside many that begin, compute-sanitizer gets no hold of its program
_TAIL = 40  # lines of a check's output that go into the report if it did not pass


class Verdict(NamedTuple):
    status: str  # "passed", "failed", "unfinished" or "skipped"
    detail: str


class Done(NamedTuple):
    """How a process ended. code is None if its time was over."""

    code: int | None
    output: str
    folder: Path


# --- what is made of what a process said ---


def by_exit_code(done: Done) -> Verdict:
    last = ["no output", *(line.strip() for line in done.output.splitlines() if line.strip())][-1]
    if done.code is None:
        return Verdict("unfinished", f"no end in the time it had; last: {last}")
    if done.code == 0:
        return Verdict("passed", last)
    return Verdict("failed", f"exit code {done.code}; last: {last}")


def by_json(done: Done) -> Verdict:
    """Its last line that is JSON is what it found, whatever else was said."""
    verdict = by_exit_code(done)
    found = [line for line in done.output.splitlines() if line.startswith("{")]
    if verdict.status == "passed":
        return Verdict("passed", found[-1]) if found else Verdict("failed", verdict.detail)
    return verdict


def by_junit(done: Done) -> Verdict:
    """Read what pytest wrote of its tests, also if its time was over; and whether much was run."""
    verdict, path = by_exit_code(done), done.folder / "properties.xml"
    counts, laws, failed = Counter[str](), Counter[str](), []
    tests: Any = ()
    if path.exists():
        with contextlib.suppress(ET.ParseError):
            tests = ET.parse(path).getroot().iter("testcase")
    for test in tests:
        kinds, name = {child.tag for child in test}, test.get("name", "?")
        outcome = "skipped" if "skipped" in kinds else "passed"
        if kinds & {"failure", "error"}:
            outcome = "failed"
            failed.append(name)
        counts[outcome] += 1
        if name.startswith("test_law["):
            laws[outcome] += 1
    said = ", ".join(f"{counts[outcome]} {outcome}" for outcome in ("passed", "failed", "skipped"))
    if failed:
        return Verdict("failed", f"{said}: {', '.join(failed[:8])}")
    if verdict.status == "passed" and laws["passed"] < max(1, laws["skipped"]):
        return Verdict("failed", f"{said}: the backend ran less than half of the laws")
    return Verdict(verdict.status, said if verdict.status == "passed" else verdict.detail)


def by_sanitizer(done: Done) -> Verdict:
    """Errors that it found count, and a program that fails under it; not that it does not work.

    What racecheck calls warnings may be no hazard: they are told.
    """
    races = re.search(r"RACECHECK SUMMARY: .*\((\d+) errors?, (\d+ warnings?)\)", done.output)
    found = races or re.search(r"ERROR SUMMARY: (\d+) error", done.output)
    if found and int(found[1]):
        first = re.search(r"=+ (Error: .*|Invalid .*|Program hit .*)", done.output)
        return Verdict("failed", f"{found[1]} errors, the first: {first[1] if first else '?'}")
    if found and done.code == 0:
        return Verdict("passed", f"0 errors, {races[2]}" if races else "0 errors")
    plain = by_exit_code(done)
    if found or "illegal memory access" in done.output:
        return Verdict("failed", f"the program itself: {plain.detail}")
    return Verdict("skipped", f"compute-sanitizer came to no result: {plain.detail}")


# --- which checks ---


@dataclass(frozen=True)
class Check:
    """command None: skipped, and why is in `detail`. after: seconds that those before it have."""

    name: str
    command: tuple[str, ...] | None
    judge: Callable[[Done], Verdict] = by_exit_code
    detail: str = ""
    environment: dict[str, str] = field(default_factory=dict)
    after: float = 0.0


# The allocator's pools would hide a read past the end of a tensor.
_TOOLS = {"memcheck": {"PYTORCH_NO_CUDA_MEMORY_CACHING": "1"}, "racecheck": {}}


def probe(name: str, *options: str) -> tuple[str, ...]:
    """Return the command of what is run here."""
    return (sys.executable, "-m", "bench.gpu.checks", name, *options)


def checks(backend: str, folder: Path, *, dry: bool, quick: bool) -> list[Check]:
    """Return the checks of a backend; `folder` is for what they write."""
    cores = os.cpu_count() or 1
    options = ("--backend", backend, *(("--dry-run",) if dry else ()))
    shorter = ("--quick",) if quick else ()
    # The properties take most cores, if not quick.
    rules, graphs = (1, 1) if cores < 12 else (8, 1) if quick else (2, 2)

    def parted(shown: str, name: str, parts: int, *more: str) -> Iterator[Check]:
        """Parts compile side by side, which is what takes the time on a GPU."""
        for part in map(str, range(1, parts + 1)):
            which = f"-{part}-of-{parts}" if parts > 1 else ""
            command = probe(name, *options, *more, "--part", part, "--of", str(parts))
            yield Check(shown + which, command)

    sanitized = [_sanitized(tool, probe("small", *options), dry, quick) for tool in _TOOLS]
    others = [
        *parted("tokenselect.check", "rules", rules),
        Check("determinism", probe("determinism", *options)),
        *parted("graphs", "graphs", graphs, *shorter),
        _models(options),
        _properties(backend, folder, cores, dry=dry, quick=quick),
    ]
    if not dry and any(check.command for check in sanitized):
        others[0] = replace(others[0], after=_ALONE)
    interpreted = INTERPRETED if dry else {}
    return [replace(check, environment=check.environment | interpreted)
            for check in (*sanitized, *others)]  # fmt: skip


def _sanitized(name: str, command: tuple[str, ...], dry: bool, quick: bool) -> Check:
    """compute-sanitizer over the small calls. A dry run makes them once, without the tool."""
    tool = shutil.which("compute-sanitizer")
    if dry and name == "memcheck" and not quick:
        return Check(name, command)
    for holds, why in (
        (quick, "left out by --quick"),
        (dry, "a dry run has no compute-sanitizer, and makes the same calls in memcheck"),
        (tool is None, "no compute-sanitizer on PATH"),
    ):
        if holds:
            return Check(name, None, detail=why)
    options = (str(tool), "--tool", name, "--target-processes", "application-only")
    return Check(name, (*options, *command), by_sanitizer, environment=_TOOLS[name])


def _models(options: Sequence[str]) -> Check:
    if importlib.util.find_spec("transformers") is None:
        return Check("models", None, detail="the package transformers is not installed")
    return Check("models", probe("models", *options))


_PYTEST = (
    *("--hypothesis-profile=device", "-q", "--tb=short", "-p", "no:cacheprovider"),
    # Of packages in versions that nobody has seen here; an error is an error all the same.
    *("-o", "minversion=7.0", "-o", "filterwarnings=default"),
)


def _properties(backend: str, folder: Path, cores: int, *, dry: bool, quick: bool) -> Check:
    if quick:
        return Check("properties", None, detail="left out by --quick")
    # Those tests that hold the backend to something: its name is in theirs. Mistakes that are
    # planted try the laws, and the laws are the same on a CPU. What "graphs" runs is not here.
    registered = named(backend)
    wanted = f"{registered} and not mistake"
    options = [
        *("properties", "--ignore=properties/test_graphs.py", *_PYTEST, f"--backend={backend}"),
        f"--junitxml={folder / 'properties.xml'}",
        *("-k", f"{wanted} and test_law and select" if dry else wanted),
    ]
    # The other checks take seven processes, most of which end soon.
    workers = max(1, min(12, cores - 4))
    if not dry and workers > 1 and importlib.util.find_spec("xdist"):
        # What is deselected looks at what its own process has run. `by_junit` counts over all.
        alone = f"properties/test_laws.py::test_backend_was_really_tried[{registered}]"
        options += ["-n", str(workers), "--deselect", alone]
    return Check("properties", (sys.executable, "-m", "pytest", *options), by_junit)


# --- running them ---


def run(
    wanted: list[Check], seconds: float, folder: Path, say: Callable[[str], None]
) -> list[dict[str, Any]]:
    """Run all at once; those that have not ended in time are stopped. A report on each."""
    processes: list[subprocess.Popen[Any]] = []
    ends_at = time.monotonic() + seconds

    def finished(check: Check) -> dict[str, Any]:
        if check.command is None:
            return _report(check, Verdict("skipped", check.detail), 0.0, "")
        begun, log = time.monotonic(), folder / f"gpu-{check.name}.log"
        with log.open("wb") as output:
            # The problems are small, and each core has a process already.
            more = {"OMP_NUM_THREADS": "1"} | check.environment
            process = start(check.command, more, output)
        processes.append(process)
        try:
            code: int | None = process.wait(max(0.0, ends_at - time.monotonic()))
        except subprocess.TimeoutExpired:
            code = None
            stop(process)
        output_of = log.read_text(encoding="utf-8", errors="replace")
        verdict = check.judge(Done(code, output_of, folder))
        return _report(check, verdict, time.monotonic() - begun, output_of)

    reports = []
    with ThreadPoolExecutor(len(wanted)) as pool:
        try:
            futures = []
            for check in sorted(wanted, key=lambda check: check.command is not None):
                time.sleep(check.after)
                futures.append(pool.submit(finished, check))
            for future in as_completed(futures):
                reports.append(report := future.result())
                status, took = report["status"], f" in {report['seconds']:.0f} s"
                told = status.upper() if status == "skipped" else status + took
                say(f"  {report['name']}: {told}: {report['detail']}")
        finally:
            for process in processes:
                stop(process, patience=0)
    return reports


def start(command: Sequence[str], more: dict[str, str], stdout: Any) -> subprocess.Popen[Any]:
    """Start a process in a group of its own, with the checkout on its path, unbuffered."""
    streams: dict[str, Any] = {"stdin": subprocess.DEVNULL, "stderr": subprocess.STDOUT}
    settings: dict[str, Any] = {"cwd": ROOT, "env": environment() | more, "process_group": 0}
    return subprocess.Popen(command, stdout=stdout, **streams, **settings)


def environment() -> dict[str, str]:
    path = os.pathsep.join(filter(None, (str(ROOT), os.environ.get("PYTHONPATH"))))
    return os.environ | {"PYTHONPATH": path, "PYTHONUNBUFFERED": "1", "PYTHONUTF8": "1"}


def stop(process: subprocess.Popen[Any], patience: float = 8.0) -> None:
    """End a process and its children: asked at first, so that pytest writes what it has."""
    for how, wait in ((signal.SIGINT, patience), (signal.SIGKILL, 5.0)):
        with contextlib.suppress(ProcessLookupError):
            os.killpg(process.pid, how)
        with contextlib.suppress(subprocess.TimeoutExpired):
            process.wait(wait)


def _report(check: Check, verdict: Verdict, seconds: float, output: str) -> dict[str, Any]:
    # Without this machine's paths.
    words = [Path(word).name if word.startswith("/") else re.sub(r"=/\S*/", "=", word)
             for word in check.command or ()]  # fmt: skip
    report: dict[str, Any] = {"name": check.name, **verdict._asdict(), "seconds": round(seconds, 1)}
    report["command"] = " ".join(words) or None
    if verdict.status in ("failed", "unfinished"):
        report["tail"] = output.splitlines()[-_TAIL:]
    return report


def is_green(reports: list[dict[str, Any]]) -> bool:
    return bool(reports) and all(report["status"] in ("passed", "skipped") for report in reports)


# --- what they run ---


def rules(backend: str, part: int, parts: int) -> int:
    for kind in [kind for i, kind in enumerate(check.KINDS) if i % parts != part - 1]:
        del check.KINDS[kind]
    return check.main(["--backend", backend])


def _results(problem: Problem, backend: str) -> Iterator[tuple[str, Tensor]]:
    yield from zip(("votes", "lse of all"), tokenselect.score(problem, backend), strict=True)
    out, info = tokenselect.run(problem, backend, return_info=True)
    yield from (("positions", info.selection.positions), ("count", info.selection.count))
    yield from (("out", out), ("lse", info.lse), ("retained mass", info.retained_mass))


def determinism(backend: str, dry: bool) -> int:
    """Problems as long as those that are timed: many programs then write what one reads."""
    device, repeats = device_for(dry), 4 if dry else 20
    shapes = [case(MAIN, 128 * K), case((9, 3, 64), 32 * K, 4), case(MAIN, 32 * K, Lq=CHUNK)]
    if dry:
        shapes = [one for one in cases(quick=True, dry=True) if one.n <= 512]
    for one in shapes:
        problem = make(one, device=device.at)
        first = {name: x.clone() for name, x in _results(problem, backend)}
        for repeat in range(1, repeats):
            for name, x in _results(problem, backend):
                hold(f"{one.name}: {name} of repeat {repeat} and of the first", x, first[name])
        print(f"{one.name}: {repeats} repeats, all tensors bitwise the same", flush=True)
    return 0


# A GPU's kernels take hundreds of tokens in one go: these selections are cut into shares, or walked
# tile by tile.
_MORE = SelectConfig(k=500, n_sink=8, n_local=32)
_LONGER = [
    replace(workload, name=f"{workload.name}, k 500", n=900, config=_MORE)
    for workload in TINY
    if workload.name in ("tiny-decode", "tiny-paged", "tiny-prefill")
]


def small(backend: str, dry: bool) -> int:
    """Run tiny workloads: decode and a chunk, paged and not, selections of a layer and a group."""
    device, chosen = device_for(dry), load(backend)
    for workload in (*TINY, *_LONGER):
        problem = on(str(device.at), make(workload))  # nothing but the backend's for the sanitizer
        if why_not := tokenselect.reasons(chosen, problem):
            print(f"{workload.name}: not run: {'; '.join(why_not)}")
            continue
        is_right = bool(tokenselect.run(problem, backend).isfinite().all())
        if chosen.static is not None:
            is_right &= _small_plan(problem, backend)
        device.synchronize()
        print(f"{workload.name}: {'done' if is_right else 'a result is wrong'}", flush=True)
        if not is_right:
            return 1
    return 0


def _small_plan(problem: Problem, backend: str) -> bool:
    """Make planned calls that select, reuse, and find a request gone; whether all are finite."""
    p = replace(problem, max_reuse=2 * problem.Lq)
    plan, cache = tokenselect.plan(p, backend), SelectionCache(max_reuse=p.max_reuse)
    absent = p.cache_seqlens.clone()
    absent[0] = 0
    outs = [plan(p.q, p.k_cache, p.v_cache, lengths, block_table=p.block_table, cache=cache).clone()
            for lengths in (p.cache_seqlens - p.Lq, p.cache_seqlens, absent)]  # fmt: skip
    return bool(torch.stack(outs).isfinite().all()) and int(cache.hits.sum()) > 0


def graphs(backend: str, quick: bool, part: int, parts: int) -> int:
    """Check plans and CUDA graphs, or a part of them, by properties/test_graphs.py."""
    wanted = "not mistake"
    if parts > 1:  # about as long
        wanted += f" and {'' if part == 1 else 'not '}bits_of_attention"
    if quick:
        wanted += " and not compiled and not 8000 and (long or not bits_of_attention)"
    command = (sys.executable, "-m", "pytest", "properties/test_graphs.py", *_PYTEST)
    os.chdir(ROOT)
    # In this process's place, so that pytest gets the signal when the time is over.
    return os.execv(sys.executable, (*command, f"--backend={backend}", "-k", wanted))


def models(backend: str, dry: bool) -> int:
    """Hold what small random models write, in float32, to stock's tokens and to those of a CPU."""
    from transformers import LlamaConfig, LlamaForCausalLM, MistralConfig, MistralForCausalLM

    from tokenselect.integrations.transformers import Lossless, TokenSelectCache, enable

    at, tokens = device_for(dry).at, 12 if dry else 24
    sizes: dict[str, Any] = dict(
        vocab_size=100, hidden_size=256, intermediate_size=256, num_hidden_layers=2,
        num_attention_heads=8, num_key_value_heads=2, max_position_embeddings=256,
        initializer_range=0.3, pad_token_id=0, eos_token_id=None,
    )  # fmt: skip
    torch.manual_seed(0)
    llama = LlamaForCausalLM(LlamaConfig(**sizes)).eval()
    mistral = MistralForCausalLM(MistralConfig(**sizes, sliding_window=64)).eval()
    ids = torch.randint(1, 100, (2, 200))
    mask = torch.ones_like(ids)
    mask[1, :40] = 0
    everything, few = dict(k=1000), dict(k=32, n_sink=4, n_local=16)

    def written(model: Any, at: torch.device | str, *presets: str, **how: Any) -> Tensor:
        """The tokens that a model writes on a device; without `options`, by stock attention."""
        options, model = how.pop("options", None), model.to(at)
        given = {"max_new_tokens": tokens, "do_sample": False, "attention_mask": mask.to(at)} | how
        if options is None:
            return model.generate(ids.to(at), **given).cpu()
        name = "reference" if at == "cpu" and not dry else backend
        if "theta" in options:  # selections that are reused live with the cache
            given["past_key_values"] = TokenSelectCache(model)
        with enable(model, *presets, backend=name, **options):
            return model.generate(ids.to(at), **given).cpu()

    def lossless(model: Any) -> Tensor:
        cache = TokenSelectCache(model.to(at))
        return written(model, at, options=few, past_key_values=cache, custom_generate=Lossless())

    def of_cpu(*presets: str, **options: Any) -> Callable[[], tuple[Tensor, Tensor]]:
        return lambda: (written(llama, at, *presets, options=few | options),
                        written(llama, "cpu", *presets, options=few | options))  # fmt: skip

    for what, pair in {
        "all selected, stock": lambda: (written(llama, at, options=everything), written(llama, at)),
        "static cache, stock": lambda: (
            written(llama, at, options=everything, cache_implementation="static"),
            written(llama, at),
        ),
        "sliding window, stock": lambda: (written(mistral, at, options={}), written(mistral, at)),
        "lossless, stock": lambda: (lossless(llama), written(llama, at)),
        "a few selected, a CPU": of_cpu(),
        "prompts selected, a CPU": of_cpu(prefill="selected", chunk=64),
        "a fraction, reused, a CPU": of_cpu(k=0.2, theta=0.9),
        "extrapolate, a CPU": of_cpu("extrapolate"),
    }.items():
        hold(f"tokens of {what}", *pair())
        print(what, flush=True)
    half, keep = llama.to(at, torch.bfloat16), dict(record=1, backend=backend)
    with enable(half, **few, **keep) as handle:
        half.generate(ids.to(at), attention_mask=mask.to(at), max_new_tokens=tokens)
    for layer in handle.report().layers:
        if layer.mass is None or not 0 < layer.mass <= 1 or layer.calls != 2 * (tokens - 1):
            print(f"bfloat16, layer {layer.layer}: {layer}")
            return 1
    print("all right: float32 writes the same tokens; bfloat16 reports what it selected")
    return 0


@torch.no_grad()
def main(argv: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="python -m bench.gpu.checks")
    names = "facts", "rules", "determinism", "small", "graphs", "models"
    parser.add_argument("name", choices=names)
    parser.add_argument("--backend", default="triton")
    parser.add_argument("--dry-run", action="store_true")
    parser.add_argument("--quick", action="store_true")
    parser.add_argument("--part", type=int, default=1)
    parser.add_argument("--of", type=int, default=1)
    given = parser.parse_args(argv)
    if given.name == "facts":
        print(json.dumps(devices.facts(given.dry_run)))
        return 0
    backend, dry = named(given.backend), given.dry_run
    try:
        return {
            "rules": lambda: rules(backend, given.part, given.of),
            "determinism": lambda: determinism(backend, dry),
            "small": lambda: small(backend, dry),
            "graphs": lambda: graphs(given.backend, given.quick, given.part, given.of),
            "models": lambda: models(backend, dry),
        }[given.name]()
    except NotEquivalent as error:
        print(error)
        return 1


if __name__ == "__main__":
    sys.exit(main())
