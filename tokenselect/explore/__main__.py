"""`python -m tokenselect.explore`: needs the extra `transformers`."""

import argparse
import os
import sys
import textwrap
import warnings
from collections.abc import Sequence
from contextlib import redirect_stderr
from io import StringIO
from pathlib import Path
from typing import Any

from tokenselect.contract import SelectConfig
from tokenselect.errors import InvalidProblem, TokenSelectError
from tokenselect.integrations.options import Options, check

LARGEST = 8_000_000


def parse(arguments: Sequence[str] | None) -> argparse.Namespace:
    """Parse the command line."""
    parser = argparse.ArgumentParser(
        prog="python -m tokenselect.explore",
        description="Let a model read a text, and write one HTML page of what each decode step "
        "read: the votes of every layer and head, the selection, and what it left out.",
        formatter_class=argparse.ArgumentDefaultsHelpFormatter,
    )
    add = parser.add_argument
    add("--model", type=Path, required=True, help="folder of a model of transformers")
    add("--gguf-file", help="GGUF file in that folder; else the only one, if there is no config")
    add("--text", type=Path, required=True, help="text file; it is read from the beginning")
    add("--title", help="what to call the text; else the name of the file")
    add("--name", help="what to call the model; else the name of its folder")
    add("--out", type=Path, default=Path("explorer.html"), help="the page")
    add("--context", type=int, default=640, help="tokens that are read densely")
    add("--steps", type=int, default=16, help="tokens after them, read one by one with selection")
    add("--k", type=int, default=64, help="tokens selected by vote")
    add("--n-sink", type=int, default=4, help="first tokens, always selected")
    add("--n-local", type=int, default=32, help="newest tokens, always selected")
    add("--theta", type=float, help="reuse a selection while queries are that alike")
    add("--max-reuse", type=int, default=64, help="for at most so many tokens")
    add(
        "--layers",
        type=int,
        nargs="+",
        metavar="N",
        help="layers to keep, from 0 on or -1 back; else all that select",
    )
    return parser.parse_args(arguments)


def main(arguments: Sequence[str] | None = None) -> int:
    """Write a page; return the exit code: 0, or 2 with a message on stderr."""
    options = parse(arguments)
    # transformers reads it when it is imported: models come from folders, never from a hub.
    os.environ.setdefault("HF_HUB_OFFLINE", "1")
    try:
        page = make(options)
        options.out.write_text(page, "utf-8")
    except (TokenSelectError, OSError, ModuleNotFoundError) as error:
        print(f"tokenselect.explore: {error}", file=sys.stderr)
        return 2
    print(f"{options.out}: {len(page.encode()) / 1e6:.1f} MB; open it in a browser")
    return 0


def make(options: argparse.Namespace) -> str:
    """Return the page of a command line."""
    config = SelectConfig(k=options.k, n_sink=options.n_sink, n_local=options.n_local)
    check(Options(config, options.theta, options.max_reuse))
    if options.out.is_dir() or not options.out.parent.is_dir():
        raise InvalidProblem(
            f"--out {options.out}",
            "the page is a file, in a folder that is there",
            "name a file, and make its folder first",
        )
    from tqdm import tqdm

    from tokenselect.explore.page import draw, size
    from tokenselect.explore.record import check_lengths, record

    check_lengths(options.context, options.steps, config)
    try:
        text = options.text.read_text("utf-8")
    except UnicodeDecodeError as error:
        raise InvalidProblem(
            f"--text {options.text}: {error}", "a text is UTF-8", "convert the file"
        ) from error
    model, tokenizer = load(options.model, options.gguf_file)
    ids = tokenizer(text)["input_ids"]
    n = options.context + options.steps
    if len(ids) < n:
        raise InvalidProblem(
            f"{options.text}: {len(ids)} tokens",
            f"context and steps take {options.context} + {options.steps} tokens of the text",
            "give a longer text, or less of --context and --steps",
        )
    shape = model.config.get_text_config(decoder=True)
    n_layers = len(options.layers or range(shape.num_hidden_layers))
    needed = size(n_layers, shape.num_attention_heads, options.steps, n)
    if needed > LARGEST:
        raise InvalidProblem(
            f"{n_layers} layers of {shape.num_attention_heads} heads, {options.steps} steps and "
            f"{n} tokens: {needed / 1e6:.1f} MB",
            f"a page takes up to {LARGEST / 1e6:.0f} MB, so that browsers open it at once",
            "give less of --steps, --context or --layers",
        )
    with tqdm(total=3 * n, unit="token", desc="reading") as bar:
        trace = record(
            model,
            ids[:n],
            options.steps,
            config,
            theta=options.theta,
            max_reuse=options.max_reuse,
            layers=options.layers,
            tick=bar.update,
        )
    with tqdm(total=len(trace.layers), unit="layer", desc="drawing") as bar:
        return draw(
            trace,
            lambda token: tokenizer.decode([token]),
            model=options.name or options.model.resolve().name,
            title=options.title or options.text.name,
            tick=bar.update,
        )


def load(folder: Path, gguf_file: str | None) -> tuple[Any, Any]:
    """Load a model in float32, and its tokenizer."""
    from transformers import AutoModelForCausalLM, AutoTokenizer
    from transformers.utils import logging

    if not folder.is_dir():
        raise InvalidProblem(
            f"--model {folder}", "a model is a folder; nothing is downloaded", "give its folder"
        )
    if gguf_file is None and not (folder / "config.json").exists():
        names = sorted(path.name for path in folder.glob("*.gguf"))
        if len(names) != 1:
            raise InvalidProblem(
                f"--model {folder}: no config.json and {len(names)} GGUF files",
                "a folder holds a model that transformers wrote, or one GGUF file",
                "name the file: --gguf-file",
            )
        gguf_file = names[0]
    logging.disable_progress_bar()
    given = {} if gguf_file is None else {"gguf_file": gguf_file}
    try:
        with redirect_stderr(StringIO()), warnings.catch_warnings():
            warnings.simplefilter("ignore")
            model = AutoModelForCausalLM.from_pretrained(folder, dtype="float32", **given)
            tokenizer = AutoTokenizer.from_pretrained(folder, **given)
    except Exception as error:  # transformers raises anything, by what is wrong in the folder
        raise InvalidProblem(
            f"--model {folder}: {type(error).__name__}: {textwrap.shorten(str(error), 300)}",
            "transformers loads a causal language model and its tokenizer from the folder",
            "give the folder of such a model, complete",
        ) from error
    return model.eval(), tokenizer


if __name__ == "__main__":
    sys.exit(main())
