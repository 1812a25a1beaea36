"""vLLM's engine with tokenselect in it, on small random models: every stream gets its own tokens.

Tokens are greedy and compared exactly: the models are float32, and their logits far enough apart.
Most engines run in this process, where what each layer computed can be looked at.
"""

import gc
import importlib.util
import json
import os
import random
import socket
import subprocess
import sys
import time
import warnings
from collections import Counter
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from itertools import pairwise
from pathlib import Path
from types import ModuleType, SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

from tests import fresh

if importlib.util.find_spec("vllm") is None:
    pytest.skip("NOT TESTED: vllm is not installed; make test-vllm", allow_module_level=True)

os.environ["VLLM_ENABLE_V1_MULTIPROCESSING"] = "0"
os.environ["VLLM_LOGGING_LEVEL"] = "WARNING"
os.environ["HF_HUB_OFFLINE"] = "1"

with warnings.catch_warnings():
    warnings.simplefilter("ignore")
    import httpx
    import openai
    import psutil
    import vllm.platforms
    from tokenizers import Tokenizer, models, pre_tokenizers
    from transformers import AutoModelForCausalLM as Auto
    from transformers import (
        DeepseekV3Config,
        Gemma2Config,
        LlamaConfig,
        LlamaForCausalLM,
        PreTrainedConfig,
        PreTrainedTokenizerFast,
    )
    from vllm import LLM, EngineArgs, SamplingParams, envs
    from vllm.config import CompilationConfig, CompilationMode, CUDAGraphMode, ModelConfig
    from vllm.model_executor.layers.quantization.utils.quant_utils import kFp8StaticTensorSym
    from vllm.model_executor.models import llama as vllm_llama
    from vllm.platforms.interface import DeviceCapability, PlatformEnum
    from vllm.v1.attention import selector
    from vllm.v1.attention.backend import CommonAttentionMetadata
    from vllm.v1.attention.backends import triton_attn
    from vllm.v1.attention.backends.cpu_attn import CPUAttentionBackend, CPUAttentionBackendImpl

    from tokenselect.integrations.options import Options
    from tokenselect.integrations.vllm import (
        BACKEND,
        backend,
        chosen,
        cpu,
        cuda,
        layout,
        metrics,
        steps,
        support,
    )
    from tokenselect.integrations.vllm.metrics import METRICS

    with pytest.MonkeyPatch.context() as patch:  # what a build for the CPU lacks, and nothing uses
        patch.setitem(sys.modules, "vllm._C_stable_libtorch", ModuleType("absent"))
        from vllm.platforms.cuda import CudaPlatformBase

import tokenselect
from examples import serve
from tokenselect import InvalidProblem, SelectConfig, UnsupportedProblem
from tokenselect.integrations.transformers import TokenSelectCache, enable

# vLLM and what it imports warn of their own affairs.
pytestmark = pytest.mark.filterwarnings("ignore")

BLOCK = 32
SIZES: dict[str, Any] = {
    "vocab_size": 211,
    "hidden_size": 64,
    "intermediate_size": 96,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 32,
    "max_position_embeddings": 512,
    "initializer_range": 0.4,
    "pad_token_id": 0,
    "bos_token_id": 1,
    "eos_token_id": None,
}
SMALL: dict[str, Any] = {"k": 8, "n_sink": 2, "n_local": 4}
EVERYTHING: dict[str, Any] = {"k": 512}
Prompt = list[int]


def saved(config: PreTrainedConfig, folder: Path) -> Path:
    """Save a random model in which attention counts, and is spread over many tokens."""
    torch.manual_seed(0)
    model = Auto.from_config(config, dtype=torch.float32)
    with torch.no_grad():
        for name, weight in model.named_parameters():
            weight *= {"q_proj": 0.3, "o_proj": 8.0}.get(name.split(".")[-2], 1.0)
    model.save_pretrained(folder)
    return folder


@pytest.fixture(scope="module")
def llama(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return saved(LlamaConfig(**SIZES), tmp_path_factory.mktemp("llama"))


@pytest.fixture(scope="module")
def gemma(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Every other layer slides, and all have a softcap.

    Its embeddings are small: with large ones it repeats its last token, whatever it attends to.
    """
    sizes = SIZES | {"initializer_range": 0.05}
    config = Gemma2Config(**sizes, sliding_window=24, attn_logit_softcapping=20.0)
    return saved(config, tmp_path_factory.mktemp("gemma"))


@pytest.fixture(scope="module")
def mla(tmp_path_factory: pytest.TempPathFactory) -> Path:
    config = DeepseekV3Config(
        **SIZES | {"head_dim": 64}, kv_lora_rank=64, q_lora_rank=None, qk_rope_head_dim=32,
        qk_nope_head_dim=32, v_head_dim=32, first_k_dense_replace=2, n_routed_experts=4,
        n_group=1, topk_group=1, num_experts_per_tok=1,
    )  # fmt: skip
    folder = tmp_path_factory.mktemp("mla")
    config.architectures = ["DeepseekV3ForCausalLM"]
    config.save_pretrained(folder)
    return folder


def prompts(*lengths: int, seed: int = 0) -> list[Prompt]:
    torch.manual_seed(seed)
    return [torch.randint(2, SIZES["vocab_size"], (n,)).tolist() for n in lengths]


class Engine:
    """An engine that is stepped by hand. options: those of tokenselect; None: stock vLLM."""

    def __init__(self, folder: Path, options: dict[str, Any] | None = None, **more: Any) -> None:
        if options is not None:
            more |= {"attention_backend": BACKEND, "hf_overrides": {"tokenselect": options}}
        given = {
            "dtype": "float32", "max_model_len": 512, "max_num_seqs": 8, "block_size": BLOCK,
            "enforce_eager": True, "skip_tokenizer_init": True, "enable_prefix_caching": False,
            "kv_cache_memory_bytes": 2**26,
        }  # fmt: skip
        self.llm = LLM(str(folder), **given | more)
        self.engine = self.llm.llm_engine
        self.tokens: dict[str, list[int]] = {}

    def add(self, name: str, prompt: Prompt, n: int = 12) -> None:
        params = SamplingParams(temperature=0, max_tokens=n, ignore_eos=True, detokenize=False)
        self.engine.add_request(name, {"prompt_token_ids": prompt}, params)

    def step(self) -> None:
        for out in self.engine.step():
            self.tokens[out.request_id] = list(out.outputs[0].token_ids)

    def finish(self) -> dict[str, list[int]]:
        for _ in range(2000):
            if not self.engine.has_unfinished_requests():
                return self.tokens
            self.step()
        raise AssertionError("requests are stuck")

    def alone(self, prompt: Prompt, n: int = 12) -> list[int]:
        self.add("alone", prompt, n)
        return self.finish().pop("alone")

    def close(self) -> None:
        """End it: of two engines in one process, the end of one ends what both share."""
        self.engine.engine_core.shutdown()
        del self.llm, self.engine
        gc.collect()

    def runner(self) -> Any:
        return self.engine.engine_core.engine_core.model_executor.driver_worker.model_runner

    def impls(self) -> list[Any]:
        layers = self.runner().compilation_config.static_forward_context
        return [layer.impl for layer in layers.values()]

    def builder(self) -> Any:
        return self.runner().attn_groups[0][0].get_metadata_builder()


def reads(
    *, q: Tensor, k: Tensor, v: Tensor, out: Tensor, cu_seqlens_q: Tensor, seqused_k: Tensor,
    block_table: Tensor, softmax_scale: float, window_size: tuple[int, int], softcap: float,
    sinks: Tensor | None, max_seqlen_q: int, **more: Any,
) -> None:  # fmt: skip
    """Attend as `unified_attention` of TRITON_ATTN does, whose kernel takes a GPU."""
    starts, group = cu_seqlens_q.tolist(), q.shape[1] // k.shape[2]
    assert max(b - a for a, b in pairwise(starts)) == max_seqlen_q
    for i, n in enumerate(seqused_k.tolist()):
        at, blocks = slice(starts[i], starts[i + 1]), block_table[i, : -(-n // k.shape[1])]
        held = (x[blocks].flatten(0, 1)[:n].float().transpose(0, 1) for x in (k, v))
        keys, values = (x.repeat_interleave(group, 0) for x in held)
        logits = q[at].transpose(0, 1).float() @ keys.mT * softmax_scale
        if softcap:
            logits = softcap * (logits / softcap).tanh()
        behind = torch.arange(n - (at.stop - at.start), n)[:, None] - torch.arange(n)
        window = n if window_size[0] < 0 else window_size[0]
        logits.masked_fill_((behind < 0) | (behind > window), -torch.inf)
        if sinks is not None:
            logits = torch.cat((logits, sinks[:, None, None].expand(-1, logits.shape[1], 1)), -1)
        out[at] = (logits.softmax(-1)[..., :n] @ values).transpose(0, 1)


def writes(
    key: Tensor, value: Tensor, keys: Tensor, values: Tensor, slots: Tensor, *more: Any
) -> None:
    """Write as `triton_reshape_and_cache_flash` does."""
    at = slots.div(keys.shape[1], rounding_mode="floor"), slots % keys.shape[1]
    keys[at], values[at] = key[: len(slots)], value[: len(slots)]


@pytest.fixture
def end(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> Iterator[str]:
    """Which backend the engine takes. That for CUDA runs on the CPU, but for vLLM's kernels."""
    which: str = getattr(request, "param", "cpu")
    selector._cached_get_attn_backend.cache_clear()
    if which == "cuda":
        monkeypatch.setattr(cpu, "Backend", cuda.Backend)
        monkeypatch.setattr(triton_attn, "unified_attention", reads)
        monkeypatch.setattr(triton_attn, "triton_reshape_and_cache_flash", writes)
    yield which
    selector._cached_get_attn_backend.cache_clear()


on_both = pytest.mark.parametrize("end", ["cpu", "cuda"], indirect=True)


@pytest.fixture
def start(end: str) -> Iterator[Callable[..., Engine]]:
    """Makes engines, each of which ends the one before."""
    made: list[Engine] = []

    def close() -> None:
        for engine in made:
            engine.close()
        made.clear()

    def make(*args: Any, **more: Any) -> Engine:
        close()
        made.append(Engine(*args, **more))
        return made[-1]

    yield make
    close()


def selected_by_transformers(
    folder: Path, prompt: Prompt, options: dict[str, Any], n: int = 12
) -> list[int]:
    model = LlamaForCausalLM.from_pretrained(folder).eval()
    ids = torch.tensor([prompt])
    with enable(model, **options):
        out = model.generate(
            ids, past_key_values=TokenSelectCache(model), max_new_tokens=n, do_sample=False
        )
    return out[0, len(prompt) :].tolist()


def test_without_being_asked_for_nothing_changes(start: Callable[..., Engine], llama: Path) -> None:
    assert {type(impl) for impl in start(llama).impls()} == {CPUAttentionBackendImpl}


@on_both
@pytest.mark.parametrize("model", ["llama", "gemma"])
@pytest.mark.parametrize(
    "options", [EVERYTHING, {**SMALL, "dense_below": 512}, {**EVERYTHING, "theta": 0.9}]
)
def test_tokens_are_those_of_stock_vllm_where_everything_is_read(
    start: Callable[..., Engine],
    model: str,
    options: dict[str, Any],
    request: pytest.FixtureRequest,
) -> None:
    folder, texts = request.getfixturevalue(model), prompts(3, 40, 100, 200)
    told = []
    for given in (None, options):
        engine = start(folder, given, max_num_batched_tokens=64)  # chunks, beside what decodes
        for i, text in enumerate(texts):
            engine.add(str(i), text)
        told.append(engine.finish())
    assert told[0] == told[1]


@on_both
@pytest.mark.parametrize("theta", [None, 0.3])
def test_tokens_are_those_of_transformers_where_few_are_selected(
    start: Callable[..., Engine], llama: Path, theta: float | None, sums: dict[str, float]
) -> None:
    texts = prompts(129, 10, 60, 90)  # a prompt's last chunk is one token
    engine = start(llama, {**SMALL, "theta": theta}, max_num_batched_tokens=64)
    for i, text in enumerate(texts):
        engine.add(str(i), text)
    told = engine.finish()
    assert sums["selecting_tokens"] == 4 * 11  # the first token is the prompt's
    for i, text in enumerate(texts):
        assert told[str(i)] == selected_by_transformers(llama, text, {**SMALL, "theta": theta})
    # The models tell selection from reading all.
    assert told["0"] != start(llama).alone(texts[0])


def look_at_all_calls(worker: Any) -> None:
    """Have a worker, in a process of its own, do what `sums` does here."""
    metrics._EVERY = 1


def counted(worker: Any) -> dict[str, float]:
    """What a worker has counted."""
    return METRICS._sums


@pytest.mark.slow
@pytest.mark.parametrize(
    ("heads", "more"), [(2, {}), (2, {"theta": 0.3}), (1, {"theta": 0.3}), (2, {"scope": "group"})]
)
def test_two_processes_that_share_a_model(
    start: Callable[..., Engine],
    heads: int,
    more: dict[str, Any],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """Each has two query heads, and one of two KV heads or a copy of the only one."""
    monkeypatch.setenv("VLLM_CPU_OMP_THREADS_BIND", "nobind")  # vLLM wants a NUMA node for each
    monkeypatch.setenv("OMP_NUM_THREADS", "1")
    envs.disable_envs_cache()
    folder = saved(LlamaConfig(**SIZES | {"num_key_value_heads": heads}), tmp_path)
    options, texts = SMALL | more, prompts(129, 10, 60, 90)
    engine = start(folder, options, max_num_batched_tokens=64, tensor_parallel_size=2)
    engine.llm.collective_rpc(look_at_all_calls)
    for i, text in enumerate(texts):
        engine.add(str(i), text)
    told = engine.finish()
    first, second = engine.llm.collective_rpc(counted)
    assert (first["selecting_tokens"], second["selecting_tokens"]) == (4 * 11, 0)
    assert (first["sampled_reused_calls"] > 0) == ("theta" in more)
    apart = start(folder, options)
    for i, text in enumerate(texts):
        assert told[str(i)] == apart.alone(text)
    assert told["0"] != start(folder).alone(texts[0])


@pytest.mark.parametrize(("heads", "theta", "told"), [
    (4, None, None), (2, None, "2 KV heads are fewer"), (4, 0.9, "reuse is decided over all heads"),
])  # fmt: skip
def test_kv_heads_that_select_alone_have_all_they_need_on_their_rank(
    heads: int, theta: float | None, told: str | None
) -> None:
    config = SimpleNamespace(
        parallel_config=SimpleNamespace(tensor_parallel_size=4),
        model_config=SimpleNamespace(model_arch_config=[SimpleNamespace(total_num_kv_heads=heads)]),
    )
    options = Options(SelectConfig(scope="group"), theta)
    if told is None:
        assert support.group_of(config, 0, options) is None
    else:
        with pytest.raises(UnsupportedProblem, match=told):
            support.group_of(config, 0, options)


@pytest.fixture
def sums(monkeypatch: pytest.MonkeyPatch) -> dict[str, float]:
    """What is counted from here on, with all calls looked at."""
    monkeypatch.setattr(metrics, "_EVERY", 1)
    METRICS._begin()
    return METRICS._sums


@on_both
@pytest.mark.parametrize("theta", [None, -1.0])  # -1: reused whenever there is something to reuse
def test_streams_do_not_disturb_one_another(
    start: Callable[..., Engine], llama: Path, theta: float | None, sums: dict[str, float]
) -> None:
    """34 streams, 6 at a time, that come while others decode, some of them aborted."""
    options = {**SMALL, "theta": theta, "max_reuse": 7}
    texts = prompts(*(torch.arange(32) * 7 % 23 + 50).tolist(), 3, 150)
    for i in range(8, 32, 4):  # prefixes that others have, in whole blocks and not
        texts[i] = texts[7][: BLOCK + i] + texts[i][:9]
    engine = start(
        llama, options, max_num_seqs=6, max_num_batched_tokens=48, enable_prefix_caching=True
    )
    waiting = [(str(i), text) for i, text in enumerate(texts)]
    lengths = {name: 6 + 7 * int(name) % 23 for name, _ in waiting}
    aborted = {str(i) for i in range(3, 32, 5)}
    while waiting or engine.engine.has_unfinished_requests():
        for name, text in waiting[:2]:
            engine.add(name, text, lengths[name])
        del waiting[:2]
        engine.step()
        for name in aborted & engine.tokens.keys():
            if len(engine.tokens[name]) == 3:
                engine.engine.abort_request([name])
    assert len(engine.tokens) == 34
    assert (sums["sampled_reused_calls"] > 500) == (theta is not None)
    apart = start(llama, options)
    for i, text in enumerate(texts):
        name = str(i)
        told = engine.tokens[name]
        assert len(told) == (3 if name in aborted else lengths[name])
        assert told == apart.alone(text, lengths[name])[: len(told)], name


def test_rows_keep_up_with_requests() -> None:
    """Requests come, wait and go: each finds what it left, and there are rows for few others."""
    rng, rows, lengths = random.Random(0), steps.Rows(), Counter[int]()
    held: list[int | None] = [None]
    before: set[int] = set()
    for _ in range(300):
        now = rng.sample(range(40), rng.choice([0, 1, 2, 5, 30]))
        now += [i for i in before if rng.random() < 0.5 and i not in now]
        lengths.update(now)
        at, is_new, order = rows.step([(i, i, lengths[i]) for i in now])
        if order is not None:
            held = [held[row] for row in order][: rows.capacity]
        held += [None] * (rows.capacity - len(held))
        assert len(set(at)) == len(now)
        assert not now or rows.capacity < 4 * len(now)
        for i, row, new in zip(now, at, is_new, strict=True):
            assert new == (i not in before)
            assert new or held[row] == i
            held[row] = i
        before = set(now)


def test_a_row_is_of_one_request() -> None:
    rows = steps.Rows()
    rows.step([(7, 7, 64)])
    at, is_new, _ = rows.step([(7, 8, 65), (7, 9, 65)])  # both behind a block that they share
    assert (at, is_new) == ([0, 1], [False, True])


def test_a_stream_that_is_left_alone_keeps_its_selections(
    start: Callable[..., Engine], llama: Path
) -> None:
    """It begins in the sixth of 8 rows, and ends in the only one."""
    options = {**SMALL, "theta": -1.0, "max_reuse": 7}
    texts, kept = prompts(30, 31, 32, 33, 34, 90), []
    for named in (texts, texts[-1:]):
        engine = start(llama, options)
        for text in named:
            engine.add(str(len(text)), text, 4 if len(text) < 90 else 30)
        told = engine.finish()["90"]
        caches = [impl.selections for impl in engine.impls()]
        kept.append((told, *([one.hits.tolist(), one.misses.tolist()] for one in caches)))
    assert kept[0] == kept[1]
    assert 0 < kept[0][1][0][0] < 29


def test_two_groups_of_layers_are_counted_once(
    start: Callable[..., Engine], gemma: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Those that slide, which are vLLM's own, and those that select."""
    engine = start(gemma, SMALL)
    monkeypatch.setattr(metrics, "_EVERY", 2)
    METRICS._begin()
    for i, text in enumerate(prompts(60, 70)):
        engine.add(str(i), text, 41)
    engine.finish()
    names = "prompt_steps", "selecting_tokens", "sampled_calls"
    assert [METRICS._sums[name] for name in names] == [2, 2 * 40, 2 * 20]
    builders = [group[0].get_metadata_builder() for group in engine.runner().attn_groups]
    assert sorted(one._divides for one in builders) == [False, True]


@on_both
@pytest.mark.parametrize("options", [EVERYTHING, SMALL])
def test_requests_that_are_preempted_go_on(
    start: Callable[..., Engine], llama: Path, options: dict[str, Any]
) -> None:
    """The cache holds 16 blocks, and five streams grow beyond it.

    A stream has the tokens of one that was given as a prompt what it had to read again.
    """
    options = {**options, "theta": -1.0, "max_reuse": 7}
    texts = prompts(90, 80, 70, 60, 50)
    engine = start(llama, options, num_gpu_blocks_override=17, async_scheduling=False)
    scheduler = engine.engine.engine_core.engine_core.scheduler
    ends: dict[str, list[int]] = {str(i): [] for i in range(len(texts))}
    before = scheduler._preempt_request
    scheduler._preempt_request = lambda request, *more, **named: (
        ends[request.request_id.split("-")[0]].append(request.num_output_tokens),
        before(request, *more, **named),
    )
    for i, text in enumerate(texts):
        engine.add(str(i), text, 60)
    told = engine.finish()
    assert any(ends.values())
    apart = start(llama, options)
    for i, text in enumerate(texts):
        tokens = told[str(i)]
        for begin, end in pairwise(sorted({0, *ends[str(i)], 60})):
            assert tokens[begin:end] == apart.alone(text + tokens[:begin], end - begin)


@on_both
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize("model", ["llama", "gemma"])
def test_what_a_layer_computes(
    start: Callable[..., Engine],
    dtype: str,
    model: str,
    monkeypatch: pytest.MonkeyPatch,
    request: pytest.FixtureRequest,
) -> None:
    """Each request's part of each call, beside the definition over its keys and values in order."""
    kinds: list[str] = []
    forward = backend.Selects.forward

    def held(self: Any, *args: Any, **named: Any) -> Tensor:
        _, q, _, _, kv_cache, metadata = args[:6]
        told = output = forward(self, *args, **named)
        if metadata is None or self._options is None:
            return told
        keys, values = self.rows(kv_cache)
        starts = metadata.query_start_loc.tolist()
        for i, n in enumerate(metadata.seq_lens.tolist()):
            at = slice(starts[i], starts[i + 1])
            blocks = metadata.block_table[i, : -(-n // BLOCK)]
            k, v = (x[blocks].flatten(0, 1)[None, :n].transpose(1, 2) for x in (keys, values))
            is_decoding = at.stop - at.start == 1
            kinds.append("selects" if is_decoding else "dense")
            settings = self._options.select if is_decoding else SelectConfig(k=n)
            right = tokenselect.attention(
                q[at].transpose(0, 1)[None], k, v, **settings, scale=self.scale,
                softcap=self.logits_soft_cap or None, sink_logits=self.sinks,
                backend="reference",
            )[0].transpose(0, 1)  # fmt: skip
            near = {"float32": 1e-5, "bfloat16": 2e-2}[dtype] * float(v.abs().max())
            assert (right.float() - output[at].float()).abs().max() <= near, (kinds[-1], n)
        return told

    monkeypatch.setattr(backend.Selects, "forward", held)
    options = {**SMALL, "layers": {"1": {"k": 20}}} if model == "llama" else SMALL
    folder = request.getfixturevalue(model)
    engine = start(folder, options, dtype=dtype, max_num_batched_tokens=40)
    if model == "llama":
        for impl in engine.impls():  # attention sinks, as gpt-oss has them
            impl.sinks = torch.randn(4)
    for i, text in enumerate(prompts(33, 90, 150, 70)):
        engine.add(str(i), text)
        engine.step()
    engine.finish()
    assert kinds.count("selects") > 40
    assert kinds.count("dense") > 10


def test_a_slot_that_is_none_takes_nothing() -> None:
    cache = torch.zeros(2, 1, 4, 16)
    layout.write(torch.ones(3, 1, 8), 2 * torch.ones(3, 1, 8), cache, torch.tensor([5, -1, 0]))
    keys, values = layout.rows(cache)
    assert [x.sum(dim=(1, 2, 3)).tolist() for x in (keys, values)] == [[8, 8], [16, 16]]
    assert keys[1, 1, 0, 0] == 1
    assert values[0, 0, 0, 0] == 2


@on_both
def test_layers_and_requests_that_stay_dense(start: Callable[..., Engine], llama: Path) -> None:
    text = prompts(55)[0]
    dense = start(llama).alone(text)
    engine = start(llama, {**SMALL, "dense_below": 60, "layers": {"0": "dense"}})
    first, second = engine.impls()
    assert (first._options, second._options.select.k) == (None, 8)
    engine.add("beside", prompts(100, seed=1)[0])  # which selects in the same steps
    told = engine.alone(text)
    assert told[:5] == dense[:5]  # the first 5 are made of 55 to 59 tokens
    assert told != dense


# --- what CUDA has of its own ----------------------------------------------------------------


def metadata_of(lengths: list[int], queries: list[int], **more: Any) -> CommonAttentionMetadata:
    """Return what vLLM tells of a step, with tensors on a device that cannot be read."""
    starts = torch.tensor([0, *queries]).cumsum(0).int()
    return CommonAttentionMetadata(
        query_start_loc=starts.to("meta"), query_start_loc_cpu=starts,
        seq_lens=torch.tensor(lengths, dtype=torch.int32, device="meta"),
        seq_lens_cpu_upper_bound=torch.tensor(lengths), num_reqs=len(lengths),
        num_actual_tokens=sum(queries), max_query_len=max(queries), max_seq_len=max(lengths),
        block_table_tensor=torch.zeros(len(lengths), 16, dtype=torch.int32, device="meta"),
        slot_mapping=torch.zeros(sum(queries), dtype=torch.int64, device="meta"),
        is_prefilling=torch.tensor([count > 1 for count in queries]), **more,
    )  # fmt: skip


@pytest.mark.parametrize("end", ["cuda"], indirect=True)
def test_no_step_waits_for_the_device(start: Callable[..., Engine], llama: Path) -> None:
    """Of a step whose requests are numbered nothing is read that lies on the device."""
    builder = start(llama, {**SMALL, "theta": 0.9, "dense_below": 20}).builder()
    builder.device = torch.device("meta")
    step = metadata_of([90, 10, 100, 64], [1, 1, 1, 64], req_idx=np.array([7, 3, 5, 4]))
    first = builder.build(0, step).tokenselect
    assert [part.metadata.max_query_len for part in first.dense] == [64]
    assert [part.lengths for part in first.decoding] == [[90, 100]]
    # Request 5 went on, and 7 waited; without numbers the block table would have to be read.
    told = builder.build(0, metadata_of([101, 92], [1, 1], req_idx=np.array([5, 7])))
    assert told.tokenselect.dense == []
    with pytest.raises(NotImplementedError, match="meta"):
        builder.build(0, metadata_of([102, 93], [1, 1]))
    for name in ("is_prefilling", "seq_lens_cpu_upper_bound"):
        with pytest.raises(UnsupportedProblem, match="does not say which requests"):
            builder.build(0, step.replace(**{name: None}))


INTERPRETED = """
import json, sys, torch
from types import SimpleNamespace
from triton.backends import backends

# Without a driver vLLM leaves triton alone, and its kernel asks what GPU there is.
backends["cpu"] = SimpleNamespace(driver=SimpleNamespace(is_active=lambda: True))
torch.cuda.get_device_capability = lambda device=None: (9, 0)
import vllm.triton_utils
del backends["cpu"]

from tests.test_vllm import Engine, cpu, cuda
cpu.Backend = cuda.Backend
folder, options, texts = json.loads(sys.argv[1])
engine = Engine(folder, options, max_num_seqs=3, max_num_batched_tokens=32)
for i, text in enumerate(texts):
    engine.add(str(i), text, 4 + i)
assert {type(impl) for impl in engine.impls()} == {cuda.Impl}
print(json.dumps(engine.finish()))
"""


@pytest.mark.parametrize("runner", [0, 1])
def test_all_kernels_interpreted(runner: int, llama: Path) -> None:
    """Those of TRITON_ATTN and of our triton backend, under both model runners of vLLM."""
    texts, options = prompts(40, 20, 9, 33), {**SMALL, "theta": -1.0, "max_reuse": 3}
    told = subprocess.run(
        [sys.executable, "-W", "ignore", "-c", INTERPRETED,
         json.dumps([str(llama), {**options, "backend": "triton"}, texts])],
        env=os.environ | {"TRITON_INTERPRET": "1", "VLLM_USE_V2_MODEL_RUNNER": str(runner)},
        capture_output=True, text=True,
    )  # fmt: skip
    assert told.returncode == 0, told.stderr
    tokens = json.loads(told.stdout.splitlines()[-1])
    for i, text in enumerate(texts):
        assert tokens[str(i)] == selected_by_transformers(llama, text, options, 4 + i)


def test_microbatches_are_refused(llama: Path) -> None:
    config = EngineArgs(model=str(llama)).create_engine_config()
    support.refuse_engine(config)
    config.parallel_config.enable_dbo = True  # vLLM takes it with kernels that are not here
    with pytest.raises(UnsupportedProblem, match="steps in microbatches"):
        support.refuse_engine(config)


def test_hybrids_are_refused(llama: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    config = EngineArgs(model=str(llama)).create_engine_config()
    monkeypatch.setattr(ModelConfig, "is_hybrid", True)
    with pytest.raises(UnsupportedProblem, match="a hybrid of attention"):
        support.refuse_engine(config)


class Gpu(CudaPlatformBase):
    """A GPU by name, which is all that vLLM's choice of a backend asks for."""

    device_name = "an H100"

    @classmethod
    def get_device_capability(cls, device_id: int = 0) -> DeviceCapability:
        return DeviceCapability(9, 0)


class Rocm(Gpu):
    device_name = "another"
    _enum = PlatformEnum.ROCM


@pytest.mark.parametrize("name", ["CUSTOM", BACKEND])
def test_cuda_takes_its_backend_by_name(
    name: str, llama: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    config = EngineArgs(
        model=str(llama), attention_backend=name, hf_overrides={"tokenselect": SMALL}
    ).create_engine_config()
    asked = {"head_size": 32, "dtype": torch.bfloat16, "kv_cache_dtype": "auto"}

    def chosen_on(platform: type, **more: Any) -> Any:
        monkeypatch.setattr(vllm.platforms, "current_platform", platform(), raising=False)
        monkeypatch.setattr(chosen, "current_platform", platform())
        selector._cached_get_attn_backend.cache_clear()
        with vllm.config.set_current_vllm_config(config):
            return selector.get_attn_backend(**asked, **more)

    assert chosen_on(Gpu) is cuda.Backend
    for more in ({"use_mla": True}, {"use_mm_prefix": True}):
        with pytest.raises(ValueError, match="not supported"):
            chosen_on(Gpu, **more)
    with monkeypatch.context() as patch:
        patch.setenv("VLLM_BATCH_INVARIANT", "1")
        with pytest.raises(ValueError, match="batch invariance"):
            chosen_on(Gpu)
    with pytest.raises(UnsupportedProblem, match="the platform another"):
        chosen_on(Rocm)
    config.model_config.hf_config.tokenselect = {"budget": 3}
    with pytest.raises(InvalidProblem, match="option 'budget'"):
        chosen_on(Gpu)
    selector._cached_get_attn_backend.cache_clear()


def test_cuda_graphs_and_quantised_outputs_leave_attention_out() -> None:
    support = cuda.Builder.get_cudagraph_support(None, None)
    compiling = CompilationConfig(mode=CompilationMode.VLLM_COMPILE, splitting_ops=None)
    compiling.set_splitting_ops_for_v1(all2all_backend="")
    compiling.cudagraph_mode = CUDAGraphMode.FULL_AND_PIECEWISE
    compiling.resolve_cudagraph_mode_and_sizes(support, "Backend")
    assert compiling.cudagraph_mode == CUDAGraphMode.PIECEWISE
    assert not cuda.Impl.fused_output_quant_supported(None, kFp8StaticTensorSym)


@pytest.mark.parametrize("end", ["cuda"], indirect=True)
def test_a_cache_of_another_dtype_is_refused(start: Callable[..., Engine], llama: Path) -> None:
    with pytest.raises(InvalidProblem, match="dtype"):
        start(llama, {}, kv_cache_dtype="bfloat16")


# --- what is refused: last, since vLLM imports numba for drafts, and then starts no engine ------


REFUSED: dict[str, tuple[dict[str, Any], dict[str, Any], str]] = {
    "option": ({"budget": 3}, {}, "option 'budget'"),
    "layer": ({"layers": {"2": "dense"}}, {}, "layers names layer 2"),
    "prompts": ({"prefill": "selected"}, {}, "prompts are read densely"),
    "moved keys": ({"positions": "contiguous"}, {}, "vLLM rotates keys"),
    "backend": ({"backend": "nativ"}, {}, "did you mean 'native'"),
    "quantised": ({}, {"kv_cache_dtype": "fp8"}, "kv_cache_dtype=fp8"),
    "latents": ({}, {"model": "mla"}, "multi-head latent attention"),
    "drafts": (
        {},
        {"speculative_config": {"method": "ngram", "num_speculative_tokens": 2,
                                "prompt_lookup_max": 2}},
        "speculative decoding",
    ),
}  # fmt: skip


@pytest.mark.parametrize(
    ("end", "case"),
    [("cuda", "quantised"), *(("cpu", case) for case in REFUSED)],
    indirect=["end"],
)
def test_what_is_refused(
    start: Callable[..., Engine], case: str, request: pytest.FixtureRequest
) -> None:
    options, more, told = REFUSED[case]
    folder = request.getfixturevalue(more.get("model", "llama"))
    more = {name: value for name, value in more.items() if name != "model"}
    with pytest.raises((InvalidProblem, UnsupportedProblem, tokenselect.UnknownBackend)) as error:
        start(folder, options, **more)
    assert told in str(error.value)


def test_a_model_that_brings_its_own_attention(
    start: Callable[..., Engine], llama: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """As MiMo-V2 and openPangu do. vLLM's own is as it was, and with it asked for none starts."""
    monkeypatch.setattr(
        vllm_llama, "Attention", partial(vllm_llama.Attention, attn_backend=CPUAttentionBackend)
    )
    assert {type(impl) for impl in start(llama).impls()} == {CPUAttentionBackendImpl}
    with pytest.raises(UnsupportedProblem, match="chooses how it attends by itself"):
        start(llama, SMALL)


def test_layers_that_another_backend_has(
    start: Callable[..., Engine], llama: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """They are counted as dense where that was asked for, by kind, and refused where not."""
    engine, lines = start(llama, SMALL), []
    config = engine.runner().vllm_config
    layers = config.compilation_config.static_forward_context
    last = list(layers.values())[-1]
    monkeypatch.setattr(last, "impl", None)
    monkeypatch.setattr(backend.logger, "warning_once", lambda *line: lines.append(line))
    built = engine.builder()
    type(built)(built.kv_cache_spec, list(layers)[:-1], config, built.device)
    assert "1 of 2 layers select while decoding (0 slide, 1 dense)" in lines[0][0] % lines[0][1:]
    with pytest.raises(UnsupportedProblem, match=last.layer_name):
        backend.refuse_others(config)
    asked = config.attention_config
    monkeypatch.setattr(asked, "backend_per_kind", {"sliding_window": asked.backend})
    monkeypatch.setattr(asked, "backend", None)
    backend.refuse_others(config)


def test_without_the_plugin_vllm_refuses_to_start(llama: Path) -> None:
    """Not a test of vLLM: absence must not be silent."""
    code = f"""
from vllm import EngineArgs
EngineArgs(model={str(llama)!r}, attention_backend={BACKEND!r}).create_engine_config()
"""
    told = subprocess.run(
        [sys.executable, "-W", "ignore", "-c", code],
        env=os.environ | {"VLLM_PLUGINS": ""}, capture_output=True, text=True,
    )  # fmt: skip
    assert told.returncode != 0
    assert f"Unknown attention backend: '{BACKEND}'" in told.stderr


# --- the server, and its processes ---------------------------------------------------------


@pytest.fixture(scope="module")
def client(llama: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[openai.OpenAI]:
    """A server on the loopback; its log goes where pytest shows it for a test that fails."""
    words = {f"w{i}": i for i in range(SIZES["vocab_size"])}
    tokenizer = Tokenizer(models.WordLevel(words, unk_token="w0"))
    tokenizer.pre_tokenizer = pre_tokenizers.Whitespace()
    PreTrainedTokenizerFast(tokenizer_object=tokenizer, unk_token="w0").save_pretrained(llama)
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    line = serve.command(llama, port, {**SMALL, "theta": 0.3})
    line += ["--dtype", "float32", "--max-model-len", "512", "--block-size", str(BLOCK)]
    line += ["--max-num-seqs", "8", "--max-num-batched-tokens", "64", "--enforce-eager"]
    log = tmp_path_factory.mktemp("server") / "log"
    with log.open("wb") as file, pytest.MonkeyPatch.context() as patch:
        patch.setenv("VLLM_ENABLE_V1_MULTIPROCESSING", "1")
        line += ["--kv-cache-memory-bytes", str(2**26)]
        server = serve.started(line, port, stdout=file, stderr=file)
    try:
        assert "TOKENSELECT IS ACTIVE: 2 of 2 layers" in log.read_text()
        yield openai.OpenAI(base_url=f"http://127.0.0.1:{port}/v1", api_key="-")
    finally:
        server.terminate()
        server.wait(60)


def words(client: openai.OpenAI, text: Prompt, n: int, stop_after: int | None = None) -> list[str]:
    """What is streamed, until the client gives up if it is to."""
    stream = client.completions.create(
        model=serve.NAME, prompt=text, max_tokens=n, temperature=0, stream=True,
        extra_body={"ignore_eos": True, "skip_special_tokens": False},
    )  # fmt: skip
    told = ""
    for at, part in enumerate(stream):
        told += part.choices[0].text
        if at == stop_after:
            stream.close()
            break
    return told.split()


def test_a_server_and_32_clients(client: openai.OpenAI) -> None:
    """Streams at the same time, every fourth given up: each has the words that it gets alone."""
    texts = prompts(*(torch.arange(32) * 11 % 90 + 5).tolist())

    def told(i: int) -> list[str]:
        return words(client, texts[i], 12 + i % 9, 2 if i % 4 == 3 else None)

    with ThreadPoolExecutor(32) as pool:
        together = list(pool.map(told, range(32)))
    for i, text in enumerate(texts):
        alone = words(client, text, 12 + i % 9)
        assert together[i] == alone[: len(together[i])]
        assert i % 4 == 3 or len(together[i]) == len(alone) == 12 + i % 9


@pytest.mark.slow
def test_random_traffic(client: openai.OpenAI, capsys: pytest.CaptureFixture[str]) -> None:
    """Twelve clients that come, go and give up as they like, for TRAFFIC_SECONDS."""
    seconds = float(os.environ.get("TRAFFIC_SECONDS", "30"))
    texts = prompts(*(torch.arange(40) * 29 % 300 + 3).tolist(), seed=1)
    alone = [words(client, text, 60) for text in texts]
    end, counts, sizes = time.monotonic() + seconds, Counter[str](), []

    def memory() -> float:
        """GB of the server's processes."""
        family = psutil.Process().children(recursive=True)
        return sum(one.memory_info().rss for one in family) / 1e9

    def visit(seed: int) -> None:
        rng = random.Random(seed)
        while time.monotonic() < end:
            i, n = rng.randrange(len(texts)), rng.randrange(1, 61)
            stop = rng.randrange(n) if rng.random() < 0.2 else None
            told = words(client, texts[i], n, stop)
            counts["wrong"] += told != alone[i][: len(told)]
            counts["short"] += stop is None and len(told) != n
            counts["given up" if stop is not None else "finished"] += 1
            counts["tokens"] += len(told)
            time.sleep(rng.random() * 0.2)

    with ThreadPoolExecutor(12) as pool:
        visits = [pool.submit(visit, seed) for seed in range(12)]
        while time.monotonic() < end:
            time.sleep(seconds / 10)
            sizes.append(memory())
        for one in visits:
            one.result(fresh.HANG)
    with capsys.disabled():
        print(f"\n{seconds:.0f} s: {dict(counts)}; GB: {', '.join(f'{x:.3f}' for x in sizes)}")
    assert counts["finished"] > 0
    assert counts["wrong"] == counts["short"] == 0
    assert sizes[-1] < 1.05 * sizes[1]


def test_prometheus(client: openai.OpenAI) -> None:
    """What the worker counts shows where the server is asked for it."""

    def counted() -> dict[str, float]:
        text = httpx.get(str(client.base_url).replace("/v1/", "/metrics")).text
        lines = [line.split() for line in text.splitlines() if line.startswith("tokenselect_")]
        return {name: float(value) for name, value in lines}

    before = counted()
    client.completions.create(
        model=serve.NAME, prompt=prompts(100)[0], max_tokens=21, temperature=0,
        extra_body={"ignore_eos": True},
    )  # fmt: skip
    added = {name: value - before[name] for name, value in counted().items()}
    assert added["tokenselect_selecting_tokens_total"] == 20
    assert added["tokenselect_prompt_steps_total"] == 2  # of 64 tokens
    calls = added["tokenselect_sampled_calls_total"]
    assert calls in (2, 4)  # two layers, one step of 16
    cached = added["tokenselect_sampled_cached_tokens_total"]
    assert 100 < cached / calls < 121
    assert 0 < added["tokenselect_sampled_attended_tokens_total"] < cached
