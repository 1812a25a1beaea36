"""The triton backend: every stage as kernels for a GPU, interpreted on the CPU for tests.

On the host, each stage works out what to launch; device code is in files of its own:

stage   launches   device code
score   score.py   score_voters.py, score_logits.py, score_votes.py
select  select.py  select_kernels.py
attend  attend.py  attend_kernels.py, attend_tile.py
reuse   reuse.py   reuse_kernels.py
a step  step.py    those of all stages
shared  launch.py, recording.py, configs.py, tables.py   device.py

`score` reads the keys once, `select` uses one program per block of candidates, `attend` touches
selected rows only, `reuse` is one launch before these (two for a chunk) and one after `select`.
Nothing waits for the device, and no result depends on the batch or the grid.
"""

import torch

from tokenselect.contract import Backend, Capability, Reuse, StaticStages
from tokenselect.kernels.triton import attend, reuse, score, select, step
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
    static=StaticStages(
        score.score_candidates,
        select.select,
        attend.attend,
        step.attend_fresh,
        step.attend_cached,
    ),
    reuse=Reuse(reuse.decide_reuse, reuse.update),
    attend_fresh=step.attend_fresh,
    attend_cached=step.attend_cached,
)
