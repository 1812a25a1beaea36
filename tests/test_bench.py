"""The benchmark itself: its inputs, its gate, its formulas, and the page made from its results."""

import json
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

from bench import page, run
from bench.dense import DENSE, requests, truth
from bench.workloads import TINY, WORKLOADS, Workload, make
from tokenselect import Backend, Problem, Scores, Selection, attention, register, score
from tokenselect.contract import check_values
from tokenselect.dispatch import registry
from tokenselect.kernels.cpu import BACKEND as CPU

ROOT = Path(__file__).parent.parent


@pytest.fixture(autouse=True)
def _leave_all_as_it_was(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    targets, threads = dict(registry._targets), torch.get_num_threads()
    monkeypatch.setattr(run, "read_bandwidth", lambda: 10.0)
    yield
    registry._targets.clear()
    registry._targets.update(targets)
    torch.set_num_threads(threads)


# --- workloads ----------------------------------------------------------------------------


@pytest.mark.parametrize("workload", TINY, ids=lambda workload: workload.name)
def test_a_tiny_workload_is_a_valid_problem_of_its_shape(workload: Workload) -> None:
    p = make(workload)
    got = (p.B, p.Hq, p.Hkv, p.Lq, p.D, p.Dv, p.q.dtype, p.is_paged, p.config)
    w = workload
    is_paged = w.page_size is not None
    assert got == (w.B, w.Hq, w.Hkv, w.Lq, w.D, w.Dv, w.dtype, is_paged, w.config)
    assert p.cache_seqlens.tolist() == w.lengths()
    check_values(p)
    assert p.k_cache.isfinite().all()
    assert score(p).lse.isfinite().all()


def test_names_are_unique_and_the_promised_ones_are_there() -> None:
    promised = "decode-128k decode-1m decode-32k smollm2-8k qwen-128k paged-128k prefill-128k"
    assert set(promised.split()) <= set(WORKLOADS)
    assert all(name == workload.name for name, workload in WORKLOADS.items())
    assert len(WORKLOADS) == len(TINY) + len(run.TIMED)


@pytest.mark.parametrize("name", ["tiny-paged", "tiny-prefill"])
def test_a_seed_reproduces_its_inputs_bitwise(name: str) -> None:
    def same(one: Problem, other: Problem) -> bool:
        pairs = [(p.q, p.k_cache, p.v_cache, p.block_table) for p in (one, other)]
        return all(a is b or torch.equal(a, b) for a, b in zip(*pairs, strict=True))

    workload = WORKLOADS[name]
    assert same(make(workload), make(workload, seed=workload.seed))
    assert not same(make(workload), make(workload, seed=workload.seed + 1))


def test_n_changes_the_length_only() -> None:
    p = make(WORKLOADS["tiny-paged"], n=80)
    assert p.cache_seqlens.tolist() == [80, 66, 53]
    assert (p.B, p.Lk) == (3, 80)


def test_inputs_have_something_to_select() -> None:
    p = make(WORKLOADS["decode-32k"], n=16 * 1024)
    _, info = attention(p.q, p.k_cache, p.v_cache, **p.config, return_info=True)
    assert 0.8 < info.retained_mass.mean() < 0.9999
    recent = replace(p.config, k=0, n_local=p.config.k + p.config.n_local)
    _, without = attention(p.q, p.k_cache, p.v_cache, **recent, return_info=True)
    assert without.retained_mass.mean() < info.retained_mass.mean() - 0.1


# --- dense --------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["tiny-decode", "tiny-paged", "tiny-prefill"])
def test_which_dense_calls_are_as_exact_as_float32_inside(name: str) -> None:
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
    with pytest.raises(ValueError, match="'reused' reads"):
        run.bytes_read(p, "reused")


# --- the gate -----------------------------------------------------------------------------


def votes_for_the_worst(p: Problem) -> Scores:
    votes, lse = CPU.score(p)
    return Scores(torch.where(votes.isfinite(), -votes, votes), lse)


def reads_kv_head_modulo(p: Problem, selection: Selection) -> Any:
    order = torch.argsort(torch.arange(p.Hq) % p.Hkv, stable=True)
    out, lse = CPU.attend(replace(p, q=p.q[:, order]), selection)
    back = torch.argsort(order)
    return type(CPU.attend(p, selection))(out[:, back], lse[:, back])


def forgets_the_newest(votes: torch.Tensor, p: Problem) -> Selection:
    positions, count = CPU.select(votes, p)
    newest = positions == positions.amax(-1, keepdim=True)
    return Selection(positions.masked_fill(newest, -1), count - 1)


def claims_to_keep_everything(p: Problem) -> Scores:
    votes, lse = CPU.score(p)
    return Scores(votes, lse - 1)


@pytest.mark.parametrize(
    ("bent", "complaint"),
    [
        ({"score": votes_for_the_worst}, "most votes"),
        ({"score": claims_to_keep_everything}, "retained_mass"),
        ({"attend": reads_kv_head_modulo}, "k for everything"),
        ({"select": forgets_the_newest}, "k for everything"),
    ],
)
def test_a_wrong_backend_is_not_timed_and_fails_the_run(
    bent: dict[str, Any], complaint: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    wrong: Backend = replace(CPU, name="wrong", **bent)
    register("wrong", wrong)
    registry._loaded.pop("wrong", None)
    path = tmp_path / "result.json"
    arguments = ["--workload", "tiny-decode", "--backend", "wrong", "--json", str(path)]
    assert run.main(arguments) == 1
    assert complaint in capsys.readouterr().out
    report = json.loads(path.read_text())
    assert report["not_equivalent"] == ["tiny-decode"]
    assert report["workloads"] == []


@pytest.fixture(scope="module")
def report(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    path = tmp_path_factory.mktemp("bench") / "result.json"
    threads = torch.get_num_threads()
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(run, "read_bandwidth", lambda: 10.0)
        names = ("tiny-decode", "tiny-smollm2", "tiny-paged", "tiny-prefill", "tiny-group")
        asked = [word for name in names for word in ("--workload", name)]
        assert run.main([*asked, "--repeats", "3", "--json", str(path)]) == 0
    torch.set_num_threads(threads)
    return json.loads(path.read_text())


def test_the_result_says_what_was_measured_where(report: dict[str, Any]) -> None:
    assert set(report) == {*("schema", "date", "command", "machine", "workloads", "not_equivalent")}
    assert set(report["machine"]) == {
        *("cpu", "cores", "threads", "isa", "read_gb_per_s", "load_at_start"),
        *("python", "torch", "tokenselect", "commit"),
    }
    for result in report["workloads"]:
        assert set(result) == {
            *("name", "inputs", "backend", "checks", "retained_mass", "attended"),
            *("peak_memory_gib", "on_cpu", "sides", "ratios"),
        }
        names = [side["name"] for side in result["sides"]]
        selections_and_stages = ["fresh", "reused", "score", "select", "attend"]
        assert names == [dense.name for dense in DENSE] + selections_and_stages
        for side in result["sides"]:
            assert 0 < side["min_ms"] <= side["median_ms"] <= side["max_ms"]
            assert side["bytes"] > 0
            assert side["gb_per_s"] == pytest.approx(side["bytes"] / side["median_ms"] / 1e6)
        honest = [side["name"] for side in result["sides"] if side.get("is_baseline")]
        assert {ratio["of"] for ratio in result["ratios"]} == {"fresh", "reused"}
        assert {ratio["to"] for ratio in result["ratios"]} <= set(honest)


def test_the_best_dense_is_the_fastest_honest_one() -> None:
    def side(name: str, kind: str, **notes: Any) -> run.Side:
        return run.Side(name, kind, lambda: None, 1, notes)

    sides = [
        side("rounded", "dense", is_baseline=False, is_call=False),
        side("composed", "dense", is_baseline=True, is_call=False),
        side("call", "dense", is_baseline=True, is_call=True),
        side("fresh", "selection"),
        side("reused", "selection"),
    ]
    times = {
        "rounded": [1.0, 1.0, 1.0],
        "composed": [4.0, 8.0, 4.0],
        "call": [9.0],  # slow: one round only
        "fresh": [2.0, 2.0, 3.0],
        "reused": [1.0, 1.0, 1.0],
    }
    got = {(r["of"], r["to"]): (r["median"], r["min"], r["max"]) for r in run._ratios(sides, times)}
    assert got == {
        ("fresh", "composed"): (0.5, 0.25, 0.75),
        ("fresh", "call"): (2 / 9, 2 / 9, 2 / 9),
        ("reused", "composed"): (0.25, 0.125, 0.25),
        ("reused", "call"): (1 / 9, 1 / 9, 1 / 9),
    }


def test_sides_alternate_and_slow_ones_run_less(monkeypatch: pytest.MonkeyPatch) -> None:
    clock, calls = [0.0], []
    monkeypatch.setattr(run.time, "perf_counter", lambda: clock[0])

    def side(name: str, kind: str, seconds: float) -> run.Side:
        def call() -> None:
            calls.append(name)
            clock[0] += seconds

        return run.Side(name, kind, call, 1, {})

    sides = [side("a", "dense", 0.1), side("slow", "dense", 9.0), side("b", "selection", 0.2)]
    times = run.alternate(sides, repeats=50, seconds=1.3)
    assert "".join(calls) == "aslowb" + "ab" + "ba" + "ab" + "ba"
    assert {name: len(took) for name, took in times.items()} == {"a": 4, "b": 4, "slow": 1}
    assert times["slow"] == [pytest.approx(9.0)]


# --- the page -----------------------------------------------------------------------------


def test_the_page_has_every_figure(report: dict[str, Any], tmp_path: Path) -> None:
    (tmp_path / "2000-01-01-cpu-x.json").write_text(json.dumps(report))
    text = page.page(tmp_path)
    for result in report["workloads"]:
        assert f"### {result['name']}" in text
        for side in result["sides"]:
            assert f"{side['median_ms']:.2f} (" in text


def test_the_page_is_the_committed_results() -> None:
    committed = (ROOT / "docs" / "benchmarks.md").read_text("utf-8")
    assert committed == page.page(), "run: python -m bench.run --docs > docs/benchmarks.md"


def test_docs_are_printed_without_measuring(capsys: pytest.CaptureFixture[str]) -> None:
    assert run.main(["--docs"]) == 0
    assert capsys.readouterr().out == page.page()
