"""A stand-in for CUDA graphs where there is no GPU: NOT CUDA, and named as such.

While a step is captured, every operator and every launch of Triton kernels is written down with the
tensors it had. A replay runs that list again, and none of the step's Python: a length that the host
had read, an address that changed, or memory that a step took for itself shows as a wrong result, as
it would on a GPU. What it cannot show: streams, the memory of a graph's pool, and what CUDA itself
refuses.
"""

import importlib
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager, suppress
from typing import Any
from unittest import mock

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode, _disable_current_modes
from torch.utils._pytree import tree_leaves

from tokenselect.plans.graph_safety import force_eager


class Recorded:
    """Fits `tokenselect.plans.cuda_graph.Interface`. captured and replayed count."""

    def __init__(self) -> None:
        self.captured = self.replayed = 0
        self.lengths: list[int] = []

    def pool(self) -> None:
        return None

    def warm_up(self, step: Callable[[], Any], device: torch.device) -> None:
        with opaque_kernels():
            step()

    def capture(
        self, step: Callable[[], Any], pool: Any, device: torch.device
    ) -> tuple[Any, Callable[[], None]]:
        self.captured += 1
        tape = _Tape()
        # Capturing runs nothing: what a step would change meanwhile is put back.
        with force_eager(), opaque_kernels(tape.calls.append), tape:
            outputs = step()
        for tensor, before in reversed(tape.changed.values()):
            tensor.copy_(before)
        tape.poison()
        self.lengths.append(len(tape.calls))

        def replay() -> None:
            self.replayed += 1
            for call in tape.calls:
                call()

        return outputs, replay


class _Tape(TorchDispatchMode):
    """Operators, as functions without arguments; and tensors that were there before, as found."""

    def __init__(self) -> None:
        super().__init__()
        self.calls: list[Callable[[], Any]] = []
        self.changed: dict[int, tuple[Tensor, Tensor]] = {}
        self._own: dict[int, Tensor] = {}

    def __torch_dispatch__(self, function: Any, types: Any, args: Any = (), kwargs: Any = None):
        kwargs = kwargs or {}
        written = [x for x in _written(function, args, kwargs) if _at(x) not in self._own]
        for x in written:
            self.changed.setdefault(_key(x), (x, x.clone()))
        result = function(*args, **kwargs)
        given = {_at(x) for x in tree_leaves((args, kwargs)) if isinstance(x, Tensor)}
        made = [x for x in tree_leaves(result) if isinstance(x, Tensor) and _at(x) not in given]
        self._own |= {_at(x): x for x in made}
        views_only = not made and not _written(function, args, kwargs)
        if not views_only:
            self.calls.append(lambda: _again(function, args, kwargs, result))
        return result

    def poison(self) -> None:
        """What the step made while it was captured is nothing, until a replay."""
        for x in self._own.values():
            x.untyped_storage().fill_(0xFF)


def _again(function: Any, args: Any, kwargs: Any, result: Any) -> None:
    """Run an operator again, its results to where they were."""
    anew = function(*args, **kwargs)
    for old, new in zip(tree_leaves(result), tree_leaves(anew), strict=True):
        if isinstance(old, Tensor) and old is not new and _at(old) != _at(new):
            old.copy_(new)


def _written(function: Any, args: Any, kwargs: Any) -> list[Tensor]:
    """The arguments that an operator's schema says it writes to."""
    found = []
    for i, argument in enumerate(function._schema.arguments):
        if argument.alias_info is not None and argument.alias_info.is_write:
            value = args[i] if i < len(args) else kwargs.get(argument.name)
            found += [x for x in tree_leaves(value) if isinstance(x, Tensor)]
    return found


def _at(x: Tensor) -> int:
    return x.untyped_storage().data_ptr()


def _key(x: Tensor) -> int:
    return hash((x.data_ptr(), x.shape, x.stride()))


@contextmanager
def opaque_kernels(
    note: Callable[[Callable[[], Any]], Any] = lambda call: None, *, run_them: bool = True
) -> Iterator[None]:
    """Kernels as one operation each: what Triton's interpreter does inside is not the step's.

    Those of the native backend are no operators of torch either.
    note gets each run of launches, as a function without arguments.
    """
    launchers = {"triton.launch": "run", "native.library": "launch"}
    with ExitStack() as patches:
        for module, name in launchers.items():
            with suppress(ModuleNotFoundError):  # triton is optional
                launcher = importlib.import_module(f"tokenselect.kernels.{module}")
                noted = _noted(getattr(launcher, name), note, run_them)
                patches.enter_context(mock.patch.object(launcher, name, noted))
        yield


def _noted(
    run: Callable[..., Any], note: Callable[[Callable[[], Any]], Any], run_them: bool
) -> Callable[..., Any]:
    def noted(*given: Any) -> Any:
        def call() -> Any:
            with _disable_current_modes(), torch._C.DisableTorchFunction():
                return run(*given)

        note(call)
        return call() if run_them else 0

    return noted
