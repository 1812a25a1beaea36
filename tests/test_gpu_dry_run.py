"""A dry run of the GPU benchmark, as it is called; one for all tests here."""

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from bench import page as whole_page
from bench.gpu import cases, page
from tests import fresh

pytestmark = pytest.mark.slow

DryRun = tuple[str, dict[str, Any], Path]


@pytest.fixture(scope="module")
def dry_run(tmp_path_factory: pytest.TempPathFactory) -> DryRun:
    """What it printed, its JSON and its folder."""
    folder = tmp_path_factory.mktemp("dry")
    arguments = ["--dry-run", "--quick", "--seconds", "1500", "--out", str(folder / "results")]
    done = subprocess.run(
        [sys.executable, "-m", "bench.gpu", *arguments],
        cwd=fresh.ROOT,
        env={**os.environ, "OUT": str(folder / "out")},
        capture_output=True,
        text=True,
        timeout=fresh.HANG,
    )
    assert done.returncode == 0, done.stdout + done.stderr
    (path,) = (folder / "results").glob("*-gpu.json")
    assert (folder / "out" / path.name).read_text("utf-8") == path.read_text("utf-8")
    return done.stdout, json.loads(path.read_text("utf-8")), folder


def test_a_dry_run_goes_through_everything(dry_run: DryRun) -> None:
    said, found, folder = dry_run
    assert [found[name] for name in ("kind", "dry_run", "quick")] == ["gpu", True, True]
    assert found["finished"]
    assert found["green"]
    checked = {check["name"]: check["status"] for check in found["checks"]}
    assert checked == {
        **dict.fromkeys(("tokenselect.check", "determinism", "graphs", "models"), "passed"),
        **dict.fromkeys(("memcheck", "racecheck", "properties"), "skipped"),
    }
    assert "properties: SKIPPED: left out by --quick" in said
    wanted = [case.name for case in cases.cases(quick=True, dry=True)]
    assert [case["name"] for case in found["cells"]] == wanted
    assert not found["left_out"]
    section = (folder / "results" / "page.md").read_text("utf-8")
    for case in found["cells"]:
        assert case["name"] in said
        assert f"#### {case['name']}" in section
        is_decode = case["kind"] == "decode"
        roles = {"whole", "stage", "dense", "gathered", "topk", "copy"}
        roles |= {"planned"} if is_decode else set()
        assert {side["role"] for side in case["sides"]} == roles
        for of in ("fresh", "attend", "select", *(("hit", "miss", "mixed") if is_decode else ())):
            for mode in page.MODES:
                assert any(r["of"] == of and r["mode"] == mode for r in case["ratios"])
        for side in case["sides"]:
            assert (
                side["role"] not in ("whole", "stage") or side["bytes_by"] == "read, by bench.run"
            )
            for times in (side[mode] for mode in page.MODES if mode in side):
                assert 0 < times["p10_us"] <= times["median_us"] <= times["p90_us"]
        moved = {side["name"]: side["bytes"] for side in case["sides"]}
        assert moved["fresh"] == moved["score"] + moved["attend"] > moved["select"] > 0


def test_planned_steps_are_told_with_how_they_were_made(dry_run: DryRun) -> None:
    _, found, _ = dry_run
    first, longest = found["cells"][:2]
    planned = {s["name"]: s["calls"] for s in first["sides"] if s["role"] == "planned"}
    assert planned == {"hit": 2, "hit, one layer": 1, "miss": 2, "mixed": 10}
    assert first["reuse"]["layers"] == first["reuse"]["kv_copies"] == 2
    assert first["reuse"]["share_of_tolerance"] <= 1
    (short,) = {(r["to"], r["role"]) for r in longest["ratios"] if r["of"] == "short"}
    assert short == ("short, own capacity", "planned")


def test_what_does_not_run_is_listed_with_its_error(dry_run: DryRun) -> None:
    said, found, folder = dry_run
    sides = found["cells"][0]["sides"]
    failed = {side["name"]: side["error"] for side in sides if "error" in side}
    assert "sdpa cudnn, enable_gqa" in failed
    section = (folder / "results" / "page.md").read_text("utf-8")
    for name, error in failed.items():
        assert f"| {name} | {error[:60]}" in section
        assert error[:60] in said


def test_the_page_refuses_a_dry_run(dry_run: DryRun, tmp_path: Path) -> None:
    (tmp_path / "2000-01-01-dry-run-gpu.json").write_text(json.dumps(dry_run[1]))
    with pytest.raises(page.Refused, match=r"2000-01-01-dry-run-gpu\.json: a dry run"):
        whole_page.page(tmp_path)
