"""The triton backend: every stage as kernels for a GPU, interpreted on the CPU for tests.

`score` reads the keys once, `select` uses as many blocks as there are, `attend` touches selected
rows only, `reuse` is a launch before them and one between. Nothing waits for the device, and no
result depends on the batch or the grid.
"""

import torch

from tokenselect.contract import Backend, Capability, Reuse, StaticStages
from tokenselect.kernels.triton import attend, reuse, score, select
from tokenselect.kernels.triton.launch import INTERPRETED

BACKEND = Backend(
    "triton",
    Capability(
        devices=("cpu",) if INTERPRETED else ("cuda",),
        dtypes=(torch.float32, torch.bfloat16, torch.float16),
        head_dims=range(32, 257),
        group_sizes=range(1, 33),
        query_lengths=range(1, 4097),
        page_sizes=range(1, 257),
        votes=("soft",),
    ),
    score.score,
    select.select,
    attend.attend,
    static=StaticStages(score.score_candidates, select.select, attend.attend),
    reuse=Reuse(reuse.decide_reuse, reuse.update),
)
