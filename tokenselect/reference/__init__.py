"""The reference: what tokenselect computes, one page a stage, an equation at a time.

Eager PyTorch with plain loops over requests, heads and queries; no speed, no tricks. Every other
backend is held to it. It computes in float32, or in float64 if that is what it is given.
"""

from tokenselect.contract import Backend, Capability, Reuse
from tokenselect.reference.attend import attend
from tokenselect.reference.reuse import decide_reuse, update
from tokenselect.reference.score import score
from tokenselect.reference.select import select

BACKEND = Backend(
    "reference",
    Capability(equal_keys=True),
    score,
    select,
    attend,
    reuse=Reuse(decide_reuse, update),
)
