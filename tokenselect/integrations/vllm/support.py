"""What of vLLM's options, models and layers is refused, and the options of config.tokenselect."""

from typing import Any

from torch.distributed import ProcessGroup
from vllm.distributed.parallel_state import get_tp_group
from vllm.v1.attention.backend import AttentionType
from vllm.v1.attention.backends.registry import AttentionBackendEnum
from vllm.v1.kv_cache_interface import KVQuantMode

from tokenselect.errors import InvalidProblem, UnsupportedProblem
from tokenselect.integrations.options import NAME, Options, check, check_layers, parse
from tokenselect.integrations.vllm import BACKEND


def is_ours(backend: Any) -> bool:
    """Say whether a member of vLLM's enum, or None, stands for this backend."""
    ours = AttentionBackendEnum[BACKEND], AttentionBackendEnum.CUSTOM
    return backend in ours and backend.get_path() == ours[0].get_path()


def is_asked_for(config: Any) -> bool:
    """Say whether a VllmConfig names this backend, for all layers or for some kind of them."""
    asked = config.attention_config
    return any(map(is_ours, (asked.backend, *asked.backend_per_kind.values())))


def refuse(what: str, why: str, fix: str) -> UnsupportedProblem:
    """Return the error for what cannot be computed rightly."""
    return UnsupportedProblem(what, {"tokenselect.integrations.vllm": [why]}, fix)


def refuse_engine(config: Any) -> None:
    """Raise UnsupportedProblem for an engine (a VllmConfig) that would not be served rightly."""
    parallel = config.parallel_config
    for name, why in (
        ("pipeline_parallel_size", "nobody has tried it"),
        ("prefill_context_parallel_size", "each rank sees a part of the cache"),
        ("decode_context_parallel_size", "each rank sees a part of the cache"),
    ):
        if getattr(parallel, name) > 1:
            raise refuse(f"{name}={getattr(parallel, name)}", why, "leave it at 1")
    if parallel.use_ubatching:
        raise refuse(
            "steps in microbatches",
            "each would divide its requests, and keep their selections, by itself",
            "leave --enable-dbo and --ubatch-size out",
        )
    if config.speculative_config is not None:
        raise refuse(
            "speculative decoding",
            "drafts are verified several tokens at a time, which would attend densely",
            "leave --speculative-config out",
        )
    if config.kv_transfer_config is not None:
        raise refuse(
            "a KV connector",
            "on a CPU the cache holds keys in rows, not as vLLM's own backend packs them; on a GPU "
            "nobody has tried it",
            "leave --kv-transfer-config out",
        )
    if config.model_config.is_hybrid:
        raise refuse(
            "a hybrid of attention and other layers that keep state",
            "vLLM takes a prompt's last token for one that is decoded there, and does not number "
            "requests",
            "use another backend, or another model",
        )
    if config.model_config.rswa_window is not None:
        raise refuse("a model with R-SWA", "its later tokens see a window", "use another backend")


def refuse_layer(impl: Any) -> None:
    """Raise UnsupportedProblem for a layer (vLLM's implementation of it) that cannot select."""
    whys = {
        f"attn_type={impl.attn_type}: only decoders have a cache to select from": impl.attn_type
        != AttentionType.DECODER,
        "ALiBi: selected keys get no bias": impl.alibi_slopes is not None,
        f"kv_cache_dtype={impl.kv_cache_dtype}: quantised keys are not read": impl.kv_quant_mode
        != KVQuantMode.NONE,
        "it shares the cache of another layer": impl.kv_sharing_target_layer_name is not None,
    }
    for why, holds in whys.items():
        if holds:
            raise refuse("a layer of this model", why, "use another backend, or another model")


def refuse_spec(spec: Any) -> None:
    """Raise UnsupportedProblem for a kind of cache whose metadata says something else."""
    kind = type(spec).__name__
    is_known = kind in ("FullAttentionSpec", "SlidingWindowSpec")
    if not is_known or getattr(spec, "attention_chunk_size", None) is not None:
        raise refuse(
            f"layers with a {kind}", "only full and sliding attention", "use another model"
        )
    if getattr(spec, "non_causal", False) or spec.head_size_v != spec.head_size:
        raise refuse(
            f"layers with head dims {spec.head_size} and {spec.head_size_v}, "
            f"non_causal={getattr(spec, 'non_causal', False)}",
            "keys and values have one head dim, and attention is causal",
            "use another model",
        )


def group_of(config: Any, number: int, options: Options) -> ProcessGroup | None:
    """Return the ranks that one layer's heads select together on; None: this rank needs no other.

    config  a VllmConfig
    number  of the layer, from 0 on
    """
    size = config.parallel_config.tensor_parallel_size
    if size == 1:
        return None
    if options.select.scope == "layer":
        group: ProcessGroup = get_tp_group().device_group
        return group
    heads = config.model_config.model_arch_config[number].total_num_kv_heads
    whys = {
        f"{heads} KV heads are fewer than the ranks: the query heads that vote for one are on "
        "several": heads < size,
        f"theta={options.theta}: reuse is decided over all heads": options.theta is not None,
    }
    for why, holds in whys.items():
        if holds:
            raise refuse(
                f"scope='group' in layer {number} with tensor_parallel_size={size}",
                why,
                "say scope='layer', or leave tensor_parallel_size at 1",
            )
    return None


def options_of(config: Any, sliding: set[int]) -> Options:
    """Return the options in a VllmConfig's model config, all checked.

    sliding  the numbers of the layers that slide
    """
    model = config.model_config
    given = getattr(model.hf_config, NAME, None) or getattr(model.hf_text_config, NAME, None)
    options = parse(given)
    check(options)
    count = model.hf_text_config.num_hidden_layers
    check_layers(options, model.hf_text_config.model_type, count, dict.fromkeys(sliding, "slides"))
    if options.needs_raw_keys:
        raise refuse(
            "positions='contiguous', or another score_at than 'true'",
            "vLLM rotates keys before they are cached, and moving them takes keys that are not",
            "leave both out, or use tokenselect.integrations.transformers",
        )
    if options.prefill != "dense":
        raise InvalidProblem(
            f"prefill={options.prefill!r}",
            "in vLLM prompts are read densely: its chunks depend on what else is being served, and "
            "so would every answer",
            "leave prefill out",
        )
    return options
