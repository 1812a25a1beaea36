"""Triton's interpreter, made twice as fast: it repeats itself, and checks every addition."""

import contextlib
import dataclasses
import functools
from collections.abc import Iterator
from typing import Any


@functools.cache
def hasten() -> None:
    """Patch Triton's language once a launch, instead of at every call of a function in a kernel.

    And check integers for overflow where it is asked for: see `overflow_checked`.
    """
    # Triton imports this when it first meets certain arguments, and must not find itself patched.
    import triton.experimental.gluon  # noqa: F401
    from triton.runtime import interpreter

    patch, launch = interpreter._patch_lang, interpreter.GridExecutor.__call__
    patched: dict[int, Any] = {}

    def patch_once(function: Any) -> Any:
        module = id(function.__globals__)
        if module not in patched:
            patched[module] = patch(function)
        return patched[module]

    def launch_anew(self: Any, *given: Any, **named: Any) -> Any:
        patched.clear()
        return launch(self, *given, **named)

    interpreter._patch_lang = patch_once
    interpreter.GridExecutor.__call__ = launch_anew
    _check_overflow(False)


def _check_overflow(wanted: bool) -> bool:
    """Returns what it was before."""
    from triton.runtime import interpreter

    builder = interpreter.interpreter_builder
    before = builder.options.sanitize_overflow and builder.options.debug
    # Without debug it computes whether a number overflows, and does not say.
    builder.options = dataclasses.replace(builder.options, sanitize_overflow=wanted, debug=wanted)
    return before


@contextlib.contextmanager
def overflow_checked() -> Iterator[None]:
    """Within, a sum or product of int32 that leaves the type is an error, where interpreted."""
    before = _check_overflow(True)
    try:
        yield
    finally:
        _check_overflow(before)
