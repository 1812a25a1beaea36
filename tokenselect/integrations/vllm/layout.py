"""How keys and values lie in vLLM's blocks, and the packed copies that its own kernel reads.

A block of a layer is (Hkv, block_size, 2 * D) numbers: for each KV head the keys of its tokens,
then their values. vLLM's kernel packs them: keys by columns, both in tiles where there is AMX. Here
a token's key is a row, and so is its value, so that those selected can be read one by one.
"""

from typing import Any

import torch
from torch import Tensor


def rows(kv_cache: Tensor) -> tuple[Tensor, Tensor]:
    """View keys and values of (blocks, Hkv, block_size, 2 * D) as (blocks, block_size, Hkv, D)."""
    blocks, heads, size, width = kv_cache.shape
    x = kv_cache.view(blocks, heads, 2, size, width // 2)
    return x[:, :, 0].transpose(1, 2), x[:, :, 1].transpose(1, 2)


def write(key: Tensor, value: Tensor, kv_cache: Tensor, slots: Tensor) -> None:
    """Write the rows of new tokens, (tokens, Hkv, D), to their slots; a negative slot is none."""
    key, value = key[: len(slots)], value[: len(slots)]
    if bool((slots < 0).any()):
        held = slots >= 0
        key, value, slots = key[held], value[held], slots[held]
    size = kv_cache.shape[2]
    block = slots.div(size, rounding_mode="floor")
    at = (block, slots - block * size)
    keys, values = rows(kv_cache)
    keys[at], values[at] = key, value


def pack(impl: Any, layer: Any, kv_cache: Tensor, blocks: list[int]) -> Tensor:
    """Return copies of some blocks, one after the other, as vLLM's own kernel reads them.

    impl  whose `pack_rows` is vLLM's own update of a cache
    """
    size = kv_cache.shape[2]
    packed = kv_cache.new_empty((len(blocks), *kv_cache.shape[1:]))
    keys, values = rows(kv_cache)
    slots = torch.arange(len(blocks) * size, device="cpu")
    for at, block in enumerate(blocks):
        mine = slots[at * size : (at + 1) * size]
        impl.pack_rows(layer, keys[block], values[block], packed, mine)
    return packed
