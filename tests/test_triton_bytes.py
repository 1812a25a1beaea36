"""The bytes that the triton kernels say they move: beside the keys' own, and as they really do."""

import json

import pytest
import torch

from tests import fresh
from tokenselect import Problem, SelectConfig

pytest.importorskip("triton", reason="the package triton is not for this platform")

from tokenselect.kernels.triton import step


def problem(Hq: int, Hkv: int, D: int, n: int) -> Problem:
    """A decode step; one row stands for all, since nobody reads them."""
    q = torch.empty(1, Hq, 1, D, dtype=torch.bfloat16)
    cache = torch.empty(1, Hkv, 1, D, dtype=torch.bfloat16).expand(1, Hkv, n, D)
    return Problem.build(q, cache, cache, SelectConfig())


@pytest.mark.parametrize(
    ("n", "figure"), [(128 * 1024, "1.152"), (1024 * 1024, "1.120")], ids=["128K", "1M"]
)
def test_all_stages_move_little_more_than_the_keys(n: int, figure: str) -> None:
    p = problem(32, 8, 128, n)
    keys = p.B * p.Hkv * p.Lk * p.D * p.q.dtype.itemsize
    share = sum(step.bytes_moved(p).values()) / keys
    print(f"{n} tokens: {share:.3f} times the keys' bytes")
    assert f"{share:.3f}" == figure
    assert figure in (fresh.ROOT / "docs" / "triton.md").read_text("utf-8")


# Counts, in Triton's interpreter, the addresses that each kernel loads from and stores to.
COUNT = """
import json
import numpy, torch
from triton.runtime.interpreter import interpreter_builder as builder
from tokenselect import Problem, SelectConfig
from tokenselect.contract import CacheState
from tokenselect.kernels.triton import reuse, select, step

touched = []

def counting(method):
    def counted(pointers, *rest):
        mask = next(x for x in rest if getattr(x, "data", None) is not None
                    and x.data.dtype == bool)
        size = pointers.get_element_ty().primitive_bitwidth // 8
        touched.append((method.__name__, size, pointers.data[mask.data].ravel()))
        return method(pointers, *rest)
    return counted

builder.create_masked_load = counting(builder.create_masked_load)
builder.create_masked_store = counting(builder.create_masked_store)

torch.manual_seed(0)
q = torch.randn(1, 8, 1, 64).bfloat16()
k_cache, v_cache = torch.randn(2, 1, 2, 4096, 64).bfloat16()
p = Problem.build(q, k_cache, v_cache, SelectConfig(k=256, n_sink=16, n_local=64))
first, last = k_cache.data_ptr(), k_cache.data_ptr() + k_cache.nbytes
measured, key_loads = {}, 0

def run(planned):
    global key_loads
    for one in planned:
        touched.clear()
        one.kernel[one.grid](**one.args, **one.constants)
        name = one.kernel.fn.__name__.lstrip("_")
        total = 0
        for kind in ("create_masked_load", "create_masked_store"):
            for size in (1, 2, 4, 8):
                parts = [at for k, s, at in touched if (k, s) == (kind, size)]
                if parts:
                    at = numpy.concatenate(parts)
                    total += size * len(numpy.unique(at))
                    if name == "logits":
                        key_loads += int(((at >= first) & (at < last)).sum())
        measured[name] = measured.get(name, 0) + total

numbers = torch.zeros(1, dtype=torch.int32)
memory = CacheState(torch.ones(1, 512), torch.zeros(1, 1, p.K, dtype=torch.int32), numbers[:, None],
                numbers, numbers.long(), numbers.long())
_, whole = step.cached_launches(p, memory, 0.9, "interpreter")
run(whole)
run(select.launches(torch.randn(1, 1, 1, 4096), p, "interpreter")[1][:1])  # of select alone
stages = (reuse.bytes_moved(p), step.bytes_moved(p, "interpreter"),
          {"clear": select.bytes_moved(p)["clear"]})
print(json.dumps({
    "measured": measured,
    "stated": {name: size for stage in stages for name, size in stage.items()},
    "keys": k_cache.nbytes, "key loads": key_loads, "key elements": k_cache.numel(),
}))
"""


@pytest.fixture(scope="module")
def counted() -> dict:
    done = fresh.run(COUNT, TRITON_INTERPRET="1")
    assert done.returncode == 0, done.stderr
    return json.loads(done.stdout)


@pytest.mark.slow
def test_each_key_is_read_exactly_once(counted: dict) -> None:
    assert counted["key loads"] == counted["key elements"]


@pytest.mark.slow
def test_the_kernels_move_what_they_state(counted: dict) -> None:
    measured, said = counted["measured"], counted["stated"]
    assert set(measured) == set(said)
    # Small things (lengths, queries) are left out of the statements.
    room = 0.005 * counted["keys"]
    off = {name: (measured[name], said[name]) for name in said
           if measured[name] > said[name] + room}  # fmt: skip
    assert not off
    assert sum(measured.values()) > 0.97 * sum(said.values())
