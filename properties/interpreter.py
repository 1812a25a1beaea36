"""Triton's interpreter, made three times as fast: it repeats itself, and checks every addition."""

import contextlib
import dataclasses
import functools
import math
from collections.abc import Iterator
from typing import Any


@functools.cache
def hasten() -> None:
    """Patch Triton's language once per launch, not at every call of a function in a kernel.

    Build what describes a type once per type, not once per value. Check integers for overflow
    only where it is asked for: see `overflow_checked`.
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
    _build_types_once(interpreter)
    _check_overflow(False)


def _build_types_once(interpreter: Any) -> None:
    from triton.language import core

    numpy_dtype = interpreter._get_np_dtype
    of_scalar = functools.cache(numpy_dtype)

    def numpy_dtype_once(dtype: Any) -> Any:
        scalar = dtype.scalar
        return numpy_dtype(scalar) if scalar.is_ptr() else of_scalar(scalar)

    @functools.cache
    def of_shape(shape: tuple[int, ...]) -> tuple[Any, Any]:
        return core.constexpr(math.prod(shape)), core.tuple([core.constexpr(n) for n in shape])

    def init_tensor(self: Any, handle: Any, type: Any) -> None:
        self.handle, self.type, self.dtype = handle, type, type.scalar
        self.numel, self.shape = of_shape(tuple(type.shape) if type.is_block() else ())

    init_block = core.block_type.__init__
    numels: dict[tuple[int, ...], int] = {}
    shapes: dict[tuple[int, ...], Any] = {}

    def init_block_once(self: Any, element_ty: Any, shape: Any) -> None:
        key = tuple([getattr(n, "value", n) for n in shape])
        if key not in shapes:
            init_block(self, element_ty, shape)
            shapes[key], numels[key] = self.shape, self.numel
        self.element_ty, self.shape, self.numel = element_ty, shapes[key], numels[key]

    semantic = type(interpreter.interpreter_semantic)
    broadcast = semantic.broadcast_impl_value

    def broadcast_unlike(self: Any, lhs: Any, rhs: Any) -> tuple[Any, Any]:
        alike = getattr(lhs.type, "shape", None) is getattr(rhs.type, "shape", None)
        return (lhs, rhs) if alike else broadcast(self, lhs, rhs)

    semantic.broadcast_impl_value = broadcast_unlike
    interpreter._get_np_dtype = numpy_dtype_once
    core.tensor.__init__, core.block_type.__init__ = init_tensor, init_block_once
    core.block_type.name = property(
        lambda self: f"<{self.shape}, {self.element_ty}>", lambda self, name: None
    )


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
