"""The native backend with one line of its C++ wrong, or compiled to watch itself."""

import functools
import shutil
import subprocess
import tempfile
from pathlib import Path
from typing import NamedTuple

from properties.guard import watched
from tokenselect import Backend, register
from tokenselect.kernels.native import backend as native
from tokenselect.kernels.native import build, stages
from tokenselect.kernels.native.library import Library

# The problems of a law are small: they are to have several blocks, and may take long. Loops stand
# in for tiles, so that what is around them is tried on every processor.
SMALL = ("-DTS_BLOCK_TILES=2", "-DTS_SPLIT_TILES=2", "-DTS_ALONE=1", "-DTS_TILES_BY_LOOPS")
QUICK = ("-O0", *SMALL)
SANITIZED = ("-O0", "-g", "-fsanitize=address,undefined", "-fno-sanitize-recover=all", *SMALL)


class Mutant(NamedTuple):
    """In `file`, `old` becomes `new`; it stands there once.

    `stage` is the one whose laws should notice; "reuse": the Selection Cache's steps.
    """

    name: str
    file: str
    old: str
    new: str
    stage: str


MUTANTS = (
    Mutant("reads-one-key-too-many", "score.h", "min(BLOCK, length(c, b) - first);\n    for",
           "min(BLOCK, length(c, b) + 1 - first);\n    for", "score"),
    Mutant("forgets-a-block-at-a-new-maximum", "score.h",
           "sum += totals[at] * __builtin_exp((double)tops[at] - largest)", "sum += totals[at]",
           "score"),
    Mutant("drops-the-last-block", "score.h", "used = ceil_div(n, BLOCK), head",
           "used = n / BLOCK, head", "score"),
    Mutant("weighs-blocks-alike", "score.h", "__builtin_exp((double)inner_top[at] - largest) / sum",
           "1 / sum", "score"),
    Mutant("votes-of-the-wrong-group", "score.h", "x = block_of(ballot, b, h / G, block)",
           "x = block_of(ballot, b, h % c.Hkv, block)", "score"),
    Mutant("averages-all-queries-in-each-run", "score.h", "i = pass.first; i < pass.last",
           "i = 0; i < pass.last", "score"),
    Mutant("pools-to-one-side", "score.h", "read <= j + reach", "read <= j", "score"),
    Mutant("rotates-keys-the-wrong-way", "score.h", "cos_sin(c, direction(ballot) * i, 1.0",
           "cos_sin(c, -direction(ballot) * i, 1.0", "score"),
    Mutant("counts-nan-as-a-logit", "score.h", "x = select_lanes(finite, x, all(-INF));", "",
           "score"),
    Mutant("leaves-votes-of-no-candidates", "score.h", "j < of.sink_end; ++j) row[j] = -INF",
           "j < of.sink_end; ++j) row[j] = 0", "score"),
    Mutant("widens-half-of-a-vector", "simd.h", "memcpy(part, p, (size_t)count * sizeof *p);",
           "memcpy(part, p, (size_t)(count - 1) * sizeof *p);", "score"),
    Mutant("cuts-exp-short", "simd.h", "p = p * r + 0x1.12106cp-7f;", "", "score"),
    Mutant("rotates-by-high-digits-alone", "rows.h", "low = size % ts::LOW;", "low = 0;", "score"),
    Mutant("takes-a-page-too-far", "rows.h", "++slot == page_size", "slot++ == page_size", "score"),
    Mutant("wins-one-tie-too-many", "select.h", "place < ties_end", "place <= ties_end", "select"),
    Mutant("orders-signed-zeros", "select.h", "x = x == x ? x + 0.0f : -INF;",
           "x = x == x ? x : -INF;", "select"),
    Mutant("orders-nan-first", "select.h", "x = x == x ? x + 0.0f : -INF;", "x = x + 0.0f;",
           "select"),
    Mutant("chooses-twice", "select.h", "if (next < n_taken && taken[next] == j) {",
           "if (next < n_taken && taken[next] == -1) {", "select"),
    Mutant("bounds-too-high", "select.h", "bound(from, m, share + n_chosen, top)",
           "bound(from, m, share / 2 + n_chosen, top)", "select"),
    Mutant("rounds-a-fraction-down", "rows.h", "return ceil_div(count * millionths, 1000000);",
           "return count * millionths / 1000000;", "select"),
    Mutant("takes-a-fraction-of-the-capacity", "select.h", "k = budget(c, n),",
           "k = budget(c, c.Lk),", "select"),
    Mutant("votes-for-a-fraction-of-the-capacity", "score.h", "budget(c, n), key",
           "budget(c, c.Lk), key", "score"),
    Mutant("pads-with-zero", "select.h", "to[i] = -1;", "to[i] = 0;", "select"),
    Mutant("query-does-not-see-itself", "attend.h", "newest = length(c, b) - c.Lq + i;",
           "newest = length(c, b) - c.Lq + i - 1;", "attend"),
    Mutant("lets-every-query-see-all", "attend.h", "newest = length(c, b) - c.Lq + i;",
           "newest = length(c, b);", "attend"),
    Mutant("drops-the-last-split", "attend.h", "i), used = ceil_div(count, SPLIT);",
           "i), used = count / SPLIT;", "attend"),
    Mutant("weighs-the-sink-alone", "attend.h", "share / (total * share + 1)",
           "share / (total + 1)", "attend"),
    Mutant("reads-kv-head-modulo", "attend.h", "memcpy(q + r * pitch, query(b, g * G + r, i)",
           "memcpy(q + r * pitch, query(b, r * c.Hkv + g, i)", "attend"),
    Mutant("walks-in-place", "attend.h", "at = c.contiguous ? r : position;", "at = position;",
           "attend"),
    Mutant("merges-unweighed", "attend.h", "float by = (float)shrunk;", "float by = 1;", "attend"),
    Mutant("multiplies-values-that-are-hidden", "chunk.h",
           "if (t0 + t + i >= seen_by_all) special |= has_special(row[i]);", "", "attend"),
    Mutant("leaves-the-last-of-an-odd-count", "chunk.h", "t + i < there; ++i",
           "t + 1 < there; ++i", "attend"),
    Mutant("lets-a-query-see-what-its-neighbours-see", "chunk.h", "min(KEYS, sees[r] - first));",
           "min(KEYS, widest - first));", "attend"),
    Mutant("shrinks-nothing-at-a-new-maximum", "chunk.h", "to[d] = to[d] * old[r] +",
           "to[d] = to[d] +", "attend"),
    Mutant("packs-half-of-a-key", "chunk.h", "(size_t)c.D * 2);\n        uint32_t* to",
           "(size_t)c.D);\n        uint32_t* to", "attend"),
    Mutant("keeps-an-lse-that-is-not-finite", "kernels.cpp", "|| __builtin_isfinite(c.out_lse[at])",
           "|| true", "attend_fresh"),
    Mutant("never-scores-where-all-is-selected", "kernels.cpp", "|| c.softcap > 0) return false",
           ") return false", "attend_fresh"),
    Mutant("attends-first-by-other-logits", "kernels.cpp", "c.score_at == ts::AT_TRUE && ", "",
           "attend_fresh"),
    Mutant("adds-up-in-float32", "reuse.h", "(double)x[i + j] * (double)y[i + j]",
           "x[i + j] * y[i + j]", "reuse"),
    Mutant("compares-unsigned", "reuse.h", "product * __builtin_fabs(product) >= bound",
           "product * product >= bound", "reuse"),
    Mutant("drops-what-was-appended", "reuse.h", "int64_t total = stored_count + n - stored_n;",
           "int64_t total = stored_count;", "reuse"),
    Mutant("remembers-who-is-gone", "reuse.h", "c.stored_length[b] = (int32_t)n;",
           "if (n > 0) c.stored_length[b] = (int32_t)n;", "reuse"),
)  # fmt: skip


def build_mutant(mutant: Mutant, where: Path) -> Backend:
    """The backend of sources with the mistake in them, registered, and guarded."""
    sources = where / "cpp"
    shutil.copytree(build.SOURCES, sources)
    text = (sources / mutant.file).read_text()
    assert text.count(mutant.old) == 1, f"{mutant.old!r} is {text.count(mutant.old)} times there"
    (sources / mutant.file).write_text(text.replace(mutant.old, mutant.new))
    made = Library(compiled(where, sources, QUICK))
    backend = watched(native.backend(made, f"planted-native-{mutant.name}"), stages)
    register(backend.name, backend)
    return backend


class Shared(NamedTuple):
    """What libraries with the same flags have in common; `place` is removed with the process."""

    command: tuple[str, ...]
    header: Path
    objects: tuple[Path, ...]
    place: tempfile.TemporaryDirectory[str]


@functools.cache
def shared(flags: tuple[str, ...]) -> Shared:
    """Compile, once, what no mistake is planted in, and the compiler's own header of intrinsics."""
    compiler = build.find_compiler()
    path = build.paths_here(compiler.machine)[-1]
    place = tempfile.TemporaryDirectory()
    where = Path(place.name)
    plain = (*compiler.command, *build.FLAGS, *flags, f"-DTS_HAS_{path}")
    objects = tuple(where / f"{name}.o" for name in ("entry", "threads"))
    for made in objects:
        source = build.SOURCES / f"{made.stem}.cpp"
        subprocess.run([*plain, "-c", str(source), "-o", str(made)], check=True)
    command = (*plain, *build.PATHS[compiler.machine][path], f"-DTS_PATH={path}")
    header = where / "intrinsics.h"
    header.write_text("#ifdef __x86_64__\n#include <immintrin.h>\n#endif\n")
    subprocess.run([*command, "-x", "c++-header", str(header), "-o", f"{header}.gch"], check=True)
    return Shared(command, header, objects, place)


def compiled(where: Path, sources: Path, flags: tuple[str, ...]) -> Path:
    """A library of sources, in a directory; for the path that runs here."""
    command, header, objects, _ = shared(flags)
    made, library = where / "kernels.o", where / "library.so"
    source = ("-include", str(header), "-c", str(sources / "kernels.cpp"))
    subprocess.run([*command, *source, "-o", str(made)], check=True)
    parts = [str(part) for part in (made, *objects)]
    subprocess.run([*command, "-shared", *parts, "-o", str(library)], check=True)
    return library
