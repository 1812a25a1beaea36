"""The options of a model: what `config.tokenselect` and `enable` take."""

import difflib
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

import torch

from tokenselect.contract import CONFIG_NAMES, Problem, SelectConfig
from tokenselect.errors import InvalidProblem
from tokenselect.reuse import SelectionCache
from tokenselect.rope import Rope

NAME = "tokenselect"
_OWN = ("theta", "max_reuse", "backend", "chunk")
NAMES = (*CONFIG_NAMES, *_OWN)
PRESETS = ("faithful", "extrapolate", "paper")


@dataclass(frozen=True)
class Options:
    """How a model's full-attention layers attend.

    select     what to select: `tokenselect.SelectConfig`
    theta      reuse a selection while queries are at least that alike; None: never
    max_reuse  at most that many tokens after it was made
    backend    a backend's name, or "auto"
    chunk      at most that many queries of one request are selected for together, >= 1
    """

    select: SelectConfig = field(default_factory=SelectConfig)
    theta: float | None = None
    max_reuse: int = 64
    backend: str = "auto"
    chunk: int = 512

    @property
    def moves(self) -> bool:
        """Whether keys have to be moved, which takes the model's rope."""
        return (self.select.positions, self.select.score_at) != ("original", "true")

    def selection_cache(self) -> SelectionCache:
        """A new, empty one with these settings; raises InvalidProblem for bad ones."""
        return SelectionCache(self.theta, self.max_reuse)


def parse(given: object) -> Options:
    """Read `config.tokenselect`: a mapping from names to values, or None for the defaults.

    Raises InvalidProblem for an unknown name. The values are checked where they are used, and all
    at once by `check`.
    """
    if given is None:
        return Options()
    if not isinstance(given, (Mapping, SelectConfig)):
        raise InvalidProblem(
            f"config.tokenselect is a {type(given).__name__}",
            "config.tokenselect maps the names of options to values",
            'set a dict, say config.tokenselect = {"k": 1024}',
        )
    values = dict(given)
    for name in values:
        if name not in NAMES:
            raise _unknown(name)
    own = {name: values.pop(name) for name in _OWN if name in values}
    options = Options(SelectConfig(**values), **own)
    chunk = options.chunk
    if not isinstance(chunk, int) or isinstance(chunk, bool) or chunk < 1:
        raise InvalidProblem(
            f"chunk={chunk!r}",
            "chunk is an integer >= 1: how many queries are selected for together",
            "pass an int of 1 or more, or leave chunk out for 512",
        )
    return options


def check(options: Options) -> None:
    """Raise InvalidProblem now for a value that the first call would refuse."""
    options.selection_cache()
    token = torch.zeros(1, 1, 1, 2)
    Problem.build(token, token, token, options.select, rope=Rope(torch.zeros(1)))


def preset_options(preset: str | None) -> dict[str, Any]:
    """The options that a preset stands for; raises InvalidProblem for an unknown name."""
    if preset is None:
        return {}
    if preset not in PRESETS:
        raise InvalidProblem(
            f"preset={preset!r}",
            f"preset is one of {', '.join(map(repr, PRESETS))}, or None",
            "name one of them, or pass the options themselves",
        )
    make = getattr(SelectConfig, preset)
    return {name: make()[name] for name in CONFIG_NAMES if make()[name] != SelectConfig()[name]}


def _unknown(name: object) -> InvalidProblem:
    close = difflib.get_close_matches(str(name), NAMES, n=1)
    return InvalidProblem(
        f"option {name!r}",
        f"options are {', '.join(NAMES)}",
        f"did you mean {close[0]!r}?" if close else "leave it out, or use one of these",
    )
