"""Whether a CUDA graph can hold a step: finds, on any machine, what would wait for the device."""

import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager, nullcontext
from typing import Any

import torch
from torch import Tensor
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from tokenselect import ops
from tokenselect.errors import NotCapturable
from tokenselect.reuse import undone

# Functions and methods of torch that read a tensor on the host.
_READERS = frozenset(
    (
        *("item", "tolist", "numpy", "cpu", "is_nonzero", "equal", "allclose"),
        *("__repr__", "__format__", "__bool__", "__int__", "__float__", "__index__"),
        *("__complex__", "__contains__", "__array__", "__dlpack__"),
    )
)
_INDEXING = (torch.ops.aten.index, torch.ops.aten.index_put, torch.ops.aten.index_put_)


def rehearse(step: Callable[..., Any], *inputs: Any) -> Any:
    """step(*inputs), run once to see whether a CUDA graph can hold it; needs no GPU.

    Raises NotCapturable, which names the operation that would wait for the device. What Selection
    Caches learn is undone.
    """
    devices = [x.device for x in tree_leaves(inputs) if isinstance(x, Tensor)]
    device = devices[0] if devices else torch.get_default_device()
    with undone(), graph_safe(device):
        return step(*inputs)


@contextmanager
def graph_safe(device: torch.device) -> Iterator[None]:
    """Raises NotCapturable at the first operation inside that a CUDA graph cannot hold.

    Those are operations on tensors of the device whose result, or its shape, the host has to read.
    Compiled functions run as they are written meanwhile, to be seen into.
    """
    # Once torch.compile has met a mode like these, it does not compile that function any more.
    compiles = "torch._dynamo" in sys.modules
    stance = torch.compiler.set_stance("force_eager") if compiles else nullcontext()
    with stance, _HostReads(device.type), _Operators(device.type):
        yield


class _HostReads(TorchFunctionMode):
    def __init__(self, device: str) -> None:
        super().__init__()
        self._device = device

    def __torch_function__(
        self, function: Any, types: Any, args: Any = (), kwargs: Any = None
    ) -> Any:
        kwargs = kwargs or {}
        name = getattr(function, "__name__", "")
        more = (*args[1:], *kwargs.values())
        reads = name in _READERS or (name == "to" and any(map(_is_host, more)))
        # Sizes that are tensors.
        reads = reads or (name == "tensor_split" and any(isinstance(x, Tensor) for x in more))
        if reads and self._device in _devices(args, kwargs):
            method = "Tensor." if hasattr(Tensor, name) else "torch."
            raise _not_capturable(f"{method}{name}()", "reads a tensor on the host")
        return function(*args, **kwargs)


class _Operators(TorchDispatchMode):
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
        if function is torch.ops.aten.lift_fresh.default and args[0].dim() > 0:
            raise _not_capturable("torch.tensor()", "copies from the host")
        result = function(*args, **kwargs)
        if "cpu" in _devices(result) and _devices(args, kwargs) == {"cuda"}:
            raise _not_capturable(str(function), "copies from the device to the host")
        return result


def _sizes_by_value(function: Any, args: Any, kwargs: Any) -> bool:
    """Whether the shape of a result, or the work itself, depends on values."""
    if function.overloadpacket in _INDEXING:  # by integers it has a fixed shape
        kinds = {index.dtype for index in args[1] if index is not None}
        assigns_one = len(args) > 2 and args[2].numel() == 1
        return bool(kinds & {torch.bool, torch.uint8}) and not assigns_one
    is_told = kwargs.get("output_size") is not None
    return torch.Tag.dynamic_output_shape in function.tags and not is_told


def _is_host(x: Any) -> bool:
    return x == "cpu" if isinstance(x, str) else isinstance(x, torch.device) and x.type == "cpu"


def _devices(*what: Any) -> set[str]:
    return {leaf.device.type for leaf in tree_leaves(what) if isinstance(leaf, Tensor)}


def _not_capturable(operation: str, why: str) -> NotCapturable:
    return NotCapturable(
        f"{operation}, which {why},",
        "what a graph holds has fixed shapes, and nothing in it waits for the device",
        "compute it on the device, or outside of the step; attention checks lengths on the CPU, a "
        "plan does not",
    )
