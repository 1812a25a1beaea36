"""What this machine can run, and whether it is right: python -m tokenselect.check.

Prints versions, devices, and each backend: available or why not, and what it takes. Then seeded
problems per backend, held to the reference by the rules of the contract, stage by stage: scores
and attention within a tolerance derived from float64, selections bit for bit, and the whole
call within that of a choice that its votes allow. Errors are shares of the tolerance: at most
1 is right.

It takes seconds. Without a GPU, Triton's kernels run in its interpreter and get a few small
problems; with --thorough, all of them, which takes minutes.

Exit code 0: every backend that can run here was right on everything that it takes. 1: one was
not, nothing was run, or a backend asked for by name cannot run here.
"""

import sys

from tokenselect.conformance.check.kinds import KINDS
from tokenselect.conformance.check.report import main

__all__ = ["KINDS", "main"]

if __name__ == "__main__":
    sys.exit(main())
