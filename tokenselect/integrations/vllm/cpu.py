"""The backend on a CPU: on vLLM's own, whose kernel reads keys that are packed.

Tokens are selected from rows, so the cache holds rows (`layout`), and prompts are packed.
"""

from typing import Any

import torch
from torch import Tensor
from vllm.v1.attention.backends.cpu_attn import (
    CPUAttentionBackend,
    CPUAttentionBackendImpl,
    CPUAttentionMetadataBuilder,
)

from tokenselect.integrations.options import EVERYTHING
from tokenselect.integrations.vllm import layout
from tokenselect.integrations.vllm.backend import Divides, Selects
from tokenselect.integrations.vllm.steps import Batch, Decoding, Dense, in_groups


class Backend(CPUAttentionBackend):
    """The class that vLLM takes for `CPU_ATTN` where this one was asked for."""

    @staticmethod
    def get_impl_cls() -> type["Impl"]:
        """Return the attention of one layer."""
        return Impl

    @staticmethod
    def get_builder_cls() -> type["Builder"]:
        """Return what reads a step's metadata, once for all layers of a group."""
        return Builder


class Builder(Divides, CPUAttentionMetadataBuilder):
    """Has prompts read from packed copies, and short requests in place, from rows."""

    def dense(self, batch: Batch) -> tuple[list[Dense], list[Decoding]]:
        """Return the calls of vLLM's kernel, and what attends to everything in place."""
        packed = [self._packed(batch, group) for group in in_groups(batch.prompts, batch.lengths)]
        short = self.decoding(batch, batch.short, EVERYTHING)
        return packed, [] if short is None else [short]

    def _packed(self, batch: Batch, group: list[int]) -> Dense:
        """Return what one call of vLLM's kernel does, over packed copies of a group's blocks."""
        size, table = self.kv_cache_spec.block_size, batch.common.block_table_tensor
        counts = [-(-batch.lengths[i] // size) for i in group]
        blocks = [b for i, m in zip(group, counts, strict=True) for b in table[i, :m].tolist()]
        at = torch.zeros(len(group), max(counts), dtype=torch.int32, device="cpu")
        done = 0
        for row, m in enumerate(counts):
            at[row, :m] = torch.arange(done, done + m, device="cpu")
            done += m
        return self.own(batch, group, at, blocks)


class Impl(Selects, CPUAttentionBackendImpl):
    """The attention of one layer."""

    def rows(self, kv_cache: Tensor) -> tuple[Tensor, Tensor]:
        """View keys and values as (blocks, block_size, Hkv, D)."""
        return layout.rows(kv_cache)

    def cache_of(self, layer: Any, kv_cache: Tensor, part: Dense) -> Tensor:
        """Return packed copies of the blocks."""
        return layout.pack(self, layer, kv_cache, part.blocks)

    def do_kv_cache_update(
        self, layer: Any, key: Tensor, value: Tensor, kv_cache: Tensor, slot_mapping: Tensor
    ) -> None:
        """Write the keys and values of new tokens to their slots."""
        if self.selects():
            layout.write(key, value, kv_cache, slot_mapping)
        else:
            super().do_kv_cache_update(layer, key, value, kv_cache, slot_mapping)

    # vLLM's own update, for `layout.pack`.
    pack_rows = CPUAttentionBackendImpl.do_kv_cache_update
