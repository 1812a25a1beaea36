"""Put a trace into one HTML page that needs nothing else."""

import base64
import html
import json
import string
from collections.abc import Callable
from importlib.resources import files
from typing import Any

import torch
from torch import Tensor

import tokenselect
from tokenselect.contract import Problem, SelectConfig
from tokenselect.explore.record import BACKEND, Layer, Trace
from tokenselect.reference.reuse import added

# Logits further below their head's largest are drawn there: a weight of e**-24.
LOWEST = 24.0
# Every token but the newest is a candidate, so that its vote is known for any n_sink and n_local.
ALL_VOTED = SelectConfig(k=0, n_sink=0, n_local=1)


def size(layers: int, heads: int, steps: int, tokens: int) -> int:
    """Return the bytes that votes and logits of a trace take in a page."""
    return layers * steps * tokens * (4 + heads) * 4 // 3


def draw(
    trace: Trace,
    piece: Callable[[int], str],
    *,
    model: str,
    title: str,
    tick: Callable[[int], object] = lambda n: None,
) -> str:
    """Return the page.

    piece  the text of a token
    tick   called with 1 after each layer
    """
    pieces = [piece(token) for token in trace.ids]
    packed = _pack(trace, tick)
    facts = {
        "model": model,
        "title": title,
        "context": trace.context,
        "steps": trace.steps,
        "layers": list(trace.layers),
        "k": trace.config.k,
        "n_sink": trace.config.n_sink,
        "n_local": trace.config.n_local,
        "theta": trace.theta,
        "max_reuse": trace.max_reuse,
        "pieces": pieces,
        "guesses": {
            way: [[(piece(token), p) for token, p in step] for step in steps]
            for way, steps in trace.guesses.items()
        },
    }
    source = files("tokenselect.explore")
    return string.Template((source / "page.html").read_text("utf-8")).substitute(
        title=html.escape(title),
        style=(source / "page.css").read_text("utf-8"),
        script=(source / "page.js").read_text("utf-8"),
        trace=json.dumps(facts | packed).replace("<", "\\u003c"),
    )


def _pack(trace: Trace, tick: Callable[[int], object]) -> dict[str, Any]:
    """Return what the page computes from, arrays in base64; page.js has their shapes."""
    one = next(iter(trace.layers.values()))
    L, T, N = len(trace.layers), trace.steps, len(trace.ids)
    heads, kv_heads = one.queries[0].shape[1], one.keys.shape[1]
    votes = torch.zeros(L, T, N, device="cpu")
    codes = torch.zeros(L, T, heads, N, dtype=torch.uint8, device="cpu")
    ranges, errors = torch.zeros(2, L, T, heads, device="cpu")
    products = torch.zeros(L, T, T, dtype=torch.float64, device="cpu")
    largest = torch.zeros(L, T, kv_heads, device="cpu")
    selected = torch.zeros(L, T, -(-N // 8) * 8, dtype=torch.uint8, device="cpu")
    mass_error = 0.0
    for i, layer in enumerate(trace.layers.values()):
        for t, query in enumerate(layer.queries):
            n = trace.context + t + 1
            keys, values = layer.keys[:, :, :n], layer.values[:, :, :n]
            problem = Problem.build(query, keys, values, ALL_VOTED, **layer.options)
            votes[i, t, :n] = tokenselect.score(problem, BACKEND).votes[0, 0, 0]
            votes[i, t, n - 1] = heads - votes[i, t, : n - 1].double().sum()
            ranges[i, t], codes[i, t, :, :n] = quantised(_logits(problem))
            largest[i, t] = values.abs().amax((0, 2, 3))
            dense = tokenselect.attention(
                query, keys, values, k=n, backend=BACKEND, **layer.options
            )
            errors[i, t] = (layer.outputs[t] - dense[0, :, 0]).abs().amax(1)
            info = layer.infos[t]
            positions = info.selection.positions[0, 0]
            positions = positions[positions >= 0].long()
            selected[i, t, positions] = 1
            mass = read_back(ranges[i, t], codes[i, t, :, :n])[:, positions].sum(1)
            off = (mass - info.retained_mass[0]).abs().nan_to_num(0.0)
            mass_error = max(mass_error, float(off.max()))
        products[i] = _products(layer)
        tick(1)
    bits = selected.view(L, T, -1, 8) << torch.arange(8, dtype=torch.uint8, device="cpu")
    arrays = {
        "votes": votes,
        "codes": codes,
        "ranges": ranges,
        "products": products,
        "largest": largest,
        "errors": errors,
        "selected": bits.sum(-1, dtype=torch.uint8),
    }
    return {
        "heads": heads,
        "kv_heads": kv_heads,
        "mass_error": mass_error,
        **{name: _as_text(array) for name, array in arrays.items()},
    }


def quantised(logits: Tensor) -> tuple[Tensor, Tensor]:
    """Return ranges (H,) and codes (H, n) uint8 of logits (H, n).

    A logit is its head's largest less range * (code / 255)**2: finer where weights are large.
    """
    below = (logits.amax(1, keepdim=True) - logits).clamp(max=LOWEST).nan_to_num(LOWEST)
    ranges = below.amax(1).clamp(min=1e-6)
    codes = (255 * (below / ranges[:, None]).sqrt()).round()
    return ranges, codes.to(torch.uint8)


def read_back(ranges: Tensor, codes: Tensor) -> Tensor:
    """Return the dense softmax (H, n), as the page makes it of codes."""
    return (-ranges[:, None] * (codes.double() / 255) ** 2).softmax(1)


def _logits(problem: Problem) -> Tensor:
    """Return the logits (H, n) of a problem of one query."""
    keys = problem.k_cache[0].float().repeat_interleave(problem.G, 0)
    logits = (keys @ problem.q[0, :, 0, :, None].float())[:, :, 0] * problem.scale
    if problem.softcap is not None:
        logits = problem.softcap * (logits / problem.softcap).tanh()
    return logits


def _products(layer: Layer) -> Tensor:
    """Return the dot products (T, T) of the steps' queries, as decisions of reuse add them up."""
    queries = torch.cat(layer.queries).flatten(1).float().double()  # (T, Hq * D)
    return torch.stack([added((queries * query).T, 512) for query in queries])


def _as_text(array: Tensor) -> str:
    """Return the numbers, little-endian, in base64."""
    numbers = array.cpu().contiguous().numpy()
    return base64.b64encode(numbers.astype(numbers.dtype.newbyteorder("<")).tobytes()).decode()
