"""The stages of one call, each a call of the library; the fused step is one."""

from typing import Any

import torch
from torch import Tensor

from tokenselect.contract import (
    AttentionOutput,
    CacheState,
    Problem,
    ReuseDecision,
    Scores,
    Selection,
)
from tokenselect.kernels.native import chunk
from tokenselect.kernels.native.cos_sin import cos_sin
from tokenselect.kernels.native.library import Library
from tokenselect.scratch import empty

SCORE, SELECT, ATTEND, GATHER, DECIDE, UPDATE, WEIGH = 1, 2, 4, 8, 16, 32, 64
DTYPES = {torch.float32: 0, torch.bfloat16: 1, torch.float16: 2}
_VOTES = {"soft": 0, "logit": 1, "hard": 2}
_SCORE_AT = {"true": 0, "fixed": 1, "split": 2}
# Less than this many bytes of cache are read by one thread: waking others takes as long.
_ALONE = 2**20
# More queries than this are attended by matrix products over gathered rows.
_FEW_QUERIES = 16
# Bytes of scratch: of a first call, and what is kept for the next.
_LEAST, _KEPT = 2**16, 2**28


class Stages:
    """The stages, on one library. No state shows in a result: what is kept is spare memory.

    is_static  as a plan runs them: scratch for the whole capacity comes from the plan too
    """

    def __init__(self, library: Library, *, is_static: bool = False) -> None:
        self._library, self._is_static = library, is_static
        self._spare: list[Tensor] = []
        self._nothing: dict[str, Any] = dict.fromkeys(library.fields, 0)
        self._nothing["path"] = library.number

    def score(self, problem: Problem) -> Scores:
        """Return votes and lse within their tolerance, in one pass over the keys."""
        p, device = problem, problem.q.device
        votes = empty((p.B, p.R, p.S, p.Lk), torch.float32, device)
        lse = empty((p.B, p.Hq), torch.float32, device)
        self._run(p, SCORE, {"votes": votes, "dense_lse": lse})
        return Scores(votes, lse)

    def select(self, votes: Tensor, problem: Problem) -> Selection:
        """Return the selection that votes (B, R, S, Lk) make; bit-exact."""
        selection = self._selection(problem)
        positions, count = selection
        made = {"votes": votes.contiguous(), "positions": positions, "count": count}
        self._run(problem, SELECT, made)
        return selection

    def attend(
        self, problem: Problem, selection: Selection, out: Tensor | None = None
    ) -> AttentionOutput:
        """Return attention over any selection, within its tolerance, in `out` if there is one."""
        positions, count = (x.contiguous() for x in selection)
        attended = self._attended(problem, out)
        if self._gathers(problem) and not self._is_static:
            chunk.attend(problem, positions, count, *attended, self._gather, self._weigh, empty)
        else:
            out, lse = attended
            given = {"positions": positions, "count": count, "out": out, "out_lse": lse}
            self._run(problem, ATTEND, given)
        return attended

    def attend_fresh(self, problem: Problem) -> tuple[AttentionOutput, Selection, Tensor]:
        """Score, select and attend in one call of the library."""
        return self._fused(problem, SCORE | SELECT, {})

    def attend_cached(
        self, problem: Problem, state: CacheState, theta: float | None
    ) -> tuple[AttentionOutput, Selection, Tensor, Tensor]:
        """Do the same with a Selection Cache: decide before, and update after selecting."""
        reused = empty((problem.B,), torch.bool, problem.q.device)
        stages = DECIDE | SCORE | SELECT | UPDATE
        return *self._fused(problem, stages, {"reused": reused}, state, theta), reused

    def _fused(
        self,
        p: Problem,
        stages: int,
        made: dict[str, Tensor],
        state: CacheState | None = None,
        theta: float | None = None,
    ) -> tuple[AttentionOutput, Selection, Tensor]:
        lse = empty((p.B, p.Hq), torch.float32, p.q.device)
        selection, attended = self._selection(p), self._attended(p)
        made |= {"dense_lse": lse, "positions": selection[0], "count": selection[1]}
        if self._gathers(p):
            self._run(p, stages, made, state, theta)
            chunk.attend(p, *selection, *attended, self._gather, self._weigh, empty)
        else:
            made |= {"out": attended[0], "out_lse": attended[1]}
            self._run(p, stages | ATTEND, made, state, theta)
        return attended, selection, lse

    def decide_reuse(
        self, problem: Problem, state: CacheState, theta: float | None
    ) -> ReuseDecision:
        """Decide which requests reuse their selection; change nothing."""
        p, device = problem, problem.q.device
        decision = ReuseDecision(
            empty((p.B,), torch.bool, device),
            empty((p.B,), torch.int32, device),
            empty((p.B, p.Hq * p.D), torch.float32, device),
        )
        self._run(p, DECIDE, _named(decision), state, theta)
        return decision

    def update(
        self, problem: Problem, state: CacheState, decision: ReuseDecision, selection: Selection
    ) -> None:
        """Complete the selections that are reused, in `selection`; store the others."""
        positions, count = selection
        made = _named(decision) | {"positions": positions, "count": count}
        self._run(problem, UPDATE, made, state)

    def _gather(self, problem: Problem, tensors: dict[str, Tensor], **numbers: int) -> None:
        self._run(problem, GATHER, tensors, numbers=numbers)

    def _weigh(self, problem: Problem, tensors: dict[str, Tensor], **numbers: int) -> None:
        self._run(problem, WEIGH, tensors, numbers=numbers)

    def _gathers(self, p: Problem) -> bool:
        """Say whether a call is attended by matrix products of torch."""
        return p.Lq > _FEW_QUERIES and not self._in_tiles(p)

    def _in_tiles(self, p: Problem) -> bool:
        """Say whether a call is attended in tiles: many queries, of bfloat16 keys as they lie."""
        return (
            self._library.has_tiles
            and p.Lq > _FEW_QUERIES
            and p.q.dtype is torch.bfloat16
            and not p.needs_rotation(p.config.positions)
        )

    @staticmethod
    def _selection(p: Problem) -> Selection:
        device = p.q.device
        positions = empty((p.B, p.S, p.K), torch.int32, device)
        return Selection(positions, empty((p.B, p.S), torch.int32, device))

    @staticmethod
    def _attended(p: Problem, out: Tensor | None = None) -> AttentionOutput:
        if out is None:
            out = empty((p.B, p.Hq, p.Lq, p.Dv), p.q.dtype, p.q.device)
        return AttentionOutput(out, empty((p.B, p.Hq, p.Lq), torch.float32, p.q.device))

    def _run(
        self,
        problem: Problem,
        stages: int,
        tensors: dict[str, Tensor],
        state: CacheState | None = None,
        theta: float | None = None,
        numbers: dict[str, int] | None = None,
    ) -> None:
        """Run stages of a problem; `tensors` are what they read and write beside it."""
        values = self._values(problem, stages)
        values.update(numbers or {})
        if state is not None:
            values.update(
                has_theta=theta is not None, theta=theta or 0.0, max_reuse=problem.max_reuse,
                stored_query=state.query.data_ptr(), stored=state.positions.data_ptr(),
                stored_columns=state.positions.shape[2], stored_count=state.count.data_ptr(),
                stored_length=state.seqlen_at_selection.data_ptr(),
                hits=state.hits.data_ptr(), misses=state.misses.data_ptr(),
            )  # fmt: skip
        for name, tensor in tensors.items():
            values[name] = tensor.data_ptr()
        values["kept"] = tensors
        if "positions" in tensors:
            values["columns"] = tensors["positions"].shape[2]
        if self._is_static:
            values["is_static"] = True
            needed = self._library.needs(values)
            scratch = empty((needed,), torch.uint8, problem.q.device)
            values.update(scratch=scratch.data_ptr(), scratch_bytes=scratch.numel())
            self._library.run(values)
            return
        try:
            scratch = self._spare.pop()
        except IndexError:  # none, or another thread's
            scratch = empty((_LEAST,), torch.uint8, problem.q.device)
        values.update(scratch=scratch.data_ptr(), scratch_bytes=scratch.numel())
        while (needed := self._library.run(values)) > 0:
            scratch = empty((needed,), torch.uint8, problem.q.device)
            values.update(scratch=scratch.data_ptr(), scratch_bytes=scratch.numel())
        if scratch.numel() <= _KEPT and len(self._spare) < 4:
            self._spare.append(scratch)

    def _values(self, p: Problem, stages: int) -> dict[str, Any]:
        """Return the fields of `Call` in cpp/call.h that a problem fills in."""
        q, k, v, table = p.q, p.k_cache, p.v_cache, p.block_table
        threads = 1
        if self._library.has_threads and 2 * p.B * p.Hkv * p.Lk * p.D * k.itemsize > _ALONE:
            threads = torch.get_num_threads()
        strides = q.stride(), k.stride(), v.stride(), None if table is None else table.stride()
        notes = {} if p.kind is None else p.kind.notes
        noted = notes.get((self, strides))
        if noted is None:
            noted = notes[self, strides] = self._of_kind(p)
        values: dict[str, Any] = noted.copy()
        values.update(
            stages=stages, threads=threads, q=q.data_ptr(), k=k.data_ptr(), v=v.data_ptr(),
            lengths=p.cache_seqlens.data_ptr(), in_tiles=self._in_tiles(p),
        )  # fmt: skip
        if table is not None:
            values["table"] = table.data_ptr()
        if p.sink_logits is not None:
            sinks = empty((p.Hq,), torch.float32, q.device).copy_(p.sink_logits)
            values["kept sinks"], values["sinks"] = sinks, sinks.data_ptr()
        if p.rope is not None and (p.rope.cached == "raw" or _moves(p)):
            made = cos_sin(p.rope.inv_freq, p.Lk)
            values["kept cos_sin"] = made
            values.update(
                cos_sin_table=made.table.data_ptr(), n_high=made.n_high,
                inv_freq=made.inv_freq.data_ptr(), half=p.rope.inv_freq.shape[0],
                interleaved=p.rope.interleaved, is_raw=p.rope.cached == "raw",
                rope_scaling=p.rope.scaling,
            )  # fmt: skip
        return values

    def _of_kind(self, p: Problem) -> dict[str, Any]:
        """Return the fields that are the same for all problems of a kind with the same strides."""
        c, k, v = p.config, p.k_cache, p.v_cache
        values = self._nothing.copy()
        q_request, q_head, q_token, q_dim = p.q.stride()
        if p.block_table is None:
            k_outer, k_head, k_token, k_dim = k.stride()
            v_outer, v_head, v_token, v_dim = v.stride()
        else:
            k_outer, k_token, k_head, k_dim = k.stride()
            v_outer, v_token, v_head, v_dim = v.stride()
            table_request, table_page = p.block_table.stride()
            values.update(
                table_request=table_request, table_page=table_page,
                n_pages=k.shape[0], page_size=p.page_size,
            )  # fmt: skip
        values.update(
            B=p.B, Hq=p.Hq, Hkv=p.Hkv, Lq=p.Lq, D=p.D, Dv=p.Dv, Lk=p.Lk,
            S=p.S, K=p.K, columns=p.K, dtype=DTYPES[p.q.dtype],
            q_request=q_request, q_head=q_head, q_token=q_token, q_dim=q_dim,
            k_outer=k_outer, k_head=k_head, k_token=k_token, k_dim=k_dim,
            v_outer=v_outer, v_head=v_head, v_token=v_token, v_dim=v_dim,
            select_scale=p.select_scale, scale=p.scale,
            softcap=p.softcap or 0.0, **c.budget_rule._asdict(),
            n_sink=c.n_sink, n_local=c.n_local, vote=_VOTES[c.vote],
            over_candidates=c.vote == "soft" and c.normalize == "candidates",
            pool=c.pool, runs=c.n_query_means, score_at=_SCORE_AT[c.score_at],
            contiguous=c.positions == "contiguous",
        )  # fmt: skip
        return values


def _moves(p: Problem) -> bool:
    return p.config.positions == "contiguous" or p.config.score_at != "true"


def _named(decision: ReuseDecision) -> dict[str, Tensor]:
    reused, open_lengths, mean_query = decision
    return {"reused": reused, "open_lengths": open_lengths, "mean_query": mean_query}
