"""The page docs/benchmarks.md: bench/page.md, with the figures of bench/results/*.json in it."""

import json
from pathlib import Path
from typing import Any

from bench.gpu import page as gpu
from bench.tables import of_columns

RESULTS = Path(__file__).parent / "results"
TEXT = Path(__file__).with_name("page.md")

_DETAILS = (
    ("", "{called}"),
    ("ms", "{median_ms:.2f} ({min_ms:.2f}–{max_ms:.2f})"),
    ("MB", "{megabytes:.1f}"),
    ("GB/s", "{gb_per_s:.1f}"),
    ("of read", "{of_read:.0%}"),
    ("error / tolerance", "{verdict}"),
)
_RATIO = "{{{0}[median]:.3f}} ({{{0}[min]:.3f}}–{{{0}[max]:.3f}})"
_OVERVIEW = (
    *(
        ("workload", "{name}"),
        ("backend", "{backend}"),
        ("retained mass", "{mass[min]:.3f}, {mass[mean]:.3f}"),
    ),
    *(
        (f"{of} / {role}", _RATIO.format(f"{of} / {role}"))
        for of in ("fresh", "reused")
        for role in ("best dense", "best dense call")
    ),
)


def page(results: Path = RESULTS) -> str:
    """Return the page as Markdown. Raises `bench.gpu.page.Refused`, with the file's name."""
    reports, on_gpus = [], []
    for path in sorted(results.glob("*.json")):
        report = json.loads(path.read_text("utf-8"))
        if report.get("kind") == "quality":  # docs/quality.md has it
            continue
        if report.get("kind") != "gpu":
            reports.append(report)
            continue
        try:
            gpu.accept(report)
        except gpu.Refused as refused:
            raise gpu.Refused(f"{path}: {refused}") from None
        on_gpus.append(report)
    on_cpus = "\n\n".join(map(_section, reversed(reports)))
    return TEXT.read_text("utf-8").format(gpus=gpu.section(on_gpus), cpus=on_cpus)


def _section(report: dict[str, Any]) -> str:
    parts = [headline(report), overview(report)]
    parts += [workload_tables(result, report["machine"]) for result in report["workloads"]]
    return "\n".join(parts)


def headline(report: dict[str, Any]) -> str:
    """Return where and how a run was made."""
    host = report["machine"]
    return (
        f"### {report['date']}: {host['cpu']}, {host['threads']} thread(s)\n\n"
        f"`{report['command'].strip()}` at {host['commit']} on {host['cores']} cores, "
        f"{host['isa']}; torch {host['torch']}, python {host['python']}; read bandwidth "
        f"{host['read_gb_per_s']:.1f} GB/s; load average at the start "
        f"{host['load_at_start']:.1f}.\n"
    )


def overview(report: dict[str, Any], is_padded: bool = False) -> str:
    """Return the table of retained mass and ratios, one line per workload."""
    lines = []
    for result in report["workloads"]:
        ratios = {f"{r['of']} / {r['role']}": r for r in result["ratios"]}
        # Where the best dense attention is a single call, it is named once.
        single = {
            f"{of} / best dense call": ratios[f"{of} / best dense"] for of in ("fresh", "reused")
        }
        named = {"name": result["name"], "backend": result["backend"]}
        lines.append(named | {"mass": result["retained_mass"], **single, **ratios})
    return "\n".join(of_columns(lines, _OVERVIEW, is_padded=is_padded))


def workload_tables(result: dict[str, Any], host: dict[str, Any], is_padded: bool = False) -> str:
    """Return one workload's facts and times."""
    share = result["checks"]["share_of_tolerance_at_k_all"]
    facts = (
        f"{result['inputs']}; {result['attended']} tokens attended to; with k for everything, "
        f"the error is {share:.2f} of the tolerance; {result['on_cpu']:.2f} threads ran at a time; "
        f"peak memory {result['peak_memory_gib']:.1f} GiB, checks included."
    )
    lines = [
        one
        | {"called": one["name"] if one["kind"] != "stage" else f"… {one['name']}"}
        | {"megabytes": one["bytes"] / 1e6, "verdict": _verdict(one)}
        | {"of_read": one["gb_per_s"] / host["read_gb_per_s"]}
        for one in result["contenders"]
    ]
    table = of_columns(lines, _DETAILS, is_padded=is_padded)
    return "\n".join([f"\n#### {result['name']}\n\n{facts}\n", *table])


def _verdict(contender: dict[str, Any]) -> str:
    if contender["kind"] != "dense":
        return ""
    share = contender["share_of_tolerance"]
    is_baseline = contender["is_baseline"]
    return f"{share:.2f}" if is_baseline else f"not a baseline: error {share:.1f} × the tolerance"
