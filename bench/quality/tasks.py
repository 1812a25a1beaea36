"""Tasks: what all kinds have; and decode, reuse, mass and sparse, which read documents.

A task is a frozen dataclass of its settings. `cases` names all there is to compute, `run` computes
cases of one work, in any order, and `summary` makes the rows of a result into those of its tables.
"""

import json
import re
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, fields, replace
from itertools import pairwise
from statistics import mean
from typing import Any, ClassVar, Literal

import numpy as np
import torch
from torch import Tensor

from bench.quality import figures, texts
from bench.quality.figures import Against, Row, grouped
from bench.quality.session import Session, feed, rewound
from bench.quality.variants import DENSE, Variant, one_of, resolve_all
from tokenselect import AttentionInfo
from tokenselect.contract import SelectConfig
from tokenselect.errors import InvalidProblem
from tokenselect.integrations.transformers import TokenSelectCache, recorded

# What a version of the tasks computes. Raise it when the same case would get another value.
VERSION = 3
_CHUNK = 512
# Caches that the task sparse holds at once.
_AT_ONCE = 8


@dataclass(frozen=True)
class Case:
    """The least that is computed, kept and never computed again.

    task   the kind of task that runs it
    label  what rows say of it, beside its variant
    more   what else decides its value
    given  what the task needs to run it
    """

    task: str
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


@dataclass(frozen=True, kw_only=True)
class Task:
    """What all kinds have: names of variants, each taken at every budget: see `variants.votes`."""

    kinds: ClassVar[dict[str, type["Task"]]] = {}
    kind: ClassVar[str]
    runs_as: ClassVar[str]  # the kind whose `run` it has, and whose cases
    variants: tuple[str, ...]
    budgets: tuple[float, ...] = ()

    def __init_subclass__(cls) -> None:
        Task.kinds[cls.kind] = cls
        if "run" in vars(cls):
            cls.runs_as = cls.kind

    def __post_init__(self) -> None:
        for item in fields(self):
            value = getattr(self, item.name)
            least = item.metadata.get("least", 1)
            if type(value) is int and value < least:
                came = f"{self.kind}: {item.name}={value}"
                raise InvalidProblem(came, f"it is at least {least}", "give more")

    def resolved(self, settings: "Settings", context: int) -> list[Variant]:
        return resolve_all(self.variants, settings.variants, self.budgets, context)

    def selecting(self, settings: "Settings", context: int) -> list[Variant]:
        """All variants but dense attention."""
        return [v for v in self.resolved(settings, context) if v.kind != "dense"]

    def case(self, session: Session, variant: Variant, given: Any, label: Row, **more: Any) -> Case:
        return Case(self.runs_as, variant, label, session.key | more, given)

    def cases(self, settings: "Settings", session: Session) -> Iterator[Case]:
        raise NotImplementedError

    @staticmethod
    def run(cases: Sequence[Case], session: Session) -> Values:
        raise NotImplementedError

    @staticmethod
    def summary(rows: Sequence[Row]) -> list[Row]:
        return figures.against_dense(rows)


@dataclass(frozen=True, kw_only=True)
class Settings:
    """What one run measures.

    name      of the result
    split     which stretches of the texts and which seeds
    tasks     by name; cases that several of them have are run once
    variants  by name, what `variants.resolve` takes
    texts     kjv, pydoc, source, or paths of text files
    dtype     of the model's weights and of its cache
    """

    name: str
    split: Literal["choose", "report"]
    tasks: Mapping[str, Task]
    variants: Mapping[str, Mapping[str, Any]]
    texts: tuple[str, ...] = ("kjv", "pydoc", "source")
    dtype: Literal["float32", "bfloat16"] = "float32"

    def __post_init__(self) -> None:
        one_of("split", self.split, texts.SPLITS)
        if not re.fullmatch(r"\w[\w.-]*", self.name):
            rule = "files are named after settings"
            raise InvalidProblem(f"name={self.name!r}", rule, "use letters, digits, _, . and -")


def reading(
    task: Any, settings: Settings, session: Session, n: int, several: list[Variant], **label: Any
) -> Iterator[Case]:
    """Return a case for each variant and each of the task's documents, of n tokens and one more."""
    few = task.documents, n + 1
    for name, ids in texts.documents(session, settings.texts, settings.split, *few):
        sha = texts.sha(" ".join(map(str, ids)))
        for variant in several:
            yield task.case(session, variant, ids, {"document": name, **label}, sha=sha)


# --- decode, reuse and mass: tokens fed one by one ---


@dataclass(frozen=True, kw_only=True)
class Decode(Task):
    """After `contexts` tokens read densely, feed `continuation` tokens of the text one by one.

    Every variant starts from the very same cache.
    """

    kind = "decode"
    contexts: tuple[int, ...]
    documents: int
    continuation: int = 128

    def fed(self, settings: Settings, context: int) -> list[Variant]:
        """The variants that are fed tokens at this context."""
        return [DENSE, *self.selecting(settings, context)]

    def cases(self, settings: Settings, session: Session) -> Iterator[Case]:
        for n in self.contexts:
            label = {"context": n, "continuation": self.continuation}
            several, tokens = self.fed(settings, n), n + self.continuation
            yield from reading(self, settings, session, tokens, several, **label)

    @staticmethod
    @torch.inference_mode()
    def run(cases: Sequence[Case], session: Session) -> Values:
        stock = replace(cases[0], variant=DENSE)
        for case, cache, rest in _prefilled(session, [stock, *cases]):
            if case is stock:
                dense, _ = decoded(session, cache, rest, DENSE)
                continue
            logits, reused = dense, {}
            if case.variant.kind != "dense":
                logits, reused = decoded(session, cache, rest, case.variant)
            yield case, Against().add(logits, dense, rest[1:]).summary() | reused


def _prefilled(
    session: Session, cases: Iterable[Case]
) -> Iterator[tuple[Case, TokenSelectCache, tuple[int, ...]]]:
    """Yield cases of one work, each with the cache of the context and the tokens that follow."""
    caches: dict[bool, TokenSelectCache] = {}
    for case in sorted(cases, key=lambda case: case.variant.moves):
        context, ids, moves = case.label["context"], case.given, case.variant.moves
        # What is moved is cached otherwise, and needs a prefill of its own.
        if moves not in caches:
            caches.clear()
            everything = case.variant.selecting_all(len(ids))
            caches[moves] = prefilled(session, ids[:context], everything, len(ids))
        yield case, caches[moves], ids[context:]


def prefilled(
    session: Session, ids: tuple[int, ...], variant: Variant, room: int
) -> TokenSelectCache:
    """Return a cache of these tokens with room for `room`, read with `variant` in chunks."""
    cache = TokenSelectCache(session.model, max_length=room)
    with variant.applied(session.model):
        for start in range(0, len(ids), _CHUNK):
            feed(session.model, cache, ids[start : start + _CHUNK])
    return cache


def decoded(
    session: Session, cache: TokenSelectCache, ids: Sequence[int], variant: Variant
) -> tuple[Tensor, dict[str, Any]]:
    """Return logits (tokens, vocabulary) after each token but the last, and how often layers reuse.

    The cache is afterwards as it was.
    """
    selections = [layer.selections for layer in cache.layers if hasattr(layer, "selections")]
    for selection in selections:
        selection.clear()
    with rewound(cache), variant.applied(session.model):
        logits = torch.cat([feed(session.model, cache, (token,)) for token in ids[:-1]])
    if variant.label["theta"] is None:
        return logits, {}
    rates = [hits / (hits + misses) for hits, misses in (s.counts() for s in selections)]
    return logits, {"hit_rate": mean(rates), "hit_rate_of_layers": rates}


@dataclass(frozen=True, kw_only=True)
class Reuse(Decode):
    """Decode with every theta on top of every variant, and without reuse to compare."""

    kind = "reuse"
    thetas: tuple[float, ...]
    max_reuse: int = field(default=64, metadata={"least": 0})

    def fed(self, settings: Settings, context: int) -> list[Variant]:
        several = [DENSE]
        for variant in self.selecting(settings, context):
            several.append(variant.with_options(theta=None))
            several += [
                variant.with_options(theta=theta, max_reuse=self.max_reuse) for theta in self.thetas
            ]
        return several


@dataclass(frozen=True, kw_only=True)
class Mass(Decode):
    """Retained mass of each layer and head, and how much selections overlap, while decoding."""

    kind = "mass"
    continuation: int = field(default=32, metadata={"least": 2})

    def fed(self, settings: Settings, context: int) -> list[Variant]:
        return self.selecting(settings, context)

    @staticmethod
    @torch.inference_mode()
    def run(cases: Sequence[Case], session: Session) -> Values:
        for case, cache, rest in _prefilled(session, cases):
            with recorded() as infos:
                decoded(session, cache, rest, case.variant)
            assert case.variant.options is not None
            select = case.variant.options.select
            yield case, of_infos(infos, len(rest) - 1, case.label["context"], select)

    @staticmethod
    def summary(rows: Sequence[Row]) -> list[Row]:
        """Return means over documents; None for what is not known."""
        found: list[Row] = []
        for named, group in grouped(rows, ("context", "variant", "budget")):
            names = ("mass", "by_step", "by_layer", "voted")
            of = {n: torch.tensor(np.array([r[n] for r in group], float)).mean(0) for n in names}
            found.append(
                named
                | {"size": group[0]["size"], "documents": len(group)}
                | {"mass": rounded(of["mass"].mean()), "least_of_a_head": rounded(of["mass"].min())}
                | {"by_step": rounded(of["by_step"].mean()), "voted": rounded(of["voted"])}
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
    voted     mean number of tokens by vote
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
        "voted": mean(float(now.sum(-1).float().mean()) for now in voted),
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


# --- sparse: everything read by the variant itself ---


@dataclass(frozen=True, kw_only=True)
class Sparse(Task):
    """Read documents of `lengths` tokens in chunks, and count tokens from that share of it on.

    All variants read in lockstep with dense attention, each into a cache of its own, so no logits
    are kept. Beyond the trained length dense attention is no measure, and a row says so.
    """

    kind = "sparse"
    lengths: tuple[int, ...]
    documents: int
    counted_from: float = 0.5
    chunk: int = _CHUNK

    def __post_init__(self) -> None:
        super().__post_init__()
        if not 0 <= self.counted_from <= 0.95:
            rule = "it is a share of the length, from 0 to 0.95"
            raise InvalidProblem(f"sparse: counted_from={self.counted_from}", rule, "give such one")

    def cases(self, settings: Settings, session: Session) -> Iterator[Case]:
        for n in self.lengths:
            label = {"context": n, "first": int(self.counted_from * n), "chunk": self.chunk}
            label["within_trained"] = session.trained is None or n <= session.trained
            several = [DENSE, *self.selecting(settings, n)]
            yield from reading(self, settings, session, n, several, **label)

    @staticmethod
    @torch.inference_mode()
    def run(cases: Sequence[Case], session: Session) -> Values:
        for start in range(0, len(cases), _AT_ONCE):
            yield from _lockstep(cases[start : start + _AT_ONCE], session)


def _lockstep(cases: Sequence[Case], session: Session) -> Values:
    """Read one document with dense attention and all these variants, a chunk at a time."""
    label, ids, model = cases[0].label, cases[0].given, session.model
    length, first, chunk = label["context"], label["first"], label["chunk"]
    # Dense attention is read along anyway, first; its own case holds no further cache.
    variants = dict.fromkeys((DENSE, *(case.variant for case in cases)))
    caches = {variant: TokenSelectCache(model, max_length=length) for variant in variants}
    found = {variant: Against() for variant in variants}
    for start in range(0, length, chunk):
        stop = min(start + chunk, length)
        count = max(0, stop - max(first, start))  # the newest of them, which are counted
        for variant, cache in caches.items():
            with variant.applied(model):
                logits = feed(model, cache, ids[start:stop], max(count, 1))
            if variant == DENSE:
                dense = logits
            if count:
                found[variant].add(logits, dense, ids[stop + 1 - count : stop + 1])
    yield from ((case, found[case.variant].summary()) for case in cases)
