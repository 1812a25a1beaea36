"""Six tasks of RULER (arXiv 2404.06654), made and scored by lm-eval and read by a model object.

They are those of its thirteen that need no network: the others read essays or questions that are
downloaded. What it takes: pip install '.[ruler]' in a checkout.
"""

import importlib.util
import sys
from collections.abc import Sequence
from contextlib import redirect_stderr, redirect_stdout
from dataclasses import dataclass
from io import StringIO
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any
from unittest import mock

import torch

from bench.quality import texts
from bench.quality.figures import Row
from bench.quality.session import Session
from bench.quality.tasks import Asked, Case, Settings, Task, Values
from bench.quality.variants import one_of
from examples.demo.model import named
from tokenselect.errors import InvalidProblem
from tokenselect.integrations.transformers import NAME, TokenSelectCache

TASKS = (
    *("niah_single_1", "niah_multikey_2", "niah_multikey_3"),
    *("ruler_vt", "ruler_cwe", "ruler_fwe"),
)
# In shorter prompts a task does not fit, and lm-eval would try forever.
SHORTEST, MOST = 1024, 500
# Beside its length a prompt may have an answer, which not every task counts in.
_ROOM = 512


@dataclass(frozen=True, kw_only=True)
class Ruler(Task):
    """Score `samples` of each task of TASKS at each length, with the seed-th seed of the split.

    contexts  tokens of a prompt with its answer, at most; they may exceed the trained length
    samples   depend on the seed and the tokenizer alone: every variant reads the same, and more
              begin with the same
    """

    kind = computes = "ruler"
    samples: int
    tasks: tuple[str, ...] = TASKS
    seed: int = 1

    def __post_init__(self) -> None:
        for task in self.tasks:
            one_of("ruler: tasks", task, TASKS)
        if min(self.contexts) < SHORTEST or self.samples > MOST:
            raise InvalidProblem(
                f"ruler: samples={self.samples}, contexts={self.contexts}",
                f"shorter prompts than {SHORTEST} have no room; there are at most {MOST} samples",
                "ask for such ones",
            )

    def asked(self, settings: Settings, session: Session, n: int) -> Asked:
        if importlib.util.find_spec("lm_eval") is None:
            raise InvalidProblem(
                "RULER without lm-eval, which is not installed",
                "lm-eval makes the tasks and scores them",
                "pip install '.[ruler]' in a checkout, another 600 MB; or run the other tasks of "
                "the settings: --only NAME ...",
            )
        seed = texts.seeds(settings.split, self.seed)[-1]
        for task in self.tasks:
            yield {"ruler": task}, {"samples": self.samples, "seed": seed}, None

    @staticmethod
    def run(cases: Sequence[Case], session: Session) -> Values:
        for case in cases:
            asked = case.label["ruler"], case.label["context"], case.more["samples"]
            with case.variant.applied(session.model):
                yield case, scored(session.model, session.tokenizer, *asked, case.more["seed"])

    @staticmethod
    def summary(rows: Sequence[Row]) -> list[Row]:
        """Return scores without those of each sample."""
        return [{name: v for name, v in row.items() if name != "scores"} for row in rows]


def scored(
    model: Any, tokenizer: Any, task: str, length: int, samples: int, seed: int
) -> dict[str, Any]:
    """Score a model, attending as it does now; prompts have no chat template, as by default.

    Returns the mean score, the number of samples (fewer than asked for, if some did not fit), and
    of each the share of the answers that the model gave, from 0 to 1.
    """
    seeds = ("random_seed", "numpy_random_seed", "torch_random_seed", "fewshot_random_seed")
    # Tasks are made with a tokenizer read from a folder, and a GGUF file is none. lm-eval's own
    # bars, prints and warnings are left out.
    with (
        TemporaryDirectory() as folder,
        redirect_stdout(StringIO()),
        redirect_stderr(StringIO()),
        # A module of its tasks downloads where sentences end when it is imported; essays are cut
        # there, and none of these tasks has any.
        mock.patch("nltk.download", return_value=False),
    ):
        tokenizer.save_pretrained(folder)
        import lm_eval
        from lm_eval.models.huggingface import HFLM
        from lm_eval.tasks.ruler import prepare_niah

        class Reader(HFLM):
            """Where the model selects, it generates with the cache that keeps selections."""

            def _model_generate(self, *arguments: Any, **how: Any) -> torch.Tensor:
                if self.model.config.get_text_config(decoder=True)._attn_implementation == NAME:
                    how |= named(self.model, TokenSelectCache(self.model))
                tokens: torch.Tensor = super()._model_generate(*arguments, **how)
                return tokens

        # This module has a generator of its own, which no seed reaches and which goes on where
        # the last run stopped: it is read again.
        sys.modules.pop("lm_eval.tasks.ruler.cwe_utils", None)
        found = lm_eval.simple_evaluate(
            # With this max_length no prompt is cut, however long the model's own is.
            model=Reader(
                pretrained=model, tokenizer=tokenizer, max_length=length + _ROOM, batch_size=1
            ),
            tasks=[task],
            task_manager=lm_eval.tasks.TaskManager(
                include_path=Path(prepare_niah.__file__).parent,
                include_defaults=False,
                metadata={"tokenizer": folder, "max_seq_lengths": [length]},
            ),
            limit=samples,
            bootstrap_iters=0,
            **dict.fromkeys(seeds, seed),
        )
    scores = [float(sample[str(length)]) for sample in found["samples"][task]]
    return {"score": sum(scores) / len(scores), "samples": len(scores), "scores": scores}
