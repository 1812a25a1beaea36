"""The cpu backend's stages for one call: the reference's semantics, vectorised in torch.

Loops run over requests, over chunks of tokens and over blocks of query rows, never over tokens or
heads. The cache is read where it lies: scoring converts it a chunk at a time, attention gathers
the selected rows. The logits of all tokens are kept if they fit a share of the cache's memory;
otherwise the keys are read twice, first for the softmax's sums, then for the votes.
"""

import functools
import math
from collections.abc import Iterator, Sequence

import torch
from torch import Tensor
from torch.nn import functional as F

from tokenselect.contract import AttentionOutput, Problem, Scores, Selection
from tokenselect.kernels.cpu.rows import as_rows
from tokenselect.rope import Rope

# A chunk of converted keys should stay in the processor's cache while it is multiplied.
_CHUNK_BYTES = 4 * 2**20
# So should the logits of a block of queries, of all heads, while they become weights.
_BLOCK_BYTES = 8 * 2**20
# What a call may hold beside the cache, as a share of it; of few tokens, this much anyway.
_SHARE = 0.08
_SMALL = 32 * 2**20
_FEW = 2**18
# A chunk has no fewer tokens than this, and sums over tokens are cut into parts of so many.
_LEAST_CHUNK = 16
_PART = 2**16


def score(problem: Problem) -> Scores:
    """See `tokenselect.reference.score`: votes within the tolerance, in one pass over the keys.

    In two where the logits of all tokens would take too much memory; hard votes, which rank them,
    then take a pass for each block of query rows.
    """
    votes = _full(problem, (problem.B, problem.R, problem.S, problem.Lk))
    lse = _full(problem, (problem.B, problem.Hq))
    for b, n in enumerate(problem.cache_seqlens.tolist()):
        if n > 0:
            for ballot, score_at in enumerate(problem.config.ballots):
                _score_request(problem, b, n, score_at, votes[b, ballot], lse[b])
    return Scores(votes, lse)


def _full(problem: Problem, shape: Sequence[int]) -> Tensor:
    """Return a float32 tensor of -inf."""
    return problem.q.new_full(shape, -math.inf, dtype=torch.float32)


def _score_request(
    problem: Problem, b: int, n: int, score_at: str, votes: Tensor, lse: Tensor
) -> None:
    """Fill votes (S, Lk) and lse (Hq,) of one request on one ballot."""
    c, Hkv, G = problem.config, problem.Hkv, problem.G
    candidates = slice(*c.regions(n, problem.Lq))
    queries = _queries(problem, b, n, score_at)
    runs = queries.tensor_split(min(c.n_query_means, problem.Lq), dim=1)
    voters = torch.cat([run.mean(1).reshape(Hkv, G, -1) for run in runs], dim=1)
    lse = lse.view(Hkv, G)
    total = votes[:, candidates].zero_().to(voters.dtype)  # votes themselves, but for float64
    fitting = _fitting_rows(problem, n)
    if c.vote != "hard" and voters.shape[1] > fitting:
        block_lse = _stream(problem, b, n, score_at, voters, candidates, total)
        if len(runs) == 1:
            lse.copy_(block_lse)
    else:
        for start in range(0, voters.shape[1], fitting):
            rows = slice(start, min(start + fitting, voters.shape[1]))
            logits = _logits(problem, b, n, score_at, voters[:, rows])
            block_votes, block_lse = _vote_(logits, candidates, problem)
            del logits  # before the next ones are made
            _add(total, block_votes)
            if len(runs) == 1:
                lse[:, rows] = block_lse
    if len(runs) > 1:
        whole = queries.mean(1).reshape(Hkv, G, -1)
        lse.copy_(_streamed_lse(problem, b, n, score_at, whole, slice(0, n)))
    m = total.shape[1]
    if c.pool > 1 and m > 0:
        pool = min(c.pool, 2 * m - 1)
        total = F.max_pool1d(total[:, None], pool, stride=1, padding=pool // 2)[:, 0]
    votes[:, candidates] = total


def _add(total: Tensor, votes: Tensor) -> None:
    """Add votes (Hkv, m) to total (S, m): all of them to the one, or each group's to its own."""
    total += votes if votes.shape == total.shape else votes.sum(0)


def _stream(
    problem: Problem,
    b: int,
    n: int,
    where: str,
    voters: Tensor,
    candidates: slice,
    total: Tensor,
) -> Tensor:
    """Add the votes of voters (Hkv, rows, D) to total (S, m) and return their lse (Hkv, rows).

    Keeps no logits: reads the keys once for the sums, once more for the votes.
    """
    c = problem.config
    lse = _streamed_lse(problem, b, n, where, voters, slice(0, n))
    norm = lse
    if c.normalize == "candidates":
        norm = _streamed_lse(problem, b, n, where, voters, candidates)
    norm = torch.where(norm == -math.inf, 0.0, norm)[..., None]
    for start, part in _logit_chunks(problem, b, n, where, voters, candidates):
        weights = part if c.vote == "logit" else part.sub_(norm).exp_()
        first = start - candidates.start
        _add(total[:, first : first + part.shape[2]], weights.sum(1))
    return lse


def _streamed_lse(
    problem: Problem, b: int, n: int, where: str, queries: Tensor, tokens: slice
) -> Tensor:
    """Return logsumexp over `tokens` of the logits of queries (Hkv, rows, D): (Hkv, rows)."""
    lse = queries.new_full(queries.shape[:2], -math.inf)
    for _, part in _logit_chunks(problem, b, n, where, queries, tokens):
        lse = torch.logaddexp(lse, part.logsumexp(-1))
    return lse


def _queries(problem: Problem, b: int, n: int, where: str) -> Tensor:
    """Return the queries (Hq, Lq, D) of request b, in the dtype of computation, at `where`."""
    queries = problem.q[b].to(problem.compute_dtype)
    if problem.rope is None or not problem.needs_rotation(where):
        return queries
    position = torch.arange(n - problem.Lq, n, device=queries.device)
    at = torch.full_like(position, problem.config.n_local) if where == "fixed" else position
    return problem.rope.reposition(queries, position, at)


def _logits(problem: Problem, b: int, n: int, where: str, queries: Tensor) -> Tensor:
    """Return logits (Hkv, rows, n) of queries (Hkv, rows, D); -inf where not finite."""
    logits = queries.new_empty(*queries.shape[:2], n)
    for start, part in _logit_chunks(problem, b, n, where, queries, slice(0, n)):
        # Not out=logits[...]: into a strided slice, bmm would make one product a head.
        logits[:, :, start : start + part.shape[2]] = part
    return logits


def _logit_chunks(
    problem: Problem, b: int, n: int, where: str, queries: Tensor, tokens: slice
) -> Iterator[tuple[int, Tensor]]:
    """Yield the logits of `tokens` per chunk: its first position, (Hkv, rows, chunk)."""
    dtype = queries.dtype
    queries = queries * problem.select_scale
    step = min(_chunk(problem, n), n)
    buffer = queries.new_empty(problem.Hkv, step, problem.D)
    rotator = None
    if problem.rope is not None and problem.needs_rotation(where):
        starts = torch.arange(tokens.start, tokens.stop, step, device=buffer.device)
        rotator = _Rotator(problem.rope, where, starts, torch.empty_like(buffer))
    for start in range(tokens.start, tokens.stop, step):
        stop = min(start + step, tokens.stop)
        chunk = _keys_in_a_row(problem, b, start, stop)
        keys = chunk if chunk.dtype == dtype else buffer[:, : stop - start].copy_(chunk)
        rows = queries
        if rotator is not None:
            rows, keys = rotator.next(queries, keys)
        part = torch.bmm(rows, keys.transpose(1, 2))
        if problem.softcap is not None:
            finite = part.isfinite()
            part.div_(problem.softcap).tanh_().mul_(problem.softcap)
            part.masked_fill_(~finite, -math.inf)
        yield start, part.nan_to_num_(nan=-math.inf, posinf=-math.inf, neginf=-math.inf)


def _keys_in_a_row(problem: Problem, b: int, start: int, stop: int) -> Tensor:
    """Return keys (Hkv, stop - start, D) of request b: a view unless they lie in several pages."""
    if problem.block_table is None:
        return problem.k_cache[b, :, start:stop]
    if problem.page_size == 1:
        pages = problem.block_table[b, start:stop]
        first = int(pages[0])
        in_a_row = torch.arange(first, first + len(pages), device=pages.device)
        if torch.equal(pages.long(), in_a_row):
            return problem.k_cache[first : first + len(pages), 0].transpose(0, 1)
    positions = torch.arange(start, stop, device=problem.q.device)
    return _gather(problem, problem.k_cache, b, positions[None])


class _Rotator:
    """Turns keys, and queries that are in place, to where a chunk of keys is scored.

    A logit depends on the difference of two angles alone. So the angle of a chunk's first token is
    taken off the queries, and the keys are left with those of 0, 1, ... positions, whatever the
    chunk: they are computed once.
    """

    def __init__(self, rope: Rope, where: str, starts: Tensor, keys: Tensor) -> None:
        """Prepare the angles of the chunks.

        starts  first positions of the chunks
        keys    (Hkv, m, D), memory for a chunk"""
        self.rope, self.memory = rope, keys
        is_raw = rope.cached == "raw"
        # Raw keys go up from 0 if they are scored in place, rotated ones down to 0 if not.
        self.sign = (1 if where == "true" else 0) - (0 if is_raw else 1)
        factor = rope.scaling if is_raw else 1.0
        self.to_start = zip(*rope.cos_sin(-self.sign * starts, keys.dtype, factor), strict=True)
        if self.sign != 0:
            by = self.sign * torch.arange(keys.shape[1], device=keys.device)
            cos, self.sin = rope.cos_sin(by, keys.dtype)
            self.cos = torch.ones_like(keys[0])
            for dims in rope.rotary_pairs(self.cos):
                dims.copy_(cos)

    def next(self, queries: Tensor, keys: Tensor) -> tuple[Tensor, Tensor]:
        """Return queries (Hkv, rows, D) and keys (Hkv, m, D) for the next chunk."""
        queries = self.rope.rotate(queries, *next(self.to_start))
        if self.sign == 0:
            return queries, keys
        m = keys.shape[1]
        turned, sin = torch.mul(keys, self.cos[:m], out=self.memory[:, :m]), self.sin[:m]
        (first, second), (to_first, to_second) = (
            self.rope.rotary_pairs(keys),
            self.rope.rotary_pairs(turned),
        )
        to_first.addcmul_(second, sin, value=-1)
        to_second.addcmul_(first, sin)
        return queries, turned


def _vote_(logits: Tensor, candidates: slice, problem: Problem) -> tuple[Tensor, Tensor]:
    """Return votes (Hkv, candidates) summed over rows, and lse (Hkv, rows). Overwrites logits."""
    c, n = problem.config, logits.shape[2]
    if c.vote == "soft" and c.normalize == "visible":
        sums, largest = _exp_(logits)
        return _weighted_sum(logits[:, :, candidates], sums), largest + sums.log()
    lse = _logsumexp(logits)
    logits = logits[:, :, candidates]
    if c.vote == "logit":
        return logits.sum(1), lse
    if c.vote == "hard":
        # Into the logits' own memory, which is not needed any more.
        return torch.sum(_best(logits, c.budget(n)), 1, out=logits[:, 0]), lse
    sums, _ = _exp_(logits)
    return _weighted_sum(logits, sums), lse


def _exp_(logits: Tensor) -> tuple[Tensor, Tensor]:
    """Turn logits into exp(logits - largest) in place; return their sums and largests (..., rows).

    The logsumexp is largest + log(sum).
    """
    if logits.shape[-1] == 0:
        return logits.sum(-1), logits.sum(-1)
    largest = logits.amax(-1, keepdim=True).clamp_(min=torch.finfo(logits.dtype).min)
    largest = torch.where(largest == math.inf, 0.0, largest)
    return logits.sub_(largest).exp_().sum(-1), largest[..., 0]


def _weighted_sum(exps: Tensor, sums: Tensor) -> Tensor:
    """Sum over rows of exps (Hkv, rows, m) / sums (Hkv, rows); a row of sum 0 adds nothing."""
    weights = torch.where(sums > 0, 1 / sums, 0.0)
    return torch.bmm(weights[:, None], exps)[:, 0]


def _logsumexp(logits: Tensor) -> Tensor:
    """Return logsumexp over the last dim, without a second tensor of that size."""
    return torch.stack([part.logsumexp(-1) for part in logits.split(_PART, dim=-1)]).logsumexp(0)


def _fitting_rows(problem: Problem, n: int) -> int:
    """Return how many query rows per KV head may have their logits held at once; at least 1."""
    item = problem.compute_dtype.itemsize
    # Beside the logits: votes, their sum and a product of that size; a chunk, turned or not.
    others = 2 * problem.S * item * n + 3 * _CHUNK_BYTES
    room = _SHARE * _cached_bytes(problem, n) - others
    if n <= _FEW:
        room = max(room, _SMALL)
    if problem.config.vote == "hard":  # masks and ranks take as much again
        room /= 3
    return max(1, int(room / (problem.Hkv * n * item)))


def _cached_bytes(problem: Problem, n: int) -> int:
    """Return how many bytes of keys and values n tokens take."""
    return n * problem.Hkv * (problem.D + problem.Dv) * problem.k_cache.dtype.itemsize


def select(votes: Tensor, problem: Problem) -> Selection:
    """See `tokenselect.reference.select`: bit-exact, by threshold instead of a full sort."""
    c, S = problem.config, problem.S
    positions = votes.new_full((problem.B, S, problem.K), -1, dtype=torch.int32)
    count = votes.new_zeros((problem.B, S), dtype=torch.int32)
    for b, n in enumerate(problem.cache_seqlens.tolist()):
        if n == 0:
            continue
        sink_end, local_start = c.regions(n, problem.Lq)
        chosen = votes.new_ones(S, n, dtype=torch.bool)
        chosen[:, sink_end:local_start] = _elect(votes[b, :, :, sink_end:local_start], c.shares(n))
        selected = chosen.nonzero()[:, 1].view(S, -1)
        positions[b, :, : selected.shape[1]] = selected
        count[b] = selected.shape[1]
    return Selection(positions, count)


def _elect(votes: Tensor, shares: tuple[int, ...]) -> Tensor:
    """Mark the candidates (S, m) that win by votes (R, S, m), ballot after ballot."""
    share, *rest = shares
    chosen = _best(votes[0], share)
    for ballot, next_share in enumerate(rest, start=1):
        chosen |= _best(votes[ballot], next_share, taken=chosen, n_taken=share)
        share += next_share
    return chosen


def _best(votes: Tensor, k: int, taken: Tensor | None = None, n_taken: int = 0) -> Tensor:
    """Return a mask of the k largest along the last dim, the lower place first among equals.

    Of those not `taken`, a mask of n_taken places in every row.
    """
    if k >= votes.shape[-1] - n_taken:
        return torch.ones_like(votes, dtype=torch.bool) if taken is None else ~taken
    if k == 0:
        return torch.zeros_like(votes, dtype=torch.bool)
    if votes.isnan().any():
        votes = votes.nan_to_num(nan=-math.inf, posinf=math.inf, neginf=-math.inf)
    threshold = _kth_largest(votes, k, taken)
    enough = votes >= threshold
    if taken is not None:
        enough &= ~taken
    if int(enough.sum()) == k * (votes.numel() // votes.shape[-1]):  # no tie across the k-th place
        return enough
    tied = enough & (votes == threshold)
    spare = enough.sum(-1, keepdim=True) - k  # the last of those that tie must go
    rank = tied.cumsum(-1, dtype=torch.int32)
    return enough & ~(tied & (rank > rank[..., -1:] - spare))


def _kth_largest(votes: Tensor, k: int, taken: Tensor | None) -> Tensor:
    """Return the k-th largest of those not taken, along the last dim: (..., 1).

    In parts, since topk holds 16 bytes an entry.
    """
    best = []
    for start in range(0, votes.shape[-1], _PART):
        part = votes[..., start : start + _PART]
        if taken is not None:
            part = part.masked_fill(taken[..., start : start + _PART], -math.inf)
        best.append(part.topk(min(k, part.shape[-1]), sorted=False)[0])
    return torch.cat(best, -1).topk(k, sorted=False)[0].amin(-1, keepdim=True)


def attend(problem: Problem, selection: Selection) -> AttentionOutput:
    """See `tokenselect.reference.attend`: gathers the selected rows, then attends to them."""
    out = problem.q.new_zeros(*problem.q.shape[:3], problem.Dv)
    lse = _full(problem, problem.q.shape[:3])
    largest = selection.count.amax(1).tolist()
    for b, n in enumerate(problem.cache_seqlens.tolist()):
        if n > 0 and largest[b] > 0:
            positions = selection.positions[b, :, : largest[b]].long()
            _attend_request(problem, b, n, positions, out[b], lse[b])
    return AttentionOutput(out, lse)


def _attend_request(
    problem: Problem, b: int, n: int, positions: Tensor, out: Tensor, lse: Tensor
) -> None:
    """Fill out (Hq, Lq, Dv) and lse (Hq, Lq) of one request, from positions (S, m).

    Selected rows are gathered a chunk at a time, again for each block of queries.
    """
    G, Lq, m = problem.G, problem.Lq, positions.shape[1]
    queries, at = _placed_to_attend(problem, b, n, positions)
    out, lse = out.view(-1, G, *out.shape[1:]), lse.view(-1, G, Lq)
    width = _chunk(problem, n)
    chunks = [slice(start, min(start + width, m)) for start in range(0, m, width)]
    step = max(1, _BLOCK_BYTES // (problem.Hq * m * queries.dtype.itemsize))
    for start in range(0, Lq, step):
        block = slice(start, min(start + step, Lq))
        query_position = torch.arange(n - Lq, n, device=positions.device)[block, None]
        visible = (positions >= 0)[:, None] & (positions[:, None] <= query_position)
        rows = queries[:, :, block].flatten(1, 2)
        parts = [
            torch.bmm(rows, _selected_keys(problem, b, positions[:, c], at[:, c]).transpose(1, 2))
            for c in chunks
        ]
        logits = (torch.cat(parts, dim=2) if len(parts) > 1 else parts[0]).unflatten(1, (G, -1))
        if problem.softcap is not None:
            logits.div_(problem.softcap).tanh_().mul_(problem.softcap)
        logits.masked_fill_(~visible[:, None], -math.inf)
        weights, lse[:, :, block] = _softmax_(logits, problem.sink_logits, visible)
        total = weights.new_zeros(*weights.shape[:3], problem.Dv)
        for c in chunks:
            values = _selected_values(problem, b, positions[:, c])
            total += _weigh(weights[..., c], values, visible[..., c])
        out[:, :, block] = total.to(out.dtype)


def _placed_to_attend(problem: Problem, b: int, n: int, positions: Tensor) -> tuple[Tensor, Tensor]:
    """Return scaled queries (Hkv, G, Lq, D), placed; and the places for keys, (S, m)."""
    Lq, at = problem.Lq, positions
    queries = problem.q[b].to(problem.compute_dtype)
    if problem.rope is not None and problem.needs_rotation(problem.config.positions):
        device = positions.device
        query_position = torch.arange(n - Lq, n, device=device)
        query_at = query_position.expand(problem.S, Lq)
        if problem.config.positions == "contiguous":
            at = torch.arange(positions.shape[1], device=device).expand_as(positions)
            newest = torch.arange(-Lq, 0, device=device)
            query_at = (positions >= 0).sum(1, keepdim=True) + newest
        per_selection = queries.reshape(problem.S, -1, Lq, problem.D)
        queries = problem.rope.reposition(per_selection, query_position, query_at[:, None])
    return queries.reshape(problem.Hkv, problem.G, Lq, problem.D) * problem.scale, at


def _selected_keys(problem: Problem, b: int, positions: Tensor, at: Tensor) -> Tensor:
    """Return keys (Hkv, m, D) of positions (S, m), moved to `at`; row 0 for padding."""
    keys = _gather(problem, problem.k_cache, b, positions.clamp(min=0))
    keys = keys.to(problem.compute_dtype)
    if problem.rope is not None and problem.needs_rotation(problem.config.positions):
        keys = problem.rope.reposition(keys, positions, at)
    return keys


def _selected_values(problem: Problem, b: int, positions: Tensor) -> Tensor:
    """Return values (Hkv, m, Dv) of positions (S, m); zeros for padding."""
    padding = positions < 0
    values = _gather(problem, problem.v_cache, b, positions.clamp(min=0))
    values = values.to(problem.compute_dtype)
    return values.masked_fill_(padding[..., None], 0.0) if padding.any() else values


def _chunk(problem: Problem, n: int) -> int:
    """Return the tokens per chunk: converted keys stay in the processor's cache; few of n."""
    row = problem.Hkv * max(problem.D, problem.Dv) * problem.compute_dtype.itemsize
    size = min(_CHUNK_BYTES, max(_CHUNK_BYTES // 4, _cached_bytes(problem, n) // 128))
    return max(_LEAST_CHUNK, size // row)


def _softmax_(logits: Tensor, sink_logits: Tensor | None, visible: Tensor) -> tuple[Tensor, Tensor]:
    """Turn logits (Hkv, G, queries, m) into their softmax in place, sinks in the denominator.

    Zeros for a query that sees nothing. Returns it, and the logsumexp without sinks (Hkv, G,
    queries). visible (S, queries, m).
    """
    sums, largest = _exp_(logits)
    factors = 1 / sums
    if sink_logits is not None:
        sinks = sink_logits.to(logits.dtype).view(*logits.shape[:2], 1)
        above = torch.maximum(largest, sinks)
        share = (largest - above).exp()
        factors = share / (sums * share + (sinks - above).exp())
    factors.masked_fill_(~visible.any(-1)[:, None], 0.0)
    return logits.mul_(factors[..., None]), largest + sums.log()


def _weigh(weights: Tensor, values: Tensor, visible: Tensor) -> Tensor:
    """Multiply weights (Hkv, G, queries, m) and values (Hkv, m, Dv), but for unseen values.

    In a product 0 * NaN is NaN, so values that are not finite are kept out of it, and added where
    they are seen. visible (S, queries, m).
    """
    seen = visible[:, None].expand_as(weights)

    def times(which: Tensor, what: Tensor) -> Tensor:
        product = which.to(values.dtype).flatten(1, 2) @ what.to(values.dtype)
        return product.view(*which.shape[:3], -1)

    def meets(which: Tensor, what: Tensor) -> Tensor:
        return times(which, what) > 0

    if visible.all() or values.isfinite().all():
        return times(weights, values)
    finite = values.nan_to_num(nan=0.0, posinf=0.0, neginf=0.0)
    plus = meets(seen & (weights > 0), values == math.inf)
    minus = meets(seen & (weights > 0), values == -math.inf)
    nan = meets(seen, values.isnan()) | meets(seen & ~(weights > 0), values.isinf())
    out = times(weights, finite)
    out = torch.where(plus, math.inf, out)
    out = torch.where(minus, torch.where(plus, math.nan, -math.inf), out)
    return torch.where(nan, math.nan, out)


def _gather(problem: Problem, cache: Tensor, b: int, positions: Tensor) -> Tensor:
    """Return rows (Hkv, m, width) of request b at positions (1, m), or (Hkv, m), one list each.

    One gather for every layout, and no other row is read.
    """
    head = torch.arange(problem.Hkv, device=positions.device)[:, None]
    index: tuple[Tensor, ...]
    if problem.block_table is None:
        cache = cache[b]
        index = head, positions
    else:
        page = problem.block_table[b][positions // problem.page_size].long()
        index = page, positions % problem.page_size, head
    matrix, steps = as_rows(cache)
    row = functools.reduce(torch.add, (i * step for i, step in zip(index, steps, strict=True)))
    return matrix.index_select(0, row.flatten()).view(problem.Hkv, -1, cache.shape[-1])
