"""Six tasks of RULER (arXiv 2404.06654), made and scored by lm-eval and read by a model object.

They are those of its thirteen that need no network: the others read essays or questions that are
downloaded. What it takes: pip install '.[ruler]' in a checkout.
"""

import importlib.util
import sys
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, redirect_stderr, redirect_stdout
from dataclasses import dataclass, field
from io import StringIO
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any
from unittest import mock

import torch

from bench.quality import texts
from bench.quality.figures import Row
from bench.quality.session import Case, Session
from bench.quality.tasks import Settings, Task, Values
from tokenselect.errors import InvalidProblem
from tokenselect.integrations.transformers import NAME, TokenSelectCache

TASKS = (
    *("niah_single_1", "niah_multikey_2", "niah_multikey_3"),
    *("ruler_vt", "ruler_cwe", "ruler_fwe"),
)

# In shorter prompts a task does not fit, and lm-eval would try forever.
SHORTEST = 1024
MOST = 500

# Beside its length a prompt may have an answer, which not every task counts in.
_ROOM = 512


@dataclass(frozen=True, kw_only=True)
class Ruler(Task):
    """Score `samples` of each task of TASKS at each length, with that seed of the split.

    lengths  tokens of a prompt with its answer, at most; they may exceed the trained length
    samples  depend on the seed and the tokenizer alone: every variant reads the same, and more
             begin with the same
    """

    kind = "ruler"
    lengths: tuple[int, ...]
    samples: int
    tasks: tuple[str, ...] = TASKS
    seed: int = field(default=0, metadata={"least": 0})

    def cases(self, settings: Settings, session: Session) -> Iterator[Case]:
        seed = texts.seeds(settings.split, self.seed + 1)[-1]
        for length in self.lengths:
            for task in self.tasks:
                check(task, length, self.samples)
                what = {"ruler": task, "length": length, "samples": self.samples, "seed": seed}
                for variant in self.resolved(settings, length):
                    yield Case(
                        task="ruler",
                        key=session.key | what,
                        label={"ruler": task, "context": length} | variant.label,
                        work=f"ruler {what} {variant.key}",
                        seconds=0.006 * length * self.samples,
                        variant=variant,
                        given=(task, length, self.samples, seed),
                    )

    @staticmethod
    def run(cases: Sequence[Case], session: Session) -> Values:
        for case in cases:
            with case.variant.applied(session.model):
                yield case, scored(session.model, session.tokenizer, *case.given)

    @staticmethod
    def summary(rows: Sequence[Row]) -> list[Row]:
        """Return scores without those of each sample."""
        return [{name: v for name, v in row.items() if name != "scores"} for row in rows]


def check(task: str, length: int, samples: int) -> None:
    """Raise InvalidProblem for what lm-eval cannot make."""
    if task not in TASKS or length < SHORTEST or not 1 <= samples <= MOST:
        raise InvalidProblem(
            f"{samples} samples of RULER's task {task!r} at {length} tokens",
            f"the tasks that need no network are {', '.join(TASKS)}; a prompt of fewer than "
            f"{SHORTEST} tokens has no room for every task, and lm-eval makes 1 to {MOST} samples",
            "ask for such a task, length and number",
        )


def need_lm_eval() -> None:
    """Raise InvalidProblem if lm-eval is not installed."""
    if importlib.util.find_spec("lm_eval") is None:
        raise InvalidProblem(
            "RULER without lm-eval, which is not installed",
            "lm-eval makes the tasks and scores them",
            "pip install '.[ruler]' in a checkout, another 600 MB; or run the other entries of the "
            "settings: --only NAME ...",
        )


def scored(
    model: Any, tokenizer: Any, task: str, length: int, samples: int, seed: int
) -> dict[str, Any]:
    """Score a model, attending as it does now; prompts have no chat template, as by default.

    Returns the mean score, the number of samples (fewer than asked for, if some did not fit), and
    of each the share of the answers that the model gave, from 0 to 1.
    """
    check(task, length, samples)
    need_lm_eval()
    # Tasks are made with a tokenizer read from a folder, and a GGUF file is none.
    with TemporaryDirectory() as folder, _quietly():
        tokenizer.save_pretrained(folder)
        lm_eval, tasks_folder = _imported()
        # This module has a generator of its own, which no seed reaches and which goes on where
        # the last run stopped: it is read again.
        sys.modules.pop("lm_eval.tasks.ruler.cwe_utils", None)
        found = lm_eval.simple_evaluate(
            model=_reader(model, tokenizer, length),
            tasks=[task],
            task_manager=lm_eval.tasks.TaskManager(
                include_path=tasks_folder,
                include_defaults=False,
                metadata={"tokenizer": folder, "max_seq_lengths": [length]},
            ),
            limit=samples,
            bootstrap_iters=0,
            random_seed=seed,
            numpy_random_seed=seed,
            torch_random_seed=seed,
            fewshot_random_seed=seed,
        )
    scores = [float(sample[str(length)]) for sample in found["samples"][task]]
    return {"score": sum(scores) / len(scores), "samples": len(scores), "scores": scores}


def _imported() -> tuple[Any, Path]:
    """Import lm-eval without a look at the network; return it and its RULER tasks' folder.

    One of their modules downloads where sentences end when it is imported; essays are cut there,
    and none of these tasks has any.
    """
    import nltk

    with mock.patch.object(nltk, "download", return_value=False):
        import lm_eval
        from lm_eval.tasks.ruler import prepare_niah
    return lm_eval, Path(prepare_niah.__file__).parent


def _reader(model: Any, tokenizer: Any, length: int) -> Any:
    from lm_eval.models.huggingface import HFLM

    class Reader(HFLM):
        """Where the model selects, it generates with the cache that keeps selections."""

        def _model_generate(self, *arguments: Any, **named: Any) -> torch.Tensor:
            if self.model.config.get_text_config(decoder=True)._attn_implementation == NAME:
                named["past_key_values"] = TokenSelectCache(self.model)
            tokens: torch.Tensor = super()._model_generate(*arguments, **named)
            return tokens

    # With this max_length no prompt is cut, however long the model's own is.
    return Reader(pretrained=model, tokenizer=tokenizer, max_length=length + _ROOM, batch_size=1)


@contextmanager
def _quietly() -> Iterator[None]:
    """Silence lm-eval's own bars, prints and warnings."""
    with redirect_stdout(StringIO()), redirect_stderr(StringIO()):
        yield
