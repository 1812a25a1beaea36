"""Variants of attention: dense, a window or selection, with every option spelt out; and budgets."""

import difflib
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, replace
from functools import cached_property
from typing import Any

from tokenselect.contract import SelectConfig
from tokenselect.errors import InvalidProblem
from tokenselect.integrations.options import check, parse, preset_options
from tokenselect.integrations.transformers import Options, enable

Given = Mapping[str, Mapping[str, Any]]


def one_of(what: str, name: str, known: Iterable[str]) -> str:
    """Return the name; raise InvalidProblem if it is none of those known, with the nearest."""
    if name not in known:
        close = difflib.get_close_matches(name, known, n=1)
        fix = f"did you mean {close[0]!r}?" if close else "use one of these"
        raise InvalidProblem(f"{what} {name!r}", f"known are {', '.join(known)}", fix)
    return name


def votes(budget: float, config: SelectConfig, context: int) -> int:
    """Return the k that goes with a config's sink and window; raise InvalidProblem below 0.

    budget  how many tokens are attended to: an int, or a float, a share of the context
    """
    total = budget if isinstance(budget, int) else round(budget * context)
    k = total - config.n_sink - config.n_local
    if k < 0 or not (isinstance(budget, int) or 0 < budget <= 1):
        raise InvalidProblem(
            f"a budget of {budget} at {context} tokens",
            "it is an int, tokens in all, or a share, above 0 and at most 1; "
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
    def given(self) -> dict[str, Any]:
        """All options, as `enable` takes them."""
        own = dict(vars(self.options)) if self.options else {"select": {}}
        return {**own.pop("select"), **own}

    @property
    def key(self) -> dict[str, Any]:
        """What decides results: all options, none of the names."""
        return {"attend": self.kind, **self.given}

    @property
    def label(self) -> dict[str, Any]:
        """What rows say of it; size: tokens that a decoded one attends to at most, None for all."""
        named = {"variant": self.name, "budget": self.budget, "kind": self.kind}
        size = sum(self.given[part] for part in ("n_sink", "k", "n_local")) if self.given else None
        return named | {"size": size, "theta": self.given.get("theta")}

    @property
    def moves(self) -> bool:
        """Whether keys are moved, and so cached before rotation."""
        return self.options is not None and self.options.needs_raw_keys

    def with_options(self, **changes: Any) -> "Variant":
        assert self.options is not None
        return replace(self, options=replace(self.options, **changes))

    def reading_densely(self, n: int) -> "Variant":
        """Return how n tokens are read densely, so that this variant can go on from the cache.

        What moves keys selects all, since it may read densely within the trained length only.
        """
        if self.options is None:
            return DENSE
        if not self.moves:
            return self.with_options(prefill="dense", theta=None)
        return self.with_options(select=replace(self.options.select, k=n), theta=None)

    @contextmanager
    def applied(self, model: Any) -> Iterator[None]:
        """Let the model attend like this inside the block."""
        if self.options is not None:
            with enable(model, **self.given):
                yield
            return
        before = model.config._attn_implementation
        model.set_attn_implementation("sdpa")
        try:
            yield
        finally:
            model.set_attn_implementation(before)


DENSE = Variant("dense", "dense")


def resolve(name: str, given: Given, budget: float | None, context: int) -> Variant:
    """Return the variant called `name`, or "dense", at a budget and a context.

    given   by name, options of `enable`, `preset` and `attend`: "select" if absent, or "window",
            which adds to n_local what others choose by vote. What a variant is to read, it
            selects from, prompts too, unless `prefill` is given
    budget  see `votes`; None: the k that is given, or the default
    Raises InvalidProblem and UnsupportedProblem.
    """
    if one_of("variant", name, ["dense", *given]) == "dense":
        return DENSE
    own = dict(given[name])
    kind = one_of(f"variant {name!r}: attend", own.pop("attend", "select"), ["select", "window"])
    try:
        if budget is not None and "k" in own:
            rule = "a budget says how many are chosen by vote, in place of k"
            raise InvalidProblem(f"k={own['k']} and a budget", rule, "leave one of the two out")
        preset = preset_options(own.pop("preset", None))
        options = parse(preset | {"prefill": "selected"} | own)
        select = options.select
        k = select.budget(context) if budget is None else votes(budget, select, context)
        changes = {"k": 0, "n_local": select.n_local + k} if kind == "window" else {"k": k}
        options = replace(options, select=replace(select, **changes))
        check(options)
    except InvalidProblem as error:
        came, *rest = error.args
        raise InvalidProblem(f"variant {name!r}: {came}", *rest) from None
    said = f"{budget} tokens" if isinstance(budget, int) else f"{100 * (budget or 0):.3g} %"
    return Variant(name, kind, options, said if budget else "")


def resolve_all(
    names: Iterable[str], given: Given, budgets: tuple[float, ...], context: int
) -> list[Variant]:
    """Return every variant at every budget; dense once, if it is among them."""
    found = [resolve(n, given, budget, context) for n in names for budget in budgets or (None,)]
    return list(dict.fromkeys(found))
