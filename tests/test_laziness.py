"""Importing tokenselect brings torch and nothing heavier; backends come when they are used."""

import json
import sys

import pytest

from tests import fresh

HEAVY = ("triton", "transformers", "vllm", "hypothesis", "pytest", "rich", "sympy", "torch._dynamo")

# Every import of triton fails, as if it were not installed.
BLOCK_TRITON = """
import sys
class Blocker:
    def find_spec(self, name, path=None, target=None):
        if name.partition(".")[0] == "triton":
            raise ModuleNotFoundError(f"{name} is blocked", name=name)
sys.meta_path.insert(0, Blocker())
"""

CALL = """
import torch, tokenselect
q, cache = torch.randn(1, 4, 1, 8), torch.randn(1, 2, 40, 8)
"""


@pytest.fixture(scope="module")
def modules() -> dict[str, list[str]]:
    """sys.modules after `import torch`, and what each later step adds to it."""
    return json.loads(
        fresh.output("""
import json, sys
added, seen = {}, set()
def note(step):
    added[step] = sorted(set(sys.modules) - seen)
    seen.update(sys.modules)
import torch
note("torch")
import tokenselect
note("tokenselect")
q, cache = torch.randn(1, 4, 1, 8), torch.randn(1, 2, 40, 8)
tokenselect.explain(q, cache, cache)
note("explain")
tokenselect.attention(q, cache, cache, 4, n_sink=1, n_local=4)
note("attention")
print(json.dumps(added))
""")
    )


def test_import_brings_only_torch_and_the_standard_library(modules: dict[str, list[str]]) -> None:
    packages = {name.partition(".")[0] for name in modules["tokenselect"]}
    assert packages - set(sys.stdlib_module_names) == {"tokenselect"}


@pytest.mark.parametrize("heavy", HEAVY)
def test_import_leaves_out_what_is_heavy(heavy: str, modules: dict[str, list[str]]) -> None:
    def brought(step: str) -> list[str]:
        return [name for name in modules[step] if name == heavy or name.startswith(heavy + ".")]

    assert not brought("tokenselect")
    assert not brought("explain")
    assert not brought("attention")


def test_import_leaves_the_backends_out(modules: dict[str, list[str]]) -> None:
    def backends(step: str) -> list[str]:
        inside = ("tokenselect.reference", "tokenselect.kernels")
        return [name for name in modules[step] if name.startswith(inside)]

    assert not backends("tokenselect")
    # "auto" loads what it tries; the reference is never among that.
    assert f"tokenselect.kernels.{fresh.AUTO}" in backends("explain")
    assert not any("reference" in name for name in backends("explain") + backends("attention"))


@pytest.mark.parametrize("backend", ["cpu", "reference"])
def test_runs_with_triton_blocked(backend: str) -> None:
    printed = fresh.output(
        BLOCK_TRITON
        + CALL
        + f"out = tokenselect.attention(q, cache, cache, 4, n_sink=1, n_local=4, "
        f"backend={backend!r})\n"
        "print(tuple(out.shape), 'triton' in sys.modules)\n"
    )
    assert printed == "(1, 4, 1, 8) False\n"


def test_without_triton_its_backend_says_so() -> None:
    printed = fresh.output(
        BLOCK_TRITON
        + CALL
        + """
why = "the package triton is not installed; pip install triton"
assert tokenselect.explain(q, cache, cache, backend="triton").passed_over == {"triton": [why]}
assert tokenselect.explain(q, cache, cache).chosen in ("native", "cpu")
try:
    tokenselect.attention(q, cache, cache, 4, backend="triton")
except tokenselect.UnsupportedProblem as error:
    assert why in str(error)
    print("told")
"""
    )
    assert printed == "told\n"


def test_a_triton_that_is_broken_says_what_broke_it() -> None:
    """Only a missing package is no error; one that fails to import raises its own."""
    part = "tokenselect.kernels.triton.tables"
    broken = BLOCK_TRITON.replace('"triton"', repr(part)).replace('name.partition(".")[0]', "name")
    done = fresh.run(
        broken + CALL + "tokenselect.attention(q, cache, cache, 4, backend='triton')\n"
    )
    assert done.returncode == 1
    assert f"ModuleNotFoundError: {part} is blocked" in done.stderr
    assert "UnsupportedProblem" not in done.stderr


def test_on_the_cpu_triton_is_refused_unless_interpreted() -> None:
    call = CALL + (
        "q, cache = torch.randn(1, 4, 1, 32), torch.randn(1, 2, 40, 32)\n"
        "print(tokenselect.explain(q, cache, cache, 4, n_sink=1, n_local=4, backend='triton'))\n"
    )
    refused = fresh.output(call, TRITON_INTERPRET="0")
    assert "passed over triton: device is cpu; triton takes cuda" in refused
    assert "chosen:  triton" in fresh.output(call, TRITON_INTERPRET="1")


def test_the_block_blocks() -> None:
    done = fresh.run(BLOCK_TRITON + "import triton\n")
    assert done.returncode == 1
    assert "triton is blocked" in done.stderr
