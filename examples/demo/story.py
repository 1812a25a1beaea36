"""The demo from beginning to end; and its first act: prefill, read on, answer, report, draw."""

import argparse
import itertools
import math
import random
from collections.abc import Iterator, Sequence
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

from examples.demo import measure, pace
from examples.demo.bars import stage
from examples.demo.beyond import Beyond
from examples.demo.errors import UnsupportedModel
from examples.demo.measure import Branch, Written
from examples.demo.model import default_model, find_gguf, load
from examples.demo.picture import Scene, Side, draw
from examples.demo.text import NEEDLE, QUESTION, lay_out, read_text
from tokenselect.integrations.transformers import TokenSelectCache, enable

BAR = 14  # characters of a layer's bar
N_MORE = 48  # tokens that lossless decoding goes on with
SHORTEST = 1000


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
    options.out.mkdir(parents=True, exist_ok=True)
    console = Console(highlight=False)
    console.print(f"tokenselect demo: {name}\n")
    columns = TextColumn("  {task.description:<24}"), BarColumn(bar_width=30)
    with Progress(*columns, MofNCompleteColumn(), TimeElapsedColumn(), console=console) as bars:
        with stage(bars, "loading the model", 1):
            model, tokenizer = load(folder, gguf_file)
            check(options, name, model)
        with stage(bars, "measuring this machine", 1):
            left = options.seconds - (perf_counter() - begun)
            fit = fitted(options, pace.measured(model), left, model)
        for line in shortened(options, fit):
            bars.console.print(line)
        options.context, options.beyond = fit
        story = Story(options, name, model, tokenizer, title, text)
        story.live(bars)
        acts: list[Story | Beyond] = [story]
        if options.beyond:
            acts.append(second := Beyond(options, options.beyond, model, tokenizer))
            second.live(bars)
    for act in acts:
        for part in act.report():
            console.print(part)
    path = options.out / "index.html"
    path.write_text(draw(story.scene()), encoding="utf-8")
    console.print(f"\nThe picture: {path}  ({perf_counter() - begun:.0f} s in all)")


def check(options: argparse.Namespace, name: str, model: Any) -> None:
    """Raise UnsupportedModel for lengths that this model has no use for."""
    trained = model.config.max_position_embeddings
    if 0 < options.beyond <= trained:
        raise UnsupportedModel(
            f"--beyond {options.beyond}: {name} was trained to {trained}, and the second text is "
            "longer than that; 0 leaves it out"
        )


def fitted(
    options: argparse.Namespace, speed: pace.Pace, seconds: float, model: Any
) -> tuple[int, int]:
    """Return the lengths of the two texts that this machine has the time for; 0: no second act.

    The second text is shortened first.
    """
    asked, trained = options.context, model.config.max_position_embeddings
    n_answer = 30 + options.new_tokens  # the question too

    def first(n: int) -> float:
        return speed.within(n, 5 * options.held_back + 5 * n_answer + 3 * N_MORE)

    def second(n: int) -> float:
        return first(asked) + speed.beyond(n, 100 + 3 * n_answer)

    further = range(options.beyond, trained, -1024) if options.beyond else ()
    if beyond := pace.longest(second, seconds, further):
        return asked, beyond
    shorter = range(asked, SHORTEST, -500)
    return pace.longest(first, seconds, shorter) or min(asked, SHORTEST), 0


def shortened(options: argparse.Namespace, fit: tuple[int, int]) -> Iterator[str]:
    """Yield what to say of texts that became shorter, or were left out."""
    for asked, has, what in zip(
        (options.context, options.beyond), fit, ("text", "second text"), strict=True
    ):
        if has < asked:
            now = f"the {what} has {has:,}" if has else f"there is no {what}"
            yield f"  {asked:,} tokens take too long here for --seconds {options.seconds}: {now}"


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
        capacity = self.n + max(options.held_back, n_answer, 1 + N_MORE)
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
        self.selected = selected
        self.branches = [
            Branch("dense", cache),
            Branch("tokenselect", cache, selected),
            Branch("window only", cache, window),
        ]
        # What stock generation and lossless decoding wrote, and ratios of times by length.
        self.more: list[Written] = []
        self.ratios: list[tuple[int, float]] = []
        self.is_same = False
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
        n_new, stop = self.options.new_tokens, measure.ends(model, self.tokenizer)
        for branch in self.branches:
            total = len(passage.question) + n_new
            with stage(bars, f"answering, {branch.title}", total) as tick:
                measure.answer(model, branch, passage.question, n_new=n_new, stop=stop, tick=tick)
        drafts = self.selected | {"theta": 0.5}
        with stage(bars, "lossless decoding", 3) as tick:
            asked = [*passage.context, *passage.question]
            answer = measure.write(model, dense.cache, asked, n_new, drafts=drafts).tokens
            self.is_same = [i for i in answer if i not in stop] == dense.written
            tick(1)
            more = [*passage.context, passage.held_back[0]]
            for way in (None, drafts):
                self.more.append(
                    measure.write(model, dense.cache, more, N_MORE, least=N_MORE, drafts=way)
                )
                tick(1)
        with stage(bars, "at other lengths", 4) as tick:
            tenth = self.selected | {"k": 0.1}
            self.ratios = measure.by_length(model, deepcopy(dense.cache), tenth, tick)

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
        n_cached, ms = dense.attended[1], selected.median_ms
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
            f"takes {ms / dense.median_ms:.2f} of the time of dense, and "
            f"{ms / self.stock.median_ms:.2f} of that with DynamicCache."
        )
        yield f"\n{self.by_length()}\n\n{self.lossless()}"
        yield "\nAttention mass that tokenselect retains, by layer (mean of heads and tokens)"
        yield from bars_by_layer(measure.mass_by_layer(selected.infos, config.num_hidden_layers))

    def by_length(self) -> str:
        """Say from which length on selection pays."""
        pays = None
        for n, ratio in reversed(self.ratios):
            if ratio >= 1:
                break
            pays = n
        ratios = ", ".join(f"{ratio:.2f} at {n:,}" for n, ratio in self.ratios)
        return (
            f"A tenth selected takes, of the time of dense: {ratios}. Of these lengths, it pays "
            + (f"from {pays:,} tokens on, on this machine." if pays else "at none, here.")
        )

    def lossless(self) -> str:
        """Say what lossless decoding came to."""
        stock, ours = self.more
        assert ours.lossless is not None
        assert ours.lossless.stats is not None
        stats = ours.lossless.stats
        same = "is" if self.is_same else "is NOT"
        more = "the same" if stock.tokens == ours.tokens else "NOT the same"
        return (
            "Lossless decoding lets tokenselect draft (theta=0.5) and dense attention decide: its "
            f"answer {same} that of dense, token for token. Going on with the text, it writes "
            f"{more} {len(ours.tokens)} tokens, in {1e3 * ours.seconds:.1f} ms each, dense in "
            f"{1e3 * stock.seconds:.1f}; of {stats.drafted} drafts {stats.accepted} were accepted."
        )

    def table(self) -> Table:
        """Return the branches side by side."""
        table = Table(show_edge=False, pad_edge=False, header_style="bold")
        table.add_column("", no_wrap=True)
        for branch in self.branches:
            table.add_column(branch.title, justify="right", ratio=1, overflow="fold")
        sides, attended = self.sides(), (branch.attended for branch in self.branches)
        # The window scores all tokens too: its time says nothing.
        times = [f"{branch.median_ms:.1f}" for branch in self.branches[:2]]
        rows = {
            "answer": [side.answer or "(nothing)" for side in sides],
            "number found": ["yes" if side.is_right else "no" for side in sides],
            "agreement with dense": [percent(side.agreement) for side in sides],
            "perplexity": [f"{side.perplexity:.3f}" for side in sides],
            "attended": [f"{n:,.0f} of {n_cached:,.0f}" for n, n_cached in attended],
            "share of the tokens": [f"{side.attended_share:.1%}" for side in sides],
            "mass retained": [percent(side.retained_mass) for side in sides],
            "ms per token": [*times, "–"],
            "with DynamicCache": [f"{self.stock.median_ms:.1f}", "–", "–"],
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
