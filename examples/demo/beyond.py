"""The second act: a text longer than the model was trained for."""

import argparse
import random
from collections.abc import Iterator
from typing import Any

from rich.console import RenderableType
from rich.progress import Progress
from rich.table import Table
from rich.text import Text
from transformers import DynamicCache

from examples.demo import measure
from examples.demo.bars import stage
from examples.demo.measure import Branch
from examples.demo.text import FILLER, NEEDLE, lay_out
from tokenselect.integrations.transformers import TokenSelectCache

N_HELD, N_SINK, K, N_LOCAL = 16, 16, 512, 128


class Beyond:
    """Dense attention and "extrapolate" over n tokens of filler, with a number hidden in it."""

    def __init__(self, options: argparse.Namespace, n: int, model: Any, tokenizer: Any) -> None:
        self.options, self.model, self.tokenizer = options, model, tokenizer
        number = str(random.Random(options.seed + 1).randint(10000, 99999))
        sizes = {"n_context": n, "n_held": N_HELD, "depth": options.depth}
        text = "a few sentences, over and over", FILLER * (n // len(FILLER.split()) + N_HELD)
        self.passage = lay_out(tokenizer, *text, number=number, **sizes)
        self.n = len(self.passage.context)
        room = self.n + max(N_HELD, len(self.passage.question) + options.new_tokens)
        far = {"preset": "extrapolate", "n_sink": N_SINK, "k": K, "n_local": N_LOCAL}
        self.branches = [
            Branch("dense", TokenSelectCache(model, max_length=room)),
            Branch(
                "extrapolate",
                TokenSelectCache(model, max_length=room),
                far | {"backend": options.backend},
            ),
        ]
        self.stock = Branch("dense, DynamicCache", DynamicCache(config=model.config))

    def live(self, bars: Progress) -> None:
        """Let both read the text and what follows, and answer."""
        model, passage = self.model, self.passage
        for branch in self.branches:
            with stage(bars, f"reading, {branch.title}", self.n) as tick:
                measure.prefill(model, branch.cache, passage.context, tick, branch.options)
        for i, layer in enumerate(self.branches[0].cache.layers):
            self.stock.cache.update(layer.keys, layer.values, i)
        with stage(bars, "reading on, in turns", N_HELD) as tick:
            measure.read_on(model, [*self.branches, self.stock], passage.held_back, tick)
        del self.stock.cache
        stop, n_new = measure.ends(model, self.tokenizer), self.options.new_tokens
        for branch in self.branches:
            with stage(bars, f"answering, {branch.title}", len(passage.question) + n_new) as tick:
                measure.answer(model, branch, passage.question, n_new=n_new, stop=stop, tick=tick)

    def report(self) -> Iterator[RenderableType]:
        """Yield what to print: the setting, a table and its caption."""
        passage, (dense, far) = self.passage, self.branches
        first, last = passage.needle
        trained = self.model.config.max_position_embeddings
        yield (
            f"\nBeyond the trained length of {trained:,} tokens\n{self.n:,} tokens of "
            f"{passage.title}\nat positions {first:,} to {last - 1:,}: "
            f"“{NEEDLE.format(number=passage.number)}”\nextrapolate: {N_SINK} first + {K} voted + "
            f"{N_LOCAL} newest, attended to as if they stood next to one another, in the prompt "
            "too\n"
        )
        table = Table(show_edge=False, pad_edge=False, header_style="bold")
        table.add_column("", no_wrap=True)
        answers = [
            str(self.tokenizer.decode(b.written, skip_special_tokens=True)).strip()
            for b in self.branches
        ]
        for branch in self.branches:
            table.add_column(branch.title, justify="right", ratio=1, overflow="fold")
        rows = {
            "answer": [answer or "(nothing)" for answer in answers],
            "number found": ["yes" if passage.number in answer else "no" for answer in answers],
            "attended": [f"{n:,.0f} of {of:,.0f}" for n, of in (b.attended for b in self.branches)],
            "ms per token": [f"{branch.median_ms:.1f}" for branch in self.branches],
            "with DynamicCache": [f"{self.stock.median_ms:.1f}", "–"],
        }
        for title, cells in rows.items():
            table.add_row(title, *map(Text, cells))
        yield table
        yield (
            f"\nAt {far.attended[1]:,.0f} tokens, one with extrapolate takes "
            f"{far.median_ms / dense.median_ms:.2f} of the time of dense, and "
            f"{far.median_ms / self.stock.median_ms:.2f} of that with DynamicCache. In a natural "
            "text, without repetitions, the number is not always found: docs/quality.md."
        )
