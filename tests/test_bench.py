"""The benchmark itself: its inputs, checks and formulas, and the page made from its results."""

import json
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from bench import machine, page, run
from bench.checks import NotEquivalent, check, check_reused
from bench.dense import DENSE, requests, truth
from bench.workloads import TINY, WORKLOADS, Workload, add_rows, make
from properties.planted import PLANTED, planted
from tests import fresh
from tokenselect import Problem, Scores, Selection, attention, register, score
from tokenselect.contract import check_values
from tokenselect.dispatch.registry import reuse_of
from tokenselect.kernels.cpu import BACKEND as CPU


@pytest.mark.parametrize("workload", TINY, ids=lambda workload: workload.name)
def test_a_tiny_workload_is_a_valid_problem_of_its_shape(workload: Workload) -> None:
    p, w = make(workload), workload
    got = (p.B, p.Hq, p.Hkv, p.Lq, p.D, p.Dv, p.q.dtype, p.config)
    assert got == (w.B, w.Hq, w.Hkv, w.Lq, w.D, w.Dv, w.dtype, w.config)
    assert p.page_size == (w.page_size or p.Lk)
    assert p.cache_seqlens.tolist() == w.lengths()
    check_values(p)
    assert p.k_cache.isfinite().all()
    assert score(p).lse.isfinite().all()
    shorter = make(w, n=80)
    assert int(shorter.cache_seqlens[0]) == 80
    assert (shorter.B, shorter.q.shape) == (p.B, p.q.shape)


@pytest.mark.parametrize("name", ["tiny-paged", "tiny-prefill"])
def test_a_seed_reproduces_its_inputs_bitwise(name: str) -> None:
    def same(one: Problem, other: Problem) -> bool:
        pairs = [(p.q, p.k_cache, p.v_cache, p.block_table) for p in (one, other)]
        return all(a is b or torch.equal(a, b) for a, b in zip(*pairs, strict=True))

    workload = WORKLOADS[name]
    assert same(make(workload), make(workload, seed=workload.seed))
    assert not same(make(workload), make(workload, seed=workload.seed + 1))


def test_inputs_have_something_to_select() -> None:
    p = make(WORKLOADS["decode-32k"], n=16 * 1024)
    caches = (p.q, p.k_cache, p.v_cache)
    _, info = attention(*caches, config=p.config, return_info=True)
    assert 0.8 < info.retained_mass.mean() < 0.9999
    recent = replace(p.config, k=0, n_local=p.config.k + p.config.n_local)
    _, without = attention(*caches, config=recent, return_info=True)
    assert without.retained_mass.mean() < info.retained_mass.mean() - 0.1
    x = torch.ones(4, 1, dtype=torch.bfloat16)
    add_rows(x, torch.tensor([1, 3, 1]), torch.tensor([[1.0], [3.0], [5.0]]))
    assert x.flatten().tolist() == [1, 7, 1, 4]


@pytest.mark.parametrize("name", ["tiny-decode", "tiny-paged", "tiny-prefill"])
def test_which_dense_variants_are_as_exact_as_float32_inside(name: str) -> None:
    several = requests(make(WORKLOADS[name]))
    exact = truth(several)
    honest = {dense.name for dense in DENSE if exact.share(dense(several)) <= 1}
    assert honest == {"sdpa, enable_gqa", "sdpa, group folded", "matmul, float32 logits"}


def test_the_truth_is_dense_attention() -> None:
    (request,) = requests(make(WORKLOADS["tiny-prefill"]))
    exact = truth([request], max_rows=request.q.shape[1])
    keys, values = (x.double().repeat_interleave(4, 0) for x in (request.k, request.v))
    logits = request.q.double() @ keys.transpose(1, 2) * request.scale
    n, Lq = logits.shape[2], logits.shape[1]
    logits = logits.masked_fill(torch.ones(Lq, n).tril(n - Lq) == 0, -torch.inf)
    assert torch.allclose(exact.out[0], logits.softmax(-1) @ values, rtol=1e-12, atol=1e-12)
    assert torch.allclose(exact.lse[0], logits.logsumexp(-1), rtol=1e-12)


def test_bytes_are_those_of_the_formula() -> None:
    # 2 requests of 100 and 75 tokens, 3 KV heads, keys and values of 64 float32.
    p = make(replace(WORKLOADS["tiny-smollm2"], n=100))
    selection = Selection(
        torch.tensor([[[0, 1, 2, 3]], [[0, 1, -1, -1]]]), torch.tensor([[4], [2]])
    )
    assert run.bytes_read(p, "dense") == 3 * 175 * 128 * 4
    assert run.bytes_read(p, "score") == 3 * 175 * 64 * 4
    assert run.bytes_read(p, "select") == 175 * 4
    assert run.bytes_read(p, "attend", selection) == 3 * 6 * 128 * 4
    assert run.bytes_read(p, "reused", selection) == 3 * 6 * 128 * 4
    assert run.bytes_read(p, "fresh", selection) == 3 * 175 * 64 * 4 + 3 * 6 * 128 * 4


# --- the checks ---------------------------------------------------------------------------


def votes(bend: Callable[[Tensor], Tensor]) -> dict[str, Any]:
    def score(p: Problem) -> Scores:
        votes, lse = CPU.score(p)
        return Scores(bend(votes), lse)

    return {"score": score}


def stage(name: str) -> dict[str, Any]:
    """A stage with a mistake of properties/planted.py."""
    return {PLANTED[name].stage: getattr(planted(name, CPU), PLANTED[name].stage)}


def for_the_sink(votes: Tensor) -> Tensor:
    votes[..., 0] = 0.0
    return votes


def forgets_the_best(votes: Tensor, p: Problem) -> Selection:
    return CPU.select(votes.masked_fill(votes == votes.amax(-1, keepdim=True), 0.0), p)


def coarse(out: Tensor) -> Tensor:
    return out.to(torch.float8_e4m3fn).to(out.dtype)


def rounds_twice(p: Problem, selection: Selection) -> Any:
    attended = CPU.attend(p, selection)
    return attended._replace(out=coarse(attended.out))


def otherwise_each_time(attend: Any) -> Any:
    calls = [0]

    def wrong(*given: Any) -> Any:
        calls[0] += 1
        attended = attend(*given)
        attended.lse.add_(1e-5 * calls[0])
        return attended

    return wrong


def measured(path: Path, *names: str, backend: str = "cpu") -> tuple[int, dict[str, Any]]:
    """The command's exit code, and what it writes."""
    asked = [word for name in names for word in ("--workload", name)]
    threads = torch.get_num_threads()
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(machine, "read_bandwidth", lambda: 10.0)  # takes seconds
        code = run.main([*asked, "--backend", backend, "--repeats", "3", "--json", str(path)])
    torch.set_num_threads(threads)
    return code, json.loads(path.read_text())


@pytest.mark.parametrize(
    ("bent", "name", "complaint"),
    [
        (votes(lambda x: torch.where(x.isfinite(), -x, x)), "tiny-decode", "a vote is"),
        (stage("score-rounds-votes-to-bfloat16"), "tiny-decode", "a vote is"),
        (votes(for_the_sink), "tiny-decode", "off the candidates"),
        (stage("score-gives-lse-in-base-two"), "tiny-decode", "score's lse"),
        ({"select": forgets_the_best}, "tiny-decode", "stable sort"),
        (stage("select-forgets-the-sink"), "tiny-decode", "stable sort"),
        (stage("attend-reads-kv-head-modulo"), "tiny-decode", "k for everything"),
        (stage("attend-reads-kv-head-modulo"), "tiny-prefill", "k for everything"),
        ({"attend": rounds_twice}, "tiny-decode", "k for everything"),
        ({"attend": otherwise_each_time(CPU.attend)}, "tiny-decode", "those of its stages"),
    ],
    ids=lambda value: value if isinstance(value, str) else "",
)
def test_a_wrong_backend_is_caught(bent: dict[str, Any], name: str, complaint: str) -> None:
    register("wrong", replace(CPU, name="wrong", **bent))
    problem = make(WORKLOADS[name])
    several = requests(problem)
    with pytest.raises(NotEquivalent, match=complaint):
        check(problem, "wrong", several, truth(several))


@pytest.mark.parametrize("name", ["tiny-decode", "tiny-prefill"])
def test_a_reused_selection_is_the_stored_one(name: str) -> None:
    """Its bound alone cannot tell: a worse selection has a looser one."""
    right = reuse_of(CPU)

    def forgets_the_stored(p: Problem, state: Any, decision: Any, selection: Selection) -> None:
        right.update(p, state, decision, selection)
        for b in decision.reused.nonzero()[:, 0].tolist():
            selection.positions[b, :, 0] = selection.positions[b, :, 1]

    register("wrong", replace(CPU, name="wrong", reuse=right._replace(update=forgets_the_stored)))
    problem = make(WORKLOADS[name])
    exact = truth(requests(problem))
    check_reused(problem, "cpu", exact)
    with pytest.raises(NotEquivalent, match="not the stored one"):
        check_reused(problem, "wrong", exact)


def test_a_wrong_backend_is_not_timed_and_fails_the_run(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    register("wrong", replace(CPU, name="wrong", **votes(torch.zeros_like)))
    code, report = measured(tmp_path / "result.json", "tiny-decode", backend="wrong")
    assert code == 1
    assert "off the candidates" in capsys.readouterr().out
    assert report["not_equivalent"] == ["tiny-decode"]
    assert report["workloads"] == []


# --- times and the page -------------------------------------------------------------------


def contender(name: str, role: str, **notes: Any) -> run.Contender:
    return run.Contender(name, role, bytes=1, notes=notes)


def test_the_best_dense_is_the_fastest_honest_one() -> None:
    contenders = [
        contender("rounded", "dense", is_baseline=False, is_call=False),
        contender("composed", "dense", is_baseline=True, is_call=False),
        contender("call", "dense", is_baseline=True, is_call=True),
        contender("fresh", "selection"),
        contender("reused", "selection"),
    ]
    # The call is slow and was timed once.
    seconds = [1.0, 1.0, 1.0], [4.0, 8.0, 4.0], [9.0], [2.0, 2.0, 3.0], [1.0, 1.0, 1.0]
    times = {one.name: own for one, own in zip(contenders, seconds, strict=True)}
    found = run.ratios(contenders, times)
    assert {(r["of"], r["to"]): (r["median"], r["min"], r["max"]) for r in found} == {
        ("fresh", "composed"): (0.5, 0.25, 0.75),
        ("fresh", "call"): (2 / 9, 2 / 9, 2 / 9),
        ("reused", "composed"): (0.25, 0.125, 0.25),
        ("reused", "call"): (1 / 9, 1 / 9, 1 / 9),
    }


def test_the_page_has_every_figure_of_a_run(tmp_path: Path) -> None:
    names = ("tiny-decode", "tiny-smollm2", "tiny-paged", "tiny-prefill", "tiny-group")
    code, report = measured(tmp_path / "2000-01-01-cpu-x.json", *names)
    assert code == 0
    text = page.page(tmp_path)
    for result in report["workloads"]:
        assert f"#### {result['name']}" in text
        names = [one["name"] for one in result["contenders"]]
        assert names[len(DENSE) :] == ["fresh", "reused", "score", "select", "attend", "everything"]
        for one in result["contenders"]:
            assert 0 < one["min_ms"] <= one["median_ms"] <= one["max_ms"]
            assert one["gb_per_s"] == pytest.approx(one["bytes"] / one["median_ms"] / 1e6)
            assert f"{one['median_ms']:.2f} (" in text
        baselines = {one["name"] for one in result["contenders"] if one.get("is_baseline")}
        assert {ratio["to"] for ratio in result["ratios"]} <= baselines
        assert {ratio["of"] for ratio in result["ratios"]} == {"fresh", "reused"}


def test_the_page_is_the_committed_results(capsys: pytest.CaptureFixture[str]) -> None:
    assert run.main(["--docs"]) == 0
    committed = (fresh.ROOT / "docs" / "benchmarks.md").read_text("utf-8")
    assert capsys.readouterr().out == committed, (
        "run: python -m bench.run --docs > docs/benchmarks.md"
    )
