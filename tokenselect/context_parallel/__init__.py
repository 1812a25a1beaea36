"""Attention over a cache that is sharded by position: each rank holds some of the tokens.

Every rank has all queries. It scores its own tokens, and attends to those of them that are
selected. In between, the ranks send each other

maximum   of each head's logits
sum       of each head's exp(logit - maximum)       the denominator of the soft vote
best      votes and positions of k candidates       the k best of all are among them
out, lse  attention to what was selected of theirs  merged by lse

The selection has the same bits however the tokens are sharded: what makes a token's vote is added
up in one order wherever the token is, and a denominator is a sum of integers, which has no order.
"""

from tokenselect.context_parallel.call import context_parallel_attention

__all__ = ["context_parallel_attention"]
