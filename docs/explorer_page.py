"""Make the explorer's page of the site, of the model and the text that the demo reads."""

import sys
from pathlib import Path

from examples.demo.model import default_model
from examples.demo.text import read_text
from tokenselect.explore.__main__ import main

if __name__ == "__main__":
    page = Path(sys.argv[1])
    page.parent.mkdir(parents=True, exist_ok=True)
    title, text = read_text("kjv")
    (page.parent.parent / "kjv.txt").write_text(text[:20_000], "utf-8")
    given = {
        "--model": str(default_model()),
        "--name": "SmolLM2-135M-Instruct",
        "--text": str(page.parent.parent / "kjv.txt"),
        "--title": title,
        "--out": str(page),
    }
    sys.exit(main([part for pair in given.items() for part in pair]))
