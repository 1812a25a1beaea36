"""Which backends a run is about."""

import functools

import pytest
import torch

from tokenselect import InvalidProblem, UnknownBackend, backends
from tokenselect.dispatch.registry import load, named


@functools.cache
def chosen(config: pytest.Config) -> tuple[str, ...]:
    """The backends to run. One that was named and cannot be loaded is an error, not a skip."""
    names = []
    for asked in config.getoption("--backend") or [name for name in backends() if is_here(name)]:
        try:
            name = named(asked)
            load(name)
        except (InvalidProblem, UnknownBackend) as error:
            raise pytest.UsageError(f"--backend={asked}: {error}") from None
        names.append(name)
    return tuple(names)


def is_here(name: str) -> bool:
    """Whether this machine can run a backend: CUDA's graphs need a GPU, native a compiler.

    Without a GPU their logic is tried over recorded operators, in test_plans.py.
    """
    has_device = name != "cuda_graph" or torch.cuda.is_available()
    return has_device and load(name).unavailable is None
