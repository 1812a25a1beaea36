"""Six tasks of RULER (arXiv 2404.06654), made and scored by lm-eval and read by a model object.

They are those of its thirteen that need no network: the others read essays or questions that are
downloaded. What it takes: pip install '.[ruler]' in a checkout.
"""

import importlib.util
import sys
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, redirect_stderr, redirect_stdout
from io import StringIO
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any
from unittest import mock

import torch

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


def run(
    model: Any,
    tokenizer: Any,
    tasks: Sequence[str],
    lengths: Sequence[int],
    samples: int,
    seed: int,
) -> dict[str, Any]:
    """Score a model, attending as it does now, by task and length.

    lengths  tokens of a prompt with its answer, at most, from 1024 on; they may exceed what the
             model was trained for
    samples  of each task and length, 1 to 500. They depend on the seed and the tokenizer, and
             on nothing else: every way of attending reads the same, and more begin with the same

    Prompts are as lm-eval's default has them, without a chat template. Returns {task:
    {str(length): {"score", "samples", "scores"}}}: the mean, how many samples there were (fewer
    than asked for, if some did not fit), and of each the share of the answers that the model gave,
    from 0 to 1. Raises InvalidProblem for an unknown task, for a length or a number of samples that
    is out of range, and if lm-eval is not installed.
    """
    for task in tasks:
        if task not in TASKS:
            raise InvalidProblem(
                f"task {task!r}",
                f"the tasks that need no network are {', '.join(TASKS)}",
                "name one of them",
            )
    for length in lengths:
        if length < SHORTEST:
            raise InvalidProblem(
                f"RULER at {length} tokens",
                f"a prompt of less than {SHORTEST} tokens has no room for every task",
                "give larger lengths",
            )
    if not 1 <= samples <= MOST:
        raise InvalidProblem(
            f"{samples} samples", f"lm-eval makes 1 to {MOST} of a task and length", "ask for fewer"
        )
    need_lm_eval()
    with TemporaryDirectory() as folder:
        # Tasks are made with a tokenizer read from a folder, and a GGUF file is none.
        tokenizer.save_pretrained(folder)
        return {
            task: {
                str(length): _scored(model, tokenizer, folder, task, length, samples, seed)
                for length in lengths
            }
            for task in tasks
        }


def need_lm_eval() -> None:
    """Raise InvalidProblem if lm-eval is not installed."""
    if importlib.util.find_spec("lm_eval") is None:
        raise InvalidProblem(
            "RULER without lm-eval, which is not installed",
            "lm-eval makes the tasks and scores them",
            "pip install '.[ruler]' in a checkout, another 600 MB; or run the other entries of the "
            "settings: --only NAME ...",
        )


def _scored(
    model: Any, tokenizer: Any, folder: str, task: str, length: int, samples: int, seed: int
) -> dict[str, Any]:
    with _quietly():
        lm_eval, tasks_folder = _imported()
        # This module has a generator of its own, which no seed reaches and which goes on where
        # the last run stopped: it is to be read anew.
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
    """lm-eval, and the folder of its RULER tasks, imported without a look at the network.

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
    """Without lm-eval's own bars, prints and warnings."""
    with redirect_stdout(StringIO()), redirect_stderr(StringIO()):
        yield
