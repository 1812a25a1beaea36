"""Decode without waiting for the device: a plan, a SelectionCache per layer, and a CUDA graph."""

import torch
from torch import nn

from tokenselect import Problem, SelectConfig, SelectionCache, attention, capture, plan

B, HQ, HKV, D, CAPACITY, N_LAYERS = 2, 8, 2, 64, 1024, 4
config = SelectConfig(k=128, n_sink=16, n_local=64)
torch.set_default_device("cuda" if torch.cuda.is_available() else "cpu")
torch.set_grad_enabled(False)
torch.manual_seed(0)
embed, head = nn.Embedding(500, HQ * D), nn.Linear(HQ * D, 500)
qkv = [nn.Linear(HQ * D, (HQ + 2 * HKV) * D) for _ in range(N_LAYERS)]
for layer in qkv:
    nn.init.normal_(layer.bias[: HQ * D], std=1.8)  # what queries have in common
caches = torch.zeros(N_LAYERS, 2, B, HKV, CAPACITY, D)  # keys and values
selections = [SelectionCache(theta=0.9, max_reuse=32) for _ in range(N_LAYERS)]
planned = plan(Problem.build(torch.zeros(B, HQ, 1, D), *caches[0], config, max_reuse=32))


def read(tokens, n, attend):
    """Feed tokens (B, L), the newest of n (B,); return the likeliest next ones (B,)."""
    x, L = embed(tokens), tokens.shape[1]
    slots = (n[:, None] - L + torch.arange(L)).long()[None, :, None, :, None]
    for i in range(N_LAYERS):
        q, *kv = qkv[i](x).view(B, L, -1, D).transpose(1, 2).split((HQ, HKV, HKV), dim=1)
        caches[i].scatter_(3, slots.expand(2, B, HKV, L, D), torch.stack(kv))
        out = attend(q, *caches[i], cache_seqlens=n, cache=selections[i])
        x = x + out.transpose(1, 2).flatten(2)
    return head(x[:, -1]).argmax(1)


def without_reuse(*qkv, cache_seqlens, cache):
    """Attend with the chunk of queries that a prompt is, and remember nothing."""
    return attention(*qkv, cache_seqlens=cache_seqlens, **config)


def decode(token, n):
    """Take one step: tensors in, tensors out, no Python value."""
    return read(token[:, None], n + 1, planned), n + 1


step = capture(decode) if torch.cuda.is_available() else decode
n = torch.full((B,), 700, dtype=torch.int32)
token = read(torch.randint(500, (B, 700)), n, without_reuse)  # the prompt
text = torch.empty(B, 40, dtype=torch.long)
for i in range(text.shape[1]):
    token, n = step(token, n)  # queued: nothing here waits for the device
    text[:, i] = token
print(text[0].tolist(), [cache.hits.tolist() for cache in selections])  # this does
