"""What holds of every backend: laws, each tried on problems that Hypothesis draws.

Importing a module of laws registers them, in this order.
"""

from tokenselect.conformance.laws import (  # noqa: F401
    attend,
    attention,
    metamorphic,
    score,
    select,
)
