"""The laws themselves, on right backends that declare little: none is given more, and none fails.

Each is `cpu` with fewer problems to its name, and stages that raise for any other.
"""

from collections.abc import Callable
from dataclasses import replace
from typing import Any

import pytest
import torch
from hypothesis import settings

from properties.laws import LAWS
from properties.test_planted import SEARCH
from tokenselect import Backend, Capability, Problem, reasons
from tokenselect.conformance.laws.law import RAN, UNABLE
from tokenselect.dispatch import registry
from tokenselect.dispatch.registry import load

# What it declares, and then what those declare that lend it a stage.
NARROWED: dict[str, tuple[Capability, ...]] = {
    "no-sink-logits": (Capability(sink_logits=(False,)),),
    "sink-logits-only": (Capability(sink_logits=(True,)),),
    "softcap-only": (Capability(softcaps=(True,)),),
    "paged-only": (Capability(layouts=("paged",), page_sizes=(16, 64)),),
    "contiguous-only": (Capability(layouts=("contiguous",)),),
    "group-scope-only": (Capability(scopes=("group",)),),
    "split-only": (Capability(score_ats=("split",)),),
    "contiguous-positions-only": (Capability(positions=("contiguous",)),),
    "raw-keys-only": (Capability(ropes=("raw",)),),
    "no-groups-of-three": (Capability(group_sizes=(1, 2, 4, 8)),),
    "decode-only": (Capability(query_lengths=(1,)),),
    "chunks-only": (Capability(query_lengths=range(2, 4096)),),
    "hard-votes-only": (Capability(votes=("hard",)),),
    "no-fractions": (Capability(fractions=(False,)),),
    "bfloat16-by-its-lender": (
        Capability(dtypes=(torch.float32, torch.bfloat16)),
        Capability(dtypes=(torch.bfloat16, torch.float16)),
    ),
}

# The laws of which every problem is beyond one of them. All problems of the others run.
ALL_UNSEEN = {
    "logits_that_are_all_minus_infinity_give_what_dense_attention_gives",
    "a_sink_takes_all_where_no_logit_is_finite",
    "an_infinite_value_of_weight_zero_is_not_a_number",
}
OF_MASS = {
    "no_other_set_of_k_candidates_retains_more_mass",
    "retained_mass_never_falls_as_k_grows",
}
BEYOND: dict[str, set[str]] = {
    "no-sink-logits": {"a_sink_takes_all_where_no_logit_is_finite"},
    "sink-logits-only": {
        "a_constant_added_to_all_values_moves_the_output_by_it",
        "what_is_left_out_bounds_the_error",
    },
    "softcap-only": ALL_UNSEEN,
    "paged-only": {"paging_changes_nothing"},
    "contiguous-only": {
        "paging_changes_nothing",
        "moving_pages_within_the_pool_changes_nothing",
    },
    "split-only": ALL_UNSEEN | OF_MASS,
    "contiguous-positions-only": ALL_UNSEEN
    | {"what_is_left_out_bounds_the_error", "what_fits_is_not_moved"},
    "raw-keys-only": ALL_UNSEEN | {"keys_may_be_cached_rotated_or_raw"},
    "decode-only": {"the_newest_value_leaves_earlier_queries_as_they_were"},
    "chunks-only": OF_MASS
    | {"retained_mass_is_the_one_computed_densely", "what_is_left_out_bounds_the_error"},
    "hard-votes-only": OF_MASS,
    "bfloat16-by-its-lender": {"keys_may_be_cached_rotated_or_raw"},
}

# What `cpu` does not promise.
UNDECLARED = {"equal_keys_have_equal_logits_where_that_is_declared"}

FEW = settings(SEARCH, max_examples=3)


def narrowed(name: str) -> Backend:
    """`cpu`, declared for less, with stages that raise for what is not declared."""
    cpu = load("cpu")
    own, *lent = NARROWED[name]
    lenders = tuple(replace(cpu, name="lender", capability=capability) for capability in lent)
    declared = replace(cpu, name=f"narrow-{name}", capability=own, lenders=lenders)

    def strict(stage: Callable[..., Any]) -> Callable[..., Any]:
        def run(*given: Any) -> Any:
            problem = next(x for x in given if isinstance(x, Problem))
            why_not = reasons(declared, problem)
            assert not why_not, f"{declared.name} is given what it does not declare: {why_not}"
            return stage(*given)

        return run

    stages = ("score", "select", "attend")
    return replace(declared, **{stage: strict(getattr(cpu, stage)) for stage in stages})


@pytest.mark.slow
@pytest.mark.parametrize("name", NARROWED)
def test_laws_hold_within_what_is_declared(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    backend = narrowed(name)
    monkeypatch.setitem(registry._loaded, backend.name, backend)
    for law in LAWS:
        law.check(backend, FEW)
    ran, unable = ({law: count for (of, law), count in counter.items() if of == backend.name}
                   for counter in (RAN, UNABLE))  # fmt: skip
    beyond = BEYOND.get(name, set()) | UNDECLARED
    assert unable.keys() - ran.keys() == beyond, "other laws are all beyond it"
    assert not unable.keys() & ran.keys(), "of one law some problems are beyond it, and some ran"
