"""The cpu backend: the reference's semantics in torch operators, for a call and for a plan.

`eager` reads the lengths on the host and does no more than they ask for. `static`, for plans, reads
nothing on the host: it goes over the whole capacity of the cache, in memory that it is lent.
"""

from tokenselect.contract import DTYPES, Backend, Capability, Reuse, StaticStages
from tokenselect.kernels import torch_reuse
from tokenselect.kernels.cpu import eager, static

BACKEND = Backend(
    "cpu",
    Capability(devices=("cpu",), dtypes=DTYPES),
    eager.score,
    eager.select,
    eager.attend,
    static=StaticStages(static.score, static.select, static.attend),
    reuse=Reuse(torch_reuse.decide_reuse, torch_reuse.update),
)
