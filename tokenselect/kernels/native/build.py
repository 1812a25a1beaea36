"""Compile the C++ kernels, once per machine, with the compiler that is there.

The library is kept in a directory that belongs to the user alone: TOKENSELECT_CACHE, or
`tokenselect` in the user's cache directory. Its name is made of all that it depends on. The
compiler is run without a shell; one process compiles at a time, under a lock that ends with the
process; a library appears whole, by a rename. Whatever goes wrong is raised as `CannotBuild`,
which says why.
"""

import ctypes
import hashlib
import logging
import os
import platform
import shlex
import shutil
import stat
import subprocess
import tempfile
import time
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from pathlib import Path
from typing import NamedTuple

import torch

SOURCES = Path(__file__).parent / "cpp"
FLAGS = (
    *("-std=c++17", "-O2", "-ftree-vectorize", "-fPIC", "-fvisibility=hidden"),
    # Sums keep their order and NaN stays NaN; errno and the flags of exceptions are not looked at.
    *("-fno-math-errno", "-fno-trapping-math", "-ffp-contract=fast"),
)
_AVX2 = ("-mavx2", "-mfma", "-mf16c")
_AVX512 = (
    *_AVX2,
    *("-mavx512f", "-mavx512bw", "-mavx512vl", "-mavx512dq", "-mprefer-vector-width=512"),
)
# Per architecture: the paths of the kernels, from the narrowest to the widest, and what each is
# compiled for. All have passed the properties; that of Arm in emulation.
PATHS: dict[str, dict[str, tuple[str, ...]]] = {
    "x86_64": {
        "baseline": (),
        "avx2": _AVX2,
        "avx512": _AVX512,
        "amx": (*_AVX512, "-mamx-tile", "-mamx-bf16"),
    },
    "aarch64": {"baseline": ()},
}
# What a path needs, as the system lists a processor's features; the library tests them itself.
_NEEDS: dict[str, tuple[str, ...]] = {
    "baseline": (),
    "avx2": ("avx2", "fma", "f16c"),
    "avx512": ("avx2", "fma", "f16c", "avx512f", "avx512bw", "avx512vl", "avx512dq"),
}
_NEEDS["amx"] = (*_NEEDS["avx512"], "amx_tile", "amx_bf16")
OLDEST = {"g++": 11, "clang++": 14}
SECONDS = 600  # that a compiler, or another process that compiles, may take

log = logging.getLogger("tokenselect")


class CannotBuild(Exception):
    """The kernels cannot be compiled, or loaded, here; the message says why."""


class Compiler(NamedTuple):
    """A C++ compiler: the command, "g++" or "clang++", its version, what it compiles for."""

    command: tuple[str, ...]
    kind: str
    version: str
    machine: str


def find_compiler() -> Compiler:
    """Return the first that is new enough of $CXX, g++ and clang++. Raises CannotBuild."""
    named = os.environ.get("CXX", "").strip()
    tried = []
    try:
        commands = [shlex.split(named)] if named else [["g++"], ["clang++"]]
    except ValueError as error:
        raise CannotBuild(f"CXX={named!r}: {error}") from None
    for command in commands:
        found = shutil.which(command[0]) if command else None
        if found is None:
            tried.append(f"{' '.join(command)} is not there")
            continue
        compiler = _asked(os.path.abspath(found), command[1:])
        if isinstance(compiler, Compiler):
            return compiler
        tried.append(compiler)
    instead = "correct CXX or leave it out, or " if named else ""
    raise CannotBuild(
        f"no C++ compiler: {'CXX: ' if named else ''}{'; '.join(tried)}; {instead}install g++ "
        f"{OLDEST['g++']} or newer, or clang++ {OLDEST['clang++']}"
    )


def _asked(found: str, arguments: Sequence[str]) -> Compiler | str:
    """Ask a compiler what it is; return why not, if it cannot be used."""
    command = (found, *arguments)
    try:
        text = _run((*command, "-dM", "-E", "-x", "c++", os.devnull), Path.cwd())
    except CannotBuild as error:
        return str(error)
    lines = (line.split(maxsplit=2) for line in text.splitlines())
    macros = {words[1]: words[2] if len(words) > 2 else "" for words in lines if len(words) > 1}
    kind = "clang++" if "__clang__" in macros else "g++"
    major = int(macros.get("__clang_major__" if kind == "clang++" else "__GNUC__", "0"))
    if major < OLDEST[kind]:
        return f"{found} is {kind} {major}, older than {OLDEST[kind]}"
    machine = next((name for name in PATHS if f"__{name}__" in macros), "another architecture")
    return Compiler(command, kind, macros.get("__VERSION__", ""), machine)


def _run(command: Sequence[str], where: Path) -> str:
    """Run a command without a shell and return what it printed. Raises CannotBuild."""
    try:
        done = subprocess.run(
            command, cwd=where, stdin=subprocess.DEVNULL, capture_output=True, timeout=SECONDS,
            check=False, encoding="utf-8", errors="replace",
        )  # fmt: skip
    except (OSError, subprocess.TimeoutExpired) as error:
        raise CannotBuild(f"{command[0]}: {error}") from None
    if done.returncode != 0:
        said = [line for line in done.stderr.splitlines() if "error" in line] or [done.stderr[:300]]
        raise CannotBuild(
            f"{command[0]} failed with exit code {done.returncode}: {said[0].strip()}"
        )
    return done.stdout


def cache_directory() -> Path:
    """Return the directory of compiled libraries, made if it is absent. Raises CannotBuild.

    It has to be the user's own, with no access for others: what lies there is loaded and run.
    """
    asked = os.environ.get("TOKENSELECT_CACHE")
    base = os.environ.get("XDG_CACHE_HOME") or "~/.cache"
    try:
        path = Path(asked or os.path.join(base, "tokenselect")).expanduser().resolve()
        path.mkdir(mode=0o700, parents=True, exist_ok=True)
        there = path.stat()
    except (OSError, RuntimeError) as error:
        raise CannotBuild(
            f"no directory for compiled kernels: {error}; name one as TOKENSELECT_CACHE"
        ) from None
    if not stat.S_ISDIR(there.st_mode) or there.st_uid != os.geteuid() or there.st_mode & 0o077:
        raise CannotBuild(
            f"{path} has owner {there.st_uid} and mode {stat.S_IMODE(there.st_mode):o}; compiled "
            "kernels are loaded from a directory of your own with mode 700 only: chmod 700, or "
            "name another as TOKENSELECT_CACHE"
        )
    return path


def check_own(library: Path) -> None:
    """Raise CannotBuild unless a library is a plain file that only this user can write."""
    there = library.lstat()
    if not stat.S_ISREG(there.st_mode) or there.st_uid != os.geteuid() or there.st_mode & 0o022:
        raise CannotBuild(
            f"{library} has owner {there.st_uid} and mode {stat.S_IMODE(there.st_mode):o}; "
            "a library is loaded if only you can write it: remove it"
        )


def _digest(*parts: object) -> str:
    return hashlib.sha256(repr(parts).encode()).hexdigest()[:16]


def features() -> str:
    """Return what this processor can do, as the system lists it."""
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
    except OSError:
        return ""
    return next((line for line in lines if line.lower().startswith(("flags", "features"))), "")


def paths_here(machine: str) -> list[str]:
    """Return the paths of an architecture that run on this processor and system; widest last."""
    there = set(features().split())
    found = [path for path in PATHS.get(machine, {}) if there.issuperset(_NEEDS[path])]
    if "amx" in found and not _grants_tiles():
        found.remove("amx")
    return found


def _grants_tiles() -> bool:
    """Ask Linux for the state of AMX tiles, which a process has to before it uses them."""
    arch_prctl, req_xcomp_perm, xtiledata = 158, 0x1023, 18
    return int(ctypes.CDLL(None).syscall(arch_prctl, req_xcomp_perm, xtiledata)) == 0


def _prefix(sources: Path, flags: Sequence[str]) -> str:
    """Return how the names of libraries begin that these sources make on this machine."""
    texts = [(path.name, path.read_bytes()) for path in sorted(sources.iterdir()) if path.is_file()]
    here = platform.machine(), features(), torch.__version__
    return f"native-{_digest(texts, flags, PATHS, here)}-"


def library(
    sources: Path = SOURCES, flags: Sequence[str] = (), *, paths: Sequence[str] | None = None
) -> Path:
    """Return the compiled library, compiling it if it is not there. Raises CannotBuild.

    flags  more of them
    paths  those to compile; None: the widest one that this machine has the features of

    Without a compiler, a library that one made here before is taken.
    """
    machine = platform.machine()
    if machine not in PATHS or os.name != "posix":
        raise CannotBuild(
            f"this machine is {platform.system()} on {machine}; the kernels are for "
            f"{' and '.join(PATHS)}"
        )
    directory = cache_directory()
    paths = paths or paths_here(machine)[-1:]
    prefix = _prefix(sources, (*FLAGS, *flags, *paths))
    try:
        compiler = find_compiler()
    except CannotBuild:
        made = sorted(directory.glob(f"{prefix}*.so"), key=lambda path: path.stat().st_mtime)
        if not made:
            raise
        return made[-1]
    if compiler.machine != machine:
        raise CannotBuild(
            f"{compiler.command[0]} compiles for {compiler.machine}, this machine is {machine}"
        )
    target = directory / f"{prefix}{_digest(compiler)}.so"
    if not target.exists():
        with _only_one(directory) as is_alone:
            if not target.exists():  # another process made it meanwhile
                if is_alone:
                    for left in directory.glob("building-*"):  # by a process that died
                        shutil.rmtree(left, ignore_errors=True)
                _compile(compiler, sources, (*FLAGS, *flags), paths, directory, target)
    return target


@contextmanager
def _only_one(directory: Path) -> Iterator[bool]:
    """Let one process at a time compile; the lock of one that dies is free.

    Yields False on a file system without locks: others may compile too, and the rename has to do.
    """
    try:
        lock = os.open(directory / "lock", os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o600)
    except OSError as error:
        raise CannotBuild(
            f"cannot write to {directory}: {error.strerror}; name another directory as "
            "TOKENSELECT_CACHE"
        ) from None
    try:
        until = time.monotonic() + SECONDS
        while (is_alone := _locked(lock)) is False:
            if time.monotonic() > until:
                raise CannotBuild(f"another process compiles in {directory} for {SECONDS} seconds")
            time.sleep(0.05)
        yield is_alone is True
    finally:
        os.close(lock)


def _locked(lock: int) -> bool | None:
    """Return whether the lock is ours now; None where there are no locks."""
    import fcntl  # not everywhere: see `library`

    try:
        fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        return False
    except OSError:
        return None
    return True


def _compile(
    compiler: Compiler,
    sources: Path,
    flags: Sequence[str],
    paths: Sequence[str],
    directory: Path,
    target: Path,
) -> None:
    """Compile the sources to `target`, which appears whole or not at all."""
    log.warning("compiling C++ kernels with %s, once on this machine", compiler.command[0])
    start = time.perf_counter()
    try:
        with tempfile.TemporaryDirectory(prefix="building-", dir=directory) as temporary:
            built = compile_in(Path(temporary), compiler, sources, flags, paths)
            built.chmod(0o500)
            os.replace(built, target)
    except OSError as error:
        raise CannotBuild(
            f"cannot write to {directory}: {error}; name another directory as TOKENSELECT_CACHE"
        ) from None
    log.warning("compiled C++ kernels in %.1f s: %s", time.perf_counter() - start, target)


def compile_in(
    where: Path,
    compiler: Compiler,
    sources: Path,
    flags: Sequence[str],
    paths: Sequence[str],
) -> Path:
    """Compile the sources in a directory and return the library. Raises CannotBuild."""
    own = PATHS[compiler.machine]
    # Each path is a namespace; what runs it is compiled once.
    units = [(name, "kernels.cpp", (f"-DTS_PATH={name}", *own[name])) for name in paths]
    units += [(name, f"{name}.cpp", tuple(f"-DTS_HAS_{path}" for path in paths))
              for name in ("entry", "threads")]  # fmt: skip

    def compiled(unit: tuple[str, str, tuple[str, ...]]) -> str:
        name, source, more = unit
        command = (*compiler.command, *flags, *more, "-c", str(sources / source), "-o", f"{name}.o")
        _run(command, where)
        return f"{name}.o"

    with ThreadPoolExecutor(os.cpu_count()) as pool:
        objects = list(pool.map(compiled, units))
    built = where / "library.so"
    _run((*compiler.command, *flags, "-shared", *objects, "-o", str(built)), where)
    return built
