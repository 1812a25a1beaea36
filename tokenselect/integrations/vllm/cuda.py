"""The backend on CUDA: on vLLM's TRITON_ATTN, whose cache holds rows in any order of blocks.

Its cache and its kernels stay as they are. What is dense is read by them, in place; requests that
select read the same blocks through strides.
"""

from torch import Tensor
from vllm.v1.attention.backend import AttentionCGSupport
from vllm.v1.attention.backends.triton_attn import (
    TritonAttentionBackend,
    TritonAttentionImpl,
    TritonAttentionMetadataBuilder,
)

from tokenselect.integrations.vllm.backend import Divides, Selects
from tokenselect.integrations.vllm.steps import Batch, Decoding, Dense


class Backend(TritonAttentionBackend):
    """The class that vLLM takes on CUDA where this one was asked for; its name stays vLLM's."""

    @staticmethod
    def get_impl_cls() -> type["Impl"]:
        """Return the attention of one layer."""
        return Impl

    @staticmethod
    def get_builder_cls() -> type["Builder"]:
        """Return what reads a step's metadata, once for all layers of a group."""
        return Builder

    @classmethod
    def supports_mm_prefix(cls) -> bool:
        """Say no: requests that are divided lose the ranges that see both ways."""
        return False

    @classmethod
    def supports_batch_invariance(cls) -> bool:
        """Say no: with theta, a request that has to wait selects again."""
        return False


class Builder(Divides, TritonAttentionMetadataBuilder):
    """Has prompts and short requests read by vLLM's kernel, in one call."""

    # What a step launches depends on its requests: graphs are of what lies between attention.
    _cudagraph_support = AttentionCGSupport.NEVER

    def dense(self, batch: Batch) -> tuple[list[Dense], list[Decoding]]:
        """Return the call of vLLM's kernel: the whole step's where nothing selects."""
        if not batch.selecting:
            return [Dense(slice(None), None)], []
        group = sorted(batch.prompts + batch.short)
        if not group:
            return [], []
        table = batch.common.block_table_tensor[self.index(group)]
        return [self.own(batch, group, table)], []


class Impl(Selects, TritonAttentionImpl):
    """The attention of one layer."""

    def rows(self, kv_cache: Tensor) -> tuple[Tensor, Tensor]:
        """View keys and values of (blocks, Hkv, block_size, 2 * D) as (blocks, size, Hkv, D)."""
        keys, values = kv_cache.transpose(1, 2).split(self.head_size, dim=-1)
        return keys, values
