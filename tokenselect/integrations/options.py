"""The options that `config.tokenselect` takes, and `enable` of the integration of transformers."""

import difflib
from dataclasses import dataclass, field, replace
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
# What a layer may have of its own.
_OF_A_LAYER = (*CONFIG_NAMES, "theta")
NAMES = (*CONFIG_NAMES, *_OWN, "layers")
DENSE = "dense"
# What a layer that attends densely selects.
EVERYTHING = SelectConfig(k=2**31 - 1)
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
    prefill    how calls of several queries per request attend: "dense" or "selected"; where they
               select and n_query_means is not given, each query of a chunk votes for itself
    dense_below  requests of fewer tokens attend densely, >= 0
    layers     by number, from 0 on or from -1 back, what differs in a layer: "dense", or fields of
               SelectConfig and theta
    """

    select: SelectConfig = field(default_factory=SelectConfig)
    theta: float | None = None
    max_reuse: int = 64
    backend: str = "auto"
    chunk: int = 512
    prefill: str = "dense"
    dense_below: int = 0
    layers: dict[int, Any] = field(default_factory=dict, hash=False)

    @property
    def needs_raw_keys(self) -> bool:
        """Whether keys are moved: cached before their rotation, which takes the model's rope."""
        everywhere = self.select, *(self.of(layer).select for layer in self.layers)
        return any((one.positions, one.score_at) != ("original", "true") for one in everywhere)

    def of(self, layer: int, count: int = 0) -> "Options":
        """Return the options of one of `count` layers, by its number; or by its key in `layers`."""
        own = self.layers.get(layer, self.layers.get(layer - count, {}))
        if own == DENSE:
            return replace(self, select=EVERYTHING, theta=None, layers={})
        changes = dict(own)
        theta = changes.pop("theta", self.theta)
        return replace(self, select=replace(self.select, **changes), theta=theta, layers={})

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
        vars(_text_config(config))[NAME] = as_json(options)

    def __delete__(self, config: Any) -> None:
        if vars(_text_config(config)).pop(NAME, self) is self:
            raise AttributeError(NAME)


def _text_config(config: Any) -> Any:
    """Return the config of the part that generates text, which may be the whole."""
    found = config.get_text_config(decoder=True)
    # It returns a copy where there is no such part.
    return found if any(part is found for part in vars(config).values()) else config


def as_json(given: Any) -> Any:
    """Return options as JSON has them: Python's numbers, and strings for the numbers of layers.

    The same dict where it can be: `enable` knows its own by that.
    """
    if not isinstance(given, dict):
        return plain(given)
    made = {
        str(plain(key)) if is_integer(plain(key)) else key: as_json(value)
        for key, value in given.items()
    }
    pairs = zip((*made, *made.values()), (*given, *given.values()), strict=False)
    is_same = all(one is other for one, other in pairs)
    # A layer that is named twice is found by `parse`.
    return given if is_same or len(made) < len(given) else made


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
    layers = _parse_layers(values.pop("layers", {}))
    own = {name: plain(values.pop(name)) for name in _OWN if name in values}
    options = Options(SelectConfig(**values), **own, layers=layers)
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
    if options.prefill == "selected" and "n_query_means" not in values:
        # A mean of several queries finds what none of them looks for.
        options = replace(options, select=replace(options.select, n_query_means=int(chunk)))
    if not is_integer(options.dense_below) or options.dense_below < 0:
        raise InvalidProblem(
            f"dense_below={options.dense_below!r}",
            "dense_below is an integer >= 0: requests of fewer tokens attend densely",
            "pass an int of 0 or more, or leave it out for 0",
        )
    return options


def _parse_layers(given: object) -> dict[int, Any]:
    """Read the option `layers`, whose names are strings if they come from JSON."""
    if not isinstance(given, dict):
        raise InvalidProblem(
            f"layers is a {type(given).__name__}",
            "layers is a dict from numbers of layers to 'dense', or to options of the layer",
            "say layers={0: 'dense', -1: {'k': 4096}}",
        )
    layers: dict[int, Any] = {}
    for name, own in given.items():
        layer = plain(name)
        if isinstance(layer, str) and layer.removeprefix("-").isdecimal():
            layer = int(layer)
        if not is_integer(layer) or layer in layers:
            raise InvalidProblem(
                f"layers names {name!r}" + " again" * (layer in layers),
                "a layer is named once, by its number: from 0 on, or from the last one, -1, back",
                "say layers={0: 'dense', -1: {'k': 4096}}",
            )
        if not isinstance(own, dict) and own != DENSE:
            raise InvalidProblem(
                f"layer {layer} is {own!r}",
                "a layer is 'dense', or has a dict of options of its own",
                f"say layers={{{layer}: 'dense'}}, or layers={{{layer}: {{'k': 4096}}}}",
            )
        for option in own if own != DENSE else ():
            if option not in _OF_A_LAYER:
                raise _unknown(option, f" of layer {layer}", _OF_A_LAYER)
        layers[layer] = own
    return layers


def check(options: Options) -> None:
    """Raise InvalidProblem or UnknownBackend for a value that the first call would refuse."""
    if options.backend != "auto":
        registry.load(options.backend)
    _check_values(options)
    for layer in options.layers:
        try:
            _check_values(options.of(layer))
        except InvalidProblem as error:
            came, *rest = error.args
            raise InvalidProblem(f"layer {layer}: {came}", *rest) from None


def _check_values(options: Options) -> None:
    options.selection_cache()
    token = torch.zeros(1, 1, 1, 2, device="cpu")
    Problem.build(token, token, token, options.select, rope=Rope(token.new_zeros(1)))


def check_layers(options: Options, model_type: str, count: int, others: dict[int, str]) -> None:
    """Raise InvalidProblem if a named layer does not exist, or does not attend to all tokens.

    others  layers, of `count`, that do not attend to all tokens, with what they do
    """
    for name in options.layers:
        layer = name if name >= 0 else name + count
        if not 0 <= layer < count:
            raise InvalidProblem(
                f"layers names layer {name}",
                f"this {model_type} model has {count} layers, 0 to {count - 1}; -1 is the last",
                "name one of them",
            )
        if layer != name and layer in options.layers:
            raise InvalidProblem(
                f"layers names layer {layer} twice, as {layer} and as {name}",
                "a layer is named once",
                "leave one of the two out",
            )
        if layer in others:
            full = ", ".join(str(i) for i in range(count) if i not in others)
            raise InvalidProblem(
                f"layers names layer {name}, which {others[layer]}",
                "only a layer that attends to all cached tokens can select, or be dense instead",
                f"leave it out; such layers are {full or 'none here'}",
            )


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
    if preset == "faithful":
        return changed
    return changed | {"prefill": "selected", "n_query_means": 1}


def _unknown(name: object, of: str = "", names: tuple[str, ...] = NAMES) -> InvalidProblem:
    """Return the error for an unknown option."""
    close = difflib.get_close_matches(str(name), names, n=1)
    if name == "preset":
        return InvalidProblem(
            "option 'preset'",
            "a preset stands for options, and config.tokenselect holds the options themselves",
            "use enable(model, preset), or set its options: dict(SelectConfig.faithful()), say",
        )
    return InvalidProblem(
        f"option {name!r}{of}",
        f"options{of} are {', '.join(names)}",
        f"did you mean {close[0]!r}?" if close else "leave it out, or use one of these",
    )
