"""Hold a backend to the laws: python -m tokenselect.conformance my_module:BACKEND.

Prints a line per law: passed, FAILED, or beyond what the backend declares. Below a failure stand
the problem, as Python that makes it again, and the disagreement.

Exit code 0: no law failed, and at least half of them had problems that the backend takes. 1: a law
failed, or too few were tried. 2: there is no such backend or law.
"""

import argparse
import os
import sys
from typing import TYPE_CHECKING

import torch

if TYPE_CHECKING:
    from tokenselect.conformance.laws.verdict import Verdict

_SAID = {"passed": "passed", "failed": "FAILED", "beyond": "beyond what it declares"}


def line(found: "Verdict") -> str:
    """Return what became of a law, in a line; and where it failed, below that."""
    text = f"{found.law:<68} {_SAID[found.became]}"
    if found.became == "passed":
        beyond = f", and {found.unable} beyond what it declares" if found.unable else ""
        text += f"  {found.ran} problem{'s' * (found.ran != 1)}{beyond}"
    if found.error is not None:
        text += f"\n    {found.case!r}\n    {type(found.error).__name__}: {found.error}"
    return text


def main(arguments: list[str] | None = None) -> int:
    """Print the report; return the exit code."""
    parser = argparse.ArgumentParser(
        prog="python -m tokenselect.conformance",
        description="Hold a backend to the laws, on problems that Hypothesis draws.",
    )
    parser.add_argument("backend", help="package.module:ATTRIBUTE, or a registered name")
    parser.add_argument(
        "--examples", type=int, default=50, metavar="N", help="problems drawn per law (50)"
    )
    parser.add_argument(
        "--law", action="append", metavar="NAME", help="try this one only; may be repeated"
    )
    parser.add_argument(
        "--few-shapes",
        action="store_true",
        help="for a device on which every other shape is a kernel to compile",
    )
    options = parser.parse_args(arguments)
    if options.examples < 1:
        parser.error("--examples is at least 1")
    if not torch.cuda.is_available():
        # To be set before triton is imported; it then computes the same on the CPU, slowly.
        os.environ.setdefault("TRITON_INTERPRET", "1")
    try:
        from hypothesis import settings
    except ModuleNotFoundError:
        parser.error("the laws need hypothesis: pip install tokenselect[conformance]")
    from tokenselect.conformance import laws  # noqa: F401  # registers them
    from tokenselect.conformance.laws.law import LAWS
    from tokenselect.conformance.laws.verdict import backend_of, hardly_tried, seeded, verdict

    known = {law.name: law for law in LAWS}
    for name in options.law or ():
        if name not in known:
            parser.error(f"there is no law {name!r}; there are {', '.join(known)}")
    try:
        backend = backend_of(options.backend)
    except Exception as error:  # a module's import may raise anything
        parser.error(f"{options.backend}: {type(error).__name__}: {error}")
    tried = seeded(options.examples)
    if options.few_shapes:
        settings.register_profile("device", tried)
        settings.load_profile("device")

    verdicts = []
    for name in dict.fromkeys(options.law or known):
        verdicts.append(verdict(known[name], backend, tried))
        print(line(verdicts[-1]), flush=True)
    wrong = [found.law for found in verdicts if found.became == "failed"]
    had_problems = [found.law for found in verdicts if found.became != "beyond"]
    print()
    if wrong:
        print(f"WRONG: {backend.name} breaks {len(wrong)} of {len(verdicts)} laws")
        return 1
    why = None
    if options.law is None:
        why = hardly_tried(had_problems)
    elif not had_problems:
        why = "all of it is beyond what it declares"
    if why is not None:
        print(f"WRONG: {backend.name} proves nothing: {why}")
        return 1
    print(f"all right: {backend.name} keeps {len(had_problems)} laws, "
          f"{len(verdicts) - len(had_problems)} are beyond what it declares")  # fmt: skip
    own = {"reuse": not isinstance(backend.reuse, str), "static": backend.static is not None}
    if any(own.values()):
        names = " and ".join(name for name, is_own in own.items() if is_own)
        print(f"not tried here: {names}; docs/add-a-backend.md says how")
    return 0


if __name__ == "__main__":
    sys.exit(main())
