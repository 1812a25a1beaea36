"""The cpu backend: the reference's semantics in torch operators, for a call and for a plan.

`eager` looks at the lengths, and does no more than they ask for. `planned` looks at nothing: it
goes over the whole capacity of the cache, in memory that it is lent.
"""

from tokenselect.contract import DTYPES, Backend, Capability, Planned
from tokenselect.kernels.cpu import eager, planned

BACKEND = Backend(
    "cpu",
    Capability(devices=("cpu",), dtypes=DTYPES),
    eager.score,
    eager.select,
    eager.attend,
    planned=Planned(planned.score, planned.select, planned.attend),
)
