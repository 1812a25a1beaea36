"""A number hidden in a long text, and the question for it: read and answered by the way alone."""

import random
import re
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any, Literal

import torch

from bench.quality import texts
from bench.quality.figures import Row, grouped, wilson
from bench.quality.lab import Cell, Lab
from bench.quality.ways import Budget, resolve_all
from examples.demo.text import NEEDLE, QUESTION, frame
from tokenselect.errors import InvalidProblem
from tokenselect.integrations.transformers import TokenSelectCache

KINDS = ("filler", "natural", "multikey")
FILLER = (
    "The grass is green. The sky is blue. The sun is yellow. Here we go. There and back again. "
)
NAMES = (
    *("anchor", "basket", "candle", "dragon", "engine", "feather", "garden", "hammer"),
    *("island", "jacket", "kettle", "ladder", "marble", "needle", "orchard", "pepper"),
)


@dataclass(frozen=True)
class Settings:
    """kinds: "filler", repeated sentences; "natural", a text; "multikey", several in filler.

    lengths in tokens, question and chat template included; depths from 0, the start, to 1; seeds:
    how many, each with a number (and a text) of its own; keys: how many numbers with multikey.
    """

    ways: tuple[str, ...]
    lengths: tuple[int, ...] = field(metadata={"least": 100})
    depths: tuple[float, ...] = field(metadata={"least": 0, "most": 1})
    seeds: int = field(metadata={"least": 1})
    kinds: tuple[Literal["filler", "natural", "multikey"], ...] = KINDS  # type: ignore[assignment]
    keys: int = field(default=4, metadata={"least": 2, "most": len(NAMES)})
    new_tokens: int = field(default=16, metadata={"least": 1})
    budgets: tuple[Budget, ...] = field(default=(), metadata={"may_be_empty": True})


@dataclass(frozen=True)
class Needle:
    """One prompt and the number that answers it."""

    ids: tuple[int, ...]
    number: str
    prompt: str = field(repr=False)


def cells(settings: Settings, plan: Any, lab: Lab) -> Iterator[Cell]:
    for length in settings.lengths:
        ways = resolve_all(settings.ways, plan.ways, settings.budgets, length)
        for kind in settings.kinds:
            for seed in texts.seeds(plan.split, settings.seeds):
                for depth in settings.depths:
                    what = {"kind": kind, "length": length, "depth": depth, "seed": seed}
                    if kind == "multikey":
                        what |= {"keys": settings.keys}
                    needle = make(lab, plan.texts, plan.split, **what)
                    read = {"sha": texts.sha(needle.prompt), "new_tokens": settings.new_tokens}
                    for way in ways:
                        yield Cell(
                            task="needles",
                            key=lab.key | what | read | {"way": way.key},
                            label={
                                "hidden": kind,
                                "context": length,
                                "depth": depth,
                                "seed": seed,
                                **way.label,
                                "kind": way.kind,
                                "size": way.size,
                            },
                            work=f"needles {what} {way.key}",
                            seconds=0.006 * length,
                            way=way,
                            given=(needle, settings.new_tokens),
                        )


def make(
    lab: Lab,
    names: Sequence[str],
    split: str,
    kind: str,
    length: int,
    depth: float,
    seed: int,
    keys: int = 1,
) -> Needle:
    """A prompt of at most `length` tokens, and nearly as many.

    The seed says which text; seed, kind and depth together, which numbers.
    """
    draw = random.Random(f"{seed} {kind} {depth}")
    numbers = [str(draw.randrange(10_000, 100_000)) for _ in range(keys)]
    if kind == "multikey":
        asked = draw.sample(NAMES, keys)
        facts = [
            f"The secret number of the {n} is {m}." for n, m in zip(asked, numbers, strict=True)
        ]
        question = f"Question: What is the secret number of the {asked[0]}?"
        depths = [depth, *(draw.random() for _ in range(keys - 1))]
    else:
        facts, depths = [NEEDLE.format(number=numbers[0])], [depth]
        question = QUESTION
    head, tail = frame(lab.tokenizer, question)
    hay = natural(names, split, seed, length) if kind == "natural" else filler(length)
    room = length - len(lab.encode("".join([head, *facts, tail]))) - 2 * len(facts) - 2
    # As many characters of the hay as there is room for, cut after a sentence.
    offsets = lab.offsets(hay)
    if room < 1 or len(offsets) < room:
        raise InvalidProblem(
            f"a needle in {kind} of {length} tokens",
            f"question, template and needles leave room for {room} tokens of {len(offsets)}",
            "use other lengths, fewer keys, or longer texts",
        )
    hay = hay[: sentence_end(hay, offsets[room - 1])]
    places = [
        (sentence_end(hay, round(d * len(hay))), fact)
        for d, fact in zip(depths, facts, strict=True)
    ]
    text, last = [head], 0
    for at, fact in sorted(places, key=lambda place: place[0]):
        text += [hay[last:at], f" {fact} " if at else f"{fact} "]
        last = at
    prompt = "".join([*text, hay[last:].lstrip(), tail])
    ids = tuple(lab.encode(prompt))
    assert len(ids) <= length, (len(ids), length)
    return Needle(ids, numbers[0], prompt)


def filler(length: int) -> str:
    """Sentences over and over, for at least `length` tokens."""
    return FILLER * (length // 20 + 2)


def natural(names: Sequence[str], split: str, seed: int, length: int) -> str:
    """Stretches of this split of one of the texts, from one of them on; the seed says which."""
    of = texts.stretches(names[seed // 2 % len(names)], split)
    start = seed // 2 % len(of)
    return "\n".join(text for _, text in of[start:] + of[:start])[: 8 * length]


def sentence_end(text: str, near: int) -> int:
    """One past the last full stop up to `near` that space follows, or nothing; 0 if there is none.

    >>> sentence_end("One. See os.path, please", 20)
    4
    """
    at = text.rfind(".", 0, near)
    while at >= 0 and not (text[at + 1 : at + 2] or " ").isspace():
        at = text.rfind(".", 0, at)
    return at + 1


@torch.inference_mode()
def run(cells: Sequence[Cell], lab: Lab) -> Iterator[tuple[Cell, dict[str, Any]]]:
    for cell in cells:
        needle, new_tokens = cell.given
        inputs = torch.tensor([needle.ids])
        cache = TokenSelectCache(lab.model, max_length=len(needle.ids) + new_tokens)
        with cell.way.attached(lab.model):
            written = lab.model.generate(
                inputs,
                attention_mask=torch.ones_like(inputs),
                past_key_values=cache,
                max_new_tokens=new_tokens,
                do_sample=False,
                pad_token_id=0,
            )[0, len(needle.ids) :]
        answer = lab.tokenizer.decode(written, skip_special_tokens=True)
        value = {"right": is_right(answer, needle.number), "answer": answer}
        yield cell, value | {"number": needle.number, "tokens": len(needle.ids)}


def summary(rows: Sequence[Row]) -> list[Row]:
    """How many are right, with a 95 % interval: over all depths (depth None), and at each."""
    found: list[Row] = []
    names = ("hidden", "context", "way", "budget")
    for values, group in grouped(rows, names).items():
        depths = grouped(group, ("depth",))
        for depth, tried in [(None, group), *((d, g) for (d,), g in depths.items())]:
            right = sum(r["right"] for r in tried)
            low, high = wilson(right, len(tried))
            found.append(
                dict(zip(names, values, strict=True))
                | {"size": group[0]["size"], "depth": depth}
                | {"right": right, "tries": len(tried), "low": low, "high": high}
            )
    return found


def is_right(answer: str, number: str) -> bool:
    """Whether the number stands in the answer, not as a part of a longer one.

    >>> is_right("It is 12345.", "12345"), is_right("123456", "12345")
    (True, False)
    """
    return re.search(rf"(?<!\d){number}(?!\d)", answer) is not None
