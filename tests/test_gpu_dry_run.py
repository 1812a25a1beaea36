"""A dry run of the GPU benchmark, as it is called; one for all tests here."""

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from bench import page as whole_page
from bench.gpu import page, plan
from tests import fresh

pytestmark = pytest.mark.slow


@pytest.fixture(scope="module")
def dry_run(tmp_path_factory: pytest.TempPathFactory) -> tuple[str, dict[str, Any], Path]:
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
    return done.stdout, json.loads(path.read_text("utf-8")), folder


def test_a_dry_run_goes_through_everything(dry_run: tuple[str, dict[str, Any], Path]) -> None:
    said, found, folder = dry_run
    assert found["kind"] == "gpu"
    assert found["dry_run"]
    assert found["quick"]
    assert found["finished"]
    assert found["green"]
    checked = {check["name"]: check["status"] for check in found["checks"]}
    assert checked == {
        **dict.fromkeys(("tokenselect.check", "determinism", "graphs"), "passed"),
        **dict.fromkeys(("memcheck", "racecheck", "properties"), "skipped"),
    }
    assert "properties: SKIPPED: left out by --quick" in said
    wanted = [cell.name for cell in plan.cells(quick=True, dry=True)]
    assert [cell["name"] for cell in found["cells"]] == wanted
    assert not found["left_out"]
    for cell in found["cells"]:
        assert cell["name"] in said
        is_decode = cell["kind"] == "decode"
        assert {side["role"] for side in cell["sides"]} == {
            *("whole", "stage", "dense", "gathered", "topk", "copy"),
            *(("planned",) if is_decode else ()),
        }
        compared = ("fresh", "attend", "select")
        for of in (*compared, *(("hit", "miss", "mixed") if is_decode else ())):
            for mode in ("graph", "eager"):
                assert any(r["of"] == of and r["mode"] == mode for r in cell["ratios"])
        for side in cell["sides"]:
            for mode in ("graph", "eager"):
                if mode in side:
                    times = side[mode]
                    assert 0 < times["p10_us"] <= times["median_us"] <= times["p90_us"]
    assert (folder / "out" / next((folder / "results").glob("*.json")).name).exists()
    section = (folder / "results" / "page.md").read_text("utf-8")
    assert all(f"#### {name}" in section for name in wanted)
    assert f"| {wanted[1]} |" in section.split("planned, µs a call, graph")[1]
    assert "planned, µs a layer as graphs" in said


def test_planned_steps_are_told_with_how_they_were_made(
    dry_run: tuple[str, dict[str, Any], Path],
) -> None:
    _, found, _ = dry_run
    first, longest = found["cells"][:2]
    names = ["hit", "hit, one layer", "miss", "mixed"]
    planned = {s["name"]: s for s in first["sides"] if s["role"] == "planned"}
    assert list(planned) == names
    assert [planned[name]["calls"] for name in names] == [2, 1, 2, 10]
    assert all(mode in side for side in planned.values() for mode in ("graph", "eager"))
    assert first["reuse"]["layers"] == first["reuse"]["kv_copies"] == 2
    assert first["reuse"]["share_of_budget"] <= 1
    (short,) = {(r["to"], r["role"]) for r in longest["ratios"] if r["of"] == "short"}
    assert short == ("short, own capacity", "planned")


def test_what_does_not_run_is_listed_with_its_error(
    dry_run: tuple[str, dict[str, Any], Path],
) -> None:
    said, found, folder = dry_run
    decode = found["cells"][0]
    failed = {side["name"]: side["error"] for side in decode["sides"] if "error" in side}
    assert "sdpa cudnn, enable_gqa" in failed
    section = (folder / "results" / "page.md").read_text("utf-8")
    for name, error in failed.items():
        assert name in said
        assert error[:60] in said
        assert error[:60] in section


def test_the_page_refuses_a_dry_run(
    dry_run: tuple[str, dict[str, Any], Path], tmp_path: Path
) -> None:
    (tmp_path / "2000-01-01-dry-run-gpu.json").write_text(json.dumps(dry_run[1]))
    with pytest.raises(page.Refused, match=r"2000-01-01-dry-run-gpu\.json: a dry run"):
        whole_page.page(tmp_path)
