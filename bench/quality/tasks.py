"""Tasks: what all kinds have; and decode, reuse, mass and sparse, which read documents.

A task is a frozen dataclass of its settings. `cases` names all there is to compute, `run` computes
cases of one work, in any order, and `summary` makes the rows of a result into those of its tables.
"""

import math
import re
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, fields, replace
from itertools import pairwise
from statistics import mean
from typing import Any, ClassVar, Literal

import torch
from torch import Tensor

from bench.quality import figures, texts
from bench.quality.figures import Against, Row, grouped
from bench.quality.session import Case, Session, feed, rewound
from bench.quality.texts import Document
from bench.quality.variants import DENSE, Budget, Variant, resolve_all
from tokenselect import AttentionInfo
from tokenselect.contract import SelectConfig
from tokenselect.errors import InvalidProblem
from tokenselect.integrations.transformers import TokenSelectCache, recorded

Values = Iterator[tuple[Case, dict[str, Any]]]
_CHUNK = 512
# Caches that the task sparse holds at once, in bytes.
_MEMORY = 4e9


@dataclass(frozen=True, kw_only=True)
class Task:
    """What all kinds have: names of variants, each taken at every budget."""

    kinds: ClassVar[dict[str, type["Task"]]] = {}
    kind: ClassVar[str]
    variants: tuple[str, ...]
    budgets: tuple[Budget, ...] = ()

    def __init_subclass__(cls) -> None:
        Task.kinds[cls.kind] = cls

    def __post_init__(self) -> None:
        for item in fields(self):
            value = getattr(self, item.name)
            if type(value) is int and value < item.metadata.get("least", 1):
                raise InvalidProblem(
                    f"{self.kind}: {item.name}={value}",
                    f"it is at least {item.metadata.get('least', 1)}",
                    "give more",
                )

    def resolved(self, settings: "Settings", context: int) -> list[Variant]:
        return resolve_all(self.variants, settings.variants, self.budgets, context)

    def selecting(self, settings: "Settings", context: int) -> list[Variant]:
        """All variants but dense attention."""
        return [v for v in self.resolved(settings, context) if v.kind != "dense"]

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
        if self.split not in texts.SPLITS or not re.fullmatch(r"\w[\w.-]*", self.name):
            raise InvalidProblem(
                f"settings: name={self.name!r}, split={self.split!r}",
                f"files are named after them, and a split is one of {', '.join(texts.SPLITS)}",
                "give such ones",
            )

    def documents(self, session: Session, count: int, length: int) -> list[Document]:
        return texts.documents(session.tokenize, self.texts, self.split, count, length)


def of_document(
    session: Session, task: str, document: Document, variant: Variant, seconds: float,
    **what: Any,
) -> Case:  # fmt: skip
    """Return the case of a task that reads one document with one variant."""
    return Case(
        task=task,
        key=session.key | {"document": document.id, "sha": document.sha} | what,
        label={"document": document.id} | what | variant.label,
        work=f"{task} {document.sha} {what}",
        seconds=seconds,
        variant=variant,
        given=document,
    )


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

    def cases(self, settings: Settings, session: Session) -> Iterator[Case]:
        for context in self.contexts:
            variants = [DENSE, *self.selecting(settings, context)]
            yield from self.of_variants("decode", variants, context, settings, session)

    def of_variants(
        self, task: str, variants: list[Variant], n: int, settings: Settings, session: Session
    ) -> Iterator[Case]:
        """Return a case for each document and variant, at one context."""
        what = {"context": n, "continuation": self.continuation}
        # The token after the last is what its logits are scored by.
        for document in settings.documents(session, self.documents, n + self.continuation + 1):
            for variant in variants:
                seconds = 0.06 * self.continuation + 0.006 * n * (variant.kind == "dense")
                yield of_document(session, task, document, variant, seconds, **what)

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
            against = Against()
            against.add(logits, dense, rest[1:])
            yield case, against.summary() | reused


def _prefilled(
    session: Session, cases: Iterable[Case]
) -> Iterator[tuple[Case, TokenSelectCache, tuple[int, ...]]]:
    """Yield cases of one work, each with the cache of the context and the tokens that follow."""
    moves, cache = None, None
    for case in sorted(cases, key=lambda case: case.variant.moves):
        context, ids = case.label["context"], case.given.ids
        # What is moved is cached otherwise, and needs a prefill of its own.
        if case.variant.moves != moves:
            moves, cache = case.variant.moves, None
            everything = case.variant.selecting_all(len(ids))
            cache = prefilled(session, ids[:context], everything, len(ids))
        assert cache is not None
        yield case, cache, ids[context:]


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
    if variant.options is None or variant.options.theta is None:
        return logits, {}
    counts = [selection.counts() for selection in selections]
    rates = [hits / (hits + misses) for hits, misses in counts]
    return logits, {"hit_rate": mean(rates), "hit_rate_of_layers": rates}


@dataclass(frozen=True, kw_only=True)
class Reuse(Decode):
    """Decode with every theta on top of every variant, and without reuse to compare."""

    kind = "reuse"
    thetas: tuple[float, ...]
    max_reuse: int = field(default=64, metadata={"least": 0})

    def cases(self, settings: Settings, session: Session) -> Iterator[Case]:
        for context in self.contexts:
            several = [DENSE]
            for variant in self.selecting(settings, context):
                several.append(variant.with_options(theta=None))
                several += [
                    variant.with_options(theta=theta, max_reuse=self.max_reuse)
                    for theta in self.thetas
                ]
            for case in self.of_variants("decode", several, context, settings, session):
                options = case.variant.options
                yield replace(case, label={**case.label, "theta": options and options.theta})


@dataclass(frozen=True, kw_only=True)
class Mass(Decode):
    """Retained mass of each layer and head, and how much selections overlap, while decoding."""

    kind = "mass"
    continuation: int = field(default=32, metadata={"least": 2})

    def cases(self, settings: Settings, session: Session) -> Iterator[Case]:
        for context in self.contexts:
            variants = self.selecting(settings, context)
            yield from self.of_variants("mass", variants, context, settings, session)

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
        """Return means over documents; `..._of_layers` in full, by layer."""
        found: list[Row] = []
        for named, group in grouped(rows, ("context", "variant", "budget")):
            mass = torch.stack([known(r["mass"]) for r in group]).mean(0)
            by_step = torch.tensor([r["by_step"] for r in group]).mean(0)
            neighbours = torch.tensor([r["by_layer"] for r in group]).mean(0).diagonal(1)
            found.append(
                named
                | {"size": group[0]["size"], "documents": len(group)}
                | {"mass": rounded(mass.mean()), "mass_of_layers": rounded(mass.mean(1))}
                | {"least_of_a_head": rounded(mass.min())}  # NaN if one is
                | {"by_step": rounded(by_step.mean()), "by_step_of_layers": rounded(by_step)}
                | {"neighbours": rounded(neighbours.mean())}
                | {"voted": mean(r["voted"] for r in group)}
            )
        return found


def known(mass: list[list[float | None]]) -> Tensor:
    """Return (layers, heads) of a row's mass, NaN where it is not known."""
    return torch.tensor([[math.nan if x is None else x for x in heads] for heads in mass])


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
    assert n_layers * steps == len(infos)
    # Of each step: (layers, selections, tokens)
    voted = [
        torch.stack(
            [votes(info, n + step + 1, config) for info in infos[step * n_layers :][:n_layers]]
        )
        for step in range(steps)
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
    """Return lists of numbers, or one, to 4 digits; None for what is not known."""
    if isinstance(values, Tensor):
        values = values.tolist()
    if isinstance(values, list):
        return [rounded(value) for value in values]
    return None if math.isnan(values) else round(values, 4)


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
            raise InvalidProblem(
                f"sparse: counted_from={self.counted_from}",
                "it is a share of the length, from 0 to 0.95",
                "give such a one",
            )

    def cases(self, settings: Settings, session: Session) -> Iterator[Case]:
        for n in self.lengths:
            what = {"context": n, "first": int(self.counted_from * n), "chunk": self.chunk}
            within = {"within_trained": session.trained is None or n <= session.trained}
            for document in settings.documents(session, self.documents, n + 1):
                for variant in [DENSE, *self.selecting(settings, n)]:
                    case = of_document(session, "sparse", document, variant, 0.007 * n, **what)
                    yield replace(case, label={**case.label, **within})

    @staticmethod
    @torch.inference_mode()
    def run(cases: Sequence[Case], session: Session) -> Values:
        config = session.config
        width = getattr(config, "head_dim", None)
        width = width or config.hidden_size // config.num_attention_heads
        per_token = 2 * 4 * config.num_hidden_layers * session.kv_heads * width
        at_once = max(1, int(_MEMORY / (per_token * cases[0].label["context"])) - 1)
        # Dense attention is read along anyway, and its own case holds no further cache.
        cases = sorted(cases, key=lambda case: case.variant.kind != "dense")
        at_once += cases[0].variant.kind == "dense"
        for start in range(0, len(cases), at_once):
            yield from _lockstep(cases[start : start + at_once], session)


def _lockstep(cases: Sequence[Case], session: Session) -> Values:
    """Read one document with dense attention and all these variants, a chunk at a time."""
    label, ids, model = cases[0].label, cases[0].given.ids, session.model
    length, first, chunk = label["context"], label["first"], label["chunk"]
    dense_cache = TokenSelectCache(model, max_length=length)
    several = [
        (case, case.variant.kind != "dense" and TokenSelectCache(model, max_length=length))
        for case in cases
    ]
    found = [(case, cache, Against()) for case, cache in several]
    for start in range(0, length, chunk):
        stop = min(start + chunk, length)
        count = max(0, stop - max(first, start))  # the newest of them, which are counted
        tokens, following = ids[start:stop], ids[stop + 1 - count : stop + 1]
        with DENSE.applied(model):
            dense = feed(model, dense_cache, tokens, max(count, 1))
        for case, cache, against in found:
            logits = dense
            if cache:
                with case.variant.applied(model):
                    logits = feed(model, cache, tokens, max(count, 1))
            if count:
                against.add(logits, dense, following)
    yield from ((case, against.summary()) for case, _, against in found)
