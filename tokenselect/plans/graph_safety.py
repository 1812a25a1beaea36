"""Whether a CUDA graph can hold a step: finds, on any machine, what would wait for the device."""

import sys
import threading
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from typing import Any

import torch
from torch import Tensor
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from tokenselect.dispatch import ops
from tokenselect.errors import NotCapturable
from tokenselect.selection_cache import rollback_caches

# Functions and methods of torch that read a tensor on the host.
_READERS = frozenset(
    (
        *("item", "tolist", "numpy", "cpu", "is_nonzero", "equal", "allclose"),
        *("__repr__", "__format__", "__bool__", "__int__", "__float__", "__index__"),
        *("__complex__", "__contains__", "__array__", "__dlpack__"),
    )
)
_INDEXING = (torch.ops.aten.index, torch.ops.aten.index_put, torch.ops.aten.index_put_)


def check_capturable(step: Callable[..., Any], *inputs: Any) -> Any:
    """Run step(*inputs) once to see whether a CUDA graph can hold it; needs no GPU.

    Raises NotCapturable, which names the operation that would wait for the device. What Selection
    Caches learn is undone.
    """
    devices = [x.device for x in tree_leaves(inputs) if isinstance(x, Tensor)]
    device = devices[0] if devices else torch.get_default_device()
    with rollback_caches(), graph_safe(device):
        return step(*inputs)


@contextmanager
def graph_safe(device: torch.device) -> Iterator[None]:
    """Raise NotCapturable at the first operation inside that a CUDA graph cannot hold.

    Those are operations on tensors of the device whose result, or its shape, the host has to read.
    Compiled functions run as they are written meanwhile, to be seen into.
    """
    with force_eager(), _HostReads(device.type), _Operators(device.type):
        yield


_stance = ExitStack()
_entered = 0
_stance_lock = threading.Lock()


@contextmanager
def force_eager() -> Iterator[None]:
    """Run compiled functions eagerly meanwhile, in all threads.

    Once torch.compile has met a mode such as those above, it never compiles that function again.
    """
    global _entered
    with _stance_lock:
        if _entered == 0 and "torch._dynamo" in sys.modules:
            _stance.enter_context(torch.compiler.set_stance("force_eager"))
        _entered += 1
    try:
        yield
    finally:
        with _stance_lock:
            _entered -= 1
            if _entered == 0:
                _stance.close()


class _HostReads(TorchFunctionMode):
    """Raise for functions of torch that read a tensor of the device on the host."""

    def __init__(self, device: str) -> None:
        super().__init__()
        self._device = device

    def __torch_function__(
        self, function: Any, types: Any, args: Any = (), kwargs: Any = None
    ) -> Any:
        kwargs = kwargs or {}
        name = getattr(function, "__name__", "")
        more = (*args[1:], *kwargs.values())
        reads = name in _READERS or (name == "to" and any(map(self._is_host, more)))
        # Sizes that are tensors.
        reads = reads or (name == "tensor_split" and any(isinstance(x, Tensor) for x in more))
        if reads and self._device in _devices(args, kwargs):
            method = "Tensor." if hasattr(Tensor, name) else "torch."
            raise _not_capturable(f"{method}{name}()", "reads a tensor on the host")
        return function(*args, **kwargs)

    def _is_host(self, x: Any) -> bool:
        """Say whether `x` is "cpu" or, of another device than that, the same as a torch.device."""
        if isinstance(x, str):
            return x == "cpu"
        return isinstance(x, torch.device) and x.type == "cpu" != self._device


class _Operators(TorchDispatchMode):
    """Raise for operators whose result the host has to read, or whose shape depends on values."""

    def __init__(self, device: str) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self._device = device

    def __torch_dispatch__(
        self, function: Any, types: Any, args: Any = (), kwargs: Any = None
    ) -> Any:
        kwargs = kwargs or {}
        inside = ops.implementation(function)
        if inside is not None:  # look into it
            with _HostReads(self._device), self:
                return inside(*args, **kwargs)
        if self._device in _devices(args, kwargs):
            if _sizes_by_value(function, args, kwargs):
                raise _not_capturable(str(function), "has to know how many values are chosen")
            if torch.Tag.data_dependent_output in function.tags:
                raise _not_capturable(str(function), "reads a tensor on the host")
        is_new = function is torch.ops.aten.lift_fresh.default
        if is_new and (args[0].dim() > 0 or args[0].is_cuda):
            raise _not_capturable("torch.tensor()", "copies from the host")
        result = function(*args, **kwargs)
        is_copy = function is torch.ops.aten.copy_.default
        if "cpu" in _devices(result) and _devices(args[1:] if is_copy else args) == {"cuda"}:
            raise _not_capturable(str(function), "copies from the device to the host")
        return result


def _sizes_by_value(function: Any, args: Any, kwargs: Any) -> bool:
    """Say whether the shape of a result, or the work itself, depends on values."""
    if function.overloadpacket in _INDEXING:  # by integers it has a fixed shape
        kinds = {index.dtype for index in args[1] if index is not None}
        assigns_one = len(args) > 2 and args[2].numel() == 1
        return bool(kinds & {torch.bool, torch.uint8}) and not assigns_one
    is_told = kwargs.get("output_size") is not None
    return torch.Tag.dynamic_output_shape in function.tags and not is_told


def _devices(*what: Any) -> set[str]:
    return {leaf.device.type for leaf in tree_leaves(what) if isinstance(leaf, Tensor)}


def _not_capturable(operation: str, why: str) -> NotCapturable:
    return NotCapturable(
        f"{operation}, which {why},",
        "what a graph holds has fixed shapes, and nothing in it waits for the device",
        "compute it on the device, or outside of the step; attention checks lengths on the CPU, a "
        "plan does not",
    )
