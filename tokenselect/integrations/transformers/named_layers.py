"""Options of layers by number: which layers there are, and which of them can have some."""

from itertools import zip_longest
from typing import Any

from transformers.cache_utils import DynamicCache, DynamicLayer

from tokenselect.integrations.options import Options, check
from tokenselect.integrations.options import check_layers as check_named
from tokenselect.integrations.transformers.masks import TokenMask
from tokenselect.integrations.transformers.refusals import refuse_layer


def layer_options(module: Any, mask: TokenMask, options: Options) -> Options:
    """Return the options of the layer that an attention module is; check all once per mask.

    Raises InvalidProblem, or UnsupportedProblem for a module that does not know its number.
    """
    if options != mask.checked:  # what attends densely would not find out
        check(options)
        check_layers(options, module.config)
        mask.checked = options
    if not options.layers:
        return options
    layer = getattr(module, "layer_idx", None)
    if layer is None:
        raise refuse_layer(
            module,
            "it has no layer_idx, so that it is unknown which of the named layers it is",
            "leave the option layers out",
        )
    return options.of(layer, module.config.num_hidden_layers)


def check_layers(options: Options, config: Any) -> None:
    """Raise InvalidProblem if a named layer does not exist, or does not attend to all tokens."""
    if options.layers:
        count = config.num_hidden_layers
        check_named(options, config.model_type, count, _others(config))


def _others(config: Any) -> dict[int, str]:
    """Return the layers that do not attend to all tokens, with what they do.

    A layer that shares the keys and values of another has no cache: its type says what it does.
    """
    others = {}
    types = getattr(config, "layer_types", None) or ()
    caches = DynamicCache(config=config).layers
    for layer, (cached, kind) in enumerate(zip_longest(caches, types)):
        if isinstance(cached, DynamicLayer):
            kind = "sliding_attention" if cached.is_sliding else "full_attention"
        if kind != "full_attention":
            others[layer] = "slides" if kind == "sliding_attention" else "does not attend"
    return others
