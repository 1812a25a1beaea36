"""Tasks: what all kinds have; and decode, reuse, mass and sparse, which read documents.

A task is a frozen dataclass of its settings. `cases` names all there is to compute, `run` computes
cases of one work, in any order, and `summary` makes the rows of a result into those of its tables.
"""

import json
from collections.abc import Callable, Iterator, Mapping, Sequence
from copy import deepcopy
from dataclasses import dataclass, field, replace
from itertools import chain, pairwise
from statistics import mean
from typing import Any, ClassVar, Literal, NamedTuple

import numpy as np
import torch
from torch import Tensor

from bench.quality import figures, texts
from bench.quality.figures import Row, grouped
from bench.quality.session import Session, feed
from bench.quality.texts import Document
from bench.quality.variants import DENSE, Variant, one_of, resolve_all
from tokenselect import AttentionInfo
from tokenselect.contract import SelectConfig
from tokenselect.integrations.transformers import TokenSelectCache, recorded

# What a version of the tasks computes. Raise it when the same case would get another value.
VERSION = 4
_CHUNK = 512


@dataclass(frozen=True)
class Case:
    """The least that is computed, kept and never computed again.

    task   what is computed, and by which `run`, with others of its work
    label  what rows say of it, beside its variant
    more   what else decides its value
    given  what `run` needs besides
    """

    task: str
    run: Callable[[Sequence["Case"], Session], "Values"] = field(compare=False)
    variant: Variant
    label: Mapping[str, Any]
    more: Mapping[str, Any]
    given: Any = field(default=None, repr=False)

    @property
    def row(self) -> dict[str, Any]:
        return {**self.label, **self.variant.label}

    @property
    def work(self) -> str:
        """Cases of one work share something costly, and are run together."""
        return json.dumps([VERSION, self.task, dict(self.label), dict(self.more)], sort_keys=True)

    @property
    def sha(self) -> str:
        """The name under which the value is kept."""
        return texts.sha(self.work + json.dumps(self.variant.key, sort_keys=True))


Values = Iterator[tuple[Case, dict[str, Any]]]
# What rows say of what is asked, what else decides its value, and what `run` takes.
Asked = Iterator[tuple[Row, Row, Any]]


@dataclass(frozen=True, kw_only=True)
class Settings:
    """What one run measures.

    name      of the result
    split     which stretches of the texts and which seeds
    tasks     by name; cases that several of them have are run once
    variants  by name, what `variants.resolve` takes
    texts     kjv, pydoc, source, or paths of text files
    dtype     of the model's weights and of its cache
    yarn      reads texts up to that many times the trained length; None: the model is as it comes
    """

    name: str
    split: Literal["choose", "report"]
    tasks: Mapping[str, "Task"]
    variants: Mapping[str, Mapping[str, Any]]
    texts: tuple[str, ...] = ("kjv", "pydoc", "source")
    dtype: Literal["float32", "bfloat16"] = "float32"
    yarn: float | None = None

    def __post_init__(self) -> None:
        one_of("split", self.split, texts.SPLITS)

    def documents(self, session: Session, count: int, n: int) -> list[Document]:
        return texts.documents(session, self.texts, self.split, count, n)


@dataclass(frozen=True, kw_only=True)
class Task:
    """What all kinds have.

    contexts  lengths in tokens
    variants  by name, each taken at every budget: see `variants.votes`
    """

    kind: ClassVar[str]
    computes: ClassVar[str]  # kinds with one `run` may share cases
    contexts: tuple[int, ...]
    variants: tuple[str, ...]
    budgets: tuple[float, ...] = ()

    def asked(self, settings: Settings, session: Session, n: int) -> Asked:
        """Return all that is asked of each variant at context n."""
        raise NotImplementedError

    def answering(self, settings: Settings, n: int) -> list[Variant]:
        """Return the variants that are asked."""
        return resolve_all(self.variants, settings.variants, self.budgets, n)

    def selecting(self, settings: Settings, n: int) -> list[Variant]:
        """Return all variants but dense attention."""
        named = resolve_all(self.variants, settings.variants, self.budgets, n)
        return [variant for variant in named if variant != DENSE]

    def cases(self, settings: Settings, session: Session) -> Iterator[Case]:
        for n in self.contexts:
            variants = self.answering(settings, n)
            for label, more, given in self.asked(settings, session, n):
                for variant in variants:
                    what = {"context": n, **label}
                    yield Case(self.computes, self.run, variant, what, session.key | more, given)

    @staticmethod
    def run(cases: Sequence[Case], session: Session) -> Values:
        raise NotImplementedError

    @staticmethod
    def summary(rows: Sequence[Row]) -> list[Row]:
        return figures.against_dense(rows)


# --- decode, reuse, mass and sparse: a document is read ---


class Passage(NamedTuple):
    """Tokens to read: those before `start` densely, the others by the variant, `chunk` at a time.

    The last is only what the one before is scored by. Logits count from `first` on.
    """

    ids: tuple[int, ...]
    start: int
    first: int
    chunk: int


def passes(
    cases: Sequence[Case], session: Session
) -> Iterator[tuple[Case, list[Tensor], list[Any], list[AttentionInfo]]]:
    """Read a passage with the variant of each case, from one cache of what stands before it.

    Yields with each case the logits that count, in chunks (tokens, vocabulary), the `Selections` of
    the cache, and what was recorded.
    """
    ids, start, first, chunk = cases[0].given
    end, model = len(ids) - 1, session.model
    before: dict[bool, TokenSelectCache] = {}
    for case in sorted(cases, key=lambda case: case.variant.moves):
        # What is moved is cached otherwise, and needs a prefill of its own.
        if case.variant.moves not in before:
            cache = TokenSelectCache(model, max_length=len(ids))
            selecting = (c.variant for c in cases if c.variant.options is not None)
            alike = (variant for variant in selecting if variant.moves == case.variant.moves)
            with next(alike, DENSE).reading_densely(len(ids)).applied(model):
                for at in range(0, start, _CHUNK):
                    feed(model, cache, ids[at : min(at + _CHUNK, start)])
            before = {case.variant.moves: cache}
        cache, logits = deepcopy(before[case.variant.moves]), []
        selections = [layer.selections for layer in cache.layers if hasattr(layer, "selections")]
        with case.variant.applied(model), recorded() as infos:
            for at in range(start, end, chunk):
                stop = min(at + chunk, end)
                count = stop - max(first, at)  # the newest of them
                found = feed(model, cache, ids[at:stop], max(count, 1))
                logits += [found] if count > 0 else []
        yield case, logits, selections, infos


@dataclass(frozen=True, kw_only=True)
class Decode(Task):
    """After `contexts` tokens read densely, feed `continuation` tokens of the text one by one.

    Every variant starts from the very same cache.
    """

    kind = computes = "decode"
    documents: int
    continuation: int = 128

    def answering(self, settings: Settings, n: int) -> list[Variant]:
        return [DENSE, *self.selecting(settings, n)]

    def asked(self, settings: Settings, session: Session, n: int) -> Asked:
        length = n + self.continuation + 1
        for name, sha, ids in settings.documents(session, self.documents, length):
            label = {"document": name, "continuation": self.continuation}
            yield label, {"sha": sha}, Passage(ids, n, n, 1)

    @staticmethod
    @torch.inference_mode()
    def run(cases: Sequence[Case], session: Session) -> Values:
        stock = replace(cases[0], variant=DENSE)
        others = passes([stock, *(c for c in cases if c.variant != DENSE)], session)
        for case, logits, selections, _ in chain([of_stock := next(others)], others):
            following = case.given.ids[case.given.first + 1 :]
            value = figures.beside_dense(logits, of_stock[1], following)
            if case.variant.label["theta"] is not None:
                counts = [one.counts() for one in selections]
                value |= {"hit_rate": mean(hits / (hits + misses) for hits, misses in counts)}
            if case in cases:
                yield case, value


@dataclass(frozen=True, kw_only=True)
class Sparse(Task):
    """Read documents of `contexts` tokens in chunks, and count tokens from that share of it on.

    Beyond the trained length dense attention is no measure, and a row says so.
    """

    kind = computes = "sparse"
    documents: int
    counted_from: float = 0.5
    chunk: int = _CHUNK
    answering, run = Decode.answering, staticmethod(Decode.run)

    def asked(self, settings: Settings, session: Session, n: int) -> Asked:
        first, within = int(self.counted_from * n), n <= (session.trained or n)
        for name, sha, ids in settings.documents(session, self.documents, n + 1):
            label = {
                "document": name,
                "first": first,
                "chunk": self.chunk,
                "within_trained": within,
            }
            yield label, {"sha": sha}, Passage(ids, 0, first, self.chunk)


@dataclass(frozen=True, kw_only=True)
class Reuse(Decode):
    """Decode with every theta on top of every variant, and without reuse to compare."""

    kind = "reuse"
    thetas: tuple[float, ...]
    max_reuse: int = 64

    def answering(self, settings: Settings, n: int) -> list[Variant]:
        reuses = [{"theta": theta, "max_reuse": self.max_reuse} for theta in self.thetas]
        several = self.selecting(settings, n)
        return [
            DENSE,
            *(v.with_options(**how) for v in several for how in ({"theta": None}, *reuses)),
        ]


@dataclass(frozen=True, kw_only=True)
class Mass(Decode):
    """Retained mass of each layer and head, and how much selections overlap, while decoding."""

    kind = computes = "mass"
    continuation: int = 32
    answering = Task.selecting

    @staticmethod
    @torch.inference_mode()
    def run(cases: Sequence[Case], session: Session) -> Values:
        for case, logits, _, infos in passes(cases, session):
            assert case.variant.options is not None
            yield case, of_infos(infos, len(logits), case.given.start, case.variant.options.select)

    @staticmethod
    def summary(rows: Sequence[Row]) -> list[Row]:
        """Return means over documents; None for what is not known."""
        found: list[Row] = []
        for named, group in grouped(rows, ("context", "variant", "budget")):
            names = ("mass", "by_step", "by_layer")
            of = {n: torch.tensor(np.array([r[n] for r in group], float)).mean(0) for n in names}
            found.append(
                named
                | {"size": group[0]["size"], "documents": len(group)}
                | {"mass": rounded(of["mass"].mean()), "least_of_a_head": rounded(of["mass"].min())}
                | {"by_step": rounded(of["by_step"].mean())}
                | {"neighbours": rounded(of["by_layer"].diagonal(1).mean())}
            )
        return found


def of_infos(
    infos: list[AttentionInfo], steps: int, n: int, config: SelectConfig
) -> dict[str, Any]:
    """Return means over steps; n tokens were cached before the first.

    mass      [layer][head], None where it is not known
    by_step   [layer]: overlap of what neighbouring steps voted for
    by_layer  [layer][layer]: overlap of what layers voted for at one step
    An overlap is Jaccard's: tokens in both over tokens in either, 1 for nothing in both.
    """
    n_layers = len(infos) // steps
    # Of each step: (layers, selections, tokens)
    voted = [
        torch.stack([votes(info, n + i + 1, config) for info in infos[i * n_layers :][:n_layers]])
        for i in range(steps)
    ]
    by_step = [overlap(now[..., : before.shape[-1]], before) for before, now in pairwise(voted)]
    by_layer = [overlap(now[:, None], now[None]) for now in voted]
    mass = torch.stack([info.retained_mass[0] for info in infos]).view(steps, n_layers, -1)
    return {
        "mass": rounded(mass.mean(0)),
        "by_step": rounded(torch.stack(by_step).mean(0)),
        "by_layer": rounded(torch.stack(by_layer).mean(0)),
    }


def votes(info: AttentionInfo, n: int, config: SelectConfig) -> Tensor:
    """Return (S, n) bool: what was selected by vote, without sink and window."""
    positions = info.selection.positions
    chosen = torch.zeros(positions.shape[1], n + 1, dtype=torch.bool)
    chosen.scatter_(1, positions[0].long() % (n + 1), True)  # padding, -1, goes to n
    sink_end, local_start = config.regions(n, 1)
    chosen[:, :sink_end] = chosen[:, local_start:] = False
    return chosen[:, :n]


def overlap(a: Tensor, b: Tensor) -> Tensor:
    """Return Jaccard's, over the last dimension; the mean over selections, the one before."""
    both, either = (a & b).sum(-1), (a | b).sum(-1)
    return torch.where(either > 0, both / either.clamp(min=1), 1.0).mean(-1)


def rounded(values: Any) -> Any:
    """Return numbers to 4 digits, as lists or one alone; None for NaN."""
    found = np.round(np.asarray(values, dtype=float), 4)
    return np.where(np.isnan(found), None, found).tolist()
