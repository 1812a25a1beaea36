"""What every call of `tokenselect.attention` inside a model selected."""

from collections.abc import Iterator
from contextlib import contextmanager
from types import SimpleNamespace
from typing import Any

import tokenselect
from tokenselect import AttentionInfo
from tokenselect.integrations.transformers import layers


@contextmanager
def recorded() -> Iterator[list[AttentionInfo]]:
    """Add the `AttentionInfo` of every selecting call inside, in the order of the layers.

    The module that calls is given a `tokenselect` whose `attention` also asks for the info; the
    package itself is left alone.
    """
    infos: list[AttentionInfo] = []

    def attention(*arguments: Any, **options: Any) -> Any:
        out, info = tokenselect.attention(*arguments, **options, return_info=True)
        infos.append(info)
        return out

    before = layers.tokenselect
    layers.tokenselect = SimpleNamespace(attention=attention)
    try:
        yield infos
    finally:
        layers.tokenselect = before
