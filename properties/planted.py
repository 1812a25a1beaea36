"""Wrong backends and caches, one mistake each, made on purpose: the suite must catch every one.

Each bends one stage of a right backend: what it is given, or what comes out. The mistakes are those
of real kernels: most were seen in released code of this field.
"""

import functools
import math
from collections.abc import Callable
from dataclasses import replace
from typing import Any, NamedTuple

import torch
from torch import Tensor

from tokenselect import (
    AttentionOutput,
    Backend,
    Problem,
    Scores,
    Selection,
    SelectionCache,
)
from tokenselect.contract import Reuse, ReuseDecision


class Mistake(NamedTuple):
    """One stage of a right backend, bent.

    bent  gets the right backend and the stage's arguments
    """

    stage: str
    bent: Callable


PLANTED: dict[str, Mistake] = {}

# The backends in which the mistakes are planted, and those that cannot show in them: what a problem
# would have to be, and is beyond what the backend declares.
BASES: dict[str, dict[str, tuple[str, Any]]] = {
    "cpu": {},
    "triton": {"score-gives-hard-votes-to-one-too-few": ("votes", "hard")},
}


def plant(stage: str) -> Callable[[Callable], Callable]:
    """Add a mistake in a `stage`, under the function's name."""

    def add(bent: Callable) -> Callable:
        PLANTED[bent.__name__.replace("_", "-")] = Mistake(stage, bent)
        return bent

    return add


def planted(name: str, base: Backend) -> Backend:
    """`base` with one mistake."""
    stage, bent = PLANTED[name]
    named = f"planted-{base.name}-{name}"
    return replace(base, name=named, **{stage: functools.partial(bent, base)})


def configured(problem: Problem, **changes: object) -> Problem:
    return replace(problem, config=replace(problem.config, **changes))


def shuffled_heads(problem: Problem) -> Tensor:
    """Where h // G of the result reads KV head h % Hkv of the problem."""
    heads = torch.arange(problem.Hq)
    return torch.argsort(heads % problem.Hkv, stable=True)


# --- score ---


@plant("score")
def score_reads_kv_head_modulo(base: Backend, p: Problem) -> Scores:
    order = shuffled_heads(p)
    votes, lse = base.score(replace(p, q=p.q[:, order]))
    return Scores(votes, lse[:, torch.argsort(order)])


@plant("score")
def score_without_scale(base: Backend, p: Problem) -> Scores:
    return base.score(configured(p, select_scale=1.0))


@plant("score")
def score_ignores_select_scale(base: Backend, p: Problem) -> Scores:
    return base.score(configured(p, select_scale=None))


@plant("score")
def score_without_softcap(base: Backend, p: Problem) -> Scores:
    return base.score(replace(p, softcap=None))


@plant("score")
def score_normalizes_over_candidates_always(base: Backend, p: Problem) -> Scores:
    return base.score(configured(p, normalize="candidates"))


@plant("score")
def score_by_the_last_query(base: Backend, p: Problem) -> Scores:
    last = p.q[:, :, -1:].expand(p.q.shape)
    return base.score(replace(p, q=last))


@plant("score")
def score_ignores_query_means(base: Backend, p: Problem) -> Scores:
    return base.score(configured(p, n_query_means=1))


@plant("score")
def score_ignores_pool(base: Backend, p: Problem) -> Scores:
    return base.score(configured(p, pool=1))


@plant("score")
def score_rounds_votes_to_bfloat16(base: Backend, p: Problem) -> Scores:
    votes, lse = base.score(p)
    return Scores(votes.bfloat16().float(), lse)


@plant("score")
def score_without_subtracting_the_maximum(base: Backend, p: Problem) -> Scores:
    votes, lse = base.score(p)
    overflowed = lse > math.log(torch.finfo(torch.float32).max)
    lse = torch.where(overflowed, math.inf, lse)
    spoiled = overflowed.any(1)[:, None, None, None] & (votes > -math.inf)
    return Scores(torch.where(spoiled, 0.0, votes), lse)


@plant("score")
def score_gives_lse_in_base_two(base: Backend, p: Problem) -> Scores:
    votes, lse = base.score(p)
    return Scores(votes, lse / math.log(2))


@plant("score")
def score_reads_capacity_for_length(base: Backend, p: Problem) -> Scores:
    full = torch.where(p.cache_seqlens > 0, p.Lk, 0).int()
    if p.is_paged:
        full = p.cache_seqlens
    votes, lse = base.score(replace(p, cache_seqlens=full))
    return Scores(votes.where(base.score(p).votes > -math.inf, -math.inf), lse)


@plant("score")
def score_reads_pages_of_the_first_request(base: Backend, p: Problem) -> Scores:
    if p.block_table is None:
        return base.score(p)
    table = p.block_table[:1].expand_as(p.block_table).clamp(0, p.k_cache.shape[0] - 1)
    return base.score(replace(p, block_table=table.contiguous()))


@plant("score")
def score_lets_one_nan_spoil_a_head(base: Backend, p: Problem) -> Scores:
    votes, lse = base.score(p)
    if not p.is_paged:
        for b, n in enumerate(p.cache_seqlens.tolist()):
            if p.k_cache[b, :, :n].isnan().any():
                votes[b] = torch.where(votes[b] > -math.inf, 0.0, votes[b])
    return Scores(votes, lse)


@plant("score")
def score_takes_interleaved_pairs_for_halves(base: Backend, p: Problem) -> Scores:
    return base.score(replace(p, rope=p.rope and replace(p.rope, interleaved=False)))


@plant("score")
def score_rounds_queries_to_bfloat16(base: Backend, p: Problem) -> Scores:
    return base.score(replace(p, q=p.q.bfloat16().to(p.q.dtype)))


@plant("score")
def score_rounds_frequencies_to_bfloat16(base: Backend, p: Problem) -> Scores:
    rope = p.rope and replace(p.rope, inv_freq=p.rope.inv_freq.bfloat16().float())
    return base.score(replace(p, rope=rope))


def off_by_a_float32_angle(p: Problem, positions: Tensor, at: Tensor) -> Problem:
    """Keys turned by what a float32 angle is off, so that moving them exactly is off by it."""
    rope = p.rope
    steps = at if rope.cached == "raw" else at - positions
    angle = steps.double()[:, None] * rope.inv_freq.double()
    error = (steps.float()[:, None] * rope.inv_freq.float()).double() - angle
    k_cache = p.k_cache.clone()
    keys = k_cache[:, :, positions].double()
    first, second = keys[..., : rope.rotary_dim].chunk(2, dim=-1)
    cos, sin = error.cos(), error.sin()
    turned = torch.cat((first * cos - second * sin, first * sin + second * cos), -1)
    k_cache[:, :, positions, : rope.rotary_dim] = turned.to(k_cache.dtype)
    return replace(p, k_cache=k_cache)


def turns_far(p: Problem, where: str) -> bool:
    """Whether keys of one long request in a contiguous cache are turned to score or attend."""
    return (
        p.rope is not None
        and p.needs_rotation(where)
        and not p.rope.interleaved
        and not p.is_paged
        and p.B == p.S == p.R == 1
        and p.Lk > 2**12
    )


@plant("score")
def score_moves_keys_by_a_float32_angle(base: Backend, p: Problem) -> Scores:
    if not turns_far(p, p.config.score_at):
        return base.score(p)
    positions = torch.arange(int(p.cache_seqlens))
    at = positions if p.config.score_at == "true" else torch.zeros_like(positions)
    return base.score(off_by_a_float32_angle(p, positions, at))


@plant("score")
def score_gives_hard_votes_to_one_too_few(base: Backend, p: Problem) -> Scores:
    if p.config.vote != "hard":
        return base.score(p)
    return base.score(configured(p, k=max(0, p.config.budget(p.Lk) - 1)))


@plant("score")
def score_rounds_to_tf32(base: Backend, p: Problem) -> Scores:
    """Ten bits of mantissa for the queries, as a matrix unit in TF32 would."""
    if p.q.dtype not in (torch.float32, torch.bfloat16):
        return base.score(p)
    q = (p.q.float().view(torch.int32) & ~0x1FFF).view(torch.float32)
    return base.score(replace(p, q=q.to(p.q.dtype)))


@plant("score")
def score_at_the_true_distance_always(base: Backend, p: Problem) -> Scores:
    votes, lse = base.score(configured(p, score_at="true"))
    return Scores(votes.expand(-1, p.R, -1, -1).contiguous(), lse)


@plant("score")
def score_sums_groups_into_one(base: Backend, p: Problem) -> Scores:
    votes, lse = base.score(configured(p, scope="layer"))
    return Scores(votes.expand(-1, -1, p.S, -1).contiguous(), lse)


_memory: dict[tuple, Scores] = {}


@plant("score")
def score_keeps_stale_state(base: Backend, p: Problem) -> Scores:
    key = (base.name, p.q.shape, p.Lk, p.config, tuple(p.cache_seqlens.tolist()))
    return _memory.setdefault(key, base.score(p))


@plant("score")
def score_mends_the_cache_that_it_reads(base: Backend, p: Problem) -> Scores:
    p.k_cache.nan_to_num_(0.0, 0.0, 0.0)
    return base.score(p)


# --- select ---


def tied_wrongly(base: Backend, votes: Tensor, p: Problem) -> Selection:
    """Select with the higher position first among equals."""
    tilt = torch.arange(p.Lk, dtype=torch.float64) * 1e-9
    ranked = (votes.double() + tilt).argsort(-1).argsort(-1).float()
    return base.select(torch.where(votes > -math.inf, ranked, votes), p)


@plant("select")
def select_takes_the_higher_position_first(base: Backend, votes: Tensor, p: Problem) -> Selection:
    return tied_wrongly(base, votes, p)


@plant("select")
def select_orders_signed_zeros(base: Backend, votes: Tensor, p: Problem) -> Selection:
    return base.select(torch.where(votes.signbit() & (votes == 0), -1e-30, votes), p)


@plant("select")
def select_window_off_by_one(base: Backend, votes: Tensor, p: Problem) -> Selection:
    bent = base.select(votes, configured(p, n_local=p.config.n_local + 1))
    return Selection(bent.positions[:, :, : p.K], bent.count.clamp(max=p.K))


@plant("select")
def select_forgets_the_sink(base: Backend, votes: Tensor, p: Problem) -> Selection:
    bent = base.select(votes, configured(p, n_sink=0))
    padded = torch.nn.functional.pad(bent.positions, (0, p.K - bent.positions.shape[2]), value=-1)
    return Selection(padded, bent.count)


@plant("select")
def select_window_forgets_the_chunk(base: Backend, votes: Tensor, p: Problem) -> Selection:
    short = replace(p, q=p.q[:, :, :1])
    bent = base.select(votes, short)
    padded = torch.nn.functional.pad(bent.positions, (0, p.K - bent.positions.shape[2]), value=-1)
    return Selection(padded, bent.count)


@plant("select")
def select_takes_one_more(base: Backend, votes: Tensor, p: Problem) -> Selection:
    bent = base.select(votes, configured(p, k=p.config.budget(p.Lk) + 1))
    return Selection(bent.positions[:, :, : p.K], bent.count.clamp(max=p.K))


@plant("select")
def select_takes_the_fraction_of_the_capacity(
    base: Backend, votes: Tensor, p: Problem
) -> Selection:
    return base.select(votes, configured(p, k=p.config.budget(p.Lk)))


@plant("select")
def select_takes_the_fraction_of_the_longest_request(
    base: Backend, votes: Tensor, p: Problem
) -> Selection:
    bent = base.select(votes, configured(p, k=p.config.budget(int(p.cache_seqlens.max()))))
    padded = torch.nn.functional.pad(bent.positions, (0, p.K - bent.positions.shape[2]), value=-1)
    return Selection(padded, bent.count)


@plant("select")
def select_rounds_up_a_fraction_that_is_whole(
    base: Backend, votes: Tensor, p: Problem
) -> Selection:
    """As in floating point, where 0.07 * 100 is more than 7."""
    if not isinstance(p.config.k, float):
        return base.select(votes, p)
    bent = base.select(votes, configured(p, k=p.config.k + 1e-6))
    return Selection(bent.positions[:, :, : p.K], bent.count.clamp(max=p.K))


@plant("select")
def select_keeps_all_that_tie(base: Backend, votes: Tensor, p: Problem) -> Selection:
    """A buffer of ties that overflows: what ties beyond the first 4 is lost."""
    rows = votes.flatten(0, 2).clone()
    for row in rows:
        values, counts = row[row > -math.inf].unique(return_counts=True)
        for value in values[counts > 4]:
            row[(row == value).nonzero()[4:, 0]] = -math.inf
    return base.select(rows.view_as(votes), p)


@plant("select")
def select_rounds_the_share_down(base: Backend, votes: Tensor, p: Problem) -> Selection:
    k = p.config.budget(p.Lk)
    share = math.floor(p.config.fixed_share * k) / max(1, k)
    return base.select(votes, configured(p, fixed_share=share))


@plant("select")
def select_pads_with_zero(base: Backend, votes: Tensor, p: Problem) -> Selection:
    positions, count = base.select(votes, p)
    return Selection(positions.clamp(min=0), count)


# --- all three in one ---


Fused = tuple[AttentionOutput, Selection, Tensor]


def in_turn(base: Backend, p: Problem, bent: Callable[[Tensor], Tensor]) -> Fused:
    """A right `attend_fresh`, but for how the votes are bent."""
    votes, lse = base.score(p)
    selection = base.select(bent(votes), p)
    return base.attend(p, selection), selection, lse


@plant("attend_fresh")
def attend_fresh_gives_ties_to_the_higher_position(base: Backend, p: Problem) -> Fused:
    later = 1e-7 * torch.arange(p.Lk)
    return in_turn(base, p, lambda votes: votes + votes.abs().nan_to_num(posinf=0.0) * later)


@plant("attend_fresh")
def attend_fresh_has_no_lse_of_a_chunk(base: Backend, p: Problem) -> Fused:
    attended, selection, lse = in_turn(base, p, lambda votes: votes)
    return attended, selection, lse if p.Lq == 1 else lse + 1


# --- attend ---


@plant("attend")
def attend_reads_kv_head_modulo(base: Backend, p: Problem, selection: Selection) -> AttentionOutput:
    if p.S > 1:
        return base.attend(p, selection)
    order = shuffled_heads(p)
    sinks = None if p.sink_logits is None else p.sink_logits[order]
    out, lse = base.attend(replace(p, q=p.q[:, order], sink_logits=sinks), selection)
    back = torch.argsort(order)
    return AttentionOutput(out[:, back], lse[:, back])


@plant("attend")
def attend_reads_padding_as_row_zero(
    base: Backend, p: Problem, selection: Selection
) -> AttentionOutput:
    """-1 taken for position 0, which then weighs as often as there is padding."""
    positions, count = selection
    filled = Selection(positions.clamp(min=0), torch.full_like(count, positions.shape[2]))
    padded, right = base.attend(p, filled), base.attend(p, selection)
    wrong = (count < positions.shape[2]).any(1) & (count > 0).all(1)
    return AttentionOutput(
        torch.where(wrong[:, None, None, None], padded.out, right.out),
        torch.where(wrong[:, None, None], padded.lse, right.lse),
    )


@plant("attend")
def attend_without_the_causal_rule(
    base: Backend, p: Problem, selection: Selection
) -> AttentionOutput:
    outs = [base.attend(replace(p, q=p.q[:, :, i : i + 1]), selection) for i in range(p.Lq)]
    return AttentionOutput(torch.cat([o.out for o in outs], 2), torch.cat([o.lse for o in outs], 2))


@plant("attend")
def attend_without_softcap(base: Backend, p: Problem, selection: Selection) -> AttentionOutput:
    return base.attend(replace(p, softcap=None), selection)


@plant("attend")
def attend_without_sink_logits(base: Backend, p: Problem, selection: Selection) -> AttentionOutput:
    return base.attend(replace(p, sink_logits=None), selection)


@plant("attend")
def attend_vanishes_under_a_large_sink(
    base: Backend, p: Problem, selection: Selection
) -> AttentionOutput:
    """Where a sink takes nearly all, what is left is dropped."""
    out, lse = base.attend(p, selection)
    if p.sink_logits is None:
        return AttentionOutput(out, lse)
    left = torch.sigmoid(lse - p.sink_logits[:, None].float())
    return AttentionOutput(torch.where(left[..., None] < 0.1, 0 * out, out), lse)


@plant("attend")
def attend_counts_sink_logits_in_lse(
    base: Backend, p: Problem, selection: Selection
) -> AttentionOutput:
    out, lse = base.attend(p, selection)
    if p.sink_logits is not None:
        lse = torch.logaddexp(lse, p.sink_logits[:, None].float().expand_as(lse))
    return AttentionOutput(out, lse)


@plant("attend")
def attend_ignores_scale(base: Backend, p: Problem, selection: Selection) -> AttentionOutput:
    return base.attend(replace(p, scale=p.D**-0.5), selection)


@plant("attend")
def attend_stays_at_original_positions(
    base: Backend, p: Problem, selection: Selection
) -> AttentionOutput:
    return base.attend(configured(p, positions="original"), selection)


@plant("attend")
def attend_moves_keys_by_a_float32_angle(
    base: Backend, p: Problem, selection: Selection
) -> AttentionOutput:
    if not turns_far(p, p.config.positions):
        return base.attend(p, selection)
    positions = selection.positions[0, 0][: int(selection.count)].long()
    at = torch.arange(len(positions)) if p.config.positions == "contiguous" else positions
    return base.attend(off_by_a_float32_angle(p, positions, at), selection)


@plant("attend")
def attend_forgets_the_rope_factor(
    base: Backend, p: Problem, selection: Selection
) -> AttentionOutput:
    return base.attend(replace(p, rope=p.rope and replace(p.rope, scaling=1.0)), selection)


@plant("attend")
def attend_multiplies_unseen_values(
    base: Backend, p: Problem, selection: Selection
) -> AttentionOutput:
    """Weights of zero, times NaN."""
    out, lse = base.attend(p, selection)
    if not p.is_paged:
        for b, n in enumerate(p.cache_seqlens.tolist()):
            if n > 0 and (selection.positions[b] == n - 1).any():
                out[b] += 0 * p.v_cache[b, :, n - 1].repeat_interleave(p.G, 0)[:, None]
    return AttentionOutput(out, lse)


@plant("attend")
def attend_reads_every_value(base: Backend, p: Problem, selection: Selection) -> AttentionOutput:
    out, lse = base.attend(p, selection)
    return AttentionOutput(out + 0 * p.v_cache.double().sum().to(out.dtype), lse)


@plant("attend")
def attend_rounds_queries_to_bfloat16(
    base: Backend, p: Problem, selection: Selection
) -> AttentionOutput:
    return base.attend(replace(p, q=p.q.bfloat16().to(p.q.dtype)), selection)


@plant("attend")
def attend_leaves_one_row_in_many_wrong(
    base: Backend, p: Problem, selection: Selection
) -> AttentionOutput:
    out, lse = base.attend(p, selection)
    out[-1, -1, -1, -1] *= 1 + 1e-2
    return AttentionOutput(out, lse)


@plant("attend")
def attend_gives_nan_to_a_query_that_sees_nothing(
    base: Backend, p: Problem, selection: Selection
) -> AttentionOutput:
    out, lse = base.attend(p, selection)
    return AttentionOutput(torch.where(lse[..., None] == -math.inf, math.nan, out), lse)


# --- Selection Caches: the stateful test must catch these ---


class PlantedCache(SelectionCache):
    """Wrong in a method, or, by a function of that name, in a step of the backend's `Reuse`."""

    decide_reuse = staticmethod(lambda right, *given: right.decide_reuse(*given))
    update = staticmethod(lambda right, *given: right.update(*given))

    @classmethod
    def reuse(cls, right: Reuse) -> Reuse:
        return Reuse(
            functools.partial(cls.decide_reuse, right), functools.partial(cls.update, right)
        )


class LosesWhatWasAppended(PlantedCache):
    """The released algorithm: the stored selection as it is."""

    @staticmethod
    def update(right, p, memory, decision, fresh):
        right.update(p, memory, decision, fresh)
        place = torch.arange(p.K)
        lost = decision.reused[:, None, None] & (place >= memory.count[:, :, None])
        fresh.positions.masked_fill_(lost, -1)
        fresh.count.copy_(torch.where(decision.reused[:, None], memory.count, fresh.count))


class ComparesWithThePreviousQuery(PlantedCache):
    """Drifts: each step is like the last, and none is like the first."""

    @staticmethod
    def update(right, p, memory, decision, fresh):
        right.update(p, memory, decision, fresh)
        memory.query.copy_(decision.query)


class IgnoresMaxReuse(PlantedCache):
    @staticmethod
    def decide_reuse(right, p, memory, theta):
        return right.decide_reuse(replace(p, max_reuse=10**6), memory, theta)


class ComparesTheWholeBatch(PlantedCache):
    """State keyed on the first request."""

    @staticmethod
    def decide_reuse(right, p, memory, theta):
        decision = right.decide_reuse(p, memory, theta)
        reused = decision.reused[:1].expand(p.B)
        return ReuseDecision(reused, p.cache_seqlens.masked_fill(reused, 0), decision.query)


class SurvivesReset(PlantedCache):
    def reset(self, b=None):
        pass


class IgnoresOverwrittenPositions(PlantedCache):
    """A request that was cut back and grew again looks as if it had only grown."""

    def crop(self, lengths):
        pass

    @staticmethod
    def decide_reuse(right, p, memory, theta):
        grown_from = (p.cache_seqlens - p.Lq).clamp(min=0)
        memory.seqlen_at_selection.copy_(torch.minimum(memory.seqlen_at_selection, grown_from))
        return right.decide_reuse(p, memory, theta)


class ReordersOnlyTheQueries(PlantedCache):
    def reorder(self, order):
        if self._memory is not None:
            self._memory.query.copy_(self._memory.query[order])


class ReusesAtAnyCosine(PlantedCache):
    @staticmethod
    def decide_reuse(right, p, memory, theta):
        return right.decide_reuse(p, memory, -1.0)


class CountsEveryMissTwice(PlantedCache):
    @staticmethod
    def update(right, p, memory, decision, fresh):
        right.update(p, memory, decision, fresh)
        memory.misses.add_(~decision.reused)


class StoresTheLengthBeforeTheCall(PlantedCache):
    """So that the call's own tokens count as appended, and stand twice in the selection."""

    @staticmethod
    def update(right, p, memory, decision, fresh):
        right.update(p, memory, decision, fresh)
        before = (p.cache_seqlens - p.Lq).clamp(min=0)
        memory.seqlen_at_selection.copy_(
            torch.where(decision.reused, memory.seqlen_at_selection, before)
        )


PLANTED_CACHES = [
    LosesWhatWasAppended,
    ComparesWithThePreviousQuery,
    IgnoresMaxReuse,
    ComparesTheWholeBatch,
    SurvivesReset,
    IgnoresOverwrittenPositions,
    ReordersOnlyTheQueries,
    ReusesAtAnyCosine,
    CountsEveryMissTwice,
    StoresTheLengthBeforeTheCall,
]
