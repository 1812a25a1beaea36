"""The demo from beginning to end: load, prefill, read on, answer, report, draw."""

import argparse
import itertools
import math
import random
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from copy import deepcopy
from pathlib import Path
from time import perf_counter
from typing import Any

import torch
import transformers
from rich.console import Console, RenderableType
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn
from rich.table import Table
from rich.text import Text
from transformers import DynamicCache

from examples.demo import measure
from examples.demo.errors import UnsupportedModel
from examples.demo.measure import Branch, Tick
from examples.demo.model import default_model, find_gguf, load
from examples.demo.picture import Scene, Side, draw
from examples.demo.text import NEEDLE, QUESTION, lay_out, read_text
from tokenselect.integrations.transformers import TokenSelectCache, enable

BAR = 14  # characters of a layer's bar


def tell(options: argparse.Namespace) -> None:
    """Run the demo as the command line asks, print what came of it and write the picture."""
    begun = perf_counter()
    transformers.logging.set_verbosity_error()
    transformers.logging.disable_progress_bar()
    torch.manual_seed(options.seed)
    if options.threads is not None:
        torch.set_num_threads(options.threads)
    folder = options.model or default_model()
    gguf_file = find_gguf(folder, options.gguf_file)
    name = folder.resolve().name if gguf_file is None else Path(gguf_file).stem
    title, text = read_text(options.text)
    console = Console(highlight=False)
    console.print(f"tokenselect demo: {name}\n")
    columns = TextColumn("  {task.description:<24}"), BarColumn(bar_width=30)
    with Progress(*columns, MofNCompleteColumn(), TimeElapsedColumn(), console=console) as bars:
        with stage(bars, "loading the model", 1):
            story = Story(options, name, *load(folder, gguf_file), title, text)
        story.live(bars)
    for part in story.report():
        console.print(part)
    options.out.mkdir(parents=True, exist_ok=True)
    path = options.out / "index.html"
    path.write_text(draw(story.scene()), encoding="utf-8")
    console.print(f"\nThe picture: {path}  ({perf_counter() - begun:.0f} s in all)")


@contextmanager
def stage(bars: Progress, title: str, total: int) -> Iterator[Tick]:
    """Show a bar of `total` ticks, full at the end of the block."""
    task = bars.add_task(title, total=total)
    yield lambda n: bars.advance(task, n)
    bars.update(task, completed=total)


class Story:
    """One model and one passage, and the branches that read it.

    Raises UnsupportedModel, UnusableText or a TokenSelectError for what cannot be run.
    """

    def __init__(
        self, options: argparse.Namespace, name: str, model: Any, tokenizer: Any, *text: str
    ) -> None:
        self.options, self.name, self.model, self.tokenizer = options, name, model, tokenizer
        number = random.Random(options.seed).randint(10000, 99999)
        sizes = {"n_context": options.context, "n_held": options.held_back}
        self.passage = lay_out(tokenizer, *text, number=str(number), depth=options.depth, **sizes)
        self.n = len(self.passage.context)
        n_answer = len(self.passage.question) + options.new_tokens
        capacity = self.n + max(options.held_back, n_answer)
        trained = model.config.max_position_embeddings
        if capacity > trained:
            raise UnsupportedModel(
                f"--context {options.context} takes {capacity} positions with what follows, and "
                f"{name} was trained to {trained}: use a smaller --context"
            )
        cache = TokenSelectCache(model, max_length=capacity)
        given = {"n_sink": options.n_sink, "backend": options.backend}
        selected = given | {"k": options.k, "n_local": options.n_local}
        window = given | {"k": 0, "n_local": options.n_local + options.k}
        self.branches = [
            Branch("dense", cache),
            Branch("tokenselect", cache, selected),
            Branch("window only", cache, window),
        ]
        # Over the cache that transformers makes by itself: to see what it takes.
        self.stock = Branch("dense, DynamicCache", DynamicCache(config=model.config))
        enable(model, **selected).disable()  # a bad budget is refused now, not after the prefill

    def live(self, bars: Progress) -> None:
        """Let every branch read on and answer, from equal caches."""
        model, passage = self.model, self.passage
        dense, *others = self.branches
        with stage(bars, "prefill, dense", self.n) as tick:
            measure.prefill(model, dense.cache, passage.context, tick)
            for branch in others:
                branch.cache = deepcopy(dense.cache)
            for i, layer in enumerate(dense.cache.layers):
                self.stock.cache.update(layer.keys, layer.values, i)
        with stage(bars, "reading on, in turns", len(passage.held_back) - 1) as tick:
            measure.read_on(model, [*self.branches, self.stock], passage.held_back, tick)
        del self.stock.cache
        n_new, ends = self.options.new_tokens, model.generation_config.eos_token_id
        ends = ends if isinstance(ends, list) else [ends]
        stop = {self.tokenizer.eos_token_id, *ends} - {None}
        for branch in self.branches:
            total = len(passage.question) + n_new
            with stage(bars, f"answering, {branch.title}", total) as tick:
                measure.answer(model, branch, passage.question, n_new=n_new, stop=stop, tick=tick)

    def said(self, tokens: Sequence[int]) -> str:
        """Return the text of tokens that were written."""
        return str(self.tokenizer.decode(tokens, skip_special_tokens=True))

    def sides(self) -> list[Side]:
        """Return every branch in numbers."""
        sides, dense = [], self.branches[0]
        for branch in self.branches:
            answer, (n_attended, n_cached) = self.said(branch.written).strip(), branch.attended
            sides.append(
                Side(
                    title=branch.title,
                    answer=answer,
                    is_right=self.passage.number in answer,
                    attended_share=n_attended / n_cached,
                    agreement=math.nan if branch is dense else branch.agreement(dense),
                    perplexity=branch.perplexity,
                    retained_mass=branch.retained_mass,
                )
            )
        return sides

    def report(self) -> Iterator[RenderableType]:
        """Yield what to print: the setting, a table, its caption, and the mass by layer."""
        options, config, passage = self.options, self.model.config, self.passage
        first, last = passage.needle
        dense, selected, _ = self.branches
        n_cached, ms = dense.attended[1], selected.median_ms[0]
        n_kv = getattr(config, "num_key_value_heads", config.num_attention_heads)
        yield (
            f"\n{config.num_hidden_layers} layers, {config.num_attention_heads} query and {n_kv} "
            f"KV heads, float32, threads: {torch.get_num_threads()}, backend: "
            f"{selected.infos[-1].backend}\n{self.n:,} tokens of {passage.title}\nat positions "
            f"{first:,} to {last - 1:,}: “{NEEDLE.format(number=passage.number)}”\n"
            f"tokenselect: {options.n_sink} first + {options.k} voted + {options.n_local} newest; "
            f"window only: {options.n_sink} first + {options.k + options.n_local} newest\n"
        )
        yield self.table()
        yield (
            f"\nOver {len(dense.steps)} held-back tokens, in turns token by token; times are "
            "medians. dense is transformers' sdpa, over the cache of tokenselect, which appends in "
            "place; transformers' own DynamicCache copies all keys and values for each token. "
            "tokenselect records what it selects, which its time includes. window only scores all "
            f"tokens too: its time says nothing.\nAt {n_cached:,.0f} tokens, one with tokenselect "
            f"takes {ms / dense.median_ms[0]:.2f} of the time of dense, and "
            f"{ms / self.stock.median_ms[0]:.2f} of that with DynamicCache. From which length on "
            "selection pays, one length cannot say: docs/benchmarks.md has more."
            "\n\nAttention mass that tokenselect retains, by layer (mean of heads and tokens)"
        )
        yield from bars_by_layer(measure.mass_by_layer(selected.infos, config.num_hidden_layers))

    def table(self) -> Table:
        """Return the branches side by side."""
        table = Table(show_edge=False, pad_edge=False, header_style="bold")
        table.add_column("", no_wrap=True)
        for branch in self.branches:
            table.add_column(branch.title, justify="right", ratio=1, overflow="fold")
        sides, attended = self.sides(), (branch.attended for branch in self.branches)
        # The window scores all tokens too: its time says nothing.
        whole, attention = zip(*(branch.median_ms for branch in self.branches[:2]), strict=True)
        rows = {
            "answer": [side.answer or "(nothing)" for side in sides],
            "number found": ["yes" if side.is_right else "no" for side in sides],
            "agreement with dense": [percent(side.agreement) for side in sides],
            "perplexity": [f"{side.perplexity:.3f}" for side in sides],
            "attended": [f"{n:,.0f} of {n_cached:,.0f}" for n, n_cached in attended],
            "share of the tokens": [f"{side.attended_share:.1%}" for side in sides],
            "mass retained": [percent(side.retained_mass) for side in sides],
            "ms per token": [*(f"{ms:.1f}" for ms in whole), "–"],
            "with DynamicCache": [f"{self.stock.median_ms[0]:.1f}", "–", "–"],
            "ms in attention": [*(f"{ms:.1f}" for ms in attention), "–"],
        }
        for title, cells in rows.items():
            table.add_row(title, *map(Text, cells))
        return table

    def scene(self) -> Scene:
        """Return the query of tokenselect's answer that wrote the first digit, else the first."""
        chosen, passage, options = self.branches[1], self.passage, self.options
        before = [self.said(chosen.written[:i]) for i in range(len(chosen.written) + 1)]
        place = before[-1].find(passage.number)
        step = next((i for i, text in enumerate(before[1:]) if len(text) > place >= 0), 0)
        written = [b.removeprefix(a) for a, b in itertools.pairwise(before)]
        return Scene(
            model=self.name,
            title=passage.title,
            question=QUESTION,
            sides=self.sides(),
            pieces=[*passage.pieces, *written[:step]],
            needle=passage.needle,
            n_text=self.n,
            selected=[measure.positions(info) for info in chosen.queries[step]],
            n_sink=options.n_sink,
            n_local=options.n_local,
            k=options.k,
            retained_mass=[measure.mass(info) for info in chosen.queries[step]],
            wrote=written[step] if written else "",
        )


def percent(share: float) -> str:
    """Return a share to a tenth of a percent; a dash for NaN."""
    return "–" if math.isnan(share) else f"{share:.1%}"


def bars_by_layer(masses: Sequence[float]) -> Iterator[Text]:
    """Yield lines of three columns of layers, each a bar from 0 to 100 %."""
    n_rows = math.ceil(len(masses) / 3)
    for i in range(n_rows):
        line = Text()
        for layer in range(i, len(masses), n_rows):
            filled = 0 if math.isnan(masses[layer]) else round(BAR * masses[layer])
            line.append(f"{layer:>4} ").append("█" * filled, style="blue")
            line.append("░" * (BAR - filled), style="bright_black")
            line.append(f" {percent(masses[layer]):>6}")
        yield line
