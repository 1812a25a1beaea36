"""Lossless decoding beside stock decoding: are the tokens the same, and what does each take."""

import time
from collections.abc import Callable, Iterator, Sequence
from copy import deepcopy
from dataclasses import dataclass
from statistics import median
from typing import Any

import torch
from transformers.cache_utils import DynamicCache

from bench.quality import texts
from bench.quality.figures import Row, grouped
from bench.quality.needles import natural
from bench.quality.session import Session, feed
from bench.quality.speed import here, source
from bench.quality.tasks import Case, Settings, Task, Values
from bench.quality.variants import DENSE, Variant
from examples.demo.model import named
from tokenselect.errors import InvalidProblem
from tokenselect.integrations.transformers import Lossless, TokenSelectCache, enable
from tokenselect.integrations.transformers.cache import GrowableLayer


@dataclass(frozen=True, kw_only=True)
class Drafts(Task):
    """Generate greedily after `contexts` tokens: densely, and from drafts that each variant makes.

    documents   of each context
    turns       how often each generates: first after the context, then after more of the text
    new_tokens  each time
    """

    kind = computes = "lossless"
    documents: int
    turns: int = 1
    new_tokens: int = 48

    def cases(self, settings: Settings, session: Session) -> Iterator[Case]:
        more = session.key | {"source": source()}
        for n in self.contexts:
            length = n + self.turns * self.new_tokens
            variants = self.selecting(settings, n)
            for seed in texts.seeds(settings.split, self.documents):
                text = natural(settings.texts, settings.split, seed, length)
                ids = session.encode(text, True)[:length]
                if len(ids) < length:
                    raise InvalidProblem(
                        f"a text of {length} tokens",
                        f"the split {settings.split!r} of the text has {len(ids)}",
                        "ask for fewer tokens, or name longer texts",
                    )
                label = {"context": n, "seed": seed, "turns": self.turns, **here()}
                label |= {"new_tokens": self.new_tokens}
                what = {"sha": texts.sha(" ".join(map(str, ids))), "of": [v.key for v in variants]}
                yield Case(self.computes, self.run, DENSE, label, more | what, (ids, variants))

    @staticmethod
    @torch.inference_mode()
    def run(cases: Sequence[Case], session: Session) -> Values:
        for case in cases:
            turns, new = case.label["turns"], case.label["new_tokens"]
            ids, variants = case.given
            yield case, {"contenders": generated(ids, variants, turns, new, session)}

    @staticmethod
    def summary(rows: Sequence[Row]) -> list[Row]:
        """Return a row for each context and way to generate.

        ms         median of a token's, over documents and turns
        of NAME    median of its ratios to the dense way NAME, within a turn
        same       texts, of `texts`, whose tokens are those of stock attention
        tokens, drafted, accepted  of a round, on average; None without drafts
        """
        found: list[Row] = []
        for context, group in grouped(rows, ("context",)):
            every = [c for row in group for c in row["contenders"]]
            of_stock = {c["name"]: [] for c in every if c["rounds"] is None}
            for c in every:
                if c["name"] in of_stock:
                    of_stock[c["name"]] += c["seconds"]
            for name, own in grouped(every, ("name",)):
                seconds = [s for c in own for s in c["seconds"]]
                ratios = {
                    f"of {base}": median(a / b for a, b in zip(seconds, those, strict=True))
                    for base, those in of_stock.items()
                }
                per_round: dict[str, float | None] = dict.fromkeys(
                    ("drafted", "accepted", "tokens")
                )
                if own[0]["rounds"] is not None:
                    rounds = sum(c["rounds"] for c in own)
                    per_round = {what: sum(c[what] for c in own) / rounds for what in per_round}
                found.append(
                    {**context, **name, "ms": 1e3 * median(seconds), **ratios}
                    | {"same": sum(c["same"] for c in own), "texts": len(seconds), **per_round}
                )
        return found


def generated(
    ids: Sequence[int], variants: Sequence[Variant], turns: int, new: int, session: Session
) -> list[dict[str, Any]]:
    """Return of each way to generate: seconds a token, by turn; texts that are those of the first.

    The ways take turns from equal caches, and another one begins each time. The text is read
    densely, as `enable` has it unless told otherwise.
    """
    model, n, cache = session.model, len(ids) - turns * new, TokenSelectCache(session.model)
    ways: list[tuple[str, Callable[[Any], Any], Variant, Lossless | None]] = [
        ("sdpa, DynamicCache", _stock, DENSE, None),
        ("sdpa, TokenSelectCache", deepcopy, DENSE, None),
    ]
    ways += [(f"lossless, {v.name} {v.budget}".strip(), deepcopy, v, Lossless()) for v in variants]
    found: dict[str, dict[str, Any]] = {
        name: {"name": name, "seconds": [], "same": 0}
        | dict.fromkeys(("rounds", "drafted", "accepted", "tokens"), 0 if lossless else None)
        for name, _, _, lossless in ways
    }
    for at in range(n, len(ids), new):
        with enable(model):
            for start in range(cache.get_seq_length(), at - 1, 512):
                feed(model, cache, tuple(ids[start : min(start + 512, at - 1)]))
        prompt, written = torch.tensor([ids[:at]]), {}
        first = (at - n) // new % len(ways)
        for name, copied, variant, lossless in (*ways[first:], *ways[:first]):
            its_cache = copied(cache)
            with variant.applied(model):
                begin = time.perf_counter()
                text = model.generate(
                    prompt,
                    attention_mask=torch.ones_like(prompt),
                    **named(model, its_cache),
                    max_new_tokens=new,
                    min_new_tokens=new,
                    do_sample=False,
                    pad_token_id=0,
                    custom_generate=lossless,
                )
                found[name]["seconds"].append((time.perf_counter() - begin) / new)
            written[name] = text[0, at:].tolist()
            if lossless is not None and lossless.stats is not None:
                for what, count in lossless.stats._asdict().items():
                    found[name][what] += count
        for name, text in written.items():
            found[name]["same"] += text == written[ways[0][0]]
    return list(found.values())


def _stock(cache: TokenSelectCache) -> DynamicCache:
    """Return transformers' own cache of the same tokens."""
    stock = DynamicCache()
    for i, layer in enumerate(cache.layers):
        if isinstance(layer, GrowableLayer):
            stock.update(layer.keys, layer.values, i)
        else:
            stock.layers.append(deepcopy(layer))
    return stock
