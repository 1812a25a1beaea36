"""Rope.reposition is a rotation by the difference of two positions, exact at any distance."""

import math

import pytest
import torch
from torch import Tensor

from tests.problems import SMALL, lengths, problem, tensors
from tokenselect import Rope, attend, attention, score, select


def inv_freq(D: int, base: float = 10000.0) -> Tensor:
    return base ** (-torch.arange(0, D, 2, dtype=torch.float64) / D)


def turned(x: Tensor, frequencies: Tensor, by: Tensor, *, interleaved: bool) -> Tensor:
    """x (..., L, D) turned by `by` (L,) positions: pairs as complex numbers, times exp(i angle)."""
    n = 2 * len(frequencies)
    x = x.double()
    first, second = (x[..., 0:n:2], x[..., 1:n:2]) if interleaved else x[..., :n].chunk(2, -1)
    angle = by.double()[:, None] * frequencies.double()
    z = torch.complex(first, second) * torch.polar(torch.ones_like(angle), angle)
    pairs = torch.view_as_real(z).flatten(-2) if interleaved else torch.cat((z.real, z.imag), -1)
    return torch.cat((pairs, x[..., n:]), -1)


@pytest.mark.parametrize("interleaved", [False, True])
@pytest.mark.parametrize("rotary_dim", [2, 6, 16])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_place_is_a_complex_multiplication(
    interleaved: bool, rotary_dim: int, dtype: torch.dtype
) -> None:
    x = tensors(Lk=7, D=16, dtype=dtype)[1]
    position = torch.tensor([0, 1, 2, 5, 100, 4000, 100_000])
    at = torch.tensor([0, 0, 5, 2, 7, 4001, 3])
    rope = Rope(inv_freq(rotary_dim), interleaved=interleaved)
    got = rope.reposition(x, position, at)
    assert (got.shape, got.dtype) == (x.shape, dtype)
    expected = turned(x, rope.inv_freq, at - position, interleaved=interleaved)
    eps = torch.finfo(dtype).eps
    torch.testing.assert_close(got.double(), expected, atol=8 * eps, rtol=4 * eps)
    assert torch.equal(got[..., rotary_dim:], x[..., rotary_dim:])


def test_interleaved_and_half_split_are_one_permutation_apart() -> None:
    x = tensors(Lk=7)[1]
    order = torch.tensor([0, 2, 4, 6, 1, 3, 5, 7])  # evens, then odds: pairs (2i, 2i+1) to (i, i+4)
    position, at = torch.arange(7), torch.arange(7) * 3 + 1
    interleaved = Rope(inv_freq(8), interleaved=True).reposition(x, position, at)
    half_split = Rope(inv_freq(8)).reposition(x[..., order], position, at)
    assert torch.equal(interleaved[..., order], half_split)


@pytest.mark.parametrize("interleaved", [False, True])
def test_staying_in_place_changes_nothing(interleaved: bool) -> None:
    x = tensors(Lk=7)[1]
    position = torch.arange(7) + 2**20
    assert torch.equal(Rope(inv_freq(8), interleaved).reposition(x, position, position), x)


@pytest.mark.parametrize("interleaved", [False, True])
@pytest.mark.parametrize("scaling", [1.0, 1.25])
def test_raw_keys_are_placed_where_rotated_ones_are_moved_to(
    interleaved: bool, scaling: float
) -> None:
    """YaRN's factor multiplies cos and sin: rotated vectors contain it, raw ones are given it."""
    raw = tensors(Lk=7, D=12)[1].double()
    position, at = torch.tensor([0, 3, 9, 27, 81, 4000, 2**20]), torch.tensor([5, 0, 9, 1, 2, 3, 4])
    frequencies = inv_freq(8)
    rotated = turned(raw, frequencies, position, interleaved=interleaved)
    rotated[..., :8] *= scaling
    from_raw = Rope(frequencies, interleaved, "raw", scaling).reposition(raw, position, at)
    from_rotated = Rope(frequencies, interleaved, "rotated", scaling).reposition(
        rotated, position, at
    )
    # A float64 angle at 2**20 is known to 1e-10.
    torch.testing.assert_close(from_raw, from_rotated, atol=1e-9, rtol=0)
    expected = turned(raw, frequencies, at, interleaved=interleaved)
    expected[..., :8] *= scaling
    torch.testing.assert_close(from_raw, expected, atol=1e-12, rtol=0)


@pytest.mark.parametrize("base", [10_000.0, 500_000.0])
def test_a_key_from_position_2_20_arrives_within_1e_6(base: float) -> None:
    """A float32 key rotated at 2**20, as a cache holds it, moved to 0: the raw key again."""
    D, distance = 128, torch.tensor([2**20])
    raw = tensors(Lk=1, D=D)[1].double()
    rope = Rope(inv_freq(D, base))
    cached = turned(raw, rope.inv_freq, distance, interleaved=False).float()
    got = rope.reposition(cached, distance, torch.tensor([0]))
    error = (got.double() - raw).norm(dim=-1) / raw.norm(dim=-1)
    assert float(error.max()) < 1e-6


def test_a_float32_angle_would_not_do() -> None:
    """What the test above guards against is real: the same by a float32 angle is off by 1e-3."""
    raw = tensors(Lk=1, D=128)[1].double()
    frequencies, distance = inv_freq(128), torch.tensor([2**20])
    cached = turned(raw, frequencies, distance, interleaved=False)
    back = (-distance.float() * frequencies.float()).double()
    first, second = cached.chunk(2, -1)
    z = torch.complex(first, second) * torch.polar(torch.ones_like(back), back)
    got = torch.cat((z.real, z.imag), -1)
    assert float((got - raw).norm(dim=-1).max() / raw.norm(dim=-1).max()) > 1e-4


def test_positions_may_differ_by_head() -> None:
    x = tensors(Lk=7)[1]
    rope = Rope(inv_freq(8))
    position = torch.stack((torch.arange(7), torch.arange(7) * 2))  # (Hkv, L)
    got = rope.reposition(x, position, torch.zeros_like(position))
    for g in range(2):
        alone = rope.reposition(x[:, g], position[g], torch.zeros(7, dtype=torch.int64))
        assert torch.equal(got[:, g], alone)


# --- through the stages -------------------------------------------------------------------


def cached(raw: Tensor, position: Tensor, rope: Rope, *, is_rotated: bool) -> Tensor:
    if not is_rotated:
        return raw
    x = turned(raw, rope.inv_freq, position, interleaved=rope.interleaved)
    x[..., : rope.rotary_dim] *= rope.scaling
    return x


@pytest.mark.parametrize("backend", ["reference", "cpu"])
@pytest.mark.parametrize("positions", ["original", "contiguous"])
@pytest.mark.parametrize("score_at", ["true", "fixed", "split"])
def test_raw_and_rotated_caches_give_one_result(
    backend: str, positions: str, score_at: str
) -> None:
    Lq, n = 2, 30
    raw_q, raw_k, v_cache = tensors(B=1, Lq=Lq, D=12, dtype=torch.float64)
    results = []
    for how in ("raw", "rotated"):
        rope = Rope(inv_freq(8), cached=how, scaling=1.1)
        is_rotated = how == "rotated"
        results.append(
            attention(
                cached(raw_q, torch.arange(n - Lq, n), rope, is_rotated=is_rotated),
                cached(raw_k, torch.arange(40), rope, is_rotated=is_rotated),
                v_cache,
                **SMALL,
                cache_seqlens=lengths(n),
                rope=rope,
                positions=positions,
                score_at=score_at,
                backend=backend,
                return_info=True,
            )
        )
    (from_raw, raw_info), (from_rotated, rotated_info) = results
    assert torch.equal(raw_info.selection.positions, rotated_info.selection.positions)
    torch.testing.assert_close(from_raw, from_rotated, atol=1e-12, rtol=1e-12)
    torch.testing.assert_close(raw_info.lse, rotated_info.lse, atol=1e-5, rtol=1e-6)


@pytest.mark.parametrize("backend", ["reference", "cpu"])
def test_contiguous_attention_is_the_formula(backend: str) -> None:
    """One head, by hand: the r-th selected key at r, the query at the last of those places."""
    q, k_cache, v_cache = tensors(B=1, Hq=1, Hkv=1, dtype=torch.float64)
    rope = Rope(inv_freq(8))
    p = problem(q, k_cache, v_cache, rope=rope, config={"positions": "contiguous"})
    selection = select(score(p, backend).votes, p, backend)
    chosen = selection.positions[0, 0].long()
    assert int(chosen.diff().max()) > 1  # something moves
    places = torch.arange(len(chosen))
    keys = turned(k_cache[0, 0, chosen], rope.inv_freq, places - chosen, interleaved=False)
    query = turned(q[0, 0], rope.inv_freq, places[-1:] - 39, interleaved=False)[0]
    weights = torch.softmax(keys @ query / math.sqrt(8), 0)
    out = attend(p, selection, backend).out[0, 0, 0]
    torch.testing.assert_close(out, weights @ v_cache[0, 0, chosen], atol=1e-12, rtol=1e-12)


@pytest.mark.parametrize("backend", ["reference", "cpu"])
def test_fixed_votes_depend_on_content_alone(backend: str) -> None:
    """The same key at two places gets the same fixed vote, and not the same true vote."""
    raw_q, raw_k, v_cache = tensors(B=1, dtype=torch.float64)
    raw_k[:, :, 20] = raw_k[:, :, 5]
    rope = Rope(inv_freq(8), cached="raw")
    p = problem(raw_q, raw_k, v_cache, rope=rope, config={"score_at": "split"})
    fixed, true = score(p, backend).votes[0, :, 0]
    assert float((fixed[20] - fixed[5]).abs()) < 1e-6 * float(fixed[5])
    assert float((true[20] - true[5]).abs()) > 1e-3 * float(true[5])
