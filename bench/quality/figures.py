"""Figures of quality: perplexity, KL, agreement; their aggregates, with intervals."""

import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from statistics import mean
from typing import Any

import torch
from torch import Tensor

# Rows of logits that are widened to float64 at once.
_ROWS = 64


@dataclass
class Against:
    """What a way makes of tokens, beside dense attention; one value a token.

    nll    negative log likelihood of the token that follows, natural log
    kl     sum of p log(p / q), p the dense distribution and q the way's
    agree  whether both have the same likeliest token
    """

    nll: list[float] = field(default_factory=list)
    kl: list[float] = field(default_factory=list)
    agree: list[bool] = field(default_factory=list)

    def add(self, logits: Tensor, dense: Tensor, following: Sequence[int]) -> None:
        """logits and dense (tokens, vocabulary); following: the token after each."""
        targets = torch.tensor(following)[:, None]
        for rows in torch.arange(len(following)).split(_ROWS):
            log_q = logits[rows].double().log_softmax(-1)
            log_p = log_q if dense is logits else dense[rows].double().log_softmax(-1)
            self.nll += (-log_q.gather(1, targets[rows])[:, 0]).tolist()
            self.kl += (log_p.exp() * (log_p - log_q)).nan_to_num().sum(-1).tolist()
            self.agree += (log_p.argmax(-1) == log_q.argmax(-1)).tolist()

    def summary(self) -> dict[str, float]:
        return {
            "tokens": len(self.nll),
            "nll": mean(self.nll),
            "kl": mean(self.kl),
            "kl_max": max(self.kl),
            "agreement": mean(self.agree),
        }


def wilson(right: int, tries: int, z: float = 1.959964) -> tuple[float, float]:
    """The Wilson score interval of a share, 95 % by default.

    >>> [round(end, 4) for end in wilson(19, 20)]
    [0.7639, 0.9911]
    """
    if tries == 0:
        return 0.0, 1.0
    share, spread = right / tries, z * z / tries
    middle = share + spread / 2
    half = z * math.sqrt(share * (1 - share) / tries + spread / (4 * tries))
    low, high = (middle - half) / (1 + spread), (middle + half) / (1 + spread)
    return max(0.0, low) if right else 0.0, min(1.0, high) if right < tries else 1.0


Row = Mapping[str, Any]


def grouped(rows: Iterable[Row], names: Sequence[str]) -> dict[tuple[Any, ...], list[Row]]:
    """Rows by what they say under `names`, in order of appearance."""
    groups: dict[tuple[Any, ...], list[Row]] = {}
    for row in rows:
        groups.setdefault(tuple(row.get(name) for name in names), []).append(row)
    return groups


def against_dense(rows: Sequence[Row], by: Sequence[str] = ()) -> list[dict[str, Any]]:
    """Rows of documents made one row for each way, budget and context.

    perplexity  exp of the mean nll over documents; loss: its ratio to dense, minus 1
    worst       the largest such ratio of one document, minus 1
    kl, agreement  means over documents; kl_max the largest of a token
    beats_window   documents, among those where dense gains from the context (its nll is below that
                   of the window of the same size), where the way's nll is below the window's
    """
    dense = {(r["context"], r["document"]): r for r in rows if r["way"] == "dense"}
    windows = {
        (r["context"], r["document"], r["size"]): r["nll"]
        for r in rows
        if r["kind"] == "window" and r.get("theta") is None
    }
    found = []
    for values, group in grouped(rows, ("context", "way", "budget", *by)).items():
        pairs = [(r, dense[r["context"], r["document"]]) for r in group]
        gaps = [r["nll"] - d["nll"] for r, d in pairs]
        beside = [(r, d, windows.get((r["context"], r["document"], r["size"]))) for r, d in pairs]
        gains = [(r, w) for r, d, w in beside if w is not None and d["nll"] < w]
        found.append(
            dict(zip(("context", "way", "budget", *by), values, strict=True))
            | {
                "size": group[0]["size"],
                "documents": len(group),
                "perplexity": math.exp(mean(r["nll"] for r in group)),
                "loss": math.exp(mean(gaps)) - 1,
                "worst": math.exp(max(gaps)) - 1,
                "kl": mean(r["kl"] for r in group),
                "kl_max": max(r["kl_max"] for r in group),
                "agreement": mean(r["agreement"] for r in group),
                "dense_gains": len(gains),
                "beats_window": sum(r["nll"] < w for r, w in gains),
            }
        )
    return found
