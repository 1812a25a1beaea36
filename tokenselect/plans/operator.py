"""The operator of a planned step, which torch.compile sees instead of what the plan does."""

from dataclasses import replace
from typing import Any
from weakref import WeakValueDictionary

import torch
from torch import Tensor

from tokenselect.contract import CacheState, Problem
from tokenselect.dispatch import ops
from tokenselect.dispatch.step import Step
from tokenselect.errors import InvalidProblem

# Plans by the handle that the operator is given.
PLANS: WeakValueDictionary[int, Any] = WeakValueDictionary()


def plan_of(handle: int) -> Any:
    """Return the plan of that handle, which must live in this process."""
    found = PLANS.get(handle)
    if found is None:
        raise InvalidProblem(
            "a compiled or exported program calls a plan that is gone, or of another process",
            "a program that calls a plan needs that plan, alive, in the process that made it",
            "keep the plan while the program is in use; compile again in another process",
        )
    return found


def with_tensors(
    like: Problem,
    q: Any,
    k_cache: Any,
    v_cache: Any,
    cache_seqlens: Any,
    block_table: Any,
    sink_logits: Any,
) -> Problem:
    """Return the planned problem with the tensors of a call."""
    return Problem(
        q,
        k_cache,
        v_cache,
        cache_seqlens,
        block_table,
        like.scale,
        like.softcap,
        sink_logits,
        like.rope,
        like.max_reuse,
        like.config,
    )


def extent(x: Tensor) -> int:
    """Return how many bytes lie from x's first to after its last."""
    reach = sum((size - 1) * stride for size, stride in zip(x.shape, x.stride(), strict=True))
    return (reach + 1) * x.itemsize


def _plan_step(
    q: Tensor,
    k_cache: Tensor,
    v_cache: Tensor,
    cache_seqlens: Tensor,
    block_table: Tensor | None,
    sink_logits: Tensor | None,
    state: list[Tensor],
    theta: float | None,
    with_info: bool,
    handle: int,
) -> tuple[Tensor, ...]:
    """Run a call of the plan with that handle."""
    made = plan_of(handle)
    given = q, k_cache, v_cache, cache_seqlens, block_table, sink_logits
    problem = with_tensors(made._like, *given)
    out = q.new_empty((problem.B, problem.Hq, problem.Lq, problem.Dv))
    made._check_memory((*given, None), [0 if x is None else extent(x) for x in (*given, None)])
    held = CacheState(*state) if state else None
    # An operator returns tensors of its own, always as many.
    _, *info = made._run(problem, held, theta, out, with_info)
    return out, *(info or [out.new_empty(0) for _ in Step._fields[1:]])


def _fake_plan_step(q: Tensor, k_cache: Tensor, v_cache: Tensor, *rest: Any) -> tuple[Tensor, ...]:
    *_, with_info, handle = rest
    if not with_info:
        out = q.new_empty((*q.shape[:3], v_cache.shape[3]))
        return out, *(q.new_empty(0) for _ in Step._fields[1:])
    like = plan_of(handle)._like
    p = replace(like, q=q, k_cache=k_cache, v_cache=v_cache, block_table=rest[1])
    return (*ops.fake_step(p), q.new_empty((p.B,), dtype=torch.bool))


ops.define(
    "plan_step",
    "Tensor q, Tensor k_cache, Tensor v_cache, Tensor cache_seqlens, Tensor? block_table, "
    "Tensor? sink_logits, Tensor(a!)[] state, float? theta, bool with_info, int plan) "
    "-> (Tensor, Tensor, Tensor, Tensor, Tensor, Tensor)",
    _plan_step,
    _fake_plan_step,
)
