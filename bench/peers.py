"""python -m bench.peers: a whole token of SmolLM2, beside llama.cpp over as long a cache.

`make bench-peers` builds llama.cpp first, by its package llama-cpp-python, which takes minutes. It
reads the 4-bit weights of the GGUF file with a float16 cache, with its flash attention and without;
transformers reads them as float32. All contenders take turns, token by token, in one process.
"""

import argparse
import sys
import time
from collections.abc import Iterator, Sequence
from pathlib import Path
from statistics import median
from typing import Any

import torch
from transformers.cache_utils import DynamicCache

from bench import machine
from bench.quality.session import Session, feed
from bench.quality.settings import VARIANTS
from bench.quality.speed import filled
from bench.quality.variants import DENSE, resolve
from bench.tables import table
from tokenselect.integrations.transformers import TokenSelectCache
from tokenselect.kernels.native import build

# Features, as the system lists them, and what llama.cpp is built with where they are there: it is
# not left to build for whatever it finds, since on some virtual machines that cannot run.
_FEATURES = {
    "avx": "AVX",
    "avx2": "AVX2",
    "fma": "FMA",
    "f16c": "F16C",
    "avx512f": "AVX512",
    "avx512_vnni": "AVX512_VNNI",
    "avx512_bf16": "AVX512_BF16",
    "avx512vbmi": "AVX512_VBMI",
}


def cmake_arguments() -> str:
    """Return what llama.cpp is built with on this machine."""
    there = set(build.features().split())
    found = [f"-DGGML_{name}=ON" for feature, name in _FEATURES.items() if feature in there]
    return " ".join(["-DGGML_NATIVE=OFF", *found])


def llama(path: Path, context: int, room: int, threads: int, flash: bool) -> Any:
    """Return llama.cpp's model with `context` tokens in its cache, and room for more."""
    import llama_cpp

    half = llama_cpp.GGML_TYPE_F16
    made = llama_cpp.Llama(
        str(path), n_ctx=context + room, n_threads=threads, n_threads_batch=threads,
        flash_attn=flash, type_k=half, type_v=half, verbose=False,
    )  # fmt: skip
    made.eval([i % 1000 for i in range(context)])
    return made


def measure(context: int, rounds: int, threads: int, session: Session) -> Iterator[tuple[str, ...]]:
    """Yield rows: contender, ms per token (median, least, largest), ratio to llama.cpp's faster."""
    model, room = session.model, context + rounds + 1
    assert session.gguf_file is not None
    path, runs = session.path / session.gguf_file, {}
    for name, flash in (("llama.cpp", False), ("llama.cpp, flash attention", True)):
        peer = llama(path, context, rounds + 1, threads, flash)
        runs[name] = lambda token, peer=peer: peer.eval([token])
    selected = resolve("faithful", VARIANTS, 0.1, context)
    for name, variant, cache in (
        ("transformers, sdpa, DynamicCache", DENSE, DynamicCache(config=model.config)),
        ("transformers, sdpa, TokenSelectCache", DENSE, TokenSelectCache(model, room)),
        ("transformers, 10 % selected", selected, TokenSelectCache(model, room)),
    ):
        filled(cache, session, variant, context)

        def run(token: int, variant: Any = variant, cache: Any = cache) -> None:
            with variant.applied(model):
                feed(model, cache, (token,))

        runs[name] = run
    seconds: dict[str, list[float]] = {name: [] for name in runs}
    for turn in range(rounds + 1):
        for name, one in list(runs.items())[:: 1 if turn % 2 == 0 else -1]:
            start = time.perf_counter()
            one(100 + turn)
            seconds[name] += [time.perf_counter() - start] * (turn > 0)
    fastest = min((took for name, took in seconds.items() if "llama" in name), key=median)
    for name, took in seconds.items():
        ratio = median(a / b for a, b in zip(took, fastest, strict=True))
        ms = [1e3 * x for x in (median(took), min(took), max(took))]
        yield name, f"{ms[0]:.1f} ({ms[1]:.1f}–{ms[2]:.1f})", f"{ratio:.2f}"


def main(argv: Sequence[str] | None = None) -> int:
    """Run the comparison; return the exit code."""
    parser = argparse.ArgumentParser(prog="python -m bench.peers", description=__doc__)
    add = parser.add_argument
    add("--contexts", type=int, nargs="+", default=[8192, 16384, 32768], help="tokens cached")
    add("--threads", type=int, default=1, help="of each contender (1)")
    add("--rounds", type=int, default=12, help="tokens of each contender (12)")
    add("--cmake-arguments", action="store_true", help="print them, run nothing")
    asked = parser.parse_args(argv)
    if asked.cmake_arguments:
        print(cmake_arguments())
        return 0
    torch.set_num_threads(asked.threads)
    session, host = Session(), machine.describe(asked.threads)
    print(f"{host['cpu']}, {asked.threads} thread(s), torch {host['torch']}, at {host['commit']}")
    with torch.inference_mode():
        for context in asked.contexts:
            rows = measure(context, asked.rounds, asked.threads, session)
            head = (f"{context:,} tokens cached", "ms per token", "over llama.cpp")
            print("\n" + "\n".join(table(head, rows, is_padded=True)), flush=True)
    return 0


if __name__ == "__main__":
    sys.exit(main())
