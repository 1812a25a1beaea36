"""The native backend: what it takes, on the library that this machine compiles."""

import logging
from typing import Any

from tokenselect.contract import Backend, Capability, Reuse, StaticStages
from tokenselect.kernels.native.library import Library, open_library
from tokenselect.kernels.native.stages import DTYPES, Stages

_TAKES = Capability(
    devices=("cpu",),
    dtypes=tuple(DTYPES),
    head_dims=range(1, 257),
    group_sizes=range(1, 33),
    equal_keys=True,
)


def backend(library: Library, name: str = "native") -> Backend:
    """Return the backend of a compiled library."""
    stages, planned = Stages(library), Stages(library, is_static=True)
    return Backend(
        name,
        _TAKES,
        stages.score,
        stages.select,
        stages.attend,
        static=StaticStages(planned.score, planned.select, planned.attend),
        reuse=Reuse(planned.decide_reuse, planned.update),  # calls take `attend_cached`
        attend_fresh=stages.attend_fresh,
        attend_cached=stages.attend_cached,
    )


def _absent(*given: Any) -> Any:
    """Stand in for a stage where there is no library: `reasons` has said why."""
    raise RuntimeError(f"native cannot run here: {LIBRARY}")


LIBRARY = open_library()
if isinstance(LIBRARY, Library):
    BACKEND = backend(LIBRARY)
else:
    logging.getLogger("tokenselect").warning("native is not available, cpu is slower: %s", LIBRARY)
    BACKEND = Backend("native", _TAKES, _absent, _absent, _absent, unavailable=LIBRARY)
