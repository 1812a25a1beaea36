"""What the backends share: how a step's requests are divided, and how a layer selects.

`Divides` and `Selects` come before vLLM's own classes among the bases of a builder and of a layer's
implementation: `cpu` and `cuda` have these.
"""

from dataclasses import replace
from typing import Any

import torch
from torch import Tensor
from torch.distributed import ProcessGroup
from vllm.config import get_current_vllm_config, get_layers_from_vllm_config
from vllm.distributed.parallel_state import get_tp_group
from vllm.logger import init_logger
from vllm.model_executor.layers.attention import Attention
from vllm.model_executor.layers.attention_layer_base import AttentionLayerBase
from vllm.model_executor.models.utils import extract_layer_index
from vllm.utils.torch_utils import async_tensor_h2d
from vllm.v1.attention.backend import (
    AttentionImpl,
    AttentionMetadataBuilder,
    CommonAttentionMetadata,
)
from vllm.v1.attention.selector import get_attn_spec_kind

from tokenselect.api import attention, run
from tokenselect.contract import Problem, SelectConfig
from tokenselect.integrations.options import EVERYTHING, NAME, Options
from tokenselect.integrations.vllm import BACKEND
from tokenselect.integrations.vllm.metrics import METRICS
from tokenselect.integrations.vllm.steps import Batch, Decoding, Dense, Division, Rows, joined
from tokenselect.integrations.vllm.support import (
    group_of,
    is_ours,
    options_of,
    refuse,
    refuse_engine,
    refuse_layer,
    refuse_spec,
)
from tokenselect.selection_cache import SelectionCache

logger = init_logger(f"vllm.{NAME}")


def refuse_others(config: Any) -> None:
    """Raise UnsupportedProblem for a layer that attends in another way than was asked for.

    config  a VllmConfig that knows the model's layers
    """
    asked = config.attention_config
    for name, layer in get_layers_from_vllm_config(config, AttentionLayerBase).items():
        if isinstance(layer, Attention):
            kind = get_attn_spec_kind(False, layer.sliding_window is not None, layer.attn_type)
            if not is_ours(asked.backend_per_kind.get(kind.value, asked.backend)):
                continue
        impl = getattr(layer, "impl", layer)
        if not isinstance(impl, Selects):
            raise refuse(
                f"layer {name}, whose attention is {type(impl).__name__}",
                "this model chooses how it attends by itself, whatever backend is asked for",
                f"leave --attention-backend {BACKEND} out for this model",
            )


class Divides(AttentionMetadataBuilder):
    """Divides the requests of each step into those that attend densely and those that select.

    It reads what vLLM keeps on the host. For Selection Caches it waits for the device once a step,
    where vLLM's model runner does not number the requests.
    """

    def __init__(self, kv_cache_spec: Any, layer_names: list[str], vllm_config: Any, device: Any):
        super().__init__(kv_cache_spec, layer_names, vllm_config, device)
        refuse_spec(kv_cache_spec)
        layers = get_layers_from_vllm_config(vllm_config, Attention)
        numbers = {name: extract_layer_index(name) for name in layers}
        sliding = [name for name, layer in layers.items() if layer.sliding_window is not None]
        self._options = options_of(vllm_config, {numbers[name] for name in sliding})
        count = vllm_config.model_config.hf_text_config.num_hidden_layers
        own = {
            name: self._options.of(numbers[name], count)
            for name, layer in layers.items()
            if isinstance(layer.impl, Selects) and name not in sliding
        }
        selecting = [name for name, options in own.items() if options.select != EVERYTHING]
        here = [name for name in layer_names if name in selecting]
        for name in layer_names:
            layers[name].impl.settle(None, None)
        for name in here:
            group = group_of(vllm_config, numbers[name], own[name])
            layers[name].impl.settle(own[name], group)
        self._selections = [
            layers[name].impl.selections for name in here if own[name].theta is not None
        ]
        self._rows = Rows()
        self._divides = bool(here)
        # Of several builders one counts.
        self._counts = self._divides and selecting[0] in here and get_tp_group().is_first_rank
        if selecting and not here:
            return
        backend = self._try(layers[layer_names[0]].num_heads)
        select, theta = self._options.select, self._options.theta
        dense = len(layers) - len(sliding) - len(selecting)
        logger.warning_once(
            "TOKENSELECT IS ACTIVE: %d of %d layers select while decoding (%d slide, %d dense), "
            "k=%s, n_sink=%d, n_local=%d, theta=%s, dense_below=%d, backend %s",
            *(len(selecting), len(layers), len(sliding), dense),
            *(select.k, select.n_sink, select.n_local, theta),
            *(self._options.dense_below, backend),
        )

    def _try(self, heads: int) -> str:
        """Attend once, to compile what has to be compiled, and return the name of the backend."""
        spec, dtype = self.kv_cache_spec, self.vllm_config.model_config.dtype
        shape = 1, spec.block_size, spec.num_kv_heads, spec.head_size
        zeros = torch.zeros(shape, dtype=spec.dtype, device=self.device)
        q = torch.zeros(1, heads, 1, spec.head_size, dtype=dtype, device=self.device)
        _, info = attention(
            *(q, zeros, zeros),
            **self._options.select,
            cache_seqlens=torch.ones(1, dtype=torch.int32, device=self.device),
            block_table=torch.zeros(1, 1, dtype=torch.int32, device=self.device),
            backend=self._options.backend,
            return_info=True,
        )
        return info.backend

    def build(
        self,
        common_prefix_len: int,
        common_attn_metadata: CommonAttentionMetadata,
        fast_build: bool = False,
    ) -> Any:
        """Return vLLM's metadata of a step; where layers select, with its `Division`."""
        common = common_attn_metadata
        if not self._divides:
            return super().build(common_prefix_len, common, fast_build)
        if common.causal is not True:
            raise refuse("attention that is not causal", "only decoders", "use another backend")
        if common.is_prefilling is None or common.seq_lens_cpu_upper_bound is None:
            raise refuse(
                "a step that does not say which requests are prompts, or how long they are",
                "those attend densely, the others select",
                "use vLLM 0.32's own model runner",
            )
        stock = super().build(common_prefix_len, common, fast_build)
        # The bound is the length itself, but for drafts, which are refused.
        lengths = common.seq_lens_cpu_upper_bound[: common.num_reqs].tolist()
        in_prompt = common.is_prefilling.tolist()
        batch = Batch(common, common.query_start_loc_cpu.tolist(), lengths, [], [], [])
        for i, n in enumerate(lengths):
            queries = batch.starts[i + 1] - batch.starts[i]
            if queries == 1 and not in_prompt[i]:
                (batch.short if n < self._options.dense_below else batch.selecting).append(i)
            elif queries > 0:
                batch.prompts.append(i)
        if self._counts:
            METRICS.step(len(batch.prompts), len(batch.short), len(batch.selecting))
        dense, decoding = self.dense(batch)
        selecting = self.decoding(batch, batch.selecting, None)
        if selecting is not None:
            decoding.append(selecting)
        stock.tokenselect = Division(dense, decoding)
        return stock

    def dense(self, batch: Batch) -> tuple[list[Dense], list[Decoding]]:
        """Return how requests attend that do not select."""
        raise NotImplementedError

    def own(
        self, batch: Batch, group: list[int], table: Tensor, blocks: list[int] | None = None
    ) -> Dense:
        """Return what one call of vLLM's kernel does for some requests.

        table, blocks  of these; blocks if they are copied
        """
        common, counts = batch.common, [batch.starts[i + 1] - batch.starts[i] for i in group]
        starts = torch.tensor([0, *counts], dtype=torch.int32, device="cpu").cumsum(0).int()
        its = CommonAttentionMetadata(
            query_start_loc=async_tensor_h2d(starts, self.device),
            query_start_loc_cpu=starts,
            seq_lens=common.seq_lens[self.index(group)],
            num_reqs=len(group),
            num_actual_tokens=sum(counts),
            max_query_len=max(counts),
            max_seq_len=max(batch.lengths[i] for i in group),
            block_table_tensor=table,
            slot_mapping=common.slot_mapping,
        )
        return Dense(self.queries(batch, group), super().build(0, its), blocks or [])

    def index(self, group: list[int]) -> Tensor | slice:
        """Return what takes some requests out of a tensor of all of them."""
        return self._sent(joined([range(i, i + 1) for i in group]))

    def queries(self, batch: Batch, group: list[int]) -> Tensor | slice:
        """Return what takes the queries of some requests out of the step's."""
        return self._sent(joined([range(batch.starts[i], batch.starts[i + 1]) for i in group]))

    def _sent(self, numbers: list[int] | slice) -> Tensor | slice:
        if isinstance(numbers, slice):
            return numbers
        sent: Tensor = async_tensor_h2d(numbers, self.device)
        return sent

    def decoding(
        self, batch: Batch, group: list[int], select: SelectConfig | None
    ) -> Decoding | None:
        """Return what requests that decode need; those that select get their rows."""
        keeps = select is None and bool(self._selections)
        if not group:
            if keeps:
                self._rows.step(())
            return None
        common, n = batch.common, [batch.lengths[i] for i in group]
        where, its = self.queries(batch, group), self.index(group)
        used = common.block_table_tensor[its, : -(-max(n) // self.kv_cache_spec.block_size)]
        if not keeps:
            return Decoding(where, n, common.seq_lens[its], used, select)
        rows = async_tensor_h2d(self._rows_of(self._named(common, group, n, used)), self.device)
        seqlens = common.seq_lens.new_zeros(self._rows.capacity)
        block_table = used.new_zeros(self._rows.capacity, used.shape[1])
        seqlens[rows], block_table[rows] = common.seq_lens[its], used
        return Decoding(where, n, seqlens, block_table, select, rows)

    def _rows_of(self, requests: list[tuple[int, int, int]]) -> list[int]:
        """Return the requests' rows in the layers' Selection Caches, which are made ready."""
        before = self._rows.capacity
        at, is_new, moved = self._rows.step(requests)
        order = begins = None
        if moved is not None:
            order = async_tensor_h2d(moved, self.device)
        if any(is_new):
            marks = torch.zeros(self._rows.capacity, dtype=torch.bool, device="cpu")
            marks[[row for row, new in zip(at, is_new, strict=True) if new]] = True
            begins = async_tensor_h2d(marks, self.device)
        for cache in self._selections:
            if order is not None:
                cache.reorder(order)
            if self._rows.capacity != before:
                cache.resize(self._rows.capacity)
            if begins is not None:
                cache.reset(begins)
        return at

    def _named(
        self, common: CommonAttentionMetadata, group: list[int], n: list[int], used: Tensor
    ) -> list[tuple[int, int, int]]:
        """Return by what `Rows` knows requests that decode again.

        used  (requests, blocks) int32, their block table
        """
        if common.req_idx is not None:
            names = [int(common.req_idx[i]) for i in group]
            return list(zip(names, names, n, strict=True))
        size = self.kv_cache_spec.block_size
        ends = [[max(0, m - 2) // size, (m - 1) // size] for m in n]
        blocks = used.gather(1, async_tensor_h2d(ends, self.device)).tolist()
        return [(before, newest, m) for (before, newest), m in zip(blocks, n, strict=True)]


class Selects(AttentionImpl):
    """The attention of one layer: vLLM's own if it slides or is named as dense."""

    def __init__(self, *args: Any, **more: Any) -> None:
        super().__init__(*args, **more)
        refuse_engine(get_current_vllm_config())  # vLLM chooses a backend once per process
        refuse_layer(self)
        self._options: Options | None = None
        self._group: ProcessGroup | None = None
        self._is_settled = False
        self.selections: SelectionCache | None = None

    def settle(self, options: Options | None, group: ProcessGroup | None) -> None:
        """Take the options of this layer, None if it is dense, and the ranks it selects with."""
        self._options, self._group, self._is_settled = options, group, True
        self.selections = None
        if options is not None and options.theta is not None:
            self.selections = options.selection_cache()

    def selects(self) -> bool:
        """Say whether requests that decode select here."""
        if not self._is_settled:
            raise RuntimeError("a layer attends before tokenselect's metadata builder was made")
        return self._options is not None

    def rows(self, kv_cache: Tensor) -> tuple[Tensor, Tensor]:
        """View keys and values as (blocks, block_size, Hkv, D)."""
        raise NotImplementedError

    def cache_of(self, layer: Any, kv_cache: Tensor, part: Dense) -> Tensor:
        """Return the cache that vLLM's kernel reads."""
        return kv_cache

    def fused_output_quant_supported(self, quant_key: Any) -> bool:
        """Say no: what is selected is not quantised with attention."""
        return False

    def forward(
        self,
        layer: Any,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        kv_cache: Tensor,
        attn_metadata: Any,
        output: Tensor,
        output_scale: Tensor | None = None,
        output_block_scale: Tensor | None = None,
    ) -> Tensor:
        """Fill output (tokens, Hq, D), as vLLM's own backend does; query likewise."""
        if attn_metadata is None or not self.selects():
            given = (layer, query, key, value, kv_cache, attn_metadata, output)
            stock: Tensor = super().forward(*given, output_scale, output_block_scale)
            return stock
        if output_scale is not None or output_block_scale is not None:
            raise refuse("an output that is quantised with attention", "not built", "leave it out")
        for part in attn_metadata.tokenselect.dense:
            q, cache = query[part.tokens], self.cache_of(layer, kv_cache, part)
            out = output[part.tokens] if isinstance(part.tokens, slice) else torch.empty_like(q)
            metadata = attn_metadata if part.metadata is None else part.metadata
            super().forward(layer, q, key, value, cache, metadata, out)
            if not isinstance(part.tokens, slice):
                output[part.tokens] = out
        for decoding in attn_metadata.tokenselect.decoding:
            self._decode(query, kv_cache, decoding, output)
        return output

    def _decode(self, query: Tensor, kv_cache: Tensor, part: Decoding, output: Tensor) -> None:
        """Fill the rows of output of some requests that decode."""
        assert self._options is not None
        options, q = self._options, query[part.tokens]
        cache, group = self.selections, self._group
        if part.select is not None:  # everything, for which nobody votes
            options = replace(options, select=part.select, theta=None)
            cache = group = None
        if part.at is not None:
            its = q
            q = its.new_zeros(len(part.seqlens), *its.shape[1:])
            q[part.at] = its
        keys, values = self.rows(kv_cache)
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
