"""The attention backend: vLLM's own for the CPU, but that requests that decode select."""

from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor
from torch.distributed import ProcessGroup
from vllm.config import get_current_vllm_config, get_layers_from_vllm_config
from vllm.distributed.parallel_state import get_tp_group
from vllm.logger import init_logger
from vllm.model_executor.layers.attention import Attention
from vllm.model_executor.models.utils import extract_layer_index
from vllm.v1.attention.backend import CommonAttentionMetadata
from vllm.v1.attention.backends.cpu_attn import (
    CPUAttentionBackend,
    CPUAttentionBackendImpl,
    CPUAttentionMetadata,
    CPUAttentionMetadataBuilder,
)

from tokenselect.api import attention, run
from tokenselect.contract import Problem, SelectConfig
from tokenselect.integrations.options import EVERYTHING, NAME, Options
from tokenselect.integrations.vllm import layout
from tokenselect.integrations.vllm.metrics import METRICS
from tokenselect.integrations.vllm.steps import Decoding, Prompts, Rows, in_groups, tokens_of
from tokenselect.integrations.vllm.support import (
    group_of,
    options_of,
    refuse,
    refuse_engine,
    refuse_layer,
    refuse_spec,
)
from tokenselect.selection_cache import SelectionCache

logger = init_logger(f"vllm.{NAME}")


@dataclass
class Metadata(CPUAttentionMetadata):
    """vLLM's metadata of a step, and what the layers that select do in it."""

    prompts: tuple[Prompts, ...] = ()
    decoding: tuple[Decoding, ...] = ()


class Backend(CPUAttentionBackend):
    """The class that vLLM takes for `CPU_ATTN` where TOKENSELECT was asked for."""

    @staticmethod
    def get_impl_cls() -> type["Impl"]:
        """Return the attention of one layer."""
        return Impl

    @staticmethod
    def get_builder_cls() -> type["Builder"]:
        """Return what reads a step's metadata, once for all layers of a group."""
        return Builder


class Builder(CPUAttentionMetadataBuilder):
    """Divides the requests of each step into those that attend densely and those that select."""

    def __init__(self, kv_cache_spec: Any, layer_names: list[str], vllm_config: Any, device: Any):
        super().__init__(kv_cache_spec, layer_names, vllm_config, device)
        refuse_spec(kv_cache_spec)
        layers = get_layers_from_vllm_config(vllm_config, Attention)
        sliding = {
            extract_layer_index(name)
            for name, layer in layers.items()
            if getattr(layer.impl, "sliding_window", -1) >= 0
        }
        self._options = options_of(vllm_config, sliding)
        everywhere = self._options, *map(self._options.of, self._options.layers)
        self._keeps = any(one.theta is not None for one in everywhere)
        self._rows = Rows()
        self._counts = get_tp_group().is_first_rank
        count = vllm_config.model_config.hf_text_config.num_hidden_layers
        for name in layer_names:
            number = extract_layer_index(name)
            own = None if number in sliding else self._options.of(number, count)
            group = None if own is None else group_of(vllm_config, number, own)
            layers[name].impl.settle(own, group)
        dense = sum(
            self._options.of(extract_layer_index(name), count).select == EVERYTHING
            for name in layers
        )
        backend = self._try()
        select, theta = self._options.select, self._options.theta
        logger.warning_once(
            "TOKENSELECT IS ACTIVE: %d of %d layers select while decoding (%d slide, %d dense), "
            "k=%s, n_sink=%d, n_local=%d, theta=%s, dense_below=%d, backend %s",
            *(len(layers) - len(sliding) - dense, len(layers), len(sliding), dense),
            *(select.k, select.n_sink, select.n_local, theta),
            *(self._options.dense_below, backend),
        )

    def _try(self) -> str:
        """Attend once, to compile what has to be compiled, and return the name of the backend."""
        zeros = torch.zeros(1, self.num_kv_heads, 32, self.head_dim, dtype=self.dtype, device="cpu")
        q = torch.zeros(1, self.num_heads, 1, self.head_dim, dtype=self.dtype, device="cpu")
        options = self._options
        _, info = attention(
            q, zeros, zeros, **options.select, backend=options.backend, return_info=True
        )
        return info.backend

    def build(
        self,
        common_prefix_len: int,
        common_attn_metadata: CommonAttentionMetadata,
        fast_build: bool = False,
    ) -> Metadata:
        """Return a step's metadata."""
        stock = super().build(common_prefix_len, common_attn_metadata, fast_build)
        if stock.causal is not True:
            raise refuse("attention that is not causal", "only decoders", "use another backend")
        starts = common_attn_metadata.query_start_loc_cpu.tolist()
        lengths = stock.seq_lens.tolist()
        prefilling = common_attn_metadata.is_prefilling
        if prefilling is None:
            raise refuse(
                "a step that does not say which requests are prompts",
                "those attend densely, the others select",
                "use vLLM 0.32's own model runner",
            )
        in_prompt = prefilling.tolist()
        prompts: list[int] = []
        short: list[int] = []
        selecting: list[int] = []
        for i, n in enumerate(lengths):
            queries = starts[i + 1] - starts[i]
            if queries == 1 and not in_prompt[i]:
                (short if n < self._options.dense_below else selecting).append(i)
            elif queries > 0:
                prompts.append(i)
        if self._counts:
            METRICS.step(len(prompts), len(short), len(selecting))
        decoding = (
            self._decoding(stock, starts, lengths, short, EVERYTHING),
            self._decoding(stock, starts, lengths, selecting, None),
        )
        return Metadata(
            **vars(stock),
            prompts=tuple(
                self._prompts(stock, starts, lengths, group)
                for group in in_groups(prompts, lengths)
            ),
            decoding=tuple(part for part in decoding if part is not None),
        )

    def _prompts(
        self, stock: CPUAttentionMetadata, starts: list[int], lengths: list[int], group: list[int]
    ) -> Prompts:
        """Return what one call of vLLM's kernel does, over packed copies of a group's blocks."""
        size = self.block_size
        counts = [-(-lengths[i] // size) for i in group]
        blocks = [
            b for i, m in zip(group, counts, strict=True) for b in stock.block_table[i, :m].tolist()
        ]
        table, queries = torch.zeros(len(group), max(counts), dtype=torch.int32, device="cpu"), [0]
        done = 0
        for row, (i, m) in enumerate(zip(group, counts, strict=True)):
            table[row, :m] = torch.arange(done, done + m, device="cpu")
            queries.append(queries[-1] + starts[i + 1] - starts[i])
            done += m
        its = CommonAttentionMetadata(
            query_start_loc=torch.tensor(queries, dtype=torch.int32, device="cpu"),
            query_start_loc_cpu=torch.tensor(queries, dtype=torch.int32, device="cpu"),
            seq_lens=stock.seq_lens[group],
            num_reqs=len(group),
            num_actual_tokens=queries[-1],
            max_query_len=stock.max_query_len,
            max_seq_len=stock.max_seq_len,
            block_table_tensor=table,
            slot_mapping=stock.slot_mapping,
        )
        return Prompts(tokens_of(starts, group), blocks, super().build(0, its))

    def _decoding(
        self,
        stock: CPUAttentionMetadata,
        starts: list[int],
        lengths: list[int],
        group: list[int],
        select: SelectConfig | None,
    ) -> Decoding | None:
        """Return what requests that decode need; those that select get their rows."""
        size, table = self.block_size, stock.block_table
        keeps = select is None and self._keeps
        if not group:
            if keeps:
                self._rows.step(())
            return None
        n = [lengths[i] for i in group]
        used = table[:, : -(-max(n) // size)]
        tokens = tokens_of(starts, group)
        if not keeps:
            its: Any = group
            if len(group) == group[-1] - group[0] + 1:
                its = slice(group[0], group[-1] + 1)
            return Decoding(tokens, n, stock.seq_lens[its], used[its], select)
        blocks = [
            (int(table[i, max(0, m - 2) // size]), int(table[i, (m - 1) // size]), m)
            for i, m in zip(group, n, strict=True)
        ]
        at, is_new = self._rows.step(blocks)
        rows = torch.tensor(at, device="cpu")
        seqlens = torch.zeros(self._rows.capacity, dtype=torch.int32, device="cpu")
        block_table = torch.zeros(
            self._rows.capacity, used.shape[1], dtype=torch.int32, device="cpu"
        )
        seqlens[rows], block_table[rows] = stock.seq_lens[group], used[group]
        begins = torch.zeros(self._rows.capacity, dtype=torch.bool, device="cpu")
        begins[rows[torch.tensor(is_new, device="cpu")]] = True
        return Decoding(
            tokens, n, seqlens, block_table, select, rows, begins if any(is_new) else None
        )


class Impl(CPUAttentionBackendImpl):
    """The attention of one layer: vLLM's own if it slides or is named as dense."""

    def __init__(self, *args: Any, **more: Any) -> None:
        super().__init__(*args, **more)
        refuse_engine(get_current_vllm_config())  # vLLM chooses a backend once per process
        refuse_layer(self)
        self._options: Options | None = None
        self._group: ProcessGroup | None = None
        self._is_settled = False
        self._cache: SelectionCache | None = None

    def settle(self, options: Options | None, group: ProcessGroup | None) -> None:
        """Take the options of this layer, None if it slides, and the ranks it selects with."""
        is_dense = options is None or options.select == EVERYTHING
        self._options, self._is_settled = None if is_dense else options, True
        self._group = group

    def _selects(self) -> bool:
        if not self._is_settled:
            raise RuntimeError("a layer attends before tokenselect's metadata builder was made")
        return self._options is not None

    def do_kv_cache_update(
        self, layer: Any, key: Tensor, value: Tensor, kv_cache: Tensor, slot_mapping: Tensor
    ) -> None:
        """Write the keys and values of new tokens to their slots."""
        if self._selects():
            layout.write(key, value, kv_cache, slot_mapping)
        else:
            super().do_kv_cache_update(layer, key, value, kv_cache, slot_mapping)

    # vLLM's own update, for `layout.pack`.
    pack_rows = CPUAttentionBackendImpl.do_kv_cache_update

    def forward(
        self,
        layer: Any,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        kv_cache: Tensor,
        attn_metadata: Metadata | None,
        output: Tensor,
        output_scale: Tensor | None = None,
        output_block_scale: Tensor | None = None,
    ) -> Tensor:
        """Fill output (tokens, Hq, D), as vLLM's own backend does; query likewise."""
        given = (layer, query, key, value, kv_cache, attn_metadata, output)
        if attn_metadata is None or not self._selects():
            stock: Tensor = super().forward(*given, output_scale, output_block_scale)
            return stock
        if output_scale is not None or output_block_scale is not None:
            raise refuse("an output that is quantised with attention", "not built", "leave it out")
        for part in attn_metadata.prompts:
            packed = layout.pack(self, layer, kv_cache, part.blocks)
            q = query[part.tokens]
            out = output[part.tokens] if isinstance(part.tokens, slice) else torch.empty_like(q)
            super().forward(layer, q, key, value, packed, part.metadata, out)
            if not isinstance(part.tokens, slice):
                output[part.tokens] = out
        for decoding in attn_metadata.decoding:
            self._decode(query, kv_cache, decoding, output)
        return output

    def _decode(self, query: Tensor, kv_cache: Tensor, part: Decoding, output: Tensor) -> None:
        """Fill the rows of output of some requests that decode."""
        assert self._options is not None
        options, q, cache, group = self._options, query[part.tokens], None, self._group
        if part.select is not None:  # everything, for which nobody votes
            options, group = replace(options, select=part.select, theta=None), None
        if part.at is not None:
            its = q
            q = its.new_zeros(len(part.seqlens), *its.shape[1:])
            q[part.at] = its
        if options.theta is not None:
            cache = self._selections(part, options)
        keys, values = layout.rows(kv_cache)
        problem = self._problem(q[:, :, None], keys, values, part, options)
        # Its lengths and blocks are those of the layer before.
        validate = None if problem is part.problem else False
        if METRICS.wants_info and part.select is None:
            out, info = run(
                problem,
                options.backend,
                cache=cache,
                process_group=group,
                validate=validate,
                return_info=True,
            )
            METRICS.add(info, part.lengths, part.at)
        else:
            out = run(problem, options.backend, cache=cache, process_group=group, validate=validate)
        output[part.tokens] = out[:, :, 0] if part.at is None else out[part.at, :, 0]

    def _problem(
        self, q: Tensor, keys: Tensor, values: Tensor, part: Decoding, options: Options
    ) -> Problem:
        """Return the layer's problem; what a step's layers have in common is checked once."""
        alike = (options, self.scale, self.logits_soft_cap, q.shape, keys.shape)
        if part.problem is not None and part.alike == alike:
            return replace(part.problem, q=q, k_cache=keys, v_cache=values, sink_logits=self.sinks)
        problem = Problem.build(
            q,
            keys,
            values,
            options.select,
            cache_seqlens=part.seqlens,
            block_table=part.block_table,
            scale=self.scale,
            softcap=self.logits_soft_cap or None,
            sink_logits=self.sinks,
            max_reuse=0 if options.theta is None else options.max_reuse,
        )
        part.problem, part.alike = problem, alike
        return problem

    def _selections(self, part: Decoding, options: Options) -> SelectionCache:
        """Return the layer's Selection Cache, without what other requests left in their rows."""
        if self._cache is None:
            self._cache = options.selection_cache()
        elif part.begins is not None:
            self._cache.resize(len(part.seqlens))
            self._cache.reset(part.begins)
        return self._cache
