"""Names of backends, loaded when first asked for; and the choice among them."""

import dataclasses
import importlib
from importlib.metadata import entry_points
from typing import Any, NamedTuple

from tokenselect.contract import Backend, Problem, Reuse, reasons
from tokenselect.errors import InvalidProblem, UnknownBackend, UnsupportedProblem

# What backend="auto" tries, in this order; everything else has to be asked for by name.
AUTO = ("native", "cpu", "triton")
# Of those, what takes seconds to load the first time, since it is compiled: "auto" leaves it alone
# where the problem is on another device.
_ONLY_ON = {"native": "cpu"}

ENTRY_POINTS = "tokenselect.backends"
_STAGES = ("score", "select", "attend")  # which may be borrowed

_targets: dict[str, str | Backend] = {
    "reference": "tokenselect.reference:BACKEND",
    "cpu": "tokenselect.kernels.cpu:BACKEND",
    "native": "tokenselect.kernels.native.backend:BACKEND",
    "triton": "tokenselect.kernels.triton:BACKEND",
    "cuda_graph": "tokenselect.plans.cuda_graph:BACKEND",
}
# Packages without which one of them is absent, instead of broken.
_PACKAGES = {"triton": "triton", "cuda_graph": "triton"}
_loaded: dict[str, Backend] = {}
# Names that installed packages declare and do not get: what came, the rule, what to do.
_refused: dict[str, tuple[str, str, str]] = {}
_scanned = False


def register(name: str, target: str | Backend) -> None:
    """Add a backend: a `Backend`, or "package.module:ATTRIBUTE", imported when first asked for.

    Packages can do the same by an entry point of the group "tokenselect.backends". Of several that
    declare one name, none gets it: `register` it for the one that is to have it.
    Raises InvalidProblem if the name is taken, is "auto" or no name, or the target is neither of
    the two, or a Backend of another name.
    """
    _scan()
    _add(name, target, f"register({name!r}, {target!r})")
    _refused.pop(name, None)


def _add(name: str, target: str | Backend, came: str) -> None:
    """Add a name that is free; `came` is what an error says that came."""
    if not isinstance(name, str) or name in ("", "auto", *_targets):
        raise InvalidProblem(
            came,
            f"a backend's name is a new string; taken: {', '.join(['auto', *_targets])}",
            "choose another name",
        )
    if not (isinstance(target, Backend) or (isinstance(target, str) and ":" in target)):
        raise InvalidProblem(
            came,
            'the target is a Backend or a string "package.module:ATTRIBUTE"',
            "point it at the module's Backend",
        )
    if isinstance(target, Backend):
        _check_name(name, target)
    _targets[name] = target


def _scan() -> None:
    """Read, once, what installed packages declare."""
    global _scanned
    if not _scanned:
        declared: dict[str, dict[str, str]] = {}
        for entry in entry_points(group=ENTRY_POINTS):
            package = "a package" if entry.dist is None else entry.dist.name
            declared.setdefault(entry.name, {})[entry.value] = package
        for name, packages in declared.items():
            _declare(name, packages)
        _scanned = True


def _declare(name: str, packages: dict[str, str]) -> None:
    """Add a name that installed packages declare, for a target each, or note why it cannot be."""
    claims = [f"{package} declares {name!r} = {target!r}" for target, package in packages.items()]
    target = next(iter(packages))
    if len(packages) > 1:
        _refused[name] = (
            "; ".join(claims),
            "a backend's name is declared by one installed package",
            f"uninstall the others, or choose one: register({name!r}, {target!r})",
        )
    elif _targets.get(name) != target:  # a scan in another thread adds the same
        try:
            _add(name, target, claims[0])
        except InvalidProblem as error:
            _refused[name] = error.args


def backends() -> tuple[str, ...]:
    """Return the names that `backend=` takes, besides "auto".

    Those too that cannot be used, because a package is missing or broken, or several declare the
    name: `explain` and the error say why.
    """
    _scan()
    return tuple(dict.fromkeys([*_targets, *(name for name in _refused if name != "auto")]))


def load(name: str, borrowers: tuple[str, ...] = ()) -> Backend:
    """Return the backend of that name, importing it the first time.

    borrowers  the backends on whose behalf it is loaded, to find a circle

    Raises UnknownBackend, or InvalidProblem for a name that installed packages declare and do not
    get; an installed backend that fails to import raises its own error.
    """
    if not isinstance(name, str) or name not in _loaded:
        _scan()
        refused = _refusal(name)
        if refused is not None:
            raise InvalidProblem(*refused)
        if not isinstance(name, str) or name not in _targets:
            raise UnknownBackend(name, [*_targets, "auto"])
        _loaded[name] = resolved(_import(name, _targets[name]), borrowers)
    return _loaded[name]


def _refusal(name: object) -> tuple[str, str, str] | None:
    """Say why the name, declared by installed packages, is nobody's; None if it is somebody's."""
    if not isinstance(name, str) or name in ("auto", *_targets):
        return None
    return _refused.get(name)


# What torch.compiler.assume_constant_result does; calling it would import the whole compiler.
load._dynamo_marked_constant = True  # type: ignore[attr-defined]


def named(asked: str) -> str:
    """Return the name of a backend given by name or as "package.module:ATTRIBUTE".

    That is imported, and registered if it is not. Raises InvalidProblem if it is no Backend, or
    another one has its name.
    """
    if ":" not in asked or asked in backends():
        return asked
    module, _, attribute = asked.partition(":")
    backend = getattr(importlib.import_module(module), attribute)
    if not isinstance(backend, Backend):
        raise InvalidProblem(
            f"{asked} is a {type(backend).__name__}",
            "what is asked for as package.module:ATTRIBUTE is a tokenselect.Backend",
            "name the module's Backend",
        )
    return registered(backend, asked)


def registered(backend: Backend, asked: str = "the backend") -> str:
    """Return the name of a backend that may be registered; register it if it is not.

    Raises InvalidProblem if another one has its name.
    """
    if backend.name not in backends():
        register(backend.name, backend)
    elif resolved(backend) != load(backend.name):
        raise InvalidProblem(
            f"{asked} has the name {backend.name!r}",
            "another backend is registered under that name",
            "give it a name of its own",
        )
    return backend.name


def _import(name: str, target: str | Backend) -> Backend:
    """Import what a name stands for."""
    if isinstance(target, str):
        module, _, attribute = target.partition(":")
        target = getattr(importlib.import_module(module), attribute)
    return _check_name(name, target)


def _check_name(name: str, target: object) -> Backend:
    """Return the target if it is a Backend of that name; else raise InvalidProblem."""
    if not isinstance(target, Backend) or target.name != name:
        came = f"Backend({target.name!r}, ...)" if isinstance(target, Backend) else repr(target)
        raise InvalidProblem(
            f"backend {name!r} is {came}",
            "the target is a Backend whose own name is the registered one",
            f"define Backend({name!r}, ...)",
        )
    return target


def resolved(backend: Backend, borrowers: tuple[str, ...] = ()) -> Backend:
    """Return `backend` with the lender's own function for each stage that it borrows."""
    lenders: dict[str, Backend] = {}

    def stages(of: object, where: str) -> dict[str, Any]:
        found = {}
        for stage in _STAGES:
            lender = getattr(of, stage)
            in_a_circle = lender in (backend.name, *borrowers)
            if in_a_circle or not (callable(lender) or isinstance(lender, str)):
                raise InvalidProblem(
                    f"backend {backend.name!r} has {where}{stage}={lender!r}",
                    "a stage is a function, or the name of another backend, which does not borrow "
                    "back",
                    "write the stage, or name the lender",
                )
            if isinstance(lender, str):
                lenders[lender] = load(lender, (backend.name, *borrowers))
                source = lenders[lender].static if where else lenders[lender]
                if source is None:
                    raise InvalidProblem(
                        f"backend {backend.name!r} has {where}{stage}={lender!r}",
                        f"only stages that are planned can be lent to a plan; {lender} has none",
                        "write the stage, or name another lender",
                    )
                lender = getattr(source, stage)
            found[stage] = lender
        return found

    static = backend.static
    if static is not None:
        static = static._replace(**stages(static, "static."))
    own = stages(backend, "")
    lending = tuple(dict.fromkeys((*backend.lenders, *lenders.values())))
    return dataclasses.replace(backend, **own, static=static, lenders=lending)


def reuse_of(backend: Backend) -> Reuse:
    """Return the Selection Cache's steps on `backend`: its own, or its lender's."""
    names = [backend.name]
    while isinstance(backend.reuse, str):
        names.append(backend.reuse)
        if backend.reuse in names[:-1]:
            raise InvalidProblem(
                f"backend {names[0]!r} borrows its reuse from {' from '.join(names[1:])}",
                "reuse is a tokenselect.contract.Reuse, or the name of a backend that has one",
                "leave reuse out for the reference's, which run on any device",
            )
        backend = load(backend.reuse)
    return backend.reuse


class Explanation(NamedTuple):
    """Which backend runs a problem, and why each one tried before it does not."""

    chosen: str | None
    passed_over: dict[str, list[str]]
    problem: str
    asked: str = "auto"

    def __str__(self) -> str:
        lines = [f"problem: {self.problem}", f"chosen:  {self.chosen or 'none'}"]
        for name, whys in self.passed_over.items():
            lines += [f"passed over {name}: {why}" for why in whys]
        _scan()
        for name, (came, rule, _) in _refused.items():
            if name not in self.passed_over:
                lines.append(f"refused {name}: {came}; {rule}")
        for name in _targets:
            if name not in (self.chosen, *self.passed_over):
                is_later = self.asked == "auto" and name in AUTO
                why = f"{self.chosen} comes first and can" if is_later else "not asked for"
                lines.append(f"not tried {name}: {why}")
        return "\n".join(lines)


def explain(name: str, problem: Problem) -> Explanation:
    """Say what backend=`name` means for `problem`, without raising where nothing can run it."""
    _scan()
    refused = _refusal(name)
    if refused is not None:
        came, rule, fix = refused
        return Explanation(None, {name: [f"{came}; {rule}; {fix}"]}, problem.describe(), name)
    return Explanation(*_choose(name, problem), problem.describe(), name)


def resolve(name: str, problem: Problem, *, static: bool = False) -> str:
    """Return the name of the backend that runs `problem`, or plans it.

    A backend specified by name is that one, or an error.

    Raises UnknownBackend, or UnsupportedProblem with the reasons of every backend tried.
    """
    kind, at = problem.kind if isinstance(name, str) else None, (name, static, AUTO)
    if kind is not None and at in kind.backends:
        noted, tried = kind.backends[at]
        if all(_loaded.get(one) is backend for one, backend in tried):
            return noted
    chosen, passed_over = _choose(name, problem, static)
    if chosen is None:
        instead = "leave backend out: 'auto' takes one that can"
        if name == "auto":
            instead = "pass backend='reference', which runs everything, slowly"
        if static:
            instead = "call attention, which does without a plan"
        raise UnsupportedProblem(
            problem.describe(), passed_over, f"change the problem, or {instead}"
        )
    if kind is not None:
        kind.backends[at] = chosen, [(one, _loaded.get(one)) for one in (*passed_over, chosen)]
    return chosen


def _choose(
    name: str, problem: Problem, static: bool = False
) -> tuple[str | None, dict[str, list[str]]]:
    """Return the first backend that can run the problem, and why those before it cannot."""
    passed_over: dict[str, list[str]] = {}
    device = problem.q.device.type
    for candidate in AUTO if name == "auto" else (name,):
        if name == "auto" and _ONLY_ON.get(candidate, device) != device:
            passed_over[candidate] = [
                f"device is {device}; {candidate} takes {_ONLY_ON[candidate]}"
            ]
            continue
        try:
            backend = load(candidate)
            whys = reasons(backend, problem)
            if static and backend.static is None:
                whys.append(f"the call is planned; {candidate} takes calls without a plan")
        except ModuleNotFoundError as error:
            if error.name is None or error.name != _PACKAGES.get(candidate):
                raise
            whys = [f"the package {error.name} is not installed; pip install {error.name}"]
        if not whys:
            return candidate, passed_over
        passed_over[candidate] = whys
    return None, passed_over
