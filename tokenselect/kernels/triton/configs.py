"""The sizes of the kernels' tiles, by architecture. Nothing is tuned at run time."""

from typing import NamedTuple


class Config(NamedTuple):
    """Sizes of one architecture.

    multiprocessors     those of a GPU, which the grids of `score` are to fill
    programs            programs of `score` per multiprocessor
    tile                tokens that `score` multiplies at once, at a head dim of up to 128
    segment             tiles whose sums of weights are kept together
    voters              the most voters that one read of the keys serves
    warps               warps of `logits`
    few_warps           likewise for up to 32 voters of a decode, if D is a power of two
    float32_warps       likewise where it multiplies in float32
    stages              tiles whose keys `logits` has in flight, in the cache's dtype
    mean_stages         likewise for mean queries, which take three times the memory of others
    hoisted_parts       whether `logits` loads mean queries once for all tiles
    pairs               pairs of dims that `logits` rotates at once
    queries             queries that `voters` adds up at once
    normalize_block     segments that `normalize` adds up at once
    vote_programs       programs of `vote` per multiprocessor
    vote_voters         voters whose weights `vote` adds up at once
    pool_block          candidates per program of `pool`
    select_block        candidates per program of `select`
    gather              selected tokens that `attend` multiplies at once, for 16 query rows
    gather_pairs        pairs of dims that `attend` rotates at once
    query_rows          query rows of a program of `attend` for up to that many; more are a chunk
    chunk_rows          likewise for a chunk
    chunk_stages        tiles whose rows `attend` has in flight for a chunk, in the cache's dtype
    float32             how a matrix unit multiplies float32: "ieee", or "tf32x3": 22 bits
    split, long_split   selected tokens per program of `attend`, for few query rows and for more
    dependent_launch    whether a kernel may be launched while the previous one runs
    """

    multiprocessors: int
    programs: int = 2
    tile: int = 128
    segment: int = 8
    voters: int = 64
    warps: int = 8
    few_warps: int = 8
    float32_warps: int = 8
    stages: int = 3
    mean_stages: int = 3
    hoisted_parts: bool = False
    pairs: int = 16
    queries: int = 16
    normalize_block: int = 128
    vote_programs: int = 8
    vote_voters: int = 32
    pool_block: int = 256
    select_block: int = 2048
    gather: int = 128
    gather_pairs: int = 64
    query_rows: int = 64
    chunk_rows: int = 64
    chunk_stages: int = 1
    split: int = 128
    long_split: int = 512
    dependent_launch: bool = False
    float32: str = "tf32x3"


TABLE = {
    "sm_80": Config(multiprocessors=108, voters=32, vote_voters=16),
    # 99 KiB of shared memory per block.
    "sm_86": Config(
        multiprocessors=84,
        voters=32,
        stages=2,
        mean_stages=1,
        vote_voters=16,
        gather_pairs=32,
    ),
    "sm_90": Config(
        multiprocessors=132,
        few_warps=4,
        hoisted_parts=True,
        queries=128,
        normalize_block=1024,
        chunk_rows=128,
        chunk_stages=3,
        dependent_launch=True,
    ),
    "sm_100": Config(
        multiprocessors=148,
        voters=32,
        stages=2,
        mean_stages=1,
        pairs=32,
        queries=8,
        dependent_launch=True,
    ),
    # A load under its own mask takes two scalar registers: few places per thread, no pipelining.
    "gfx942": Config(
        multiprocessors=304,
        tile=64,
        voters=16,
        warps=16,
        few_warps=16,
        float32_warps=8,
        stages=1,
        mean_stages=1,
        gather=16,
        gather_pairs=16,
        query_rows=32,
        chunk_rows=32,
        float32="ieee",
    ),
    # Small, so that the problems of the properties reach every loop and every border.
    "interpreter": Config(
        multiprocessors=1,
        hoisted_parts=True,
        tile=32,
        segment=2,
        vote_programs=3,
        vote_voters=4,
        pool_block=64,
        select_block=64,
        gather=64,
        gather_pairs=16,
        query_rows=32,
        chunk_rows=32,
        split=32,
        long_split=48,
        float32="ieee",
    ),
}
