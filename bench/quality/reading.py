"""Frozen dataclasses from mappings, with errors that say what came, the rule, and what to do."""

import difflib
import types
import typing
from collections.abc import Mapping
from dataclasses import MISSING, fields
from typing import Any, TypeVar, get_args, get_origin, get_type_hints

from tokenselect.errors import InvalidProblem

T = TypeVar("T")


def unknown(what: str, name: object, known: typing.Iterable[str]) -> InvalidProblem:
    """The error for a name that is none of those known, with the near miss if there is one."""
    names = sorted(map(str, known))
    close = difflib.get_close_matches(str(name), names, n=1)
    return InvalidProblem(
        f"{what} {name!r}",
        f"known are {', '.join(names)}",
        f"did you mean {close[0]!r}?" if close else "use one of these, or leave it out",
    )


def build(cls: type[T], given: object, where: str) -> T:
    """Make a dataclass of a mapping. A field's metadata may say `least` and `most`."""
    if not isinstance(given, Mapping):
        raise InvalidProblem(
            f"{where} is {given!r}", "it maps names to values", "write it as key: value lines"
        )
    known = {field.name: field for field in fields(cls)}  # type: ignore[arg-type]
    for name in given:
        if name not in known:
            raise unknown(f"{where}:", name, known)
    hints = get_type_hints(cls)
    values = {}
    for name, field in known.items():
        if name in given:
            values[name] = convert(hints[name], given[name], f"{where}.{name}", field.metadata)
        elif field.default is MISSING and field.default_factory is MISSING:
            raise InvalidProblem(f"{where} without {name}", f"{name} has no default", "give it")
    return cls(**values)


def convert(hint: Any, value: Any, where: str, limits: Mapping[str, Any]) -> Any:
    """`value` as what a field is annotated with; raises InvalidProblem."""
    origin, inner = get_origin(hint), get_args(hint)
    if origin in (typing.Union, types.UnionType):
        if value is None and type(None) in inner:
            return None
        return convert(next(t for t in inner if t is not type(None)), value, where, limits)
    if origin is tuple:
        if isinstance(value, str) or not isinstance(value, list | tuple):
            raise InvalidProblem(f"{where}: {value!r}", "it is a list", "write [a, b, ...]")
        if not value and not limits.get("may_be_empty"):
            raise InvalidProblem(f"{where}: []", "it has one item at least", "name one")
        return tuple(convert(inner[0], item, where, limits) for item in value)
    if origin is Mapping and not isinstance(value, Mapping):
        raise InvalidProblem(
            f"{where}: {value!r}", "it maps names to values", "write it as key: value lines"
        )
    if origin is typing.Literal:
        if value not in inner:
            raise unknown(f"{where}:", value, map(str, inner))
        return value
    if hasattr(hint, "__dataclass_fields__"):
        return build(hint, value, where)
    if hint in (int, float):
        good = isinstance(value, int if hint is int else int | float) and value == value
        least, most = limits.get("least"), limits.get("most")
        inside = good and (least is None or value >= least) and (most is None or value <= most)
        if isinstance(value, bool) or not inside:
            bounds = [f">= {least}"] * (least is not None) + [f"<= {most}"] * (most is not None)
            kind = "an integer" if hint is int else "a number"
            raise InvalidProblem(
                f"{where}: {value!r}", " ".join([f"it is {kind}", *bounds]), "give such a one"
            )
        return hint(value)
    if hint is str and not isinstance(value, str):
        raise InvalidProblem(f"{where}: {value!r}", "it is a text", "quote it")
    return value
