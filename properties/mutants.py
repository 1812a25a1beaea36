"""The triton backend with one line of its source wrong: each has to break a law."""

import importlib
import sys
from dataclasses import replace
from pathlib import Path
from types import ModuleType
from typing import NamedTuple

from properties.guard import watched
from tokenselect import Backend, register

PACKAGE = "tokenselect.kernels.triton"


class Mutant(NamedTuple):
    """In `module`, `old` becomes `new`; it stands there `times` times, and all of them change.

    A stage's module is all its files: `score` is score.py, score_logits.py and so on.
    `stage` is the one whose laws should notice; "reuse": the Selection Cache's steps, which have to
    be the reference's; None: only bad values show it, and the fences do.
    """

    name: str
    module: str
    old: str
    new: str
    stage: str | None
    times: int = 1


MUTANTS = (
    Mutant("reads-one-key-too-many", "score", "position < n,", "position <= n,", "score"),
    Mutant(
        "leaves-votes-of-no-candidates",
        "score",
        'votes = tl.where(is_candidate, votes, float("-inf"))',
        "votes = tl.where(is_candidate, votes, 0.0)",
        "score",
    ),
    Mutant(
        "forgets-a-tile-at-a-new-maximum", "score", "total * tl.exp2(largest - safe) + tl.sum(tl.e",
        "total + tl.sum(tl.e", "score",
    ),
    Mutant(
        "forgets-a-segment-at-a-new-maximum",
        "score",
        "total = total * tl.exp2(largest - safe) + tl.sum(sums * tl.exp2(top - safe), 0)",
        "total = total + tl.sum(sums * tl.exp2(top - safe), 0)",
        "score",
    ),
    Mutant("reads-one-segment-too-many", "score", "segment < used", "segment <= used", "score"),
    Mutant("adds-up-one-run-of-queries-twice", "score", "< longer).to", "<= longer).to", "score"),
    Mutant("votes-of-the-wrong-head", "score", "+ u // n_voting", "+ u % (Hkv // S)", "score"),
    Mutant("pools-to-one-side", "score", "range(-reach, reach + 1)", "range(-reach, 1)", "score"),
    Mutant(
        "starts-the-tables-anew", "score", "tile * TILE // LOW_ROWS", "0 * TILE // LOW_ROWS",
        "score",
    ),
    Mutant("turns-the-wrong-way", "device", "if SIGN < 0:", "if SIGN > 0:", "score"),
    Mutant("wins-one-tie-too-many", "select", "(rank < need)", "(rank <= need)", "select"),
    Mutant(
        "writes-every-block-to-the-front", "select", "sink_end + won_before +", "sink_end +",
        "select",
    ),
    Mutant("orders-signed-zeros", "select", "tl.where(vote == 0.0, 0.0, vote)", "vote", "select"),
    Mutant("chooses-twice", "select", "tl.where(taken, -1, bits)", "bits", "select"),
    Mutant(
        "counts-the-third-digit-of-others",
        "select",
        "is_listed & (key >> 11 == digits)",
        "is_listed & (key >> 11 >= digits)",
        "select",
    ),
    Mutant(
        "rounds-a-fraction-down", "select", "* millionths + 999999)", "* millionths)", "select",
    ),
    Mutant(
        "takes-a-fraction-of-the-capacity", "select", "_part(millionths, n)",
        "_part(millionths, Lk)", "select",
    ),
    Mutant(
        "lets-a-block-see-what-its-last-query-sees", "attend", "(position <= first_query)",
        "(position <= last_query)", "attend",
    ),
    Mutant("walks-in-place", "attend", "position = following", "position = position", "attend"),
    Mutant(
        "query-does-not-see-itself",
        "attend",
        "visible_from[None, :] <= query_position[:, None]",
        "visible_from[None, :] < query_position[:, None]",
        "attend",
    ),
    Mutant(
        "reads-kv-head-modulo", "attend", "query, head = row // G, g * G + row % G",
        "query, head = row // G, row % G * Hkv + g", "attend",
    ),
    Mutant("forgets-at-a-new-maximum", "attend", "acc *= old[:, None]", "acc += 0.0", "attend"),
    Mutant(
        "merges-unweighed", "attend", "tl.sum(parts * weights[:, None], 0)", "tl.sum(parts, 0)",
        "attend",
    ),
    Mutant("drops-the-last-share", "attend", "split < used", "split < used - 1", "attend"),
    Mutant(
        "weighs-the-sink-alone", "attend", "total * shrunk + tl.exp2(sink - top)",
        "total * shrunk + 1.0", "attend",
    ),
    Mutant(
        "adds-up-in-float32", "reuse", "power += x * x",
        "power += (x * x).to(tl.float32).to(tl.float64)", "reuse",
    ),
    Mutant(
        "adds-up-in-another-order", "reuse", "tl.reshape(x, [2, x.shape[0] // 2, x.shape[1]]), 0",
        "tl.reshape(x, [x.shape[0] // 2, 2, x.shape[1]]), 1", "reuse",
    ),
    Mutant(
        "rounds-theta", "reuse", "bits.to(tl.int64).to(tl.float64, bitcast=True)",
        "bits.to(tl.int64).to(tl.float64, bitcast=True).to(tl.float32).to(tl.float64)", "reuse",
    ),
    Mutant(
        "drops-what-was-appended", "reuse", "tl.where(place < total, position, -1)",
        "tl.where(place < count, position, -1)", "reuse",
    ),
    Mutant("keeps-a-stale-count", "reuse", "tl.store(count_at, total,", "tl.store(count_at, count,",
        "reuse",
    ),
    Mutant(
        "remembers-who-is-gone", "reuse",
        "tl.store(stored_seqlen_at, n, mask=is_first)\n",
        "tl.store(stored_seqlen_at, n, mask=is_first & (n > 0))\n", "reuse",
    ),
    Mutant(
        "trusts-lengths", "device", "tl.minimum(tl.maximum(tl.load(seqlens_ptr + b), 0), Lk)",
        "tl.load(seqlens_ptr + b)", None,
    ),
    Mutant(
        "trusts-block-tables", "device", "is_token & (page >= 0) & (page < n_pages)", "is_token",
        None,
    ),
    Mutant(
        "trusts-positions", "attend", "is_token = (position >= 0) & (position < n)",
        "is_token = position >= 0", None,
    ),
)  # fmt: skip


def build(mutant: Mutant, where: Path) -> tuple[Backend, ModuleType]:
    """The backend of a package with the mistake in it, written to `where`, and its `launch`.

    Registered, and guarded.
    """
    package = "mutant_" + mutant.name.replace("-", "_")
    source = Path(sys.modules[PACKAGE].__file__).parent
    (where / package).mkdir()
    found = 0
    for path in source.glob("*.py"):
        text = path.read_text()
        if path.stem.partition("_")[0] == mutant.module:
            found += text.count(mutant.old)
            text = text.replace(mutant.old, mutant.new)
        (where / package / path.name).write_text(text.replace(PACKAGE, package))
    assert found == mutant.times, f"{mutant.old!r} is {found} times in {mutant.module}"
    sys.path.insert(0, str(where))
    try:
        module = importlib.import_module(package)
        launch = importlib.import_module(f"{package}.launch")
    finally:
        sys.path.remove(str(where))
    backend = watched(replace(module.BACKEND, name=f"planted-{mutant.name}"), launch)
    register(backend.name, backend)
    return backend, launch
