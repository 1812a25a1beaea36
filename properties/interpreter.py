"""Triton's interpreter, made three times as fast: it repeats itself, and checks every addition."""

import contextlib
import dataclasses
import functools
import inspect
import math
from collections.abc import Iterator
from typing import Any


@functools.cache
def hasten() -> None:
    """Patch Triton's language once per launch, not at every call of a function in a kernel.

    Build what describes a type once per type, not once per value; look at the types of two operands
    only where they differ. Check integers for overflow only where it is asked for: see
    `overflow_checked`.
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
    _call_directly(interpreter)
    _build_types_once(interpreter)
    _convert_unlike(interpreter)
    _check_overflow(False)


def _call_directly(interpreter: Any) -> None:
    """Leave out the wrappers around the language's functions, and find those once per module."""
    from triton.language import core

    semantic = interpreter.interpreter_semantic

    def direct(member: Any) -> Any:
        inner = getattr(member, "__wrapped__", member)

        def call(*given: Any, **named: Any) -> Any:
            named["_semantic"] = semantic
            return inner(*given, **named)

        return call

    @functools.cache
    def functions_of(module: Any) -> list[tuple[str, Any]]:
        members = inspect.getmembers(module, core.is_builtin)
        return [(name, direct(member)) for name, member in members]

    def patch_module(module: Any, builder: Any, scope: Any) -> None:
        for name, function in functions_of(module):
            scope.set_attr(module, name, function)

    interpreter._patch_builtin = patch_module


def _convert_unlike(interpreter: Any) -> None:
    from triton.language import core

    semantic = type(interpreter.interpreter_semantic)
    convert = semantic.binary_op_type_checking_impl
    # Whatever is done with two of a type, a quotient included, is done in it.
    plain = {"int1", "int32", "int64", "fp32"}

    def of_type(self: Any, value: Any, dtype: Any) -> Any:
        """Return the value as a tensor of this type; None if more than that is to be done."""
        if type(value) is core.tensor:
            return value if value.dtype is dtype else None
        if type(value) is int and (dtype is core.int32 or dtype is core.int64):
            fits = dtype.get_int_min_value() <= value <= dtype.get_int_max_value()
            return self.scalar_constant(value, dtype) if fits else None
        if type(value) is float and dtype is core.float32:
            return self.scalar_constant(value, dtype)
        return None

    def convert_unlike(self: Any, lhs: Any, rhs: Any, *given: Any, **named: Any) -> Any:
        are_tensors = type(lhs) is type(rhs) is core.tensor
        tensor = lhs if type(lhs) is core.tensor else rhs
        if type(tensor) is core.tensor and tensor.dtype.name in plain:
            left, right = of_type(self, lhs, tensor.dtype), of_type(self, rhs, tensor.dtype)
            if left is not None and right is not None:
                return self.broadcast_impl_value(left, right)
        elif are_tensors and given[:1] == (True,) and lhs.dtype.is_ptr() and rhs.dtype.is_int():
            # A pointer is allowed on the left; what is added to it keeps its type.
            return self.broadcast_impl_value(lhs, rhs)
        return convert(self, lhs, rhs, *given, **named)

    semantic.binary_op_type_checking_impl = convert_unlike


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
