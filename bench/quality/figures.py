"""Figures of quality: perplexity, KL, agreement; their aggregates, with intervals."""

import math
from collections.abc import Iterable, Mapping, Sequence
from statistics import mean
from typing import Any

import numpy as np
import torch
from torch import Tensor

Row = Mapping[str, Any]
# Rows of logits that are widened to float64 at once.
_ROWS = 64
# Nats that may be rounding.
_TIE = 1e-4


def beside_dense(
    logits: Sequence[Tensor], dense: Sequence[Tensor], following: Sequence[int]
) -> dict[str, Any]:
    """Return what a variant makes of tokens: means over them, and the largest KL.

    nll        negative log likelihood of the token that follows, natural log
    kl         sum of p log(p / q), p the dense distribution and q the variant's
    agreement  whether both have the same likeliest token
    logits and dense are in parts (tokens, vocabulary); the same ones for dense attention itself.
    """
    nll, kl, agree, targets = [], [], [], torch.tensor(following)[:, None]
    for part, of_dense in zip(logits, dense, strict=True):
        for rows in torch.arange(len(part)).split(_ROWS):
            log_q = part[rows].double().log_softmax(-1)
            log_p = log_q if of_dense is part else of_dense[rows].double().log_softmax(-1)
            nll += (-log_q.gather(1, targets[len(nll) :][: len(rows)])[:, 0]).tolist()
            p = log_p.exp()
            kl += torch.where(p == 0, 0.0, p * (log_p - log_q)).sum(-1).tolist()
            agree += (log_p.argmax(-1) == log_q.argmax(-1)).tolist()
    means = {"nll": mean(nll), "kl": mean(kl), "agreement": mean(agree)}
    return {"tokens": len(nll), **means, "kl_max": float(np.max(kl))}


def wilson(right: int, tries: int, z: float = 1.959964) -> tuple[float, float]:
    """Return the Wilson score interval of a share, 95 % by default."""
    share, spread = right / tries, z * z / tries
    middle = share + spread / 2
    half = z * math.sqrt(share * (1 - share) / tries + spread / (4 * tries))
    low, high = (middle - half) / (1 + spread), (middle + half) / (1 + spread)
    return max(0.0, low) if right else 0.0, min(1.0, high) if right < tries else 1.0


def bootstrapped(values: Sequence[float], draws: int = 10_000) -> list[float]:
    """Return a 95 % interval of the mean, of samples drawn from `values` themselves.

    With a handful of values it comes out too narrow.
    """
    generator = torch.Generator().manual_seed(0)
    picked = torch.randint(len(values), (draws, len(values)), generator=generator)
    means = torch.tensor(values, dtype=torch.float64)[picked].mean(1)
    ends: list[float] = means.quantile(torch.tensor([0.025, 0.975], dtype=torch.float64)).tolist()
    return ends


def grouped(rows: Iterable[Row], names: Sequence[str]) -> list[tuple[dict[str, Any], list[Row]]]:
    """Return rows by what they say under `names`, and that, in order of appearance."""
    groups: dict[tuple[Any, ...], list[Row]] = {}
    for row in rows:
        groups.setdefault(_under(row, *names), []).append(row)
    return [(dict(zip(names, key, strict=True)), group) for key, group in groups.items()]


def _under(row: Row, *names: str) -> tuple[Any, ...]:
    return tuple(row.get(name) for name in names)


def _of_document(row: Row) -> tuple[Any, ...]:
    return _under(row, "context", "document")


def _dense(rows: Sequence[Row]) -> dict[tuple[Any, ...], float]:
    return {_of_document(r): r["nll"] for r in rows if r["variant"] == "dense"}


def beside_window(rows: Sequence[Row]) -> list[Row]:
    """Return rows of documents, with two flags where a window of the same size read it too.

    Of several windows of that size, the best counts.

    dense_gains   dense attention gains from what the window lacks: its nll is lower, by more than
                  rounding
    beats_window  the variant's nll is lower than the window's
    """
    dense, same = _dense(rows), ("context", "document", "size")
    windows = {
        _under(group[0], *same): min(r["nll"] for r in group)
        for _, group in grouped((r for r in rows if r["kind"] == "window"), same)
    }

    def flags(r: Row) -> dict[str, bool]:
        window, of_dense = windows.get(_under(r, *same)), dense.get(_of_document(r))
        if window is None or of_dense is None or r["kind"] != "select":
            return {}
        return {"dense_gains": window - of_dense > _TIE, "beats_window": r["nll"] < window}

    return [{**r, **flags(r)} for r in rows]


def against_dense(rows: Sequence[Row]) -> list[Row]:
    """Return one row for each variant, budget, theta and context, of those of documents.

    perplexity    exp of the mean nll over documents; loss: its ratio to dense, minus 1
    worst         the largest such ratio of one document, minus 1
    kl, agreement means over documents; kl_max the largest of a token
    loss_95, kl_95  intervals of both means: see `bootstrapped`
    closer        documents with a lower KL than the first selecting variant's of this budget
    gains, beats  documents where dense gains from what the window lacks (all of them beyond the
                  trained length, where dense is no measure), and those among them where the
                  variant beats the best window of its size; None without such a window
    """
    dense, same = _dense(rows), ("context", "document", "budget")
    selecting = [r for r in rows if r["kind"] == "select"]
    first = {_under(group[0], *same): group[0]["kl"] for _, group in grouped(selecting, same)}
    measured = [r for r in beside_window(rows) if _of_document(r) in dense]
    found: list[Row] = []
    for named, group in grouped(measured, ("context", "variant", "budget", "theta")):
        gaps = [r["nll"] - dense[_of_document(r)] for r in group]
        kls = [r["kl"] for r in group]
        beside = [r for r in group if "dense_gains" in r]
        gains = [r for r in beside if r["dense_gains"] or r.get("within_trained") is False]
        rates = [r["hit_rate"] for r in group if "hit_rate" in r]
        closer = [r["kl"] < first[_under(r, *same)] for r in group if r["kind"] == "select"]
        found.append(
            named
            | {"size": group[0]["size"], "documents": len(group)}
            | {"perplexity": math.exp(mean(r["nll"] for r in group))}
            | {"loss": math.expm1(mean(gaps)), "worst": math.expm1(np.max(gaps))}
            | {"loss_95": [math.expm1(end) for end in bootstrapped(gaps)]}
            | {"kl": mean(kls), "kl_95": bootstrapped(kls)}
            | {"kl_max": float(np.max([r["kl_max"] for r in group]))}
            | {"closer": sum(closer) if closer else None}
            | {"agreement": mean(r["agreement"] for r in group)}
            | {"gains": len(gains) if beside else None}
            | {"beats": sum(r["beats_window"] for r in gains) if beside else None}
            | {"hit_rate": mean(rates) if rates else None}
        )
    return found
