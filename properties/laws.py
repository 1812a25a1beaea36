"""The laws, tried on the benchmark's named shapes too, at sizes that the reference can follow."""

from dataclasses import dataclass, replace
from typing import Any

from bench.workloads import TINY, WORKLOADS, make
from tokenselect.conformance import laws  # noqa: F401  # registers them
from tokenselect.conformance.laws.law import LAWS as OF_ALL
from tokenselect.conformance.laws.law import Law
from tokenselect.conformance.problems import Case, Chosen
from tokenselect.contract import Problem


@dataclass(frozen=True)
class Named(Case):
    """A workload of the benchmark, as it is."""

    can_bend = False
    workload: str = ""

    def problem(self) -> Problem:
        return make(WORKLOADS[self.workload], seed=self.seed)

    def __repr__(self) -> str:
        return f"Named(workload={self.workload!r}, seed={self.seed})"


NAMED = tuple(Named(workload=workload.name) for workload in TINY)
SELECTED = tuple(Chosen(case, 0.3, 0) for case in NAMED)
MORE: dict[str, tuple[Any, ...]] = {
    "out_and_lse_are_within_tolerance": SELECTED,
    "rows_that_are_not_selected_have_no_influence": SELECTED,
    "it_chooses_what_the_votes_allow_and_attends_to_that": NAMED,
    "votes_and_lse_are_within_tolerance": NAMED,
}


def with_workloads(law: Law) -> Law:
    return replace(law, examples=(*law.examples, *MORE.get(law.name, ())))


LAWS = [with_workloads(law) for law in OF_ALL]
assert MORE.keys() <= {law.name for law in LAWS}
