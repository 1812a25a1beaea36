"""What this machine can run, and whether it is right: python -m tokenselect.check.

Prints versions, devices, and each backend: available or why not, and what it takes. Then seeded
problems per backend, held to the reference by the rules of the contract, stage by stage: scores
and attention within a tolerance derived from float64, selections bit for bit, and the whole
call within that of a choice that its votes allow. Errors are shares of the tolerance: at most
1 is right.

It takes seconds. Without a GPU, Triton's kernels run in its interpreter and get a few small
problems; with --thorough, all of them, which takes minutes.

Exit code 0: every backend that can run here was right on everything that it takes. 1: one was
not, nothing was run, or a backend asked for by name cannot run here.
"""

import argparse
import importlib.metadata
import math
import os
import platform
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager, nullcontext
from dataclasses import fields, replace
from functools import cache
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor

from tokenselect import api
from tokenselect.conformance.tolerances import (
    AttendTolerance,
    Finding,
    ScoreTolerance,
    attend_tolerance,
    choice_finding,
    compare_selection,
    score_tolerance,
)
from tokenselect.contract import (
    CONFIG_NAMES,
    AttentionOutput,
    Backend,
    Capability,
    Problem,
    Scores,
    SelectConfig,
    Selection,
    listed,
    reasons,
)
from tokenselect.dispatch import registry
from tokenselect.rope import Rope
from tokenselect.selection_cache import SelectionCache

_DEFAULT: dict[str, Any] = {
    "B": 2, "Hq": 8, "Hkv": 2, "Lq": 1, "Lk": 160, "D": 64, "Dv": 64, "dtype": torch.float32,
    "k": 24, "n_sink": 4, "n_local": 16,
}  # fmt: skip

# For an interpreter, which takes seconds for a problem of the size above.
_SMALL: dict[str, Any] = {"B": 1, "Hq": 4, "Lk": 64, "D": 32, "Dv": 32, "k": 8}

# Each kind of problem: what differs from the default, a decode step of grouped queries. Beside the
# settings of SelectConfig and Problem.build: "ties", equal votes in masses; "rope", how the cache
# arrives; "sinks", sink_logits; "steps", so many calls with one SelectionCache.
KINDS: dict[str, dict[str, Any]] = {
    "decode": {},
    "multi-head": {"Hkv": 8},
    "multi-query": {"Hkv": 1},
    "three heads a group": {"Hq": 6},
    "v of another width": {"Dv": 32},
    "bfloat16": {"dtype": torch.bfloat16},
    "float16": {"dtype": torch.float16},
    "float64": {"dtype": torch.float64},
    "prefill chunk": {"Lq": 9},
    "chunk of three query means": {"Lq": 9, "n_query_means": 3},
    "paged": {"page_size": 16},
    "paged prefill chunk": {"page_size": 16, "Lq": 9},
    "pages of one token": {"page_size": 1},
    "ragged, one absent": {"B": 4, "lengths": (160, 0, 1, 97)},
    "ragged and paged": {"B": 4, "lengths": (160, 0, 1, 97), "page_size": 16},
    "votes that tie": {"ties": True},
    "all candidates selected": {"k": 160},
    "no candidate selected": {"k": 0, "n_sink": 0, "n_local": 1},
    "soft vote of candidates": {"normalize": "candidates"},
    "logit vote": {"vote": "logit"},
    "hard vote": {"vote": "hard"},
    "paper, eq. 7": {"select_scale": 1.0},
    "one selection a group": {"scope": "group"},
    "pool of 5": {"pool": 5},
    "softcap": {"softcap": 5.0},
    "sink logits": {"sinks": True},
    "rope, raw keys": {"rope": "raw"},
    "fixed scoring": {"rope": "rotated", "score_at": "fixed"},
    "extrapolate, rotated keys": {
        "rope": "rotated", "positions": "contiguous", "score_at": "split",
    },
    "extrapolate, raw keys": {"rope": "raw", "positions": "contiguous", "score_at": "split"},
    "extrapolate, paged chunk": {
        "rope": "rotated", "positions": "contiguous", "score_at": "split", "page_size": 16, "Lq": 5,
    },
    "reuse over 9 steps": {"steps": 9, "lengths": (160, 160)},
    "reuse, paged": {"steps": 9, "lengths": (160, 160), "page_size": 16},
    "small decode": _SMALL,
    "small paged chunk": _SMALL | {"Lq": 3, "page_size": 16, "dtype": torch.bfloat16},
    "small, extrapolate": _SMALL | {
        "rope": "rotated", "positions": "contiguous", "score_at": "split",
    },
    "small, reuse over 2 steps": _SMALL | {"B": 2, "steps": 2, "lengths": (64, 64)},
}  # fmt: skip
# All that an interpreter gets, unless it is to be thorough.
INTERPRETED = tuple(kind for kind in KINDS if kind.startswith("small"))


# --- problems -----------------------------------------------------------------------------


@cache
def draw(kind: str, seed: int) -> Problem:
    """A problem of a kind, on the CPU; rows of the cache that hold no token are NaN."""
    given = _DEFAULT | KINDS[kind]
    generator = torch.Generator().manual_seed(seed)

    def normal(*shape: int) -> Tensor:
        return torch.randn(*shape, generator=generator, device="cpu").to(given["dtype"])

    B, Hkv, Lk, D = (given[name] for name in ("B", "Hkv", "Lk", "D"))
    q = 2 * normal(B, given["Hq"], given["Lq"], D)
    caches = [normal(B, Hkv, Lk, width) for width in (D, given["Dv"])]
    if given.get("ties"):  # whole numbers, and the same seven keys over and over
        q, caches[0] = q.round(), caches[0].round()[:, :, torch.arange(Lk, device="cpu") % 7]
    drawn = torch.randint(Lk // 2, Lk + 1, (B,), generator=generator, device="cpu")
    n = torch.tensor(given["lengths"], device="cpu") if "lengths" in given else drawn
    absent = torch.arange(Lk, device="cpu") >= n[:, None]  # (B, Lk)
    caches = [x.masked_fill(absent[:, None, :, None], torch.nan) for x in caches]
    block_table = None
    if "page_size" in given:
        caches, block_table = _paged(caches, given["page_size"], generator)
    sink_logits = normal(given["Hq"]) if given.get("sinks") else None
    rope = None
    if "rope" in given:
        pair = torch.arange(0, D, 2, device="cpu").double()
        rope = Rope(1e4 ** (-pair / D), cached=given["rope"])
    return Problem.build(
        q,
        caches[0],
        caches[1],
        SelectConfig(**{name: given[name] for name in CONFIG_NAMES if name in given}),
        cache_seqlens=n.int(),
        block_table=block_table,
        softcap=given.get("softcap"),
        sink_logits=sink_logits,
        rope=rope,
    )


def _paged(
    caches: list[Tensor], page_size: int, generator: torch.Generator
) -> tuple[list[Tensor], Tensor]:
    """The caches in shuffled pages, two of them spare, and the block table."""
    B, _, Lk, _ = caches[0].shape
    max_pages = Lk // page_size
    n_pages = B * max_pages + 2
    pages = torch.randperm(n_pages, generator=generator, device="cpu")
    block_table = pages[:-2].view(B, max_pages)
    pools = []
    for x in caches:
        pool = x.new_full((n_pages, page_size, x.shape[1], x.shape[3]), torch.nan)
        pool[block_table] = x.transpose(1, 2).unflatten(1, (max_pages, page_size))
        pools.append(pool)
    return pools, block_table.int()


def poisoned(problem: Problem, selection: Selection) -> Problem:
    """The same problem with NaN in every row that is not selected."""
    rows = problem.v_cache.shape[0] * problem.page_size  # of a paged cache, or B * Lk
    b = torch.arange(problem.B, device="cpu")[:, None, None].expand_as(selection.positions)
    chosen = selection.positions >= 0
    b, position = b[chosen], selection.positions[chosen].long()
    page = b
    if problem.block_table is not None:
        page = problem.block_table[b, position // problem.page_size].long()
    kept = torch.zeros(rows, dtype=torch.bool, device="cpu")
    kept[page * problem.page_size + position % problem.page_size] = True
    shape = (-1, 1, problem.Lk, 1) if problem.block_table is None else (-1, problem.page_size, 1, 1)
    return replace(
        problem,
        k_cache=problem.k_cache.masked_fill(~kept.view(shape), torch.nan),
        v_cache=problem.v_cache.masked_fill(~kept.view(shape), torch.nan),
    )


def moved(problem: Problem, device: str) -> Problem:
    """The same problem with its tensors on a device."""

    def to(x: Tensor | None) -> Any:
        return None if x is None else x.to(device)

    names = ("q", "k_cache", "v_cache", "cache_seqlens", "block_table", "sink_logits")
    rope = problem.rope and replace(problem.rope, inv_freq=to(problem.rope.inv_freq))
    return replace(problem, rope=rope, **{name: to(getattr(problem, name)) for name in names})


# --- the rules ----------------------------------------------------------------------------


class Outcome(NamedTuple):
    """The finding that counts of one backend on one problem, and the stage that it is of."""

    stage: str
    finding: Finding


class Truth(NamedTuple):
    """What one problem's scores may be, the reference's selection, what attending to it may be."""

    scores: ScoreTolerance
    selection: Selection
    attended: AttendTolerance


@cache
def truth(kind: str, seed: int) -> Truth:
    """What a problem's results are compared with."""
    problem = draw(kind, seed)
    scores = score_tolerance(problem)
    selection = _reference_selection(scores.votes.truth.float(), problem)
    return Truth(scores, selection, attend_tolerance(problem, selection))


def _reference_selection(votes: Tensor, problem: Problem) -> Selection:
    return api.select(votes, problem, backend="reference")


def judge(name: str, kind: str, seed: int, device: str) -> Outcome:
    """Run one problem on one backend, as far as the first stage that is wrong.

    What is raised counts as wrong.
    """
    checks = _reuse if "steps" in KINDS[kind] else _stages
    worst = Outcome("", Finding(0.0, ""))
    try:
        for outcome in checks(name, kind, seed, device):
            if not outcome.finding.holds:
                return outcome
            worst = max(worst, outcome, key=lambda outcome: outcome.finding.share)
    except Exception as error:  # whatever a backend raises is a failure to report, not to die of
        return Outcome("running it", Finding(math.inf, f"{type(error).__name__}: {error}"))
    return worst


def _stages(name: str, kind: str, seed: int, device: str) -> Iterator[Outcome]:
    """Each stage on the reference's input, then the whole call."""
    problem, expected = draw(kind, seed), truth(kind, seed)
    there = moved(problem, device)

    scores = api.score(there, name)
    yield Outcome("score", expected.scores.compare(Scores(*_here(scores))))

    exact = expected.scores.votes.truth.float()
    tied = (exact * 8).round()
    for votes in (exact, tied):
        selection = Selection(*_here(api.select(votes.to(device), there, name)))
        found = compare_selection(selection, _reference_selection(votes, problem))
        yield Outcome("select", found)

    given = Selection(*(tensor.to(device) for tensor in expected.selection))
    attended = api.attend(moved(poisoned(problem, expected.selection), device), given, name)
    yield Outcome("attend", expected.attended.compare(AttentionOutput(*_here(attended))))

    done = _call(name, problem, device)
    yield Outcome("attention", choice_finding(problem, done.selection, expected.scores.votes))
    if torch.equal(done.selection.positions, expected.selection.positions):
        allowed = expected.attended
    else:
        allowed = attend_tolerance(problem, done.selection)
    yield Outcome("attention", allowed.compare(done.attended))


def _reuse(name: str, kind: str, seed: int, device: str) -> Iterator[Outcome]:
    """Decode steps with one SelectionCache: queries alike, then one request's is another."""
    whole = draw(kind, seed)
    seen = SelectionCache(max_reuse=4)
    stored: dict[int, list[int]] = {}
    for step in range(KINDS[kind]["steps"]):
        q = whole.q.clone()
        if step >= 6:
            q[0] = q[0].flip(-1)
        n = torch.full_like(whole.cache_seqlens, whole.Lk // 2 + step)
        problem = replace(whole, q=q, cache_seqlens=n, max_reuse=seen.max_reuse)
        done = _call(name, problem, device, seen)
        # A selection is stored at step 0, after four hits, and where the query changed.
        expected = [step not in (0, 5, 6), step not in (0, 5)]
        if done.reused.tolist() != expected:
            came = f"step {step}: reused {done.reused.tolist()}, not {expected}"
            yield Outcome("reuse", Finding(math.inf, came))
            return
        for b in range(problem.B):
            positions = done.selection.positions[b, 0, : int(done.selection.count[b, 0])].tolist()
            if expected[b] and positions != [*stored[b], int(n[b]) - 1]:
                came = f"step {step}: [{b}] attends to {positions}, stored were {stored[b]}"
                yield Outcome("reuse", Finding(math.inf, came))
            stored[b] = positions
        # To the rule of fresh choices, a request that reuses its selection is not there.
        fresh = Selection(
            done.selection.positions.masked_fill(done.reused[:, None, None], -1),
            done.selection.count.masked_fill(done.reused[:, None], 0),
        )
        chosen_by = replace(problem, cache_seqlens=n.masked_fill(done.reused, 0))
        votes = score_tolerance(chosen_by).votes
        yield Outcome("attention", choice_finding(chosen_by, fresh, votes))
        allowed = attend_tolerance(problem, done.selection)
        yield Outcome("attention", allowed.compare(done.attended))


class _Done(NamedTuple):
    attended: AttentionOutput
    selection: Selection
    reused: Tensor


def _call(name: str, problem: Problem, device: str, seen: SelectionCache | None = None) -> _Done:
    """What `attention` makes of a problem, back on the CPU."""
    there = moved(problem, device)
    out, info = api.attention(
        there.q,
        there.k_cache,
        there.v_cache,
        **there.config,
        cache_seqlens=there.cache_seqlens,
        block_table=there.block_table,
        softcap=there.softcap,
        sink_logits=there.sink_logits,
        rope=there.rope,
        cache=seen,
        backend=name,
        return_info=True,
    )
    attended = AttentionOutput(out.cpu(), info.lse.cpu())
    return _Done(attended, Selection(*_here(info.selection)), info.reused.cpu())


def _here(tensors: tuple[Tensor, ...]) -> Iterator[Tensor]:
    return (tensor.cpu() for tensor in tensors)


# --- the report ---------------------------------------------------------------------------


def versions() -> Iterator[tuple[str, str]]:
    """Names and versions of what the results depend on."""
    yield "tokenselect", _version("tokenselect")
    yield "python", platform.python_version()
    yield "torch", torch.__version__
    yield "triton", _version("triton")
    yield "platform", platform.platform()
    yield "cpu", f"{_cpu()}, {os.cpu_count()} cores, {torch.get_num_threads()} threads"
    for i in range(torch.cuda.device_count()):
        yield f"cuda:{i}", torch.cuda.get_device_name(i)
    if not torch.cuda.is_available():
        yield "cuda", "no device: triton is interpreted, on few problems; --thorough takes minutes"


def _version(distribution: str) -> str:
    try:
        return importlib.metadata.version(distribution)
    except importlib.metadata.PackageNotFoundError:
        return "not installed"


def _cpu() -> str:
    info = Path("/proc/cpuinfo")
    if info.exists():
        for line in info.read_text().splitlines():
            if line.startswith("model name"):
                return line.partition(":")[2].strip()
    return platform.processor() or platform.machine()


def capability(backend: Backend) -> str:
    """What a backend takes, in a line."""
    limits = []
    for field in fields(Capability):
        value = getattr(backend.capability, field.name)
        if value is not None and not isinstance(value, bool):
            limits.append(f"{field.name} {listed(value)}".replace("torch.", ""))
    limits += [f"borrows from {lender.name}" for lender in backend.lenders]
    limits.append("can be planned" if backend.static else "cannot be planned")
    if not backend.capability.deterministic:
        limits.append("not deterministic")
    return "; ".join(limits)


def device_of(backend: Backend) -> str:
    """Where to check a backend: on the GPU if it names it and one is here, else on the CPU."""
    devices = backend.capability.devices
    named = devices is not None and "cuda" in devices
    return "cuda" if named and torch.cuda.is_available() else "cpu"


def is_interpreted(backend: Backend) -> bool:
    """Whether Triton's interpreter runs the backend's kernels, as it does without a GPU."""
    uses_triton = "triton" in (backend.name, *(lender.name for lender in backend.lenders))
    return uses_triton and device_of(backend) == "cpu"


def where(backend: Backend) -> str:
    """The device, in words."""
    return device_of(backend) + (", interpreted" if is_interpreted(backend) else "")


def loaded(asked: str) -> Backend | str:
    """The backend of that name, or at package.module:ATTRIBUTE; or why it is not available."""
    try:
        return registry.load(registry.named(asked))
    except Exception as error:  # a backend's import may raise anything; the report says what
        return f"{type(error).__name__}: {error}"


class Tally(NamedTuple):
    """How many problems a backend ran, and how many of them it got wrong."""

    ran: int
    failed: int


def check(
    backend: Backend, seeds: range, say: Callable[[str], None], *, thorough: bool = False
) -> Tally:
    """Hold one backend to the rules on every kind of problem that it gets; a line each."""
    device = device_of(backend)
    ran = failed = 0
    few = is_interpreted(backend) and not thorough
    kinds = [kind for kind in KINDS if kind in INTERPRETED or not few]
    for kind in kinds:
        whys = reasons(backend, moved(draw(kind, seeds[0]), device))
        if whys:
            say(f"  {kind:<28}not supported: {'; '.join(whys)}")
            continue
        outcomes = [judge(backend.name, kind, seed, device) for seed in seeds]
        wrong = [outcome for outcome in outcomes if not outcome.finding.holds]
        ran += len(outcomes)
        failed += len(wrong)
        worst = max(outcomes, key=lambda outcome: outcome.finding.share)
        stage, finding = worst
        if wrong:
            say(f"  {kind:<28}FAILED  {finding.share:7.3g}  {stage}: {finding.where}")
        else:
            say(f"  {kind:<28}ok      {finding.share:7.3f}  {stage}")
    if few:
        say(f"  {f'{len(KINDS) - len(kinds)} other kinds':<28}not tried: pass --thorough")
    return Tally(ran, failed)


@contextmanager
def _one_thread() -> Iterator[None]:
    """The problems are small: threads would only wait for one another."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        yield
    finally:
        torch.set_num_threads(before)


def main(arguments: list[str] | None = None) -> int:
    """Print the report; return the exit code."""
    parser = argparse.ArgumentParser(
        prog="python -m tokenselect.check",
        description="What this machine can run, and whether it is right.",
    )
    parser.add_argument(
        "--backend",
        action="append",
        metavar="NAME",
        help="check this one only: a registered name, or package.module:ATTRIBUTE; may be repeated",
    )
    parser.add_argument(
        "--thorough",
        action="store_true",
        help="all kinds of problem for an interpreted backend too; all threads",
    )
    parser.add_argument("--seed", type=int, default=0, metavar="N", help="first seed (0)")
    parser.add_argument(
        "--problems", type=int, default=1, metavar="N", help="problems of each kind (1)"
    )
    options = parser.parse_args(arguments)
    if options.problems < 1:
        parser.error("--problems is at least 1")
    if not torch.cuda.is_available():
        # To be set before triton is imported; it then computes the same on the CPU, slowly.
        os.environ.setdefault("TRITON_INTERPRET", "1")
    for label, value in versions():
        print(f"{label:<12}{value}")

    print("\nbackends")
    available: list[Backend] = []
    missing: list[str] = []
    for name in registry.backends() if options.backend is None else dict.fromkeys(options.backend):
        backend = loaded(name)
        if isinstance(backend, str):
            missing.append(name)
            why = backend.replace("\n", "\n" + 14 * " ")
            print(f"  {name:<11} not available: {why}")
        else:
            available.append(backend)
            print(f"  {name:<11} available: {capability(backend)}")

    seeds = range(options.seed, options.seed + options.problems)
    tallies: dict[str, Tally] = {}
    for backend in available:
        print(f"\n{backend.name} on {where(backend)}: worst error as a share of its tolerance")
        with nullcontext() if options.thorough else _one_thread():
            tallies[backend.name] = check(
                backend,
                seeds,
                lambda line: print(line, flush=True),
                thorough=options.thorough,
            )

    print()
    wrong = [f"{name} fails {tally.failed} of {tally.ran}" for name, tally in tallies.items()
             if tally.failed]  # fmt: skip
    idle = [name for name, tally in tallies.items() if not tally.ran]
    if options.backend is not None:
        wrong += [f"{name} is not available" for name in missing]
        wrong += [f"{name} can run none of the problems here" for name in idle]
    elif len(idle) == len(tallies):
        wrong.append("no backend ran")
    if wrong:
        print(f"WRONG: {'; '.join(wrong)} (seeds {seeds[0]} to {seeds[-1]})")
        return 1
    right = [f"{name} {tally.ran} problems" for name, tally in tallies.items() if tally.ran]
    print(f"all right: {', '.join(right)}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
