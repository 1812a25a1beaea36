"""Options of layers by number: which layers there are, and which of them can have some."""

from itertools import zip_longest
from typing import Any

from transformers.cache_utils import DynamicCache, DynamicLayer

from tokenselect.errors import InvalidProblem
from tokenselect.integrations.transformers.masks import TokenMask
from tokenselect.integrations.transformers.options import Options, check
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
    if not options.layers:
        return
    count = config.num_hidden_layers
    full, others = _kinds(config)
    for name in options.layers:
        layer = name if name >= 0 else name + count
        if not 0 <= layer < count:
            raise InvalidProblem(
                f"layers names layer {name}",
                f"this {config.model_type} model has {count} layers, 0 to {count - 1}; -1 is the "
                "last",
                "name one of them",
            )
        if layer != name and layer in options.layers:
            raise InvalidProblem(
                f"layers names layer {layer} twice, as {layer} and as {name}",
                "a layer is named once",
                "leave one of the two out",
            )
        if layer in others:
            raise InvalidProblem(
                f"layers names layer {name}, which {others[layer]}",
                "only a layer that attends to all cached tokens can select, or be dense instead",
                f"leave it out; such layers are {', '.join(map(str, full)) or 'none here'}",
            )


def _kinds(config: Any) -> tuple[list[int], dict[int, str]]:
    """Return the layers that attend to all tokens; and the others, with what they do.

    A layer that shares the keys and values of another has no cache: its type says what it does.
    """
    full, others = [], {}
    types = getattr(config, "layer_types", None) or ()
    caches = DynamicCache(config=config).layers
    for layer, (cached, kind) in enumerate(zip_longest(caches, types)):
        if isinstance(cached, DynamicLayer):
            kind = "sliding_attention" if cached.is_sliding else "full_attention"
        if kind == "full_attention":
            full.append(layer)
        else:
            others[layer] = "slides" if kind == "sliding_attention" else "does not attend"
    return full, others
