"""bench.quality: its split, its keys, its resuming and its figures, on a tiny random model."""

import json
import math
import random
import re
import shutil
import sys
from collections.abc import Iterator
from itertools import pairwise
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
import yaml
from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from transformers import (
    AutoModelForCausalLM,
    Gemma3TextConfig,
    GPT2Config,
    LlamaConfig,
    LlamaForCausalLM,
    MistralConfig,
    PreTrainedTokenizerFast,
)

import bench.quality
import bench.run
import tokenselect
from bench.quality import figures, page, plan, provenance, recorder, run, store, texts
from bench.quality.__main__ import main
from bench.quality.lab import Lab, fed
from bench.quality.tasks import decode, mass, needles, ruler, sparse, speed
from bench.quality.ways import DENSE, Budget, Way, resolve, resolve_all
from tests import fresh
from tests.models import BOTH_KINDS, SIZES, assert_close, model_of, tokens
from tokenselect.contract import Selection
from tokenselect.errors import InvalidProblem
from tokenselect.integrations.transformers import TokenSelectCache, layers
from tokenselect.integrations.transformers.options import parse

pytestmark = pytest.mark.slow

WAYS: dict[str, Any] = {
    "window": {"attend": "window", "n_sink": 2, "n_local": 8},
    "few": {"n_sink": 2, "n_local": 8},
    "moved": {"preset": "extrapolate", "n_sink": 2, "n_local": 8},
    "all": {"k": 1000},
    "all-moved": {"preset": "extrapolate", "k": 1000},
}
BUDGETS = [{"share": 0.25}]
TASKS: dict[str, Any] = {
    "decode": {
        "ways": ["few", "window", "moved"],
        "contexts": [96],
        "documents": 2,
        "held": 6,
        "budgets": BUDGETS,
    },
    "same": {"task": "decode", "ways": ["all", "all-moved"]}
    | {"contexts": [96], "documents": 2, "held": 6},
    "sparse": {
        "ways": ["few", "window", "moved", "dense"],
        "lengths": [128],
        "documents": 2,
        "chunk": 48,
        "budgets": BUDGETS,
    },
    "needles": {
        "ways": ["dense", "few"],
        "lengths": [600],
        "depths": [0, 0.5, 1],
        "seeds": 1,
        "keys": 2,
        "budgets": [{"k": 20}],
    },
    "reuse": {
        "ways": ["few"],
        "contexts": [96],
        "documents": 1,
        "held": 6,
        "thetas": [-1, 1],
        "budgets": BUDGETS,
    },
    "mass": {"ways": ["few"], "contexts": [96], "documents": 1, "held": 4, "budgets": BUDGETS},
    "all-mass": {"task": "mass", "ways": ["all"], "contexts": [96], "documents": 1, "held": 4},
    "speed": {"ways": ["few", "moved"], "contexts": [64], "rounds": 3, "budgets": BUDGETS},
}


@pytest.fixture(scope="module", autouse=True)
def _short_stretches() -> Iterator[None]:
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(texts, "STRETCH", 2000)
        patch.setattr(bench.run, "read_bandwidth", lambda: 1.0)  # takes seconds
        yield


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A model of two layers whose tokens are bytes, and a text."""
    folder = tmp_path_factory.mktemp("tiny")
    torch.manual_seed(0)
    letters = sorted(pre_tokenizers.ByteLevel.alphabet())
    tokenizer = Tokenizer(models.BPE(vocab={c: i for i, c in enumerate(letters)}, merges=[]))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    PreTrainedTokenizerFast(tokenizer_object=tokenizer).save_pretrained(folder / "model")
    config = LlamaConfig(
        vocab_size=len(letters),
        hidden_size=32,
        intermediate_size=48,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        max_position_embeddings=512,
        initializer_range=0.3,
        bos_token_id=None,
        eos_token_id=None,
    )
    LlamaForCausalLM(config).save_pretrained(folder / "model")
    draw = random.Random(0)
    words = ["".join(draw.choices("etaoin", k=draw.randint(1, 7))) for _ in range(200)]
    (folder / "text.txt").write_text(
        ". ".join(" ".join(draw.choices(words, k=9)) for _ in range(400))
    )
    return folder


@pytest.fixture(scope="module")
def lab(folder: Path) -> Lab:
    return Lab(folder / "model")


def settings(folder: Path, **changes: Any) -> dict[str, Any]:
    given: dict[str, Any] = {"name": "tiny", "split": "choose", "ways": WAYS, "tasks": TASKS}
    return given | {"texts": [str(folder / "text.txt")]} | changes


def commanded(folder: Path, out: Path, *more: str, **changes: Any) -> dict[str, Any]:
    """What the command line makes of settings; the collected result."""
    path = out.parent / f"{out.name}.yaml"
    path.write_text(yaml.safe_dump(settings(folder, **changes)))
    files = ["--settings", str(path), "--model", str(folder / "model"), "--out", str(out)]
    assert main(["run", *files, *more]) == 0
    assert main(["collect", *files]) == 0
    found: dict[str, Any] = json.loads((out / "quality-tiny.json").read_text())
    return found


@pytest.fixture(scope="module")
def out(folder: Path) -> Path:
    return folder / "out"


@pytest.fixture(scope="module")
def result(folder: Path, out: Path) -> dict[str, Any]:
    """Every task, run once."""
    return commanded(folder, out)


def rows(result: dict[str, Any], name: str, **which: Any) -> list[dict[str, Any]]:
    found = result["entries"][name]["rows"]
    return [r for r in found if all(r.get(key) == value for key, value in which.items())]


def without_times(result: dict[str, Any]) -> dict[str, Any]:
    return {n: e for n, e in result["entries"].items() if n != "speed"}


# --- the split ---


def test_the_splits_of_a_text_share_nothing_and_leave_nothing(folder: Path) -> None:
    name = str(folder / "text.txt")
    text, parts = texts.read(name), {}
    for split in texts.SPLITS:
        for number, stretch in texts.stretches(name, split):
            parts[number] = (text.index(stretch), text.index(stretch) + len(stretch))
            assert number % 2 == texts.SPLITS.index(split)
    ends = [parts[number] for number in range(len(parts))]
    assert len(ends) == len(text) // 2000
    assert all(before[1] <= after[0] for before, after in pairwise(ends))


def test_seeds_of_the_splits_share_nothing() -> None:
    assert texts.seeds("choose", 3) == [0, 2, 4]
    assert texts.seeds("report", 3) == [1, 3, 5]


def test_the_splits_of_a_plan_share_no_cell_that_reads(folder: Path, lab: Lab) -> None:
    tasks = {name: task for name, task in TASKS.items() if name != "speed"}
    both = [
        {cell.sha for _, cell in cells(folder, lab, split=split, tasks=tasks)}
        for split in texts.SPLITS
    ]
    assert both[0]
    assert not both[0] & both[1]


def test_natural_needles_lie_in_stretches_of_their_split(folder: Path) -> None:
    name = str(folder / "text.txt")
    for split, other in (("choose", "report"), ("report", "choose")):
        for seed in texts.seeds(split, 3):
            hay = needles.natural([name], split, seed, 600)
            assert not any(stretch[:200] in hay for _, stretch in texts.stretches(name, other))


@pytest.mark.parametrize("name", ["kjv", "pydoc", "source"])
def test_the_splits_of_a_shipped_text_share_next_to_nothing(
    name: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Less than 1 %, in verbatim stretches of 200 characters."""
    monkeypatch.setattr(texts, "STRETCH", 80_000)
    choose, report = (
        [text[:36_000] for _, text in texts.stretches(name, split)] for split in texts.SPLITS
    )
    seen = {hash(text[i : i + 200]) for text in choose for i in range(len(text) - 199)}
    shared = 0
    for text in report:
        end = 0
        for i in range(len(text) - 199):
            if hash(text[i : i + 200]) in seen:
                shared += i + 200 - max(i, end)
                end = i + 200
    assert shared < 0.01 * sum(map(len, report))


def test_pydoc_repeats_no_paragraph() -> None:
    paragraphs = [" ".join(p.split()) for p in texts.read("pydoc").split("\n\n")]
    long = [p for p in paragraphs if len(p) >= 40]
    assert len(long) > 1000
    assert len(set(long)) == len(long)


def test_a_paragraph_that_comes_again_is_left_out() -> None:
    once, short = "This paragraph has more than forty letters.", "Example:"
    text = "\n\n".join([once, short, "Another.", once.replace(" ", "\n  "), short, "The end."])
    kept = [once, short, "Another.", short, "The end."]
    assert texts._unrepeated(text).split("\n\n") == kept


# --- ways ---


@pytest.mark.parametrize("budget", [Budget(share=0.1), Budget(total=100), Budget(k=90)])
def test_ways_of_one_budget_attend_to_equally_many(budget: Budget) -> None:
    ways = {
        "a": {"attend": "window", "n_sink": 2, "n_local": 8},
        "b": {"n_sink": 2, "n_local": 8},
        "c": {"n_sink": 5, "n_local": 5, "scope": "group"},
    }
    a, b, c = (resolve(name, ways, budget, 1000) for name in ways)
    assert a.size == b.size == c.size == 100
    assert a.options is not None
    assert (a.options.select.k, a.options.select.n_sink, a.options.select.n_local) == (0, 2, 98)


def test_dense_attention_is_there_once_whatever_the_budgets() -> None:
    ways = resolve_all(("dense", "few"), WAYS, (Budget(k=1), Budget(k=2)), 100)
    assert [way.name for way in ways] == ["dense", "few", "few"]


def test_a_budget_below_sink_and_window_says_so() -> None:
    with pytest.raises(InvalidProblem, match=r"5 tokens\n  rule: n_sink=2 and n_local=8"):
        resolve("few", WAYS, Budget(share=0.05), 100)


def test_every_option_of_a_way_reaches_the_model(lab: Lab) -> None:
    given = {"k": 3, "vote": "hard", "theta": 0.5, "max_reuse": 7, "backend": "cpu", "chunk": 5}
    it = resolve("it", {"it": given}, None, 100)
    with it.attached(lab.model):
        assert parse(lab.config.tokenselect) == it.options


@torch.inference_mode()
@pytest.mark.parametrize("way", ["few", "window", "moved"])
def test_a_way_with_everything_is_dense_attention(lab: Lab, way: str) -> None:
    def read(how: Way) -> torch.Tensor:
        cache = TokenSelectCache(lab.model)
        with how.attached(lab.model):
            fed(lab.model, cache, tuple(range(64)))
            return fed(lab.model, cache, tuple(range(64, 96)), 32)

    it, dense = resolve(way, WAYS, Budget(k=4), 96), read(DENSE)
    assert (read(it) - dense).abs().max() > 0.01 * dense.abs().max()
    assert_close(read(it.everything(96)), dense)


# --- keys ---


def cells(folder: Path, lab: Lab, **changes: Any) -> list[Any]:
    return plan.cells(plan.read(settings(folder, **changes)), lab)


@pytest.mark.parametrize(
    "name", [name for name in TASKS if name not in ("same", "all-mass", "speed")]
)
def test_the_key_changes_with_all_that_decides_a_value(folder: Path, lab: Lab, name: str) -> None:
    def shas(ways: dict[str, Any] = WAYS, other_lab: Lab = lab, **changes: Any) -> set[str]:
        tasks = {name: TASKS[name] | {"ways": ["few"]} | changes}
        found = cells(folder, other_lab, tasks=tasks, ways=ways)
        return {cell.sha for _, cell in found if cell.way.kind != "dense"}

    before = shas()
    assert shas() == before
    other_options = [
        {"vote": "hard"},
        {"normalize": "candidates"},
        {"n_query_means": 2},
        {"chunk": 7},
        {"backend": "reference"},
    ]
    for options in other_options:
        assert not shas(ways=WAYS | {"few": WAYS["few"] | options}) & before, options
    changes: dict[str, Any] = {"budgets": [{"k": 33}]}
    length = "contexts" if "contexts" in TASKS[name] else "lengths"
    changes[length] = [TASKS[name][length][0] + 1]
    own = {
        "decode": {"held": 7},
        "mass": {"held": 7},
        "reuse": {"held": 7, "max_reuse": 3},
        "sparse": {"chunk": 7, "counted_from": 0.25},
        "needles": {"new_tokens": 7, "depths": [0.25]},
    }
    for setting, value in (changes | own[name]).items():
        differs = shas(**{setting: value}) - before
        unlike = shas(**{setting: value}) & before
        # Without theta, max_reuse decides nothing.
        assert differs, setting
        assert setting == "max_reuse" or not unlike, setting
    twin = Lab(lab.path)
    twin.__dict__["fingerprint"] = "another model"
    assert not shas(other_lab=twin) & before
    assert not shas(other_lab=Lab(lab.path, dtype="bfloat16")) & before


def test_names_are_no_part_of_a_key(folder: Path, lab: Lab) -> None:
    one = cells(folder, lab, tasks={"decode": TASKS["decode"]})
    renamed = {"x" + name: way for name, way in WAYS.items()}
    other = TASKS["decode"] | {"task": "decode", "ways": ["xfew", "xwindow", "xmoved"]}
    two = cells(folder, lab, ways=renamed, tasks={"other": other})
    assert [cell.sha for _, cell in one] == [cell.sha for _, cell in two]


def test_another_text_is_another_cell(folder: Path, lab: Lab, tmp_path: Path) -> None:
    text = (folder / "text.txt").read_text()
    (tmp_path / "text.txt").write_text(text.replace("e", "t", 1))
    tasks = {"decode": TASKS["decode"]}
    one = cells(folder, lab, tasks=tasks)
    two = cells(folder, lab, tasks=tasks, texts=[str(tmp_path / "text.txt")])
    assert {c.sha for _, c in one}.isdisjoint(c.sha for _, c in two)


def test_a_fingerprint_is_of_the_weights(lab: Lab, tmp_path: Path) -> None:
    shutil.copytree(lab.path, tmp_path / "twin")
    assert Lab(tmp_path / "twin").fingerprint == lab.fingerprint
    weights = tmp_path / "twin" / "model.safetensors"
    content = weights.read_bytes()
    weights.write_bytes(content[:-1] + bytes([content[-1] ^ 1]))
    assert Lab(tmp_path / "twin").fingerprint != lab.fingerprint


# --- resuming ---


def test_a_run_that_was_cut_off_does_what_is_missing(
    folder: Path, out: Path, result: dict[str, Any], capsys: pytest.CaptureFixture[str]
) -> None:
    again = folder / "again"
    again.mkdir()
    lines = (out / "cells.jsonl").read_text().splitlines(keepends=True)
    (again / "cells.jsonl").write_text("".join(lines[::2]) + lines[1][:30])
    capsys.readouterr()
    found = commanded(folder, again)
    said = capsys.readouterr()
    assert f"{len(lines)} cells, {len(lines[::2])} of them done before" in said.out
    assert "the last line is torn; its cell runs again" in said.err
    assert without_times(found) == without_times(result)
    assert len((again / "cells.jsonl").read_text().splitlines()) == len(lines)
    before = (again / "cells.jsonl").read_bytes()
    commanded(folder, again)
    assert (again / "cells.jsonl").read_bytes() == before


def test_parts_together_are_the_whole(folder: Path, result: dict[str, Any]) -> None:
    out, tasks = folder / "parts", {n: TASKS[n] for n in ("decode", "sparse", "mass")}
    commanded(folder, out, "--part", "1/2", tasks=tasks)
    first = set(store.read(out))
    found = commanded(folder, out, "--part", "2/2", tasks=tasks)
    second = {json.loads(line)["sha"] for line in (out / "cells-2.jsonl").open()}
    assert first
    assert second
    assert not first & second
    assert found["missing"] == 0
    assert found["entries"] == {name: result["entries"][name] for name in tasks}


def test_parts_share_evenly(folder: Path, lab: Lab) -> None:
    works = plan.works(cell for _, cell in cells(folder, lab))
    for n in (1, 2, 3):
        parts = [plan.part(works, i, n) for i in range(1, n + 1)]
        assert sorted(id(w) for part in parts for w in part) == sorted(map(id, works))
        loads = [sum(cell.seconds for work in part for cell in work) for part in parts]
        longest = max(sum(cell.seconds for cell in work) for work in works)
        assert max(loads) - min(loads) <= longest + 1e-9


def test_cells_of_other_settings_are_left_out(
    folder: Path, out: Path, result: dict[str, Any], capsys: pytest.CaptureFixture[str]
) -> None:
    capsys.readouterr()
    path = folder / "one.yaml"
    path.write_text(yaml.safe_dump(settings(folder, tasks={"mass": TASKS["mass"]})))
    target = folder / "one.json"
    files = ["--settings", str(path), "--model", str(folder / "model"), "--out", str(out)]
    assert main(["collect", *files, "--json", str(target)]) == 0
    assert "belong to other settings, and are left out" in capsys.readouterr().out
    found = json.loads(target.read_text())
    assert found["entries"] == {"mass": result["entries"]["mass"]}


def test_a_bad_line_in_the_middle_is_an_error(tmp_path: Path) -> None:
    (tmp_path / "cells.jsonl").write_text(
        '{"ran": {}, "sha": "a"}\n{"sh\n{"ran": {}, "sha": "b"}\n'
    )
    with pytest.raises(InvalidProblem, match=r"cells.jsonl, line 2"):
        store.read(tmp_path)


@pytest.mark.parametrize(
    "torn", ['{"ran": {}, "sha": "b"', '{"ran": {}, "sha": "b"}', '{"sha\n', "\x00\x00\n"]
)
def test_a_torn_last_line_is_dropped(tmp_path: Path, torn: str) -> None:
    path = tmp_path / "cells.jsonl"
    path.write_text('{"ran": {}, "sha": "a"}\n' + torn)
    assert list(store.read(tmp_path)) == ["a"]
    with store.appending(path) as file:
        store.append(file, {"ran": {}, "sha": "c"})
    assert path.read_text() == '{"ran": {}, "sha": "a"}\n{"ran": {}, "sha": "c"}\n'


def test_two_runs_do_not_write_one_file(tmp_path: Path) -> None:
    path, error = tmp_path / "cells.jsonl", pytest.raises(InvalidProblem, match="another run")
    with store.appending(path), error, store.appending(path):
        raise AssertionError


# --- figures ---


def test_dense_attention_is_no_way_from_itself(result: dict[str, Any]) -> None:
    for name in ("decode", "sparse"):
        dense = rows(result, name, way="dense")
        assert len(dense) == 2
        assert all(r["kl"] == r["kl_max"] == 0 and r["agreement"] == 1 for r in dense)


def test_a_budget_for_everything_is_dense_attention(result: dict[str, Any]) -> None:
    dense = {r["document"]: r["nll"] for r in rows(result, "same", way="dense")}
    for way in ("all", "all-moved"):
        found = rows(result, "same", way=way)
        assert len(found) == 2
        for row in found:
            assert row["kl_max"] <= 1e-6
            assert row["agreement"] == 1
            assert row["nll"] == pytest.approx(dense[row["document"]], abs=1e-5)


def test_ways_change_something(result: dict[str, Any]) -> None:
    for name in ("decode", "sparse"):
        for way in ("few", "window", "moved"):
            assert all(r["kl"] > 1e-6 for r in rows(result, name, way=way))


@torch.inference_mode()
def test_likelihoods_are_those_of_one_forward_pass(result: dict[str, Any], lab: Lab) -> None:
    (document, _) = lab.documents((result["settings"]["texts"][0],), "choose", 2, 129)
    logits = lab.model(torch.tensor([document.ids])).logits[0, :-1].double().log_softmax(-1)
    nll = -logits.gather(1, torch.tensor(document.ids)[1:, None])[:, 0]
    (dense,) = rows(result, "sparse", way="dense", document=document.id)
    assert dense["tokens"] == 64
    assert dense["nll"] == pytest.approx(float(nll[64:].mean()), abs=1e-5)
    (dense,) = rows(result, "decode", way="dense", document=document.id)
    assert dense["tokens"] == 6
    assert dense["nll"] == pytest.approx(float(nll[96:102].mean()), abs=1e-5)


def test_kl_and_agreement_are_those_of_torch() -> None:
    torch.manual_seed(0)
    p, q = torch.randn(2, 150, 7)
    against = figures.Against()
    against.add(q, p, [0] * 150)
    expected = torch.nn.functional.kl_div(
        q.log_softmax(-1), p.log_softmax(-1), reduction="none", log_target=True
    ).sum(-1)
    found = against.summary()
    assert found["kl"] == pytest.approx(float(expected.mean()), rel=1e-5)
    assert found["kl_max"] == pytest.approx(float(expected.max()), rel=1e-5)
    assert found["agreement"] == pytest.approx(float((p.argmax(-1) == q.argmax(-1)).float().mean()))
    assert found["nll"] == pytest.approx(float(-q.log_softmax(-1)[:, 0].mean()), rel=1e-5)


@pytest.mark.parametrize(
    ("logits", "dense", "kl"),
    [
        ([0, 0, -math.inf], [0, 0, -math.inf], 0),
        ([0, 0, 0], [0, 0, -math.inf], math.log(1.5)),
        ([0, -math.inf, 0], [0, 0, 0], math.inf),
        ([0, math.nan, 0], [0, 0, -math.inf], math.nan),
        ([0, 0, 0], [0, math.nan, 0], math.nan),
    ],
)
def test_kl_where_a_probability_is_nothing(
    logits: list[float], dense: list[float], kl: float
) -> None:
    against = figures.Against()
    against.add(torch.tensor([logits]), torch.tensor([dense]), [0])
    assert against.summary()["kl"] == pytest.approx(kl, nan_ok=True)


def test_lockstep_in_several_goes_changes_nothing(
    folder: Path, lab: Lab, result: dict[str, Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(sparse, "_MEMORY", 1.0)
    planned = cells(folder, lab, tasks={"sparse": TASKS["sparse"]})
    (work, _) = plan.works(cell for _, cell in planned)
    values = {cell.sha: value for cell, value in sparse.run(work, lab)}
    assert len(values) == len(work) == 4
    for cell in work:
        (row,) = rows(result, "sparse", way=cell.way.name, document=cell.given.id)
        assert values[cell.sha].items() <= row.items()


def test_wilson_intervals_are_the_known_ones() -> None:
    known = {(0, 10): (0, 0.2775), (10, 10): (0.7225, 1), (5, 10): (0.2366, 0.7634)}
    known[81, 263] = (0.2553, 0.3662)  # Newcombe 1998, table I
    for (right, tries), ends in known.items():
        assert figures.wilson(right, tries) == pytest.approx(ends, abs=5e-5)
    assert figures.wilson(0, 0) == (0, 1)


def test_a_bootstrapped_interval_is_that_of_a_share() -> None:
    """Of 400 tries, 80 right: 1.96 standard errors of 0.02 to either side."""
    ends = figures.bootstrapped([1.0] * 80 + [0.0] * 320)
    assert ends == pytest.approx((0.2 - 0.0392, 0.2 + 0.0392), abs=0.003)


def reading(document: str, way: str, nll: float, **more: Any) -> dict[str, Any]:
    """What one way makes of one document; dense attention, a window, or a way of 100 tokens."""
    kind = {"dense": "dense", "window": "window"}.get(way, "select")
    size = None if way == "dense" else 100
    base = {"context": 1, "document": document, "way": way, "budget": "", "kind": kind}
    return base | {"size": size, "nll": nll, "kl": nll / 10, "kl_max": nll, "agreement": 0.5} | more


def two_documents(**more: Any) -> list[dict[str, Any]]:
    return [
        *(reading("a", "dense", 1.0, **more), reading("a", "window", 1.5, **more)),
        *(reading("a", "it", 1.2, **more), reading("b", "dense", 2.0, **more)),
        *(reading("b", "window", 2.0, **more), reading("b", "it", 2.4, **more)),
    ]


def test_a_summary_says_what_its_rows_say() -> None:
    it = next(r for r in figures.against_dense(two_documents()) if r["way"] == "it")
    assert it["perplexity"] == pytest.approx(math.exp(1.8))
    assert it["loss"] == pytest.approx(math.exp(0.3) - 1)
    assert it["worst"] == pytest.approx(math.exp(0.4) - 1)
    # A quarter of all samples of two have one of them twice.
    assert it["loss_95"] == pytest.approx([math.exp(0.2) - 1, math.exp(0.4) - 1])
    assert it["kl_95"] == pytest.approx([0.12, 0.24])
    assert (it["gains"], it["beats"], it["documents"]) == (1, 1, 2)
    flagged = [r for r in figures.beside_window(two_documents()) if r["way"] == "it"]
    assert [(r["dense_gains"], r["beats_window"]) for r in flagged] == [
        (True, True),
        (False, False),
    ]


def test_closer_than_the_first_way() -> None:
    several = two_documents()
    first = [r for r in several if r["way"] == "it"]
    other = [{**r, "way": "other", "kl": kl} for r, kl in zip(first, (0.11, 0.25), strict=True)]
    found = {r["way"]: r["closer"] for r in figures.against_dense(several + other)}
    assert (found["it"], found["other"], found["dense"]) == (0, 1, None)


@pytest.mark.parametrize("order", [1, -1])
def test_of_two_windows_the_better_counts(order: int) -> None:
    windows = [reading("a", "window", 1.5), reading("a", "other", 1.1, kind="window")][::order]
    ways = [reading("a", "it", 1.2), reading("a", "best", 1.05)]
    several = [reading("a", "dense", 1.0), *windows, *ways]
    flagged = figures.beside_window(several)[-2:]
    assert [(r["dense_gains"], r["beats_window"]) for r in flagged] == [(True, False), (True, True)]
    ties = figures.beside_window([reading("a", "dense", 1.1), *several[1:]])[-2:]
    assert [r["dense_gains"] for r in ties] == [False, False]


@pytest.mark.parametrize(("within", "gains", "beats"), [(True, 1, 1), (False, 2, 1)])
def test_beyond_the_trained_length_all_documents_count(
    within: bool, gains: int, beats: int
) -> None:
    several = two_documents(within_trained=within)
    it = next(r for r in figures.against_dense(several) if r["way"] == "it")
    assert (it["gains"], it["beats"]) == (gains, beats)


# --- tasks ---


def test_reuse_counts_its_hits(result: dict[str, Any]) -> None:
    (always,) = rows(result, "reuse", theta=-1)
    assert always["hit_rate"] == pytest.approx(5 / 6)  # all but the first step
    (same,) = rows(result, "reuse", theta=1)
    assert same["hit_rate"] == 0
    (never,) = rows(result, "reuse", theta=None, way="few")
    assert "hit_rate" not in never
    assert never["nll"] == same["nll"]


@torch.inference_mode()
def test_hits_are_those_of_one_decoding(lab: Lab) -> None:
    it = resolve("it", {"it": WAYS["few"] | {"theta": -1}}, Budget(k=4), 20)
    cache = decode.prefilled(lab, range(20), DENSE, 10)
    for count in (3, 8):
        _, reused = decode.decoded(lab, cache, range(20, 21 + count), it)
        assert reused["hit_rate"] == pytest.approx((count - 1) / count)


def test_mass_and_overlap_of_everything_are_one(result: dict[str, Any]) -> None:
    (everything,) = rows(result, "all-mass")
    assert everything["mass"] == [[1.0] * 4] * 2
    (few,) = rows(result, "mass")
    assert all(0 < x <= 1 for layer in few["mass"] for x in layer)
    assert [len(few["by_step"]), len(few["by_layer"])] == [2, 2]
    assert few["by_layer"][0][0] == few["by_layer"][1][1] == 1
    assert few["by_layer"][0][1] == few["by_layer"][1][0] < 1


def test_votes_leave_out_sink_and_window() -> None:
    q, cache = torch.randn(1, 2, 1, 4), torch.randn(1, 1, 30, 4)
    config = tokenselect.SelectConfig(k=5, n_sink=3, n_local=4)
    _, info = tokenselect.attention(q, cache, cache, **config, return_info=True)
    chosen = mass.votes(info, 30, config)
    assert chosen.shape == (1, 30)
    assert chosen.sum() == chosen[0, 3:26].sum() == 5


def test_overlap_is_jaccards() -> None:
    a, b = torch.zeros(2, 1, 6, dtype=torch.bool)
    a[0, :3], b[0, 2:4] = True, True
    assert mass.overlap(a, b) == 0.25
    assert mass.overlap(a & False, b & False) == 1


def test_mass_and_overlap_by_hand() -> None:
    """Three steps of two layers after 8 tokens; sink and window, 0 and the newest two, are none."""

    def info(selected: list[int], retained: list[float]) -> tokenselect.AttentionInfo:
        chosen = Selection(torch.tensor([[selected]]), torch.tensor([[len(selected)]]))
        reused, lse = torch.tensor([False]), torch.zeros(1, 2, 1)
        return tokenselect.AttentionInfo(lse, chosen, torch.tensor([retained]), reused, "reference")

    infos = [
        *(info([0, 2, 3, 7, 8], [0.1, 0.2]), info([0, 2, 4, 7, 8], [0.3, 0.4])),
        *(info([0, 2, 3, 8, 9], [0.3, 0.4]), info([0, 2, 5, 8, 9], [0.5, 0.8])),
        *(info([0, 3, 9, 10, -1], [0.5, 0.6]), info([0, 3, 9, 10, -1], [0.7, 0.9])),
    ]
    config = tokenselect.SelectConfig(k=2, n_sink=1, n_local=2)
    assert mass.of_infos(infos, 3, 8, config) == {
        "mass": [[0.3, 0.4], [0.5, 0.7]],
        "by_step": [0.75, 0.1667],  # (1 + 1/2) / 2 and (1/3 + 0) / 2
        "by_layer": [[1, 0.5556], [0.5556, 1]],  # (1/3 + 1/3 + 1) / 3
        "voted": pytest.approx(5 / 3),
    }


def test_a_summary_of_mass_is_a_mean_over_documents() -> None:
    def of(mass_of_a: float, overlap: float, voted: float) -> dict[str, Any]:
        table = [[mass_of_a, 0.8], [0.6, 0.6]]
        by_layer = [[1, overlap], [overlap, 1]]
        base = {"context": 1, "way": "it", "budget": "", "size": 9, "voted": voted}
        return base | {"mass": table, "by_step": [overlap, 0.5], "by_layer": by_layer}

    (found,) = mass.summary([of(0.2, 0.1, 3.0), of(0.6, 0.3, 5.0)])
    assert found["documents"] == 2
    assert found["mass_of_layers"] == [0.6, 0.6]
    assert (found["mass"], found["least_of_a_head"]) == (0.6, 0.4)
    assert found["by_step_of_layers"] == [0.2, 0.5]
    assert (found["neighbours"], found["voted"]) == (0.2, 4.0)


def test_the_recorder_leaves_the_package_alone() -> None:
    before = tokenselect.attention
    with recorder.recorded():
        assert tokenselect.attention is before
        assert layers.tokenselect is not tokenselect
    assert layers.tokenselect is tokenselect


@pytest.mark.parametrize("kind", needles.KINDS)
@pytest.mark.parametrize("depth", [0.0, 0.5, 1.0])
def test_needles_lie_where_they_are_said_to(
    folder: Path, lab: Lab, kind: str, depth: float
) -> None:
    names, keys = (str(folder / "text.txt"),), 3 if kind == "multikey" else 1
    needle = needles.make(lab, names, "choose", kind, 1200, depth, 4, keys)
    again = needles.make(lab, names, "choose", kind, 1200, depth, 4, keys)
    assert needle == again
    assert 1200 - 120 <= len(needle.ids) <= 1200
    assert needle.prompt.count(needle.number) == 1
    at = needle.prompt.index(needle.number) / needle.prompt.index("Question:")
    assert at == pytest.approx(depth, abs=0.15)
    assert needle.number != needles.make(lab, names, "choose", kind, 1200, depth, 6, keys).number


def test_the_number_scored_is_that_of_the_key_asked_for(lab: Lab) -> None:
    needle = needles.make(lab, (), "choose", "multikey", 1200, 0.5, 4, keys=3)
    (key,) = re.findall(r"What is the secret number of the (\w+)\?", needle.prompt)
    assert f"The secret number of the {key} is {needle.number}." in needle.prompt
    assert needle.prompt.count("The secret number of the ") == 3


def test_seed_kind_and_depth_each_change_the_number(folder: Path, lab: Lab) -> None:
    names = (str(folder / "text.txt"),)
    numbers = [
        needles.make(lab, names, "choose", kind, 1200, depth, seed).number
        for kind in needles.KINDS
        for depth in (0.0, 0.5, 1.0)
        for seed in (4, 6)
    ]
    assert len(set(numbers)) == len(numbers)


def test_a_dot_within_a_word_ends_no_sentence() -> None:
    text = "One. At 3.14 see os.path! Two."
    ends = [needles.sentence_end(text, near) for near in range(len(text) + 1)]
    assert ends == [0] * 4 + [4] * (len(text) - 4) + [len(text)]


@pytest.mark.parametrize(("wrong", "right"), [("", True), ("1", False)])
def test_answers_are_scored(
    folder: Path, lab: Lab, monkeypatch: pytest.MonkeyPatch, wrong: str, right: bool
) -> None:
    tasks = {"needles": TASKS["needles"] | {"kinds": ["filler"], "depths": [0.5]}}
    cell = cells(folder, lab, tasks=tasks)[0][1]
    number = cell.given[0].number

    def generate(inputs: torch.Tensor, **_: Any) -> torch.Tensor:
        answer = lab.encode(f"It is {number}{wrong}.")
        return torch.tensor([[*inputs[0].tolist(), *answer]])

    monkeypatch.setattr(lab.model, "generate", generate)
    ((_, value),) = needles.run([cell], lab)
    assert value["right"] is right
    assert value["answer"] == f"It is {number}{wrong}."


def test_needles_are_read_the_way_they_say(
    folder: Path, lab: Lab, monkeypatch: pytest.MonkeyPatch
) -> None:
    tasks = {"needles": TASKS["needles"] | {"kinds": ["filler"], "depths": [0.5]}}
    seen = []

    def generate(inputs: torch.Tensor, **_: Any) -> torch.Tensor:
        seen.append((lab.config._attn_implementation, (lab.config.tokenselect or {}).get("k")))
        return inputs

    monkeypatch.setattr(lab.model, "generate", generate)
    planned = [cell for _, cell in cells(folder, lab, tasks=tasks)]
    assert [cell.way.name for cell, _ in needles.run(planned, lab)] == ["dense", "few"]
    assert seen == [("sdpa", None), ("tokenselect", 20)]


def test_speed_compares_with_stock_attention(result: dict[str, Any]) -> None:
    (row,) = rows(result, "speed")
    names = [side["name"] for side in row["sides"]]
    assert names == ["sdpa, DynamicCache", "sdpa, TokenSelectCache", "few 25 %", "moved 25 %"]
    assert row["sides"][0]["of sdpa, DynamicCache"] == 1
    assert all(0 < side["least"] <= side["median"] <= side["largest"] for side in row["sides"])


def test_ratios_are_of_a_side_to_the_baseline(lab: Lab, monkeypatch: pytest.MonkeyPatch) -> None:
    """By a clock that says how long each token took; the first round is warm-up."""
    took, clock = {"sdpa": [1000, 1, 2, 3], "tokenselect": [1000, 3, 4, 9]}, [0]

    def timed(model: Any, cache: Any, ids: tuple[int, ...]) -> Any:
        if ids != (0,):
            clock[0] += took[model.config._attn_implementation][ids[0] - 100]
        return fed(model, cache, ids)

    monkeypatch.setattr(speed, "fed", timed)
    monkeypatch.setattr(speed, "time", SimpleNamespace(perf_counter=lambda: clock[0]))
    sides = [speed.Side("stock", DENSE), speed.Side("it", resolve("few", WAYS, Budget(k=4), 30))]
    stock, it = speed.times(sides, 30, 3, lab)["sides"]
    assert stock == {"name": "stock", "median": 2, "least": 1, "largest": 3, "of stock": 1}
    assert it == {"name": "it", "median": 4, "least": 3, "largest": 9, "of stock": 3}


@pytest.mark.skipif(not Path("/proc/self/clear_refs").exists(), reason="Linux tells peak memory")
@pytest.mark.parametrize("way", ["dense", "few", "moved"])
def test_memory_is_measured(lab: Lab, way: str) -> None:
    key = resolve(way, WAYS, Budget(k=20), 100).key
    job = {"model": str(lab.path), "gguf_file": None, "dtype": "float32", "way": key, "threads": 1}
    found = speed.measure(job | {"new": 300, "cached": 100})
    assert found["cache_mib"] == 2 * 2 * 2 * 400 * 8 * 4 / 2**20
    # The system counts pages roughly; torch alone takes more than the upper bound.
    assert -0.5 <= found["peak_mib"] < 64


def test_ruler_is_scored_under_each_way(
    folder: Path, lab: Lab, monkeypatch: pytest.MonkeyPatch
) -> None:
    asked = []

    def scored(
        model: Any, tokenizer: Any, tasks: Any, lengths: Any, samples: int, seed: int
    ) -> Any:
        asked.append((model.config._attn_implementation, *tasks, *lengths, samples, seed))
        return {task: {str(n): {"score": 0.5, "scores": [0, 1]} for n in lengths} for task in tasks}

    fake = SimpleNamespace(TASKS=("a", "b"), run=scored)
    monkeypatch.setitem(sys.modules, "bench.quality.ruler", fake)
    monkeypatch.setattr(bench.quality, "ruler", fake, raising=False)
    task = {"ways": ["dense", "few"], "lengths": [1024], "samples": 2, "budgets": [{"k": 9}]}
    planned = cells(folder, lab, split="report", tasks={"ruler": task})
    values = list(ruler.run([cell for _, cell in planned], lab))
    assert asked == [
        (attention, name, 1024, 2, 1) for name in "ab" for attention in ("sdpa", "tokenselect")
    ]
    summary = ruler.summary([{**cell.label, **value} for cell, value in values])
    assert [(r["ruler"], r["way"], r["score"]) for r in summary] == [
        (name, way, 0.5) for name in "ab" for way in ("dense", "few")
    ]


@pytest.mark.parametrize("way", ["dense", "few", "moved"])
def test_bfloat16_goes_all_the_way(folder: Path, way: str) -> None:
    lab = Lab(folder / "model", dtype="bfloat16")
    assert lab.model.dtype == torch.bfloat16
    sides = [
        speed.Side("stock", DENSE, True),
        speed.Side("it", resolve(way, WAYS, Budget(k=9), 64)),
    ]
    times = speed.times(sides, 64, 3, lab)["sides"]
    assert [side["name"] for side in times] == ["stock", "it"]


# --- other models ---


def put(folder: Path, config: Any, target: Path) -> Path:
    """A random model of a config, with the tokenizer of bytes, in a folder."""
    torch.manual_seed(0)
    AutoModelForCausalLM.from_config(config).save_pretrained(target)
    for path in (folder / "model").glob("tokenizer*"):
        shutil.copy(path, target)
    return target


@torch.inference_mode()
@pytest.mark.parametrize("family", ["llama", "mistral", "gemma3", "qwen2_sliding"])
@pytest.mark.parametrize("way", ["dense", "few", "moved"])
def test_what_is_decoded_leaves_no_trace_in_the_cache(family: str, way: str) -> None:
    """To the bit, with windows shorter than the context and than what is decoded."""
    small = {name: {**options, "n_local": 2} for name, options in WAYS.items()}
    it, model = resolve(way, small, Budget(k=4), 30), model_of(family)
    model.set_attn_implementation("sdpa")
    ids = tokens(1, 30)[0].tolist()
    with_model: Any = SimpleNamespace(model=model)
    cache = decode.prefilled(with_model, ids[:20], it.everything(30), 10)
    again = [decode.decoded(with_model, cache, ids[20:], it)[0] for _ in range(3)]
    fresh_cache = decode.prefilled(with_model, ids[:20], it.everything(30), 10)
    with it.attached(model):
        expected = torch.cat([fed(model, fresh_cache, (token,)) for token in ids[20:-1]])
    assert all(torch.equal(logits, expected) for logits in again)


CONFIGS: dict[str, Any] = {
    "gemma3": Gemma3TextConfig(**SIZES | {"vocab_size": 256}, **BOTH_KINDS),
    "gpt2": GPT2Config(
        vocab_size=256, n_embd=32, n_layer=2, n_head=4, bos_token_id=None, eos_token_id=None
    ),
}


@pytest.mark.parametrize("family", CONFIGS)
def test_models_of_other_kinds_go_all_the_way(folder: Path, tmp_path: Path, family: str) -> None:
    path = tmp_path / "tiny.yaml"
    tasks = {**TASKS, "speed": TASKS["speed"] | {"ways": ["few"]}}
    tasks = {
        name: {**task, "ways": [way for way in task["ways"] if "moved" not in way]}
        for name, task in tasks.items()
    }
    path.write_text(yaml.safe_dump(settings(folder, tasks=tasks)))
    model = put(folder, CONFIGS[family], tmp_path / "model")
    files = ["--settings", str(path), "--model", str(model), "--out", str(tmp_path)]
    assert main(["run", *files]) == 0
    found = json.loads((tmp_path / "quality-tiny.json").read_text())
    assert found["missing"] == 0
    assert found["model"]["kv_heads"] == (2 if family == "gemma3" else 4)
    assert all(row["kl_max"] < 1e-5 for row in rows(found, "same", way="all"))


@pytest.mark.skipif(not Path("/proc/self/clear_refs").exists(), reason="Linux tells peak memory")
@pytest.mark.parametrize("cached", [0, 100])
def test_memory_of_a_model_with_windows(folder: Path, tmp_path: Path, cached: int) -> None:
    model = put(folder, CONFIGS["gemma3"], tmp_path / "model")
    key = resolve("few", WAYS, Budget(k=20), 100).key
    job = {"model": str(model), "gguf_file": None, "dtype": "float32", "way": key, "threads": 1}
    found = speed.measure(job | {"new": 300, "cached": cached})
    tokens_held = (300 + cached) + (BOTH_KINDS["sliding_window"] - 1)
    assert found["cache_mib"] * 2**20 == 2 * 2 * 8 * 4 * tokens_held


def test_a_model_of_windows_alone_is_refused(
    folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    config = MistralConfig(**SIZES | {"vocab_size": 256}, sliding_window=6)
    model = put(folder, config, tmp_path / "model")
    assert "every layer has a window of its own" in told(
        capsys, "run", "--model", str(model), "--out", str(tmp_path / "out")
    )


@pytest.mark.parametrize("family", ["gpt2", "llama"])
def test_a_folder_without_a_tokenizer_says_so(folder: Path, tmp_path: Path, family: str) -> None:
    """For one of them transformers makes an empty one up, for the other it raises."""
    model = put(folder, CONFIGS.get(family) or LlamaConfig(**SIZES), tmp_path / "model")
    for path in model.glob("tokenizer*"):
        path.unlink()
    with pytest.raises(InvalidProblem, match="model: no tokenizer"):
        _ = Lab(model).tokenizer


def test_a_model_without_sdpa_says_so(folder: Path, tmp_path: Path) -> None:
    model = put(folder, model_of("gemma2").config, tmp_path / "model")
    with pytest.raises(InvalidProblem, match="runs with 'sdpa'"):
        _ = Lab(model).model


# --- settings ---


@pytest.mark.parametrize("path", sorted(plan.FOLDER.glob("*.yaml")), ids=lambda path: path.stem)
def test_shipped_settings_are_read(path: Path) -> None:
    read = plan.read(plan.load(path))
    assert read.name == path.stem
    assert read.split == ("report" if path.stem.startswith(("report", "ruler")) else "choose")
    for entry in plan.entries(read):
        for context in getattr(entry.settings, "contexts", getattr(entry.settings, "lengths", ())):
            resolve_all(entry.settings.ways, read.ways, entry.settings.budgets, context)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        (["splt=report"], "settings: 'splt'\n  rule: known are(.|\n)*did you mean 'split'"),
        (["split=rebort"], "settings.split: 'rebort'(.|\n)*did you mean 'report'"),
        (["texts=[]"], r"settings.texts: \[\]"),
        (["tasks.decode.held=0"], "tasks.decode.held: 0\n  rule: it is an integer >= 1"),
        (["tasks.decode.held=yes"], "tasks.decode.held: True\n  rule: it is an integer"),
        (["tasks.decode.documnts=1"], "did you mean 'documents'"),
        (["tasks.decode.contexts=5"], "tasks.decode.contexts: 5\n  rule: it is a list"),
        (["tasks.decode.ways=[fw]"], "tasks.decode.ways: 'fw'(.|\n)*did you mean 'few'"),
        (["tasks.decode.budgets=[{k: 1, share: 0.1}]"], "a budget is one of k, total, share"),
        (["tasks.decode.budgets=[{share: 10}]"], "share a number above 0 and at most 1"),
        (["tasks.decode.budgets=[{kk: 1}]"], "budgets: 'kk'"),
        (["tasks.decode.task=decde"], "tasks.decode: task 'decde'(.|\n)*did you mean 'decode'"),
        (["tasks.needles.kinds=[hay]"], "tasks.needles.kinds: 'hay'"),
        (["tasks.needles.depths=[1.5]"], "it is a number >= 0 <= 1"),
        (["ways.few.vot=hard"], "ways.few: 'vot'(.|\n)*did you mean 'vote'"),
        (["ways.few=3"], "ways.few: 3"),
        (["way.few.vote=hard"], "--set way.few.vote: 'way'(.|\n)*did you mean 'ways'"),
        (["nonsense"], "--set nonsense\n  rule: it is NAME=VALUE"),
        (["tasks=3"], "settings.tasks: 3\n  rule: it maps names to values"),
        (["tasks.decode.task=[decode]"], r"tasks.decode: task \['decode'\]"),
        (["tasks.decode.held.x=1"], "held is 6\n  rule: a dot leads into"),
        (["name=["], r"--set name=\[\n  rule: a value is YAML"),
        (["name=../x"], "settings.name: '../x'\n  rule: files are named after it"),
        (["tasks={../x: {task: decode}}"], "settings.tasks: '../x'"),
        (["ways.few.k=x"], "way 'few': k='x'"),
        (["ways.window.k=x"], "way 'window': k='x'"),
        (["ways.few.k=5"], "ways.few.k, and tasks.decode.budgets"),
    ],
)
def test_errors_of_settings(folder: Path, changes: list[str], message: str) -> None:
    path = folder / "bad.yaml"
    path.write_text(yaml.safe_dump(settings(folder)))
    with pytest.raises(InvalidProblem, match=message):
        plan.read(plan.load(path, changes))


@pytest.mark.parametrize("content", [b"", b"- a", b"\xff", b"a: ["])
def test_what_is_no_file_of_settings(tmp_path: Path, content: bytes) -> None:
    (tmp_path / "bad.yaml").write_bytes(content)
    with pytest.raises(InvalidProblem, match=r"bad\.yaml: "):
        plan.load(tmp_path / "bad.yaml", ["name=5"])


@pytest.mark.parametrize(
    ("way", "message"),
    [
        ({"vote": "sft"}, "way 'few': vote='sft'"),
        ({"n_local": 0}, "way 'few': n_local=0"),
        ({"attend": "dense", "k": 3}, "dense attention has no options"),
        ({"attend": "dens"}, "did you mean 'dense'"),
        ({"preset": "fathful"}, "way 'few': preset='fathful'"),
    ],
)
def test_errors_of_ways(way: dict[str, Any], message: str) -> None:
    with pytest.raises(InvalidProblem, match=message):
        resolve("few", {"few": way}, None, 100)


def test_too_many_documents_are_an_error(folder: Path, lab: Lab) -> None:
    name = str(folder / "text.txt")
    longest = max(len(lab.tokenize(text)) for _, text in texts.stretches(name, "choose"))
    told = rf"has \d+ so long: a document lies in a stretch of 2,000 .* has {longest:,} tokens"
    with pytest.raises(InvalidProblem, match=told):
        lab.documents((name,), "choose", 1000, 100)


def told(capsys: pytest.CaptureFixture[str], *arguments: str) -> str:
    """What the command line says of an error; its exit status is 2."""
    capsys.readouterr()
    try:
        status: Any = main(arguments)
    except SystemExit as end:
        status = end.code
    assert status == 2
    return capsys.readouterr().err


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--settings", "none.yaml"], "none.yaml(.|\n)*quick.yaml"),
        (["--part", "3/2"], "i from 1 to n"),
        (["--threads", "0"], "--threads(.|\n)*'0'"),
        (["--save", "--only", "decode"], "--save with --only(.|\n)*--partial"),
        (["--save", "--part", "1/2"], "--save with --part(.|\n)*collect --save"),
        (["--model", "no/such/folder"], "no/such/folder: no such folder\n"),
        (["--model", "HuggingFaceTB/SmolLM2-135M"], "looks like a hub id(.|\n)*download it"),
        (["--model", "{tmp}"], "GGUF files are none, and it has no config.json"),
        (["--model", "{tmp}", "--gguf-file", "a.gguf"], "--gguf-file a.gguf"),
    ],
)
def test_the_command_line_reports_errors(
    capsys: pytest.CaptureFixture[str], tmp_path: Path, arguments: list[str], message: str
) -> None:
    given = [argument.format(tmp=tmp_path) for argument in arguments]
    assert re.search(message, told(capsys, "run", "--out", str(tmp_path / "out"), *given))


def test_what_is_no_result_is_not_drawn(
    capsys: pytest.CaptureFixture[str], tmp_path: Path, result: dict[str, Any]
) -> None:
    path = tmp_path / "it.json"
    for text in ("# no JSON", "[1]", '{"kind": "another"}'):
        path.write_text(text)
        assert "no result of bench.quality" in told(capsys, "plot", str(path))
    path.write_text(json.dumps(result | {"entries": {}}))
    assert "nothing to draw" in told(capsys, "plot", str(path))


@pytest.mark.parametrize("verb", ["run", "collect"])
def test_help_says_what_settings_may_say(verb: str, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit, match="0"):
        main([verb, "-h"])
    said = capsys.readouterr().out
    for word in ("quick.yaml", "n_sink", "extrapolate", "window", *plan.TASKS, "thetas"):
        assert word in said


def test_what_is_saved_is_whole(
    folder: Path,
    out: Path,
    result: dict[str, Any],
    monkeypatch: pytest.MonkeyPatch,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
) -> None:
    monkeypatch.setattr("bench.quality.__main__.RESULTS", tmp_path / "results")
    saved = tmp_path / "results" / "quality-tiny.json"
    (tmp_path / "tiny.yaml").write_text(yaml.safe_dump(settings(folder)))
    files = ["--settings", str(tmp_path / "tiny.yaml"), "--model", str(folder / "model")]

    def collect(out: Path, *more: str) -> list[str]:
        return ["collect", *files, "--out", str(out), "--save", *more]

    few = tmp_path / "few"
    assert "has none of the" in told(capsys, *collect(few))
    assert "has none of the" in told(capsys, *collect(few, "--partial"))
    lines = (out / "cells.jsonl").read_text().splitlines(keepends=True)
    few.mkdir()
    (few / "cells.jsonl").write_text("".join(lines[:-3]))
    assert "--save with 3 cells missing" in told(capsys, *collect(few))
    assert not saved.exists()
    assert main(collect(few, "--partial")) == 0
    assert json.loads(saved.read_text())["missing"] == 3
    assert "3 cells of these settings have not been run." in page.page(saved.parent)
    assert main(collect(out)) == 0
    assert json.loads(saved.read_text())["missing"] == 0


def test_cells_of_several_entries_count_once(
    folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    both = {"decode": TASKS["decode"], "again": TASKS["decode"] | {"task": "decode"}}
    tasks = both | {"mass": TASKS["mass"]}
    commanded(folder, tmp_path / "out", "--only", "mass", tasks=tasks)
    said = capsys.readouterr().out
    assert "1 cells, 0 of them done before" in said
    assert "8 cells are still missing" in said  # 2 documents, dense and 3 ways


def test_a_run_that_is_stopped_says_what_it_kept(
    folder: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    def stopped(cells: Any, lab: Lab) -> Iterator[Any]:
        yield cells[0], {"kl": 0.5}
        raise KeyboardInterrupt

    monkeypatch.setattr(decode, "run", stopped)
    path = tmp_path / "tiny.yaml"
    path.write_text(yaml.safe_dump(settings(folder, tasks={"decode": TASKS["decode"]})))
    files = ["--settings", str(path), "--model", str(folder / "model")]
    assert main(["run", *files, "--out", str(tmp_path / "out")]) == 130
    said = capsys.readouterr()
    assert "stopped; 1 of 8 cells are kept, the same command goes on" in said.err
    assert len(store.read(tmp_path / "out")) == 1
    line = next(line for line in said.out.splitlines() if line.startswith("1/8"))
    assert re.fullmatch(
        r"1/8 decode: context=96, document=\S+, held=6, way=dense: kl=0.5 \(.* s\)", line
    )


def test_a_line_about_speed_says_how_fast(result: dict[str, Any]) -> None:
    (row,) = rows(result, "speed")
    said = run.said({"sides": row["sides"]})
    assert said[0] == f"'sdpa, DynamicCache' {1e3 * row['sides'][0]['median']:.1f} ms"
    assert len(said) == len(row["sides"])


def test_without_lm_eval_nothing_is_run(
    folder: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    def missing() -> None:
        raise InvalidProblem("RULER without lm-eval", "", "")

    monkeypatch.setattr(bench.quality.ruler, "need_lm_eval", missing)
    path = tmp_path / "tiny.yaml"
    task = {"ways": ["few"], "lengths": [1024], "samples": 1, "budgets": [{"k": 9}]}
    path.write_text(yaml.safe_dump(settings(folder, tasks={"mass": TASKS["mass"], "ruler": task})))
    files = ["--settings", str(path), "--model", str(folder / "model"), "--out", str(tmp_path)]
    assert "RULER without lm-eval" in told(capsys, "run", *files)
    assert store.read(tmp_path) == {}
    assert main(["run", *files, "--only", "mass"]) == 0


# --- page and pictures ---


def test_the_page_is_the_committed_results() -> None:
    committed = (fresh.ROOT / "docs" / "quality.md").read_text("utf-8")
    assert committed == page.page(), "run: python -m bench.quality page > docs/quality.md"


def test_the_readme_says_what_is_reported() -> None:
    readme = " ".join((fresh.ROOT / "README.md").read_text("utf-8").split())
    results = {
        name: json.loads((page.RESULTS / f"quality-{name}.json").read_text("utf-8"))["entries"]
        for name in ("report", "report-long")
    }

    def row(report: str, entry: str, **what: Any) -> dict[str, Any]:
        (found,) = [r for r in results[report][entry]["summary"] if what.items() <= r.items()]
        return found

    for way, said in (("faithful", "selected"), ("window", "the first and newest tokens alone")):
        r = row("report", "decode", way=way, budget="10 %", context=8064)
        assert r["documents"] == 8
        assert f"| {said}" in readme
        assert f"| {r['loss']:+.2%} | {r['kl']:.4f} |" in readme
    selected, window = (
        row("report-long", "sparse", way=way, budget="10 %") for way in ("faithful", "window")
    )
    assert f"is {selected['loss']:+.1%} over dense against {window['loss']:+.1%}" in readme
    assert f"better on {selected['beats']} of {selected['documents']} texts" in readme
    copying, other = "of sdpa, DynamicCache", "of sdpa, TokenSelectCache"
    for context, said in (
        (32_768, "takes {:.2f} of the time that stock `sdpa` takes, {:.2f} of what it takes over"),
        (8_192, "with 8,192, {:.2f} and {:.2f}"),
    ):
        sides = row("report", "speed", context=context)["sides"]
        (side,) = [side for side in sides if side["name"] == "faithful 10 %"]
        assert said.format(side[copying], side[other]) in readme
    for entry, length in (("needles-beyond", "16,384"), ("needles-32k", "32,768")):
        r = row("report-long", entry, depth=None)
        assert f"{r['right']} of {r['tries']} times in {length} tokens" in readme


def test_the_page_shows_every_entry(
    folder: Path, out: Path, result: dict[str, Any], tmp_path: Path
) -> None:
    (tmp_path / "quality-tiny.json").write_text(json.dumps(result))
    shown = page.page(tmp_path)
    for name in TASKS:
        assert f"### tiny: {name}" in shown
    for row in result["entries"]["decode"]["summary"]:
        assert f"| {row['perplexity']:.3f} |" in shown
    assert "| 0 of 3 | 0% to 56% |" in shown
    assert (out / "quality-tiny.md").read_text().startswith("## tiny: model")


def test_a_page_has_reports_first_and_by_name(result: dict[str, Any], tmp_path: Path) -> None:
    order = ["report", "report-long", "choose", "choose-long"]
    for day, name in enumerate(order):
        split = {"split": name.partition("-")[0]}
        one = result | {"name": name, "settings": result["settings"] | split, "date": f"{day}"}
        (tmp_path / f"quality-{name}.json").write_text(json.dumps(one))
    shown = page.page(tmp_path)
    at = [shown.index(f"## {name}: model") for name in order]
    assert at == sorted(at)


def test_pictures_are_drawn(out: Path, result: dict[str, Any], tmp_path: Path) -> None:
    assert main(["plot", str(out / "quality-tiny.json"), "--out", str(tmp_path)]) == 0
    names = {path.name for path in tmp_path.glob("*.png")}
    assert names == {f"quality-tiny-{name}.png" for name in TASKS}


def test_what_a_result_says_of_itself(result: dict[str, Any], lab: Lab, out: Path) -> None:
    assert (result["kind"], result["missing"]) == ("quality", 0)
    assert result["model"]["sha256"] == lab.fingerprint
    assert result["settings"]["split"] == "choose"
    (ran,) = result["ran"]
    now = provenance.conditions()
    assert ran.keys() == now.keys() | {"cells"}
    assert all(ran[name] == now[name] for name in ("cpu", "threads", "versions"))
    assert ran["commit"].rstrip("+") == now["commit"].rstrip("+")
    assert ran["cells"] == len(store.read(out))
    assert set(ran["versions"]) >= {"torch", "transformers"}
