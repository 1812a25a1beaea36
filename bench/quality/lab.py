"""What every task works with: the model, its tokenizer, and the cells of a plan."""

import hashlib
import json
import os
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from copy import deepcopy
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import Any

import torch
from transformers.cache_utils import DynamicLayer

from bench.quality import texts
from bench.quality.model import find, load_model, load_tokenizer
from bench.quality.ways import Way
from examples.demo.model import named
from tokenselect.integrations.transformers import TokenSelectCache
from tokenselect.integrations.transformers.cache import GrowableLayer

# What a version of the tasks computes. Raise it when the same cell would get another value.
VERSION = 1


@dataclass(frozen=True)
class Cell:
    """The least that is computed, kept and never computed again.

    task     the module that runs it
    key      everything that decides its value, JSON
    label    what people call it: way, budget, context, document, ...
    work     cells of one work share something costly, and are run together
    seconds  about how long it takes on one core; only the bar and the parts go by it
    way, given   what the task needs to run it
    """

    task: str
    key: Mapping[str, Any]
    label: Mapping[str, Any]
    work: str
    seconds: float
    way: Way
    given: Any = field(default=None, repr=False)

    @property
    def sha(self) -> str:
        """The name under which the value is kept."""
        content = {"version": VERSION, "task": self.task, **self.key}
        return texts.sha(json.dumps(content, sort_keys=True))


class Lab:
    """One model and its tokenizer, read when first needed, on the CPU in `dtype`."""

    def __init__(
        self, path: Path | None = None, gguf_file: str | None = None, dtype: str = "float32"
    ) -> None:
        self.path, self.gguf_file = find(path, gguf_file)
        self.dtype = dtype
        self._tokens: dict[str, tuple[int, ...]] = {}
        self._offsets: dict[str, list[int]] = {}

    @cached_property
    def model(self) -> Any:
        return load_model(self.path, self.gguf_file, getattr(torch, self.dtype))

    @cached_property
    def tokenizer(self) -> Any:
        return load_tokenizer(self.path, self.gguf_file)

    @cached_property
    def fingerprint(self) -> str:
        """sha256 of the model's files: the GGUF file, or all files of the folder by name."""
        digest = hashlib.sha256()
        names = [self.gguf_file] if self.gguf_file else sorted(os.listdir(self.path))
        for name in names:
            if (self.path / name).is_file():
                digest.update(name.encode())
                with (self.path / name).open("rb") as file:
                    while block := file.read(1 << 20):
                        digest.update(block)
        return digest.hexdigest()

    @property
    def key(self) -> dict[str, str]:
        """What of a cell's key the model decides."""
        return {"model": self.fingerprint, "dtype": self.dtype}

    def tokenize(self, text: str) -> tuple[int, ...]:
        """Token ids, with what the tokenizer itself puts at the start; each text is done once."""
        name = texts.sha(text)
        if name not in self._tokens:
            self._tokens[name] = tuple(self.tokenizer(text, verbose=False)["input_ids"])
        return self._tokens[name]

    def encode(self, text: str) -> list[int]:
        """Token ids of a text, and nothing else."""
        return list(self.tokenizer(text, add_special_tokens=False, verbose=False)["input_ids"])

    def offsets(self, text: str) -> list[int]:
        """Where in a text each of its tokens ends."""
        name = texts.sha(text)
        if name not in self._offsets:
            encoded = self.tokenizer(
                text, add_special_tokens=False, return_offsets_mapping=True, verbose=False
            )
            self._offsets[name] = [end for _, end in encoded["offset_mapping"]]
        return self._offsets[name]

    def documents(
        self, names: tuple[str, ...], split: str, count: int, length: int
    ) -> list[texts.Document]:
        return texts.documents(self.tokenize, names, split, count, length)

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

    @property
    def selects(self) -> bool:
        """Whether the model has a layer of full attention: no other selects."""
        return any(
            isinstance(layer, GrowableLayer) for layer in TokenSelectCache(self.model).layers
        )

    def describe(self) -> dict[str, Any]:
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


def fed(model: Any, cache: Any, ids: tuple[int, ...], keep: int = 1) -> torch.Tensor:
    """Feed tokens to a model; return the logits (keep, vocabulary) of the last `keep`."""
    inputs = torch.tensor([ids])
    given = named(model, cache)
    out = model(input_ids=inputs, **given, use_cache=True, logits_to_keep=keep)
    logits: torch.Tensor = out.logits[0]
    return logits


@contextmanager
def rewound(cache: Any) -> Iterator[None]:
    """What is fed to a cache inside the block is forgotten after it."""
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


def of_document(
    lab: Lab,
    task: str,
    document: texts.Document,
    context: int,
    way: Way,
    seconds: float,
    **more: Any,
) -> Cell:
    """The cell of a task that reads one document one way."""
    read = {"document": document.id, "sha": document.sha, "context": context, **more}
    label = {"context": context, "document": document.id, **more}
    return Cell(
        task=task,
        key=lab.key | read | {"way": way.key},
        label=label | way.label | {"kind": way.kind, "size": way.size},
        work=f"{task} {document.sha} {context} {more}",
        seconds=seconds,
        way=way,
        given=document,
    )
