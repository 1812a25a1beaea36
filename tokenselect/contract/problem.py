"""Problem: the tensors and settings of one call."""

from dataclasses import dataclass
from types import NoneType
from typing import Any, ClassVar, Self

import torch
from torch import Tensor
from torch.nn import Parameter

from tokenselect.contract.config import SelectConfig
from tokenselect.contract.rules import RULES
from tokenselect.errors import InvalidProblem
from tokenselect.rope import Rope
from tokenselect.scalars import plain


class Kind:
    """What is known of all problems of one kind: they keep the rules, and what is noted here.

    Of one kind are problems with one config and numbers, and with tensors of one shape, dtype and
    device; of a rope, its size counts and how keys arrive.

    backends  by what was asked for, and what "auto" was: which one runs them, and all tried
    notes     of backends, each by keys of its own
    """

    def __init__(self, config: SelectConfig) -> None:
        self.config = config  # its id is part of how a kind looks: it stays its own
        self.backends: dict[
            tuple[str, bool, tuple[str, ...]], tuple[str, list[tuple[str, Any]]]
        ] = {}
        self.notes: dict[Any, Any] = {}


@dataclass(frozen=True, eq=False)
class Problem:
    """One call's tensors and settings, checked. Make it with `Problem.build`.

    q             (B, Hq, Lq, D)
    k_cache       (B, Hkv, Lk, D), or paged (n_pages, page_size, Hkv, D); the new keys are in it
    v_cache       likewise with Dv
    cache_seqlens (B,) int32, contiguous: n of each request, 0 (an absent request) or >= Lq
    block_table   None, or (B, max_pages) int32: position j lies in page
                  block_table[b, j // page_size], row j % page_size
    """

    q: Tensor
    k_cache: Tensor
    v_cache: Tensor
    cache_seqlens: Tensor
    block_table: Tensor | None
    scale: float
    softcap: float | None
    sink_logits: Tensor | None
    rope: Rope | None
    max_reuse: int
    config: SelectConfig
    # Of a problem that was built, not replaced: what is known of all that look the same.
    kind: ClassVar["Kind | None"] = None

    @classmethod
    def build(
        cls,
        q: Tensor,
        k_cache: Tensor,
        v_cache: Tensor,
        config: SelectConfig,
        *,
        cache_seqlens: Tensor | None = None,
        block_table: Tensor | None = None,
        scale: float | None = None,
        softcap: float | None = None,
        sink_logits: Tensor | None = None,
        rope: Rope | None = None,
        max_reuse: int = 0,
    ) -> Self:
        """Fill in the defaults and check everything that needs no tensor to be read.

        Raises InvalidProblem. Lengths and block tables are values: see `check_values`.
        """
        problem = cls(
            q=q,
            k_cache=k_cache,
            v_cache=v_cache,
            cache_seqlens=cache_seqlens,  # type: ignore[arg-type]  # filled in below
            block_table=block_table,
            scale=plain(scale),  # filled in below
            softcap=plain(softcap),
            sink_logits=sink_logits,
            rope=rope,
            max_reuse=plain(max_reuse),
            config=config,
        )
        looks = _looks(problem)
        kind = None if looks is None else _KINDS.get(looks)
        if kind is None:
            for rule in RULES:
                came = rule.broken(problem)
                if came is not None:
                    raise InvalidProblem(came, rule.rule, rule.fix)
            if looks is not None:
                if len(_KINDS) >= _MOST_KINDS:
                    _KINDS.clear()
                kind = _KINDS[looks] = Kind(config)
        if kind is not None:
            object.__setattr__(problem, "kind", kind)
        if cache_seqlens is None:
            cache_seqlens = torch.full((problem.B,), problem.Lk, dtype=torch.int32, device=q.device)
        # Kernels read them one after the other.
        object.__setattr__(problem, "cache_seqlens", cache_seqlens.contiguous())
        factor = problem.D**-0.5 if scale is None else float(problem.scale)
        object.__setattr__(problem, "scale", factor)
        return problem

    @property
    def B(self) -> int:
        """Number of requests."""
        return self.q.shape[0]

    @property
    def Hq(self) -> int:
        """Number of query heads."""
        return self.q.shape[1]

    @property
    def Lq(self) -> int:
        """Number of queries per request in this call."""
        return self.q.shape[2]

    @property
    def D(self) -> int:
        """Head dim of queries and keys."""
        return self.q.shape[3]

    @property
    def Dv(self) -> int:
        """Head dim of values."""
        return self.v_cache.shape[3]

    @property
    def is_paged(self) -> bool:
        """Whether the caches come in pages, with a block table."""
        return self.block_table is not None

    @property
    def page_size(self) -> int:
        """Tokens per page; a contiguous cache is one page per request."""
        return self.k_cache.shape[1] if self.is_paged else self.k_cache.shape[2]

    @property
    def Hkv(self) -> int:
        """Number of KV heads."""
        return self.k_cache.shape[2] if self.is_paged else self.k_cache.shape[1]

    @property
    def G(self) -> int:
        """Query heads per KV head."""
        return self.Hq // self.Hkv

    @property
    def Lk(self) -> int:
        """Capacity of the cache, in tokens per request."""
        if self.block_table is None:
            return self.k_cache.shape[2]
        return self.block_table.shape[1] * self.page_size

    @property
    def compute_dtype(self) -> torch.dtype:
        """What q, keys and values are converted to: float32, or float64 for float64."""
        return torch.promote_types(self.q.dtype, torch.float32)

    @property
    def R(self) -> int:
        """Number of ballots: 2 for split scoring, else 1."""
        return len(self.config.ballots)

    @property
    def S(self) -> int:
        """Selections per request: 1, or one per KV head."""
        return 1 if self.config.scope == "layer" else self.Hkv

    @property
    def K(self) -> int:
        """Capacity of a selection: static, and never more than the cache holds."""
        c = self.config
        return min(c.n_sink + c.budget(self.Lk) + c.n_local + self.Lq - 1 + self.max_reuse, self.Lk)

    @property
    def select_scale(self) -> float:
        """Factor on the vote's logits."""
        chosen = self.config.select_scale
        return self.scale if chosen is None else float(chosen)

    def needs_rotation(self, where: str) -> bool:
        """Say whether vectors must be rotated to score at, or attend at, `where`."""
        in_place = where in ("original", "true")
        return self.rope is not None and not (in_place and self.rope.cached == "rotated")

    def describe(self) -> str:
        """Return one line of shapes and settings, for errors and reports."""
        changed = {
            name: value
            for name, value in dict(self.config).items()
            if value != getattr(SelectConfig, name)
        }
        layout = f"pages of {self.page_size}" if self.is_paged else "contiguous"
        return (
            f"B={self.B} Hq={self.Hq} Hkv={self.Hkv} Lq={self.Lq} Lk={self.Lk} D={self.D} "
            f"Dv={self.Dv} {self.q.dtype} on {self.q.device} ({layout})"
            + "".join(f" {name}={value!r}" for name, value in changed.items())
        )


# Kinds of problems that keep all rules, by how they look.
_KINDS: dict[tuple[Any, ...], Kind] = {}
_MOST_KINDS = 256


def _looks(p: Problem) -> tuple[Any, ...] | None:
    """Return all that rules and limits look at; None where some is no plain value or tensor."""
    if torch.compiler.is_compiling():
        return None
    found: list[Any] = [id(p.config)]
    if type(p.rope) is Rope:
        found += [p.rope.inv_freq.shape, p.rope.inv_freq.device, p.rope.cached]
    elif p.rope is not None:
        return None
    for number in (p.scale, p.softcap, p.max_reuse):
        if type(number) not in (int, float, NoneType):
            return None
        found += [type(number), number]
    for x in (p.q, p.k_cache, p.v_cache, p.cache_seqlens, p.block_table, p.sink_logits):
        if x is None:
            found.append(None)
        elif type(x) is Tensor or type(x) is Parameter:
            found += [x.shape, x.dtype, x.device]
        else:
            return None
    return tuple(found)
