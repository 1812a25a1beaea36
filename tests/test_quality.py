"""bench.quality: its split, its keys, its store and its figures, on a tiny random model."""

import json
import math
import random
import shutil
from collections.abc import Iterator
from dataclasses import dataclass, replace
from functools import cached_property
from itertools import pairwise
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from transformers import DynamicCache, Gemma3TextConfig, GPT2Config, LlamaConfig, MistralConfig

import tokenselect
from bench.quality import figures, lossless, needles, page, results, speed, tasks, texts
from bench.quality.__main__ import main
from bench.quality.lossless import Drafts
from bench.quality.needles import Needles
from bench.quality.session import Session, feed
from bench.quality.settings import SETTINGS, VARIANTS
from bench.quality.speed import Speed
from bench.quality.tasks import Decode, Mass, Reuse, Settings, Sparse
from bench.quality.variants import DENSE, resolve
from tests import fresh
from tests.models import BOTH_KINDS, CACHE, SIZES, model_of, put, tokens
from tokenselect.contract import Selection
from tokenselect.errors import InvalidProblem
from tokenselect.integrations.options import parse
from tokenselect.integrations.transformers import TokenSelectCache

Patch, Said = pytest.MonkeyPatch, pytest.CaptureFixture[str]
pytestmark = [pytest.mark.slow, pytest.mark.filterwarnings("ignore:n_sink")]

OURS: dict[str, Any] = {
    "window": {"attend": "window", "n_sink": 2, "n_local": 8},
    "few": {"n_sink": 2, "n_local": 8},
    "reused": {"n_sink": 2, "n_local": 2, "theta": 0.5},
    "moved": {"preset": "extrapolate", "n_sink": 2, "n_local": 8},
    "all": {"k": 1000},
    "all-moved": {"preset": "extrapolate", "k": 1000},
}
THREE, FEW = ("few", "window", "moved"), ("few",)
AT: dict[str, Any] = {"contexts": (96,), "budgets": (0.25,)}
ALL: dict[str, Any] = {"contexts": (96,), "documents": 2}
TASKS: dict[str, Any] = {
    "decode": Decode(variants=THREE, documents=2, continuation=6, **AT),
    "same": Decode(variants=("all", "all-moved"), continuation=6, **ALL),
    "sparse": Sparse(variants=(*THREE, "dense"), contexts=(128,), documents=2, chunk=48,
                     budgets=AT["budgets"]),
    "needles": Needles(variants=("dense", "few"), contexts=(600,), depths=(0.0, 0.5, 1.0), seeds=1,
                       new_tokens=3, budgets=(30,)),
    "reuse": Reuse(variants=FEW, documents=1, continuation=6, thetas=(-1.0, 1.0), **AT),
    "mass": Mass(variants=FEW, documents=1, continuation=4, **AT),
    "all-mass": Mass(variants=("all",), continuation=4, **ALL | {"documents": 1}),
    "lossless": Drafts(variants=("reused",), contexts=(64,), documents=2, turns=3, new_tokens=8,
                       budgets=AT["budgets"]),
    "speed": Speed(variants=("few", "moved"), contexts=(64,), rounds=3, budgets=AT["budgets"]),
}  # fmt: skip
CONFIGS: dict[str, Any] = {
    "llama": LlamaConfig(**SIZES | {"vocab_size": 256, "max_position_embeddings": 512}),
    "gemma3": Gemma3TextConfig(**SIZES | {"vocab_size": 256}, **BOTH_KINDS),
    "gpt2": GPT2Config(
        vocab_size=256, n_embd=32, n_layer=2, n_head=4, bos_token_id=None, eos_token_id=None
    ),
}


@dataclass(frozen=True)
class Tiny:
    """Small settings for a small model, and what running them all once gives."""

    settings: Settings
    session: Session
    out: Path

    @cached_property
    def result(self) -> dict[str, Any]:
        return self.done(self.settings, self.out)

    def only(self, *names: str, **changes: Any) -> Settings:
        return replace(self.settings, tasks={n: replace(TASKS[n], **changes) for n in names})

    def cases(self, settings: Settings, session: Session | None = None) -> dict[str, Any]:
        found = results.planned(settings, session or self.session)
        return {case.sha: case for _, case in found}

    def done(self, settings: Settings, out: Path, *part: int, **other: Session) -> dict[str, Any]:
        """Run what is missing; return what a result's file says."""
        session = other.get("session", self.session)
        cases = results.planned(settings, session)
        results.run(cases, session, out, *part)
        found = json.dumps(results.collect(settings, cases, session, out, "command"))
        result: dict[str, Any] = json.loads(found, parse_constant=pytest.fail)  # no NaN
        return result

    def rows(self, name: str, **which: Any) -> list[dict[str, Any]]:
        return [r for r in self.result["entries"][name]["rows"] if which.items() <= r.items()]


@pytest.fixture(scope="module")
def tiny(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Tiny]:
    folder = tmp_path_factory.mktemp("tiny")
    draw = random.Random(0)
    words = ["".join(draw.choices("etaoin", k=draw.randint(1, 7))) for _ in range(200)]
    text = ". ".join(" ".join(draw.choices(words, k=9)) for _ in range(400))
    (folder / "text.txt").write_text(text)
    names = (str(folder / "text.txt"),)
    settings = Settings(name="tiny", split="choose", tasks=TASKS, variants=OURS, texts=names)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(texts, "STRETCH", 2000)
        yield Tiny(settings, Session(put(folder / "model", CONFIGS["llama"])), folder / "out")


# --- the split ---


def test_the_splits_of_a_text_share_nothing_and_leave_nothing(tiny: Tiny) -> None:
    (name,) = tiny.settings.texts
    text, parts = texts.read(name), {}
    for split in texts.SPLITS:
        for number, stretch in texts.stretches(name, split):
            parts[number] = (text.index(stretch), text.index(stretch) + len(stretch))
            assert number % 2 == texts.SPLITS.index(split)
    ends = [parts[number] for number in range(len(text) // 2000)]
    assert all(before[1] <= after[0] for before, after in pairwise(ends))
    assert (texts.seeds("choose", 3), texts.seeds("report", 3)) == ([0, 2, 4], [1, 3, 5])
    reading = tiny.only(*(name for name in TASKS if name != "speed"))
    one, other = (set(tiny.cases(replace(reading, split=split))) for split in texts.SPLITS)
    assert one
    assert not one & other
    for split, other_split in (texts.SPLITS, texts.SPLITS[::-1]):
        hays = [needles.natural([name], split, seed, 600) for seed in texts.seeds(split, 3)]
        others = [stretch[:200] for _, stretch in texts.stretches(name, other_split)]
        assert not any(stretch in hay for hay in hays for stretch in others)


@pytest.mark.parametrize("name", ["kjv", "pydoc", "source"])
def test_the_splits_of_a_shipped_text_share_next_to_nothing(name: str, monkeypatch: Patch) -> None:
    """Less than 1 %, in verbatim stretches of 200 characters."""
    monkeypatch.setattr(texts, "STRETCH", 80_000)
    choose, report = (
        [text[:36_000] for _, text in texts.stretches(name, split)] for split in texts.SPLITS
    )
    seen = {hash(text[i : i + 200]) for text in choose for i in range(len(text) - 199)}
    shared = 0
    for text in report:
        hits = [i for i in range(len(text) - 199) if hash(text[i : i + 200]) in seen]
        shared += len({at for i in hits for at in range(i, i + 200)})
    assert shared < 0.01 * sum(map(len, report))


def test_a_paragraph_that_comes_again_is_left_out() -> None:
    once, short = "This paragraph has more than forty letters.", "Example:"
    text = "\n\n".join([once, short, "Another.", once.replace(" ", "\n  "), short, "The end."])
    assert texts.unrepeated(text).split("\n\n") == [once, short, "Another.", short, "The end."]
    assert texts.unrepeated(texts.read("pydoc")) == texts.read("pydoc")


# --- variants ---


def test_variants_of_one_budget_attend_to_equally_many() -> None:
    given = {**OURS, "other": {"n_sink": 5, "n_local": 5, "scope": "group"}}
    several = [resolve(name, given, 100, 1000) for name in ("window", "few", "other")]
    several.append(resolve("few", given, 0.1, 1000))
    assert {variant.label["size"] for variant in several} == {100}
    assert [several[0].given[name] for name in ("k", "n_sink", "n_local")] == [0, 2, 98]


@pytest.mark.parametrize(
    ("given", "budget", "message"),
    [
        ({}, 0.05, r"(?s)0.05 at 100 tokens.*n_sink=2"),
        ({}, 1.5, "a share, above 0 and at most 1"),
        ({"k": 5}, 50, "k=5 and a budget"),
        ({"vote": "sft"}, None, "variant 'few': vote='sft'"),
        ({"attend": "windw"}, None, "did you mean 'window'"),
    ],
)
def test_a_variant_that_cannot_be_is_refused(given: Any, budget: Any, message: str) -> None:
    with pytest.raises(InvalidProblem, match=message):
        resolve("few", {"few": OURS["few"] | given}, budget, 100)


def test_every_option_of_a_variant_reaches_the_model(tiny: Tiny) -> None:
    given = {"k": 3, "vote": "hard", "theta": 0.5, "max_reuse": 7, "backend": "cpu", "chunk": 5}
    assert resolve("it", {"it": given}, None, 100).given["prefill"] == "selected"
    given |= {"prefill": "dense", "dense_below": 9}
    it = resolve("it", {"it": given}, None, 100)
    with it.applied(tiny.session.model):
        assert parse(tiny.session.config.tokenselect) == it.options
        with DENSE.applied(tiny.session.model):
            assert tiny.session.config._attn_implementation == "sdpa"
        assert tiny.session.config._attn_implementation == "tokenselect"


# --- keys and the store ---

OTHERWISE: dict[str, dict[str, Any]] = {
    **{name: {"continuation": 7, "contexts": (97,)} for name in ("decode", "mass", "reuse")},
    "sparse": {"chunk": 7, "counted_from": 0.25, "contexts": (129,)},
    "needles": {"new_tokens": 4, "depths": (0.25,), "contexts": (601,)},
}


@pytest.mark.parametrize("name", OTHERWISE)
def test_keys_change_with_all_that_decides_a_value(tiny: Tiny, name: str) -> None:
    def keys(given: Any = OURS, session: Any = None, **more: Any) -> set[str]:
        settings = replace(tiny.only(name, variants=FEW, **more), variants=given)
        found = tiny.cases(settings, session)
        return {sha for sha, case in found.items() if case.variant.kind != "dense"}

    before = keys()
    assert keys() == before
    options = [{"vote": "hard"}, {"normalize": "candidates"}, {"chunk": 7}, {"backend": "cpu"}]
    for option in options:
        assert not keys({"few": OURS["few"] | option}) & before, option
    for setting, value in (OTHERWISE[name] | {"budgets": (43,)}).items():
        assert not keys(**{setting: value}) & before, setting
    twin = Session(tiny.session.path)
    twin.__dict__["fingerprint"] = "another model"
    for session in (twin, Session(tiny.session.path, dtype="bfloat16")):
        assert not keys(session=session) & before
    assert name != "reuse" or keys(max_reuse=3) - before


def test_keys_change_with_the_text_and_the_weights_and_not_with_names(
    tiny: Tiny, tmp_path: Path
) -> None:
    text = Path(tiny.settings.texts[0]).read_text()
    (tmp_path / "text.txt").write_text(text.replace("e", "t", 1))
    decode = tiny.only("decode")
    other = replace(decode, texts=(str(tmp_path / "text.txt"),))
    one, two = ({case.more["sha"] for case in tiny.cases(s).values()} for s in (decode, other))
    assert one - two
    renamed = replace(
        tiny.only("decode", variants=tuple("x" + variant for variant in THREE)),
        variants={"x" + variant: given for variant, given in OURS.items()},
    )
    assert set(tiny.cases(renamed)) == set(tiny.cases(decode))
    shutil.copytree(tiny.session.path, tmp_path / "twin")
    assert Session(tmp_path / "twin").fingerprint == tiny.session.fingerprint
    weights = tmp_path / "twin" / "model.safetensors"
    content = weights.read_bytes()
    weights.write_bytes(content[:-1] + bytes([content[-1] ^ 1]))
    assert Session(tmp_path / "twin").fingerprint != tiny.session.fingerprint


def test_a_run_that_was_cut_off_goes_on(tiny: Tiny, tmp_path: Path, monkeypatch: Patch) -> None:
    """In parts too; a case that was being written, or that nobody asks for, is none."""
    some, run = tiny.only("decode", "sparse", "mass"), Decode.run

    def stopped(cases: Any, session: Session) -> Iterator[Any]:
        yield next(run(cases, session))
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(Decode, "run", staticmethod(stopped))
        with pytest.raises(KeyboardInterrupt):
            tiny.done(some, tmp_path)
    (kept,) = (tmp_path / "cases").iterdir()
    kept.with_suffix(".123").write_text('{"va')
    before = kept.stat().st_mtime_ns
    assert tiny.done(some, tmp_path, 1, 2)["missing"] > 0
    first = set(results.read(tmp_path))
    found = tiny.done(some, tmp_path, 2, 2)
    assert first < set(results.read(tmp_path)) == set(tiny.cases(some))
    assert kept.stat().st_mtime_ns == before
    assert found["missing"] == 0
    assert found["entries"] == {name: tiny.result["entries"][name] for name in some.tasks}
    mass = tiny.done(tiny.only("mass"), tmp_path)
    assert mass["entries"] == {"mass": tiny.result["entries"]["mass"]}
    ran = results.conditions() | {"cases": len(tiny.cases(tiny.only("mass")))}
    assert mass["ran"] == [ran]
    assert mass["model"]["sha256"] == tiny.session.fingerprint
    assert (mass["kind"], mass["settings"]["split"]) == ("quality", "choose")


def test_what_is_saved_is_whole(
    tiny: Tiny, monkeypatch: Patch, tmp_path: Path, capsys: Said
) -> None:
    (tmp_path / "results").mkdir()
    monkeypatch.setattr(page, "RESULTS", tmp_path / "results")
    monkeypatch.setitem(SETTINGS, "tiny", tiny.settings)
    saved = tmp_path / "results" / "quality-tiny.json"
    assert tiny.result["missing"] == 0
    shutil.copytree(tiny.out / "cases", tmp_path / "cases")
    for path in sorted((tmp_path / "cases").iterdir())[:3]:
        path.unlink()
    model = str(tiny.session.path)
    collect = ["collect", "--settings", "tiny", "--model", model, "--save", "--out"]
    for out, complaint in (("none", "has none of the"), (".", "--save with 3 cases missing")):
        assert main([*collect, str(tmp_path / out)]) == 2
        assert complaint in capsys.readouterr().err
    assert not saved.exists()
    assert main([*[word for word in collect if word != "--save"], str(tmp_path)]) == 0
    assert "3 cases of these settings" in (tmp_path / "quality-tiny.md").read_text()
    assert main([*collect, str(tiny.out)]) == 0
    assert json.loads(saved.read_text())["entries"] == tiny.result["entries"]
    with pytest.raises(SystemExit, match="2"):
        main([*collect, str(tiny.out), "--only", "decode"])
    run = ["run", *collect[1:5], "--only", "decode", "--out", str(tmp_path / "again"), "--part"]
    for part in ("3/2", "0/1", "x"):
        with pytest.raises(SystemExit, match="2"):
            main([*run, part])
    assert main([*run, "1/1"]) == 0
    again = json.loads((tmp_path / "again" / "quality-tiny.json").read_text())
    assert again["entries"] == {"decode": tiny.result["entries"]["decode"]}


# --- figures ---


@torch.inference_mode()
def test_dense_attention_and_a_budget_for_everything_change_nothing(tiny: Tiny) -> None:
    for name in ("decode", "sparse"):
        dense = tiny.rows(name, variant="dense")
        assert len(dense) == 2
        assert all(r["kl"] == r["kl_max"] == 0 and r["agreement"] == 1 for r in dense)
        for variant in THREE:
            assert all(r["kl"] > 1e-6 for r in tiny.rows(name, variant=variant))
    nll = {r["document"]: r["nll"] for r in tiny.rows("same", variant="dense")}
    found = tiny.rows("same", variant="all") + tiny.rows("same", variant="all-moved")
    assert len(found) == 4
    for row in found:
        assert row["kl_max"] <= 1e-6
        assert row["agreement"] == 1
        assert row["nll"] == pytest.approx(nll[row["document"]], abs=1e-5)
    # And dense likelihoods are those of one forward pass.
    ((name, _, ids), _) = texts.documents(tiny.session, tiny.settings.texts, "choose", 2, 129)
    logits = tiny.session.model(torch.tensor([ids])).logits[0, :-1].double().log_softmax(-1)
    expected = -logits.gather(1, torch.tensor(ids)[1:, None])[:, 0]
    for task, of in (("sparse", slice(64, 128)), ("decode", slice(96, 102))):
        (row,) = tiny.rows(task, variant="dense", document=name)
        assert row["tokens"] == of.stop - of.start
        assert row["nll"] == pytest.approx(float(expected[of].mean()), abs=1e-5)


def test_kl_and_agreement_are_those_of_torch() -> None:
    torch.manual_seed(0)
    p, q = torch.randn(2, 150, 7)
    log_p, log_q = p.log_softmax(-1), q.log_softmax(-1)
    following = [i % 7 for i in range(150)]
    nll = -log_q.gather(1, torch.tensor(following)[:, None]).mean()
    kl = torch.nn.functional.kl_div(log_q, log_p, reduction="none", log_target=True).sum(-1)
    agree = (p.argmax(-1) == q.argmax(-1)).float()
    expected = {"tokens": 150, "nll": nll, "kl": kl.mean(), "kl_max": kl.max()}
    expected = {name: float(value) for name, value in expected.items()}
    expected["agreement"] = float(agree.mean())
    found = figures.beside_dense(q.split(100), p.split(100), following)
    assert found == pytest.approx(expected, rel=1e-5)


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
def test_kl_where_a_probability_is_nothing(logits: Any, dense: Any, kl: float) -> None:
    found = figures.beside_dense([torch.tensor([logits])], [torch.tensor([dense])], [0])
    assert [found["kl"], found["kl_max"]] == pytest.approx([kl, kl], nan_ok=True)


def test_intervals_are_the_known_ones() -> None:
    known = {(0, 10): (0, 0.2775), (10, 10): (0.7225, 1), (5, 10): (0.2366, 0.7634)}
    known |= {(81, 263): (0.2553, 0.3662)}  # Newcombe 1998, table I
    for (right, tries), ends in known.items():
        assert figures.wilson(right, tries) == pytest.approx(ends, abs=5e-5)
    # Of 400 tries, 80 right: 1.96 standard errors of 0.02 to either side.
    found = figures.bootstrapped([1.0] * 80 + [0.0] * 320)
    assert found == pytest.approx((0.2 - 0.0392, 0.2 + 0.0392), abs=0.003)


def reading(document: str, variant: str, nll: float, **more: Any) -> dict[str, Any]:
    """What one variant makes of one document; dense, a window, or one that selects 100 tokens."""
    kind = variant if variant in ("dense", "window") else "select"
    size = None if variant == "dense" else 100
    base = {"context": 1, "document": document, "variant": variant, "budget": "", "kind": kind}
    return base | {"size": size, "nll": nll, "kl": nll / 10, "kl_max": nll, "agreement": 0.5} | more


def two_documents(**more: Any) -> list[dict[str, Any]]:
    nll = {"a": {"dense": 1.0, "window": 1.5, "it": 1.2}, "b": {"dense": 2, "window": 2, "it": 2.4}}
    return [reading(d, v, x, **more) for d, of in nll.items() for v, x in of.items()]


def test_a_summary_says_what_its_rows_say() -> None:
    several = two_documents()
    other = [reading("a", "x", 1.2, kl=0.11), reading("b", "x", 2.4, kl=0.25)]
    found = {r["variant"]: r for r in figures.against_dense(several + other)}
    it = found["it"]
    assert it["perplexity"] == pytest.approx(math.exp(1.8))
    assert it["loss"] == pytest.approx(math.exp(0.3) - 1)
    assert it["worst"] == pytest.approx(math.exp(0.4) - 1)
    # A quarter of all samples of two have one of them twice.
    assert it["loss_95"] == pytest.approx([math.exp(0.2) - 1, math.exp(0.4) - 1])
    assert it["kl_95"] == pytest.approx([0.12, 0.24])
    assert (it["gains"], it["beats"], it["documents"]) == (1, 1, 2)
    assert [found[variant]["closer"] for variant in ("it", "x", "dense")] == [0, 1, None]
    # Beyond the trained length all documents count.
    beyond = figures.against_dense(two_documents(within_trained=False))
    assert [(r["gains"], r["beats"]) for r in beyond if r["variant"] == "it"] == [(2, 1)]


@pytest.mark.parametrize("order", [1, -1])
def test_of_two_windows_the_better_counts(order: int) -> None:
    windows = [reading("a", "window", 1.5), reading("a", "other", 1.1, kind="window")][::order]
    rest = [*windows, reading("a", "it", 1.2), reading("a", "best", 1.05)]
    flagged = figures.beside_window([reading("a", "dense", 1.0), *rest])[-2:]
    assert [(r["dense_gains"], r["beats_window"]) for r in flagged] == [(True, False), (True, True)]
    ties = figures.beside_window([reading("a", "dense", 1.1), *rest])[-2:]
    assert [r["dense_gains"] for r in ties] == [False, False]


# --- tasks ---


def test_reuse_counts_its_hits(tiny: Tiny) -> None:
    (always,) = tiny.rows("reuse", theta=-1)
    assert always["hit_rate"] == pytest.approx(5 / 6)  # all but the first step
    (same,) = tiny.rows("reuse", theta=1)
    (never,) = tiny.rows("reuse", theta=None, variant="few")
    assert same["hit_rate"] == 0
    assert "hit_rate" not in never
    assert never["nll"] == same["nll"]


def test_mass_and_overlap_of_everything_are_one(tiny: Tiny) -> None:
    (everything,) = tiny.rows("all-mass")
    assert everything["mass"] == [[1.0] * 4] * 2
    (few,) = tiny.rows("mass")
    assert all(0 < x <= 1 for of_layer in few["mass"] for x in of_layer)
    assert few["by_layer"][0][0] == few["by_layer"][1][1] == 1
    assert few["by_layer"][0][1] == few["by_layer"][1][0] < 1


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
    assert tasks.of_infos(infos, 3, 8, config) == {
        "mass": [[0.3, 0.4], [0.5, 0.7]],
        "by_step": [0.75, 0.1667],  # (1 + 1/2) / 2 and (1/3 + 0) / 2
        "by_layer": [[1, 0.5556], [0.5556, 1]],  # (1/3 + 1/3 + 1) / 3
    }
    nothing = torch.zeros(1, 6, dtype=torch.bool)
    assert tasks.overlap(nothing, nothing) == 1


def test_a_summary_of_mass_is_a_mean_over_documents() -> None:
    def of(a: float | None, overlap: float) -> dict[str, Any]:
        by_layer = [[1, overlap], [overlap, 1]]
        base = {"context": 1, "variant": "it", "budget": "", "size": 9}
        mass = [[a, 0.8], [0.6, 0.6]]
        return base | {"mass": mass, "by_step": [overlap, 0.5], "by_layer": by_layer}

    (found,) = Mass.summary([of(0.2, 0.1), of(0.6, 0.3)])
    assert found["documents"] == 2
    assert (found["mass"], found["least_of_a_head"]) == (0.6, 0.4)
    assert (found["by_step"], found["neighbours"]) == (0.35, 0.2)
    (unknown,) = Mass.summary([of(None, 0.1), of(0.6, 0.3)])
    assert unknown["mass"] is unknown["least_of_a_head"] is None


@pytest.mark.parametrize("kind", needles.KINDS)
def test_needles_lie_where_they_are_said_to(tiny: Tiny, kind: str) -> None:
    numbers = set()
    for depth in (0.0, 0.5, 1.0):
        given = tiny.settings, tiny.session, kind, 1200, depth
        prompt, number = needles.make(*given, 4)
        assert (prompt, number) == needles.make(*given, 4)
        assert 1200 - 120 <= len(tiny.session.encode(prompt)) <= 1200
        assert prompt.count(number) == 1
        at = prompt.index(number) / prompt.index("Question:")
        assert at == pytest.approx(depth, abs=0.15)
        numbers |= {number, needles.make(*given, 6)[1]}
    assert len(numbers) == 6
    with pytest.raises(InvalidProblem, match="did you mean 'natural'"):
        needles.make(tiny.settings, tiny.session, "natral", 1200, 0.5, 4)
    text = "One. At 3.14 see os.path! Two."
    ends = [needles.sentence_end(text, near) for near in range(len(text) + 1)]
    assert ends == [0] * 4 + [4] * (len(text) - 4) + [len(text)]


@pytest.mark.parametrize("wrong", ["", "1"])
def test_needles_are_read_and_scored(tiny: Tiny, monkeypatch: Patch, wrong: str) -> None:
    settings = tiny.only("needles", kinds=("filler",), depths=(0.5,))
    cases = list(tiny.cases(settings).values())
    answer, seen = f"It is {cases[0].given[1]}{wrong}.", []

    def generate(inputs: torch.Tensor, **_: Any) -> torch.Tensor:
        options = tiny.session.config.tokenselect or {}
        seen.append((tiny.session.config._attn_implementation, options.get("k")))
        return torch.tensor([[*inputs[0].tolist(), *tiny.session.encode(answer)]])

    monkeypatch.setattr(tiny.session.model, "generate", generate)
    values = [value for _, value in Needles.run(cases, tiny.session)]
    assert [(v["right"], v["answer"]) for v in values] == [(not wrong, answer)] * 2
    assert seen == [("sdpa", None), ("tokenselect", 20)]
    (every, _) = Needles.summary([cases[1].row | v for v in [*values, {"right": False}]])
    assert (every["right"], every["tries"]) == (2 * (not wrong), 3)


def test_ratios_are_of_a_contender_to_the_baseline(tiny: Tiny, monkeypatch: Patch) -> None:
    """By a clock that says how long each token took; the first round is warm-up."""
    (row,) = tiny.rows("speed")
    names = [c["name"] for c in row["contenders"]]
    assert names == ["sdpa, DynamicCache", "sdpa, TokenSelectCache", "few 25 %", "moved 25 %"]
    took, clock = {"sdpa": [1000, 1, 2, 3], "tokenselect": [1000, 3, 4, 9]}, [0]

    def timed(model: Any, cache: Any, ids: tuple[int, ...]) -> Any:
        if ids != (0,):
            clock[0] += took[model.config._attn_implementation][ids[0] - 100]
        return feed(model, cache, ids)

    monkeypatch.setattr(speed, "feed", timed)
    monkeypatch.setattr(speed, "time", SimpleNamespace(perf_counter=lambda: clock[0]))
    both = [speed.Contender("stock", DENSE), speed.Contender("it", resolve("few", OURS, 14, 30))]
    stock, it = speed.times(both, 30, 3, tiny.session)["contenders"]
    assert stock == {"name": "stock", "median": 2, "least": 1, "largest": 3, "of stock": 1}
    assert it == {"name": "it", "median": 4, "least": 3, "largest": 9, "of stock": 3}


def test_drafts_are_judged_beside_stock_attention(tiny: Tiny, monkeypatch: Patch) -> None:
    """By a clock that says how long each way took; one text of three is made another."""
    model, clock = tiny.session.model, [0]
    case, _ = tiny.cases(tiny.only("lossless")).values()
    generate, ids = model.generate, case.given[0]

    def timed(prompt: torch.Tensor, custom_generate: Any, **how: Any) -> torch.Tensor:
        assert prompt[0].tolist() == list(ids[: prompt.shape[1]])
        text = generate(prompt, custom_generate=custom_generate, **how)
        is_stock = type(how.pop(CACHE)) is DynamicCache
        with DENSE.applied(model):
            assert text.equal(generate(prompt, **how))  # reading the prompt itself
        clock[0] += 8 * (3 if is_stock else 1 if custom_generate else 2)
        text[0, -1] += bool(custom_generate) and prompt.shape[1] == 72
        return text

    monkeypatch.setattr(model, "generate", timed)
    monkeypatch.setattr(lossless, "time", SimpleNamespace(perf_counter=lambda: clock[0]))
    ((_, value),) = Drafts.run([case], tiny.session)
    rows = Drafts.summary([case.row | value, case.row | value])
    assert [r["name"] for r in rows] == [
        *("sdpa, DynamicCache", "sdpa, TokenSelectCache", "lossless, reused 25 %")
    ]
    assert [(r["ms"], r["same"], r["texts"]) for r in rows] == [
        (3e3, 6, 6),
        (2e3, 6, 6),
        (1e3, 4, 6),
    ]
    assert [r["of sdpa, DynamicCache"] for r in rows] == [
        1,
        pytest.approx(2 / 3),
        pytest.approx(1 / 3),
    ]
    assert rows[2]["of sdpa, TokenSelectCache"] == 0.5
    it = value["contenders"][2]
    assert it["tokens"] == 24 == 3 + it["rounds"] + it["accepted"]
    assert rows[2]["accepted"] == it["accepted"] / it["rounds"] > 0
    assert rows[0]["accepted"] is None


@pytest.mark.skipif(not Path("/proc/self/clear_refs").exists(), reason="Linux tells peak memory")
@pytest.mark.parametrize(
    ("name", "family", "n"),
    [("dense", "llama", 100), ("few", "llama", 100), ("moved", "llama", 100), ("few", "gemma3", 0)],
)
def test_memory_is_measured(tmp_path: Path, name: str, family: str, n: int) -> None:
    path, variant = put(tmp_path / "model", CONFIGS[family]), resolve(name, OURS, 30, 100)
    found = speed.peak(path, None, "float32", variant, 1, 300, n)
    per_layer = [300 + n, BOTH_KINDS["sliding_window"] - 1 if family == "gemma3" else 300 + n]
    assert found["cache_mib"] * 2**20 == 2 * 2 * 8 * 4 * sum(per_layer)
    # The system counts pages roughly; torch alone takes more than the upper bound.
    assert -0.5 <= found["peak_mib"] < 64


# --- other models ---


@torch.inference_mode()
@pytest.mark.parametrize("family", ["llama", "mistral", "gemma3", "qwen2_sliding"])
def test_every_variant_starts_from_the_same_cache(family: str) -> None:
    """Bit-identical, with windows shorter than the context and than what is decoded."""
    model, ids = model_of(family), tuple(tokens(1, 31)[0].tolist())
    model.set_attn_implementation("sdpa")
    small = {key: {**options, "n_local": 2, "theta": -1} for key, options in OURS.items()}
    few, moved = (resolve(name, small, 8, 30) for name in ("few", "moved"))
    passage = tasks.Passage(ids, 20, 20, 1)
    with_model: Any = SimpleNamespace(model=model)
    cases = [
        tasks.Case("decode", Decode.run, v, {}, {}, passage)
        for v in (DENSE, few, moved, few, moved)
    ]
    for case, logits, selections, _ in tasks.passes(cases, with_model):
        cache = TokenSelectCache(model, max_length=31)
        reader = few if case.variant == DENSE else case.variant
        with reader.reading_densely(31).applied(model):
            feed(model, cache, ids[:20])
        with case.variant.applied(model):
            expected = torch.cat([feed(model, cache, (token,)) for token in ids[20:30]])
        assert torch.equal(torch.cat(logits), expected)
        counts = [one.counts() for one in selections]
        assert all(count == ((9, 1) if case.variant != DENSE else (0, 0)) for count in counts)


@pytest.mark.parametrize("family", ["gemma3", "gpt2", "bfloat16"])
def test_models_of_other_kinds_go_all_the_way(tiny: Tiny, tmp_path: Path, family: str) -> None:
    other, bound, left_out = Session(tiny.session.path, dtype="bfloat16"), 0.1, "nothing"
    if family in CONFIGS:
        other, bound, left_out = Session(put(tmp_path / "model", CONFIGS[family])), 1e-5, "moved"
    fit = {}
    for name, task in TASKS.items():
        one = {"documents": 1} if hasattr(task, "documents") else {}
        names = tuple(v for v in task.variants if left_out not in v)
        fit[name] = replace(task, variants=names, **one)
    chosen = replace(tiny.settings, tasks=fit)
    found = tiny.done(chosen, tmp_path, session=other)
    assert found["missing"] == 0
    assert found["model"]["kv_heads"] == (4 if family == "gpt2" else 2)
    rows = found["entries"]["same"]["rows"]
    assert all(row["kl_max"] < bound for row in rows if row["variant"] in ("dense", "all"))


def test_yarn_stretches_a_model(tiny: Tiny) -> None:
    other = Session(tiny.session.path, yarn=2.0)
    assert (other.trained, other.config.rope_parameters["factor"]) == (1024, 2.0)
    assert other.config.rope_parameters["original_max_position_embeddings"] == 512
    assert other.key == tiny.session.key | {"yarn": 2.0}
    shown = page.section(tiny.result | {"model": other.describe()})
    assert "trained for 512 tokens, made to read 2 times as many by YaRN" in shown


def test_models_that_cannot_be_measured_are_refused(tmp_path: Path, capsys: Said) -> None:
    windows = MistralConfig(**SIZES | {"vocab_size": 256}, sliding_window=6)
    with pytest.raises(InvalidProblem, match="every layer has a window of its own"):
        Session(put(tmp_path / "windows", windows)).check_selects()
    with pytest.raises(InvalidProblem, match="runs the model with 'sdpa'"):
        _ = Session(put(tmp_path / "eager", model_of("gemma2").config)).model
    # For one of them transformers makes an empty tokenizer up, for the other it raises.
    for config in (CONFIGS["gpt2"], CONFIGS["llama"]):
        with pytest.raises(InvalidProblem, match="tokenizer"):
            _ = Session(put(tmp_path / config.model_type, config, False)).tokenizer
    assert main(["run", "--model", str(tmp_path / "absent")]) == 2
    assert "no such folder" in capsys.readouterr().err


# --- settings, page and pictures ---


def test_named_settings_can_be_run() -> None:
    used = set()
    for name, settings in SETTINGS.items():
        assert settings.name == name
        assert settings.split == ("report" if name.startswith("report") else "choose")
        for task in settings.tasks.values():
            used.update(task.variants)
            for n in task.contexts:
                assert task.answering(settings, n)
    assert used == {"dense", *VARIANTS}


def test_the_page_is_the_committed_results() -> None:
    committed = page.PAGE.read_text("utf-8").partition(page.MARK + "\n")[2]
    assert committed == page.page(), "run: python -m bench.quality page"
    assert committed


def test_the_readme_says_what_is_reported() -> None:
    readme = " ".join((fresh.ROOT / "README.md").read_text("utf-8").split())
    entries = {
        name: json.loads((page.RESULTS / f"quality-{name}.json").read_text("utf-8"))["entries"]
        for name in ("report", "report-long", "report-voters")
    }

    def row(report: str, entry: str, **what: Any) -> dict[str, Any]:
        (found,) = [r for r in entries[report][entry]["summary"] if what.items() <= r.items()]
        return found

    for name, said in (("faithful", "selected"), ("window", "the first and newest tokens alone")):
        r = row("report", "decode", variant=name, budget="10 %", context=8064)
        assert r["documents"] == 8
        assert f"| {said}" in readme
        assert f"| {r['loss']:+.2%} | {r['kl']:.4f} |" in readme
    selected, window, mean = (
        row("report-voters", "sparse", variant=name, budget="10 %")
        for name in ("every-query", "window", "means-1")
    )
    assert f"as in the paper, it is {mean['loss']:+.1%}" in readme
    assert f"is {selected['loss']:+.1%} over dense against {window['loss']:+.1%}" in readme
    assert f"better on {selected['beats']} of {selected['documents']} texts" in readme
    copying, other = "of sdpa, DynamicCache", "of sdpa, TokenSelectCache"
    for context, said in (
        (32_768, "takes {:.2f} of the time that stock `sdpa` takes, {:.2f} of what it takes over"),
        (8_192, "with 8,192, {:.2f} and {:.2f}"),
    ):
        contenders = row("report", "speed", context=context)["contenders"]
        (it,) = [c for c in contenders if c["name"] == "faithful 10 %"]
        assert said.format(it[copying], it[other]) in readme
    for entry, length in (("needles-beyond", "16,384"), ("needles-32k", "32,768")):
        r = row("report-long", entry, depth=None)
        assert f"{r['right']} of {r['tries']} times in {length} tokens" in readme


def test_a_result_is_shown_and_drawn(tiny: Tiny, tmp_path: Path) -> None:
    names = ["report", "report-long", "choose", "choose-long"]
    for name in names:
        settings = tiny.result["settings"] | {"split": name[:6]}
        one = tiny.result | {"name": name, "settings": settings}
        (tmp_path / f"quality-{name}.json").write_text(json.dumps(one))
    shown = page.page(tmp_path)
    at = [shown.index(f"## {name}: model") for name in names]  # reports first
    assert at == sorted(at)
    for name in TASKS:
        assert f"### report: {name}" in shown
    for row in tiny.result["entries"]["decode"]["summary"]:
        assert f"| {row['perplexity']:.3f} |" in shown
    assert "| 0 of 3 | 0% to 56% |" in shown
    path = tmp_path / "quality-report.json"
    assert main(["plot", str(path), "--out", str(tmp_path)]) == 0
    drawn = {p.name for p in tmp_path.glob("*.png")}
    assert drawn == {f"quality-report-{n}.png" for n, t in TASKS.items() if t.kind != "mass"}
