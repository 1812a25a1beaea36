"""What every task works with: the model, its tokenizer, and the cells of a plan."""

import hashlib
import json
import os
from collections.abc import Mapping
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import Any

import torch

from bench.quality import texts
from bench.quality.ways import Way

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
        # transformers reads it when it is imported: models come from folders, never from a hub.
        os.environ.setdefault("HF_HUB_OFFLINE", "1")
        from tokenselect.demo.model import default_model, find_gguf

        self.path = default_model() if path is None else path
        self.gguf_file = find_gguf(self.path, gguf_file)
        self.dtype = dtype
        self._tokens: dict[str, tuple[int, ...]] = {}
        self._offsets: dict[str, list[int]] = {}

    @cached_property
    def _loaded(self) -> tuple[Any, Any]:
        from tokenselect.demo.model import load

        return load(self.path, self.gguf_file, getattr(torch, self.dtype))

    @cached_property
    def model(self) -> Any:
        return self._loaded[0]

    @cached_property
    def tokenizer(self) -> Any:
        return self._loaded[1]

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
    def trained(self) -> int | None:
        """The length that the model was trained for, as its config says."""
        return getattr(self.model.config, "max_position_embeddings", None)

    def describe(self) -> dict[str, Any]:
        config = self.model.config
        return {
            "name": self.path.name,
            "file": self.gguf_file,
            "sha256": self.fingerprint,
            "architecture": type(self.model).__name__,
            "layers": config.num_hidden_layers,
            "heads": config.num_attention_heads,
            "kv_heads": config.num_key_value_heads,
            "trained_length": self.trained,
            "dtype": str(self.model.dtype).removeprefix("torch."),
        }


def fed(model: Any, cache: Any, ids: tuple[int, ...], keep: int = 1) -> torch.Tensor:
    """Feed tokens to a model; return the logits (keep, vocabulary) of the last `keep`."""
    inputs = torch.tensor([ids])
    out = model(input_ids=inputs, past_key_values=cache, use_cache=True, logits_to_keep=keep)
    logits: torch.Tensor = out.logits[0]
    return logits


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
