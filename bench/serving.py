"""python -m bench.serving: SmolLM2 in vLLM, with its own attention and with selection, in one run.

Each document is most of 8,192 tokens of text with a number hidden in it, and a question for the
number. Engines take turns, round by round, in one process; each reads a document, and then decodes
greedily, a request at a time. Times are those of vLLM's steps.
"""

import argparse
import gc
import os
import random
import sys
import time
from collections.abc import Sequence
from pathlib import Path
from statistics import median
from typing import Any

os.environ["VLLM_ENABLE_V1_MULTIPROCESSING"] = "0"
os.environ.setdefault("VLLM_LOGGING_LEVEL", "ERROR")

import torch
from vllm import LLM, SamplingParams

from bench import machine
from bench.quality.texts import stretches
from bench.tables import table
from examples.demo.text import Passage, lay_out
from examples.serve import converted

CONTEXT, TOKENS = 8000, 64
ENGINES: dict[str, dict[str, Any] | None] = {
    "vLLM's own": None,
    "a tenth selected": {"k": 0.1},
    "a tenth, theta 0.9": {"k": 0.1, "theta": 0.9},
}


def passages(tokenizer: Any, count: int) -> list[Passage]:
    """Return documents, each of another stretch of a text, with a number at another depth."""
    made = []
    for at, (stretch, text) in enumerate(stretches("kjv", "report")[:count]):
        rng = random.Random(stretch)
        number = str(rng.randrange(10_000, 100_000))
        made.append(
            lay_out(
                tokenizer, "kjv", text[text.index(". ") + 2 :], number=number,
                n_context=CONTEXT, n_held=0, depth=(at + 0.5) / count,
            )
        )  # fmt: skip
    return made


class Run:
    """What one engine did with its documents: seconds of each prompt, of each token, and tokens."""

    def __init__(self) -> None:
        self.prompts: list[float] = []
        self.steps: list[float] = []
        self.tokens: list[list[int]] = []

    def read(self, engine: Any, passage: Passage) -> None:
        """Read a document and decode."""
        params = SamplingParams(temperature=0, max_tokens=TOKENS, ignore_eos=True)
        prompt = {"prompt_token_ids": passage.context + passage.question}
        engine.add_request(passage.number, prompt, params)
        took, tokens = [], []
        while engine.has_unfinished_requests():
            start = time.perf_counter()
            out = engine.step()
            took.append(time.perf_counter() - start)
            tokens = list(out[0].outputs[0].token_ids) if out else tokens
        self.prompts.append(sum(took[: 1 - TOKENS]))
        self.steps += took[1 - TOKENS :]
        self.tokens.append(tokens)


def alike(a: Sequence[int], b: Sequence[int]) -> int:
    """Return how many tokens two texts have in common before they part."""
    return next((i for i, (x, y) in enumerate(zip(a, b, strict=True)) if x != y), len(a))


def measure(folder: Path, dtype: str, documents: int, rounds: int, eager: bool) -> list[Any]:
    """Return a row for each engine."""
    runs = {name: Run() for name in ENGINES}
    texts: list[Passage] = []
    for turn in range(rounds):
        for name, options in list(ENGINES.items())[:: 1 if turn % 2 == 0 else -1]:
            more: dict[str, Any] = {}
            if options is not None:
                given = {"tokenselect": options}
                more = {"attention_backend": "TOKENSELECT", "hf_overrides": given}
            llm = LLM(
                str(folder), dtype=dtype, enforce_eager=eager, kv_cache_memory_bytes=2**30,
                enable_prefix_caching=False, max_num_seqs=8, **more,
            )  # fmt: skip
            tokenizer = llm.get_tokenizer()
            texts = texts or passages(tokenizer, documents)
            for text in texts:
                runs[name].read(llm.llm_engine, text)
            llm.llm_engine.engine_core.shutdown()
            del llm
            gc.collect()
    stock, rows = runs["vLLM's own"], []
    for name, run in runs.items():
        ms = [1e3 * x for x in (median(run.steps), min(run.steps), max(run.steps))]
        right = sum(
            text.number in tokenizer.decode(told)
            for text, told in zip(texts, run.tokens, strict=False)
        )
        same = [alike(a, b) for a, b in zip(run.tokens, stock.tokens, strict=True)][:documents]
        rows.append(
            (
                *(dtype, name, f"{median(run.prompts):.2f}"),
                f"{ms[0]:.1f} ({ms[1]:.1f}–{ms[2]:.1f})",
                f"{median(run.steps) / median(stock.steps):.2f}",
                *(f"{right} of {documents}", ", ".join(map(str, same))),
            )
        )
    return rows


def main(argv: Sequence[str] | None = None) -> int:
    """Run the comparison; return the exit code."""
    parser = argparse.ArgumentParser(prog="python -m bench.serving", description=__doc__)
    add = parser.add_argument
    add("--folder", type=Path, required=True, help="where the model is, or goes")
    add("--dtypes", nargs="+", default=["float32", "bfloat16"])
    add("--documents", type=int, default=4)
    add("--rounds", type=int, default=2)
    add("--compile", action="store_true", help="let vLLM compile the model, as it does by default")
    asked = parser.parse_args(argv)
    rows: list[Any] = []
    with torch.inference_mode():
        for dtype in asked.dtypes:
            rows += measure(
                converted(asked.folder), dtype, asked.documents, asked.rounds, not asked.compile
            )
    host = machine.describe(torch.get_num_threads())
    print(f"{host['cpu']}, {host['threads']} thread(s), torch {host['torch']}, at {host['commit']}")
    head = (
        *("dtype", "attention", "s per prompt", "ms per token", "over vLLM's"),
        *("number found", f"tokens as vLLM's own, of {TOKENS}"),
    )
    print("\n" + "\n".join(table(head, rows, is_padded=True)))
    return 0


if __name__ == "__main__":
    sys.exit(main())
