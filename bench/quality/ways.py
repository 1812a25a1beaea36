"""Ways to attend: a name in the settings, and what a model does under it."""

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import asdict, dataclass, replace
from functools import cached_property
from typing import Any

from bench.quality.reading import unknown
from tokenselect.contract import SelectConfig
from tokenselect.errors import InvalidProblem
from tokenselect.integrations.transformers import Options, enable
from tokenselect.integrations.transformers.options import check, parse, preset_options

KINDS = ("dense", "window", "select")
STOCK: dict[str, Mapping[str, Any]] = {"dense": {"attend": "dense"}, "window": {"attend": "window"}}


@dataclass(frozen=True)
class Budget:
    """How many tokens are attended to: by vote `k`, or in `total`, or a `share` of the context."""

    k: int | None = None
    total: int | None = None
    share: float | None = None

    def __post_init__(self) -> None:
        given = {name: v for name, v in asdict(self).items() if v is not None}
        if len(given) != 1:
            raise InvalidProblem(
                f"budget {given}", "a budget is one of k, total, share", "give exactly one"
            )
        name, value = next(iter(given.items()))
        good = 0 < value <= 1 if name == "share" else isinstance(value, int) and value >= 0
        if isinstance(value, bool) or not good:
            raise InvalidProblem(
                f"budget {name}: {value!r}",
                "k and total are integers >= 0, share a number above 0 and at most 1",
                "give such a one",
            )

    def __str__(self) -> str:
        if self.share is not None:
            return f"{100 * self.share:.3g} %"
        return f"k={self.k}" if self.k is not None else f"{self.total} tokens"

    def votes(self, config: SelectConfig, context: int) -> int:
        """The k that goes with a config's sink and window; raises InvalidProblem below 0."""
        if self.k is not None:
            return self.k
        total = round(self.share * context) if self.share is not None else self.total
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
class Way:
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
        own = {name: v for name, v in asdict(self.options).items() if name != "select"}
        return {"attend": self.kind} | asdict(self.options.select) | own

    @property
    def label(self) -> dict[str, Any]:
        return {"way": self.name, "budget": self.budget}

    @property
    def size(self) -> int | None:
        """Tokens that a decoded one attends to, at most; None for all."""
        if self.options is None:
            return None
        s = self.options.select
        return s.n_sink + s.k + s.n_local

    @property
    def moves(self) -> bool:
        """Whether keys are moved, and so cached before rotation."""
        if self.options is None:
            return False
        select = self.options.select
        return (select.positions, select.score_at) != ("original", "true")

    def with_options(self, **changes: Any) -> "Way":
        assert self.options is not None
        return replace(self, options=replace(self.options, **changes))

    def everything(self, n: int) -> "Way":
        """Dense attention that leaves the cache as this way wants it: k for all n tokens.

        What fits is not moved and is all selected, so it is dense whatever the options.
        """
        if not self.moves:
            return DENSE
        assert self.options is not None
        return self.with_options(select=replace(self.options.select, k=n))

    @contextmanager
    def attached(self, model: Any) -> Iterator[None]:
        """The model attends this way inside the block."""
        if self.options is None:
            before = model.config._attn_implementation
            model.set_attn_implementation("sdpa")
            try:
                yield
            finally:
                model.set_attn_implementation(before)
            return
        own = {name: v for name, v in vars(self.options).items() if name != "select"}
        with enable(model, **self.options.select, **own):
            yield


DENSE = Way("dense", "dense")


def resolve(
    name: str, ways: Mapping[str, Mapping[str, Any]], budget: Budget | None, context: int
) -> Way:
    """The way called `name` at a budget and a context; raises InvalidProblem, UnsupportedProblem.

    A window has no votes: what others choose by vote, it adds to n_local.
    """
    known = STOCK | dict(ways)
    if name not in known:
        raise unknown("way", name, known)
    given = dict(known[name])
    kind, preset = given.pop("attend", "select"), given.pop("preset", None)
    if kind not in KINDS:
        raise unknown(f"ways.{name}.attend:", kind, KINDS)
    if kind == "dense":
        if given or preset:
            raise InvalidProblem(
                f"ways.{name}: {sorted(given)}", "dense attention has no options", "leave them out"
            )
        return replace(DENSE, name=name)
    try:
        options = parse(preset_options(preset) | given)
        check(options)
        select = options.select
        k = select.k if budget is None else budget.votes(select, context)
        if kind == "window":
            select = replace(select, k=0, n_local=select.n_local + k)
        else:
            select = replace(select, k=k)
        options = replace(options, select=select)
        check(options)
    except InvalidProblem as error:
        came, *rest = error.args
        raise InvalidProblem(f"way {name!r}: {came}", *rest) from None
    return Way(name, kind, options, "" if budget is None else str(budget))


def resolve_all(
    names: tuple[str, ...],
    ways: Mapping[str, Mapping[str, Any]],
    budgets: tuple[Budget, ...],
    context: int,
) -> list[Way]:
    """Every way at every budget; dense once, if it is among them."""
    found = [resolve(n, ways, budget, context) for n in names for budget in budgets or (None,)]
    return list(dict.fromkeys(found))


def selecting(ways: list[Way]) -> list[Way]:
    """All but dense attention."""
    return [way for way in ways if way.kind != "dense"]
