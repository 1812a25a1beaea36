"""Variants of attention: dense, a window or selection, with every option spelt out; and budgets."""

import difflib
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import astuple, dataclass, replace
from functools import cached_property
from typing import Any

from tokenselect.contract import SelectConfig
from tokenselect.errors import InvalidProblem
from tokenselect.integrations.transformers import Options, enable
from tokenselect.integrations.transformers.options import check, parse, preset_options

Given = Mapping[str, Mapping[str, Any]]


def unknown(what: str, name: object, known: Iterable[str]) -> InvalidProblem:
    """Return the error for a name that is none of those known, with the nearest of them."""
    close = difflib.get_close_matches(str(name), known, n=1)
    return InvalidProblem(
        f"{what} {name!r}",
        f"known are {', '.join(known)}",
        f"did you mean {close[0]!r}?" if close else "use one of these",
    )


@dataclass(frozen=True)
class Budget:
    """How many tokens are attended to: by vote `k`, or in `total`, or a `share` of the context."""

    k: int | None = None
    total: int | None = None
    share: float | None = None

    def __post_init__(self) -> None:
        given = [value for value in astuple(self) if value is not None]
        if len(given) != 1 or given[0] < 0 or (self.share is not None and not 0 < self.share <= 1):
            raise InvalidProblem(
                f"{self!r}",
                "a budget is one of k and total, >= 0, and share, above 0 and at most 1",
                "give exactly one",
            )

    def __str__(self) -> str:
        if self.share is not None:
            return f"{100 * self.share:.3g} %"
        return f"k={self.k}" if self.k is not None else f"{self.total} tokens"

    def votes(self, config: SelectConfig, context: int) -> int:
        """Return the k that goes with a config's sink and window; raises InvalidProblem below 0."""
        if self.k is not None:
            return self.k
        total = self.total if self.share is None else round(self.share * context)
        assert total is not None
        k = total - config.n_sink - config.n_local
        if k < 0:
            raise InvalidProblem(
                f"a budget of {self} at {context} tokens: {total} tokens",
                f"n_sink={config.n_sink} and n_local={config.n_local} are part of it",
                "give a larger budget or length, or smaller n_sink and n_local",
            )
        return k


@dataclass(frozen=True)
class Variant:
    """How a model attends, with every option spelt out; `name` and `budget` are for people."""

    name: str
    kind: str
    options: Options | None = None
    budget: str = ""

    @cached_property
    def key(self) -> dict[str, Any]:
        """What decides results: all options, none of the names."""
        if self.options is None:
            return {"attend": self.kind}
        return {"attend": self.kind, **self.options.select, **self._own}

    @property
    def _own(self) -> dict[str, Any]:
        return {name: value for name, value in vars(self.options).items() if name != "select"}

    @property
    def label(self) -> dict[str, Any]:
        """What rows say of it; size: tokens that a decoded one attends to at most, None for all."""
        select = self.options and self.options.select
        size = select.n_sink + select.k + select.n_local if select else None
        return {"variant": self.name, "budget": self.budget, "kind": self.kind, "size": size}

    @property
    def moves(self) -> bool:
        """Whether keys are moved, and so cached before rotation."""
        return self.options is not None and self.options.needs_raw_keys

    def with_options(self, **changes: Any) -> "Variant":
        assert self.options is not None
        return replace(self, options=replace(self.options, **changes))

    def selecting_all(self, n: int) -> "Variant":
        """Return dense attention of n tokens that leaves the cache as this variant needs it.

        A selection of everything is not moved, so it is dense whatever the options.
        """
        if not self.moves:
            return DENSE
        assert self.options is not None
        return self.with_options(select=replace(self.options.select, k=n))

    @contextmanager
    def applied(self, model: Any) -> Iterator[None]:
        """Let the model attend like this inside the block."""
        if self.options is not None:
            with enable(model, **self.options.select, **self._own):
                yield
            return
        before = model.config._attn_implementation
        model.set_attn_implementation("sdpa")
        try:
            yield
        finally:
            model.set_attn_implementation(before)


DENSE = Variant("dense", "dense")


def resolve(name: str, given: Given, budget: Budget | None, context: int) -> Variant:
    """Return the variant called `name`, or "dense", at a budget and a context.

    given  by name, options of `enable`, `preset` and `attend`: "select" if absent, or "window",
           which adds to n_local what others choose by vote
    Raises InvalidProblem and UnsupportedProblem.
    """
    if name == "dense":
        return DENSE
    if name not in given:
        raise unknown("variant", name, ["dense", *given])
    own = dict(given[name])
    kind, preset = own.pop("attend", "select"), own.pop("preset", None)
    if kind not in ("select", "window"):
        raise unknown(f"variant {name!r}: attend", kind, ["select", "window"])
    try:
        if budget is not None and "k" in own:
            raise InvalidProblem(
                f"k={own['k']} and a budget of {budget}",
                "a budget says how many are chosen by vote, in place of k",
                "leave one of the two out",
            )
        options = parse(preset_options(preset) | own)
        check(options)
        select = options.select
        k = select.k if budget is None else budget.votes(select, context)
        changes = {"k": 0, "n_local": select.n_local + k} if kind == "window" else {"k": k}
        options = replace(options, select=replace(select, **changes))
        check(options)
    except InvalidProblem as error:
        came, *rest = error.args
        raise InvalidProblem(f"variant {name!r}: {came}", *rest) from None
    return Variant(name, kind, options, "" if budget is None else str(budget))


def resolve_all(
    names: Iterable[str], given: Given, budgets: tuple[Budget, ...], context: int
) -> list[Variant]:
    """Return every variant at every budget; dense once, if it is among them."""
    found = [resolve(n, given, budget, context) for n in names for budget in budgets or (None,)]
    return list(dict.fromkeys(found))
