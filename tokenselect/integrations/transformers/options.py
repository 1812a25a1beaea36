"""The options that `config.tokenselect` and `enable` take."""

import difflib
from dataclasses import dataclass, field
from typing import Any

import torch

from tokenselect.contract import CONFIG_NAMES, Problem, SelectConfig
from tokenselect.dispatch import registry
from tokenselect.errors import InvalidProblem
from tokenselect.rope import Rope
from tokenselect.scalars import is_integer, plain
from tokenselect.selection_cache import SelectionCache

NAME = "tokenselect"
_OWN = ("theta", "max_reuse", "backend", "chunk", "prefill", "dense_below")
NAMES = (*CONFIG_NAMES, *_OWN)
PRESETS = ("faithful", "extrapolate", "paper")
PREFILLS = ("dense", "selected")


@dataclass(frozen=True)
class Options:
    """How a model's full-attention layers attend.

    select     which tokens: `tokenselect.SelectConfig`
    theta      reuse a selection while queries are at least that alike; None: never
    max_reuse  at most that many tokens after it was made
    backend    a backend's name, or "auto"
    chunk      at most that many queries of one request share a selection, >= 1
    prefill    how calls of several queries per request attend: "dense" or "selected"
    dense_below  requests of fewer tokens attend densely, >= 0
    """

    select: SelectConfig = field(default_factory=SelectConfig)
    theta: float | None = None
    max_reuse: int = 64
    backend: str = "auto"
    chunk: int = 512
    prefill: str = "dense"
    dense_below: int = 0

    @property
    def needs_raw_keys(self) -> bool:
        """Whether keys are moved: cached before their rotation, which takes the model's rope."""
        return (self.select.positions, self.select.score_at) != ("original", "true")

    def selection_cache(self) -> SelectionCache:
        """Return a new SelectionCache with these settings; raise InvalidProblem for bad ones."""
        return SelectionCache(self.theta, self.max_reuse)


class TextConfigOptions:
    """`config.tokenselect` of any model: the options of the part of it that generates text.

    A model that also sees or hears has a config of configs; its attention is given only that of the
    text, so options of the outer config are kept there. Stored like any other attribute; None while
    not set, so that from_pretrained(..., tokenselect={...}) finds the attribute.
    """

    def __get__(self, config: Any, kind: type) -> Any:
        if config is None:
            return self
        return vars(_text_config(config)).get(NAME)

    def __set__(self, config: Any, options: Any) -> None:
        if isinstance(options, dict):
            as_json = {name: plain(value) for name, value in options.items()}
            # The same dict where it can be: `enable` knows its own by that.
            if any(as_json[name] is not value for name, value in options.items()):
                options = as_json
        vars(_text_config(config))[NAME] = options

    def __delete__(self, config: Any) -> None:
        if vars(_text_config(config)).pop(NAME, self) is self:
            raise AttributeError(NAME)


def _text_config(config: Any) -> Any:
    """Return the config of the part that generates text, which may be the whole."""
    found = config.get_text_config(decoder=True)
    # It returns a copy where there is no such part.
    return found if any(part is found for part in vars(config).values()) else config


def parse(given: object) -> Options:
    """Read `config.tokenselect`: a dict from names to values, or None for the defaults.

    Raises InvalidProblem for an unknown name. The values are checked where they are used, and all
    at once by `check`.
    """
    if given is None:
        return Options()
    if not isinstance(given, dict):  # all else would keep the config from being saved
        raise InvalidProblem(
            f"config.tokenselect is a {type(given).__name__}",
            "config.tokenselect is a dict from the names of options to values",
            'set config.tokenselect = {"k": 1024}, say, or dict(SelectConfig(...))',
        )
    values = dict(given)
    for name in values:
        if name not in NAMES:
            raise _unknown(name)
    own = {name: plain(values.pop(name)) for name in _OWN if name in values}
    options = Options(SelectConfig(**values), **own)
    chunk = options.chunk
    if not is_integer(chunk) or chunk < 1:
        raise InvalidProblem(
            f"chunk={chunk!r}",
            "chunk is an integer >= 1: how many queries share a selection",
            "pass an int of 1 or more, or leave chunk out for 512",
        )
    if options.prefill not in PREFILLS:
        raise InvalidProblem(
            f"prefill={options.prefill!r}",
            f"prefill is one of {', '.join(map(repr, PREFILLS))}: how prompts are read",
            "leave it out for the preset's own, or for 'dense'",
        )
    if not is_integer(options.dense_below) or options.dense_below < 0:
        raise InvalidProblem(
            f"dense_below={options.dense_below!r}",
            "dense_below is an integer >= 0: requests of fewer tokens attend densely",
            "pass an int of 0 or more, or leave it out for 0",
        )
    return options


def check(options: Options) -> None:
    """Raise InvalidProblem or UnknownBackend for a value that the first call would refuse."""
    options.selection_cache()
    if options.backend != "auto":
        registry.load(options.backend)
    token = torch.zeros(1, 1, 1, 2, device="cpu")
    Problem.build(token, token, token, options.select, rope=Rope(token.new_zeros(1)))


def preset_options(preset: str | None) -> dict[str, Any]:
    """Return the options that a preset sets; raise InvalidProblem for an unknown name."""
    if preset is None:
        return {}
    if preset not in PRESETS:
        close = difflib.get_close_matches(str(preset), PRESETS, n=1)
        by_name = "pass options by name: enable(model, k=1024), or enable(model, **options)"
        raise InvalidProblem(
            f"preset={preset!r}",
            f"preset is one of {', '.join(map(repr, PRESETS))}, or None",
            f"did you mean {close[0]!r}?" if close else by_name,
        )
    config, plain_config = getattr(SelectConfig, preset)(), SelectConfig()
    changed = {name: config[name] for name in CONFIG_NAMES if config[name] != plain_config[name]}
    return changed if preset == "faithful" else changed | {"prefill": "selected"}


def _unknown(name: object) -> InvalidProblem:
    """Return the error for an unknown option."""
    close = difflib.get_close_matches(str(name), NAMES, n=1)
    if name == "preset":
        return InvalidProblem(
            "option 'preset'",
            "a preset stands for options, and config.tokenselect holds the options themselves",
            "use enable(model, preset), or set its options: dict(SelectConfig.faithful()), say",
        )
    return InvalidProblem(
        f"option {name!r}",
        f"options are {', '.join(NAMES)}",
        f"did you mean {close[0]!r}?" if close else "leave it out, or use one of these",
    )
