"""What the gate runs in processes of their own: python -m bench.gpu.probe NAME [--dry-run] ...

facts        what device this is, as JSON on the last line
rules        tokenselect.check, or one part of its kinds of problem
determinism  a call repeated: every tensor bitwise the same each time
small        a few small calls of every layout, also planned, for compute-sanitizer to watch
graphs       plans and CUDA graphs: see `bench.gpu.graphs`
"""

import argparse
import json
import sys
from collections.abc import Iterator, Sequence
from dataclasses import replace

import torch
from torch import Tensor

import tokenselect
from bench.gpu import truth
from bench.gpu.device import host
from bench.gpu.inputs import draw
from bench.gpu.plan import CHUNK, MAIN, Cell, cells
from bench.gpu.worker import device_for, named
from bench.workloads import TINY, make
from tokenselect import Problem, SelectConfig, SelectionCache, check
from tokenselect.dispatch.registry import load

REPEATS, DRY_REPEATS = 20, 4


def facts(dry: bool) -> int:
    device = device_for(dry)
    # A device that cannot add is better found now than as a mystery later.
    assert float(torch.ones(8, device=device.at).sum()) == 8.0
    print(json.dumps(device.facts() | host()))
    return 0


def rules(backend: str, part: int, parts: int) -> int:
    for i, kind in enumerate(list(check.KINDS)):
        if i % parts != part - 1:
            del check.KINDS[kind]
    return check.main(["--backend", backend, "--thorough"])


def _stages(problem: Problem, backend: str) -> Iterator[tuple[str, Tensor]]:
    scores = tokenselect.score(problem, backend)
    yield from zip(("votes", "lse of all"), scores, strict=True)
    out, info = truth.attention(problem, backend, return_info=True)
    yield from (("positions", info.selection.positions), ("count", info.selection.count))
    yield from (("out", out), ("lse", info.lse), ("retained mass", info.retained_mass))


def determinism(backend: str, dry: bool) -> int:
    """Problems as long as those that are timed: many programs then write what one reads."""
    device = device_for(dry)
    shapes = [Cell("decode", *MAIN, 128 * 1024), Cell("decode", 9, 3, 64, 32 * 1024, B=4)]
    shapes.append(Cell("prefill", *MAIN, 32 * 1024, Lq=CHUNK))
    if dry:
        shapes = [cell for cell in cells(quick=True, dry=True) if cell.n <= 512]
    repeats = DRY_REPEATS if dry else REPEATS
    for cell in shapes:
        problem = draw(cell, device.at, torch.bfloat16)
        first = {name: x.clone() for name, x in _stages(problem, backend)}
        for repeat in range(1, repeats):
            for name, x in _stages(problem, backend):
                if not truth.same(x, first[name]):
                    print(f"{cell.name}: {name} of repeat {repeat} differ from the first")
                    return 1
        print(f"{cell.name}: {repeats} repeats, all tensors bitwise the same", flush=True)
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
    """The benchmark's tiny workloads: decode and a chunk, paged and not, a layer and a group; and
    some with more tokens to attend to.
    """
    device = device_for(dry)
    for workload in (*TINY, *_LONGER):
        problem = check.moved(make(workload), str(device.at))
        why_not = tokenselect.reasons(load(backend), problem)
        if why_not:
            print(f"{workload.name}: not run: {'; '.join(why_not)}")
            continue
        out = truth.attention(problem, backend, block_table=problem.block_table)
        device.synchronize()
        if not out.isfinite().all():
            print(f"{workload.name}: a result is not finite")
            return 1
        if load(backend).static is not None and not _small_plan(problem, backend):
            print(f"{workload.name}: a planned result is not finite")
            return 1
        device.synchronize()
        print(f"{workload.name}: done", flush=True)
    return 0


def _small_plan(problem: Problem, backend: str) -> bool:
    """Planned calls that select afresh, reuse, and find a request gone; whether all are finite."""
    p = replace(problem, max_reuse=2 * problem.Lq)
    plan, cache = tokenselect.plan(p, backend), SelectionCache(max_reuse=p.max_reuse)
    given = {"block_table": p.block_table, "cache": cache}
    earlier = p.cache_seqlens - p.Lq
    absent = p.cache_seqlens.clone()
    absent[0] = 0
    outs = [plan(p.q, p.k_cache, p.v_cache, lengths, **given).clone()
            for lengths in (earlier, p.cache_seqlens, absent)]  # fmt: skip
    return bool(torch.stack(outs).isfinite().all()) and int(cache.hits.sum()) > 0


def graphs(backend: str, dry: bool, quick: bool, part: int, parts: int) -> int:
    """Plans and CUDA graphs, or a part of the checks; in a dry run with what stands for them."""
    from bench.gpu.graphs import CHECKS, Ground, run

    interface = None
    if dry:
        from properties.recorded import Recorded

        interface = Recorded()
    ground = Ground(backend, device_for(dry), dry, quick, interface)
    return run(ground, CHECKS[part - 1 :: parts])


@torch.no_grad()
def main(argv: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="python -m bench.gpu.probe")
    parser.add_argument("name", choices=("facts", "rules", "determinism", "small", "graphs"))
    parser.add_argument("--backend", default="triton")
    parser.add_argument("--dry-run", action="store_true")
    parser.add_argument("--quick", action="store_true")
    parser.add_argument("--part", type=int, default=1)
    parser.add_argument("--of", type=int, default=1)
    asked = parser.parse_args(argv)
    if asked.name == "facts":
        return facts(asked.dry_run)
    if asked.name == "rules":
        return rules(named(asked.backend), asked.part, asked.of)
    if asked.name == "graphs":
        which = asked.part, asked.of
        return graphs(named(asked.backend), asked.dry_run, asked.quick, *which)
    run = {"determinism": determinism, "small": small}[asked.name]
    return run(named(asked.backend), asked.dry_run)


if __name__ == "__main__":
    sys.exit(main())
