"""What cells ran on and with."""

import json
import platform
import subprocess
from collections import Counter
from collections.abc import Mapping, Sequence
from datetime import date
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

import torch

import bench.run

ROOT = Path(__file__).parents[2]
_PACKAGES = ("torch", "transformers", "tokenizers", "numpy", "lm_eval")


def conditions() -> dict[str, Any]:
    """Those of this process; every cell keeps them."""
    return {
        "date": date.today().isoformat(),
        "cpu": bench.run._cpu(),
        "threads": torch.get_num_threads(),
        "versions": {"python": platform.python_version()} | dict(_installed()),
        "commit": git("rev-parse", "--short=12", "HEAD") + _changed("tokenselect", "bench/quality"),
    }


def together(records: Sequence[Mapping[str, Any]]) -> list[dict[str, Any]]:
    """The different conditions that these records keep, each with the number of its cells."""
    count = Counter(json.dumps(record["ran"], sort_keys=True) for record in records)
    return [json.loads(ran) | {"cells": cells} for ran, cells in sorted(count.items())]


def source_tree() -> str:
    """What of tokenselect/ runs: git's hash of the committed tree, "+" if it was changed since."""
    return git("rev-parse", "--short=12", "HEAD:tokenselect") + _changed("tokenselect")


def git(*arguments: str) -> str:
    """What git says of this checkout; "unknown" where there is none."""
    command = ["git", "-C", str(ROOT), *arguments]
    try:
        return subprocess.run(command, capture_output=True, text=True, check=True).stdout.strip()
    except (OSError, subprocess.CalledProcessError):
        return "unknown"


def _changed(*folders: str) -> str:
    changes = git("status", "--porcelain", "--untracked-files=no", "--", *folders)
    return "+" if changes not in ("", "unknown") else ""


def _installed() -> list[tuple[str, str]]:
    found = []
    for name in _PACKAGES:
        try:
            found.append((name, version(name)))
        except PackageNotFoundError:
            assert name == "lm_eval", name
    return found
