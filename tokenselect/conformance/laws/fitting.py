"""Problems bent to what a backend declares and a law is about."""

import random
from collections.abc import Callable
from dataclasses import replace
from typing import Any

import torch
from hypothesis import settings

from tokenselect.conformance.problems import DTYPES, Case
from tokenselect.contract import Backend, Capability


class CannotRun(Exception):
    """A problem is beyond what the backend declares: not a failure, but counted."""


# Where a case may be bent to what a backend takes: the field, what to try instead, and what a value
# needs of a capability. What stands there more than once is taken more often: a wide head costs
# time. None is taken where nothing else can be.
_Field = tuple[str, tuple[Any, ...], Callable[[Any], dict[str, Any]]]
_HEAD_DIMS = (8, 16, 32, 32, 32, 64, 64, 80, 80, 96, 96, 40, 40, 128, 256)
_CASE_FIELDS: tuple[_Field, ...] = (
    ("dtype", DTYPES, lambda x: {"dtypes": x}),
    ("D", _HEAD_DIMS, lambda x: {"head_dims": x}),
    ("Dv", _HEAD_DIMS, lambda x: {"head_dims": x}),
    ("G", (1, 2, 3, 4, 7, 8, 12, 16, 32), lambda x: {"group_sizes": x}),
    ("Lq", (1, 2, 5), lambda x: {"query_lengths": x}),
    (
        "page_size",
        (1, 2, 16, 53, 64, 256, None),
        lambda x: {"layouts": "paged", "page_sizes": x} if x else {"layouts": "contiguous"},
    ),
    ("softcap", (30.0, None), lambda x: {"softcaps": x is not None}),
    ("has_sink_logits", (False, True), lambda x: {"sink_logits": x}),
)
_ROPE: _Field = ("rope", ("rotated", "raw", None), lambda x: {"ropes": x or "none"})
_CONFIG_FIELDS: tuple[_Field, ...] = (
    ("k", (0, 1, 5, 8, 17, 0.1, 0.3), lambda x: {"fractions": isinstance(x, float)}),
    ("vote", ("soft", "logit", "hard"), lambda x: {"votes": x}),
    ("normalize", ("visible", "candidates"), lambda x: {"normalizes": x}),
    ("scope", ("layer", "group"), lambda x: {"scopes": x}),
    ("pool", (1, 3, 7), lambda x: {"pools": x}),
    ("positions", ("original", "contiguous"), lambda x: {"positions": x}),
    ("score_at", ("true", "fixed", "split"), lambda x: {"score_ats": x}),
)
_ANYTHING = Capability()
# Keys move with a rope only.
_UNMOVED = Capability(positions=("original",), score_ats=("true",))
_MOVED = Capability(ropes=("rotated", "raw"))

# Under the profile `device`: each combination of these is another kernel to compile.
_ON_A_DEVICE = Capability(
    dtypes=(torch.float32, torch.bfloat16, torch.float16),
    head_dims=(64, 128, 80),
    group_sizes=(1, 4, 7),
    query_lengths=(1, 5),
    page_sizes=(1, 16),
    pools=(1, 3),
    query_means=(1, 2),
)


def on_a_device() -> bool:
    """Return whether the profile `device` is loaded."""
    return settings.get_current_profile_name() == "device"


def fitted(drawn: Any, backend: Backend, about: Capability = _ANYTHING) -> Any:
    """Return `drawn`, bent to what the backend declares, so that a narrow one is tried as often.

    And to what a law is `about`. A case that cannot bend stays as it is. Raises CannotRun if no
    value of some field is both.
    """
    if not isinstance(drawn, Case):
        return replace(drawn, case=fitted(drawn.case, backend, about))
    if not drawn.can_bend:
        return drawn
    takes = [about, backend.capability, *(lender.capability for lender in backend.lenders)]

    def is_taken(needs: dict[str, Any], wish: Capability = _ANYTHING) -> bool:
        limits = (
            (getattr(x, name), value) for x in (*takes, wish) for name, value in needs.items()
        )
        return all(allowed is None or value in allowed for allowed, value in limits)

    def bent(
        now: Any, field: str, options: tuple[Any, ...], needs: Callable[[Any], dict[str, Any]]
    ) -> Any:
        for wish in (_ON_A_DEVICE, _ANYTHING) if on_a_device() else (_ANYTHING,):
            if is_taken(needs(now), wish):
                return now
            able = [option for option in options if is_taken(needs(option), wish)]
            if able:
                # Each field on its own, so that D and Dv differ too.
                chance = random.Random(f"{field} {drawn.seed} {drawn.lengths}")
                return chance.choice([option for option in able if option is not None] or able)
        raise CannotRun(f"no {field} of {options} is for {backend.name} and the law")

    changes = {field[0]: bent(getattr(drawn, field[0]), *field) for field in _CASE_FIELDS}
    Lq = changes["Lq"]
    if not any(is_taken({"ropes": kept}) for kept in ("rotated", "raw")):
        takes.append(_UNMOVED)
    config = {field[0]: bent(drawn.config[field[0]], *field) for field in _CONFIG_FIELDS}
    if not isinstance(config["k"], float):
        config |= {"k_min": 0, "k_max": None}
    means: _Field = ("n_query_means", (1, 2, 3), lambda x: {"query_means": min(x, Lq)})
    config["n_query_means"] = bent(drawn.config.n_query_means, *means)
    if (config["positions"], config["score_at"]) != ("original", "true"):
        takes.append(_MOVED)
    changes["rope"] = bent(drawn.rope, *_ROPE)
    if drawn.rotary_dim >= drawn.D - 1:  # all of it was turned, and is
        changes["rotary_dim"] = max(drawn.rotary_dim, changes["D"])
    changes["lengths"] = tuple(n and max(n, Lq) for n in drawn.lengths)
    return replace(drawn, **changes, config=replace(drawn.config, **config))
