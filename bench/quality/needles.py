"""A number hidden in a long text, and the question for it: read and answered by one variant."""

import random
import re
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import product

import torch

from bench.quality import figures, texts
from bench.quality.figures import Row, grouped
from bench.quality.session import Session
from bench.quality.tasks import Asked, Case, Settings, Task, Values
from bench.quality.variants import one_of
from examples.demo.model import named
from examples.demo.text import FILLER, NEEDLE, QUESTION, frame
from tokenselect.errors import InvalidProblem
from tokenselect.integrations.transformers import TokenSelectCache

KINDS = ("filler", "natural")


@dataclass(frozen=True, kw_only=True)
class Needles(Task):
    """Read a text with a number in it, and write the answer to the question for it.

    contexts  include question and chat template
    depths    from 0, the start, to 1
    seeds     how many, each with a number (and a text) of its own
    kinds     "filler", repeated sentences; "natural", a text
    """

    kind = computes = "needles"
    depths: tuple[float, ...]
    seeds: int
    kinds: tuple[str, ...] = KINDS
    new_tokens: int = 16

    def asked(self, settings: Settings, session: Session, n: int) -> Asked:
        seeds = texts.seeds(settings.split, self.seeds)
        for kind, seed, depth in product(self.kinds, seeds, self.depths):
            prompt, number = make(settings, session, kind, n, depth, seed)
            more = {"sha": texts.sha(prompt), "new_tokens": self.new_tokens}
            yield {"hidden": kind, "depth": depth, "seed": seed}, more, (prompt, number)

    @staticmethod
    @torch.inference_mode()
    def run(cases: Sequence[Case], session: Session) -> Values:
        for case in cases:
            prompt, number = case.given
            inputs, new_tokens = torch.tensor([session.encode(prompt)]), case.more["new_tokens"]
            cache = TokenSelectCache(session.model, max_length=inputs.numel() + new_tokens)
            with case.variant.applied(session.model):
                written = session.model.generate(
                    inputs,
                    attention_mask=torch.ones_like(inputs),
                    **named(session.model, cache),
                    max_new_tokens=new_tokens,
                    do_sample=False,
                    pad_token_id=0,
                )[0, inputs.numel() :]
            answer = session.tokenizer.decode(written, skip_special_tokens=True)
            value = {"right": is_right(answer, number), "answer": answer}
            yield case, value | {"number": number, "tokens": inputs.numel()}

    @staticmethod
    def summary(rows: Sequence[Row]) -> list[Row]:
        """Count what is right, with a 95 % interval: over all depths (depth None), and at each."""
        found: list[Row] = []
        for of, group in grouped(rows, ("hidden", "context", "variant", "budget")):
            for depth, tried in [({"depth": None}, group), *grouped(group, ("depth",))]:
                right = sum(r["right"] for r in tried)
                low, high = figures.wilson(right, len(tried))
                count = {"right": right, "tries": len(tried), "low": low, "high": high}
                found.append(of | {"size": group[0]["size"]} | depth | count)
        return found


def make(
    settings: Settings, session: Session, kind: str, length: int, depth: float, seed: int
) -> tuple[str, str]:
    """Return a prompt of at most `length` tokens, and nearly as many, and the number it asks for.

    The seed says which text; seed, kind and depth together, which number.
    """
    one_of("needles: kinds", kind, KINDS)
    draw = random.Random(f"{seed} {kind} {depth}")
    number = str(draw.randrange(10_000, 100_000))
    fact = NEEDLE.format(number=number)
    head, tail = frame(session.tokenizer, QUESTION)
    hay = FILLER * (length // 20 + 2)
    if kind == "natural":
        hay = natural(settings.texts, settings.split, seed, length)
    room = length - len(session.encode(head + fact + tail)) - 4
    # As many characters of the hay as there is room for, cut after a sentence.
    ends = session.ends(hay)
    if not 1 <= room <= len(ends):
        raise InvalidProblem(
            f"a needle in {kind} of {length} tokens",
            f"question, template and needle leave room for {room} tokens of {len(ends)}",
            "use other lengths, or longer texts",
        )
    hay = hay[: sentence_end(hay, ends[room - 1])]
    at = sentence_end(hay, round(depth * len(hay)))
    needle = f" {fact} " if at else f"{fact} "
    return head + hay[:at] + needle + hay[at:].lstrip() + tail, number


def natural(names: Sequence[str], split: str, seed: int, length: int) -> str:
    """Return stretches of this split of one of the texts, from one of them on; the seed decides."""
    of = texts.stretches(names[seed // 2 % len(names)], split)
    start = seed // 2 % len(of)
    return "\n".join(text for _, text in of[start:] + of[:start])[: 8 * length]


def sentence_end(text: str, near: int) -> int:
    """Return one past the last full stop up to `near` that space or nothing follows; 0 if none.

    >>> sentence_end("One. See os.path, please", 20)
    4
    """
    at = text.rfind(".", 0, near)
    while at >= 0 and not (text[at + 1 : at + 2] or " ").isspace():
        at = text.rfind(".", 0, at)
    return at + 1


def is_right(answer: str, number: str) -> bool:
    """Return whether the number stands in the answer, not as a part of a longer one.

    >>> is_right("It is 12345.", "12345"), is_right("123456", "12345")
    (True, False)
    """
    return re.search(rf"(?<!\d){number}(?!\d)", answer) is not None
