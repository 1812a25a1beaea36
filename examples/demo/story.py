"""The demo from beginning to end: load, prefill, read on, answer, report, draw."""

import argparse
import itertools
import math
import random
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from statistics import mean
from time import perf_counter
from typing import Any

import torch
import transformers
from rich.console import Console, Group
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn
from rich.table import Table
from rich.text import Text

import tokenselect
from examples.demo import measure
from examples.demo.errors import UnsupportedModel
from examples.demo.measure import Branch, Tick
from examples.demo.model import (
    DenseAttention,
    PreallocatedCache,
    SelectedAttention,
    default_model,
    find_gguf,
    load,
)
from examples.demo.picture import Scene, Side, draw
from examples.demo.text import NEEDLE, QUESTION, Passage, lay_out, read_text


class Bars:
    """Progress bars, one a stage."""

    def __init__(self, progress: Progress) -> None:
        self.progress = progress

    @contextmanager
    def stage(self, title: str, total: int) -> Iterator[Tick]:
        """A bar of `total` ticks, full at the end of the block."""
        task = self.progress.add_task(title, total=total)

        def tick(n: int) -> None:
            self.progress.advance(task, n)

        yield tick
        self.progress.update(task, completed=total)


def tell(options: argparse.Namespace) -> None:
    """Run the demo as the command line asks, print what came of it and write the picture."""
    begun = perf_counter()
    transformers.logging.set_verbosity_error()
    transformers.logging.disable_progress_bar()
    torch.manual_seed(options.seed)
    if options.threads is not None:
        torch.set_num_threads(options.threads)
    console = Console(highlight=False)
    columns = (
        TextColumn("  {task.description:<24}"),
        BarColumn(bar_width=30),
        MofNCompleteColumn(),
        TimeElapsedColumn(),
    )
    folder = options.model or default_model()
    gguf_file = find_gguf(folder, options.gguf_file)
    name = folder.resolve().name if gguf_file is None else Path(gguf_file).stem
    title, text = read_text(options.text)
    _check_budget(options)
    console.print(f"tokenselect demo: {name}\n")
    with Progress(*columns, console=console) as progress:
        bars = Bars(progress)
        with bars.stage("loading the model", 1):
            model, tokenizer = load(folder, gguf_file)
            passage = _lay_out(options, name, model, tokenizer, title, text)
        branches = _run(options, model, tokenizer, passage, bars)
    sides = [_side(branch, branches[0], tokenizer, passage) for branch in branches]
    _print(console, options, model, passage, branches, sides)
    page = draw(_scene(options, name, tokenizer, passage, branches, sides))
    options.out.mkdir(parents=True, exist_ok=True)
    path = options.out / "index.html"
    path.write_text(page, encoding="utf-8")
    console.print(f"\nThe picture: {path}  ({perf_counter() - begun:.0f} s in all)")


def _check_budget(options: argparse.Namespace) -> None:
    """Let tokenselect refuse the budget or the backend now, and not after the prefill."""
    q = k_cache = torch.zeros(1, 1, 1, 64, device="cpu")
    tokenselect.explain(
        q,
        k_cache,
        k_cache,
        options.k,
        n_sink=options.n_sink,
        n_local=options.n_local,
        backend=options.backend,
    )


def _lay_out(
    options: argparse.Namespace, name: str, model: Any, tokenizer: Any, title: str, text: str
) -> Passage:
    passage = lay_out(
        tokenizer,
        title,
        text,
        number=str(random.Random(options.seed).randint(10000, 99999)),
        n_context=options.context,
        n_held=options.held_back,
        depth=options.depth,
    )
    trained = model.config.max_position_embeddings
    if _capacity(options, passage) > trained:
        raise UnsupportedModel(
            f"--context {options.context} takes {_capacity(options, passage)} positions with what "
            f"follows, and {name} was trained to {trained}: use a smaller --context"
        )
    return passage


def _capacity(options: argparse.Namespace, passage: Passage) -> int:
    n_after: int = max(options.held_back, len(passage.question) + options.new_tokens)
    return len(passage.context) + n_after


def _run(
    options: argparse.Namespace, model: Any, tokenizer: Any, passage: Passage, bars: Bars
) -> list[Branch]:
    cache = PreallocatedCache.of(model, _capacity(options, passage))
    with bars.stage("prefill, dense", len(passage.context)) as tick:
        measure.prefill(model, cache, passage.context, tick)
    budget = {"n_sink": options.n_sink, "backend": options.backend}
    selected = SelectedAttention(k=options.k, n_local=options.n_local, **budget)
    window = SelectedAttention(
        name="tokenselect_demo_window", k=0, n_local=options.n_local + options.k, **budget
    )
    branches = [
        Branch("dense", DenseAttention(), cache),
        Branch("tokenselect", selected, cache.fork()),
        Branch("window only", window, cache.fork()),
    ]
    with bars.stage("reading on, in turns", len(passage.held_back) - 1) as tick:
        measure.read_on(model, branches, passage.held_back, tick)
    stop = _stop_tokens(model, tokenizer)
    for branch in branches:
        total = len(passage.question) + options.new_tokens
        with bars.stage(f"answering, {branch.title}", total) as tick:
            branch.answer = measure.answer(
                model, branch, passage.question, n_new=options.new_tokens, stop=stop, tick=tick
            )
    return branches


def _stop_tokens(model: Any, tokenizer: Any) -> set[int]:
    ends = model.generation_config.eos_token_id
    return {tokenizer.eos_token_id, *(ends if isinstance(ends, list) else [ends])} - {None}


def _said(tokenizer: Any, tokens: Sequence[int]) -> str:
    return str(tokenizer.decode(tokens, skip_special_tokens=True))


def _side(branch: Branch, dense: Branch, tokenizer: Any, passage: Passage) -> Side:
    assert branch.answer is not None
    said = _said(tokenizer, branch.answer.tokens).strip()
    n_attended, n_cached = branch.attended
    return Side(
        title=branch.title,
        answer=said,
        is_right=passage.number in said,
        attended_share=n_attended / n_cached,
        agreement=branch.reading.agreement(dense.reading) if branch is not dense else math.nan,
        perplexity=branch.reading.perplexity,
        retained_mass=mean(record.retained_mass for record in branch.records)
        if branch.records
        else math.nan,
    )


def _print(
    console: Console,
    options: argparse.Namespace,
    model: Any,
    passage: Passage,
    branches: list[Branch],
    sides: list[Side],
) -> None:
    config = model.config
    first, last = passage.needle
    n_kv = getattr(config, "num_key_value_heads", config.num_attention_heads)
    backend = branches[1].records[-1].backend
    console.print(
        f"\n{config.num_hidden_layers} layers, {config.num_attention_heads} query and {n_kv} KV "
        f"heads, float32, threads: {torch.get_num_threads()}, backend: {backend}\n"
        f"{len(passage.context):,} tokens of {passage.title}\n"
        f"at positions {first:,} to {last - 1:,}: “{NEEDLE.format(number=passage.number)}”\n"
        f"tokenselect: {options.n_sink} first + {options.k} voted + {options.n_local} newest; "
        f"window only: {options.n_sink} first + {options.k + options.n_local} newest\n"
    )
    console.print(_comparison(branches, sides))
    console.print(
        f"\nOver {len(branches[0].reading.seconds)} held-back tokens, the three taking turns token "
        "by token; time is the median of a token. dense is transformers' sdpa. window only is "
        "tokenselect.attention with k=0, which scores all tokens too: its time says nothing. "
        "A short text and a small model are no place to save time: docs/benchmarks.md shows where."
    )
    console.print("\nAttention mass that tokenselect retains, by layer (mean of heads and tokens)")
    console.print(
        _bars_by_layer(measure.mass_by_layer(branches[1].records, config.num_hidden_layers))
    )


def _comparison(branches: list[Branch], sides: list[Side]) -> Table:
    table = Table(show_edge=False, pad_edge=False, header_style="bold")
    table.add_column("", no_wrap=True)
    for side in sides:
        table.add_column(side.title, justify="right", ratio=1, overflow="fold")

    def row(title: str, values: Sequence[str]) -> None:
        table.add_row(title, *(Text(value) for value in values))

    timed = branches[:2]
    row("answer", [side.answer or "(nothing)" for side in sides])
    row("number found", ["yes" if side.is_right else "no" for side in sides])
    row("agreement with dense", [_percent(side.agreement) for side in sides])
    row("perplexity", [f"{side.perplexity:.3f}" for side in sides])
    row("attended", ["{:,.0f} of {:,.0f}".format(*branch.attended) for branch in branches])
    row("share of the tokens", [f"{side.attended_share:.1%}" for side in sides])
    row("mass retained", [_percent(side.retained_mass) for side in sides])
    row("ms per token", [*(f"{branch.reading.median_ms:.1f}" for branch in timed), "–"])
    row("ms in attention", [*(f"{b.reading.median_attention_ms:.1f}" for b in timed), "–"])
    return table


def _percent(share: float) -> str:
    return "–" if math.isnan(share) else f"{share:.1%}"


def _bars_by_layer(masses: Sequence[float]) -> Group:
    """Three columns of layers, each a bar from 0 to 100 %."""
    n_rows = math.ceil(len(masses) / 3)
    width = 14
    lines = []
    for i in range(n_rows):
        line = Text()
        for layer in range(i, len(masses), n_rows):
            filled = 0 if math.isnan(masses[layer]) else round(width * masses[layer])
            line.append(f"{layer:>4} ")
            line.append("█" * filled, style="blue")
            line.append("░" * (width - filled), style="bright_black")
            line.append(f" {_percent(masses[layer]):>6}")
        lines.append(line)
    return Group(*lines)


def _scene(
    options: argparse.Namespace,
    name: str,
    tokenizer: Any,
    passage: Passage,
    branches: list[Branch],
    sides: list[Side],
) -> Scene:
    """The query of tokenselect's answer that wrote the first digit; else the question's last."""
    answer = branches[1].answer
    assert answer is not None
    before = [_said(tokenizer, answer.tokens[:i]) for i in range(len(answer.tokens) + 1)]
    place = before[-1].find(passage.number)
    step = next((i for i, text in enumerate(before[1:]) if len(text) > place >= 0), 0)
    written = [b.removeprefix(a) for a, b in itertools.pairwise(before)]
    records = answer.records[step]
    return Scene(
        model=name,
        title=passage.title,
        question=QUESTION,
        sides=sides,
        pieces=[*passage.pieces, *written[:step]],
        needle=passage.needle,
        n_text=len(passage.context),
        selected=[record.positions.tolist() for record in records],
        n_sink=options.n_sink,
        n_local=options.n_local,
        k=options.k,
        retained_mass=[record.retained_mass for record in records],
        wrote=written[step] if written else "",
    )
