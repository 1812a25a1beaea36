"""Names of backends: who may register, when they load, who runs what, and what `auto` says."""

import re
import textwrap
from pathlib import Path
from typing import Any

import pytest
import torch

from tests import fresh
from tests.problems import SMALL, problem, tensors
from tokenselect import (
    Backend,
    Capability,
    Explanation,
    InvalidProblem,
    Problem,
    Rope,
    SelectConfig,
    UnknownBackend,
    UnsupportedProblem,
    attention,
    backends,
    explain,
    register,
    score,
    select,
)
from tokenselect.dispatch import registry

CALL = """
import torch, tokenselect
q, cache = torch.randn(1, 4, 1, 8), torch.randn(1, 2, 40, 8)
small = {"k": 4, "n_sink": 1, "n_local": 4}
"""


def counting(name: str, **limits: Any) -> tuple[Backend, list[str]]:
    """A backend that borrows from cpu, except that its `score` notes each call."""
    calls: list[str] = []

    def counted(p: Any) -> Any:
        calls.append(name)
        return registry.load("cpu").score(p)

    return Backend(name, Capability(**limits), counted, "cpu", "cpu"), calls


# --- names --------------------------------------------------------------------------------


def test_the_built_in_names() -> None:
    assert set(backends()) >= {"reference", "cpu"}
    assert "auto" not in backends()


@pytest.mark.parametrize("name", ["reference", "cpu"])
def test_a_backends_name_is_its_registered_one(name: str) -> None:
    assert registry.load(name).name == name


def test_a_registered_backend_runs_by_name() -> None:
    backend, calls = counting("mine")
    register("mine", backend)
    assert "mine" in backends()
    q, k_cache, v_cache = tensors()
    out, info = attention(q, k_cache, v_cache, **SMALL, backend="mine", return_info=True)
    assert calls == ["mine"]
    assert info.backend == "mine"
    assert torch.equal(out, attention(q, k_cache, v_cache, **SMALL, backend="cpu"))


def test_a_name_can_be_taken_once() -> None:
    first, calls = counting("mine")
    register("mine", first)
    with pytest.raises(InvalidProblem, match=r"taken: .*mine"):
        register("mine", counting("mine")[0])
    score(problem(), backend="mine")
    assert calls == ["mine"]


def test_a_target_is_imported_when_first_used(tmp_path: Path) -> None:
    (tmp_path / "lazy_backend.py").write_text(
        "from tokenselect import Backend, Capability\n"
        "BACKEND = Backend('lazy', Capability(), 'cpu', 'cpu', 'cpu')\n"
    )
    printed = fresh.output(
        CALL
        + textwrap.dedent("""
        import sys
        tokenselect.register("lazy", "lazy_backend:BACKEND")
        print("lazy" in tokenselect.backends(), "lazy_backend" in sys.modules)
        tokenselect.attention(q, cache, cache, **small)
        print("lazy_backend" in sys.modules)
        tokenselect.attention(q, cache, cache, **small, backend="lazy")
        print("lazy_backend" in sys.modules)
        """),
        tmp_path,
    )
    assert printed.split() == ["True", "False", "False", "True"]


def test_every_stage_can_be_borrowed() -> None:
    register("hollow", Backend("hollow", Capability(), "cpu", "reference", "cpu"))
    loaded = registry.load("hollow")
    cpu, reference = registry.load("cpu"), registry.load("reference")
    assert (loaded.score, loaded.select, loaded.attend) == (cpu.score, reference.select, cpu.attend)
    assert [lender.name for lender in loaded.lenders] == ["cpu", "reference"]


def test_a_stage_can_be_borrowed_from_a_borrower() -> None:
    register("second", Backend("second", Capability(), "first", "cpu", "cpu"))
    register("first", Backend("first", Capability(), "cpu", "cpu", "cpu"))
    assert registry.load("second").score is registry.load("cpu").score


# --- other people's distributions ---------------------------------------------------------


@pytest.fixture
def distribution(tmp_path: Path) -> Path:
    """An installed distribution whose entry point names a backend that borrows from cpu."""
    (tmp_path / "speedy").mkdir()
    (tmp_path / "speedy" / "__init__.py").write_text(
        "from tokenselect import Backend, Capability, Scores\n"
        "def score(problem):\n"
        "    from tokenselect.dispatch.registry import load\n"
        "    print('speedy scores')\n"
        "    return load('cpu').score(problem)\n"
        "BACKEND = Backend('speedy', Capability(devices=('cpu',)), score, 'cpu', 'cpu')\n"
    )
    info = tmp_path / "speedy-1.0.dist-info"
    info.mkdir()
    (info / "METADATA").write_text("Metadata-Version: 2.1\nName: speedy\nVersion: 1.0\n")
    (info / "entry_points.txt").write_text("[tokenselect.backends]\nspeedy = speedy:BACKEND\n")
    return tmp_path


def test_an_entry_point_adds_a_backend(distribution: Path) -> None:
    printed = fresh.output(
        CALL
        + textwrap.dedent("""
        import sys
        print(tokenselect.backends()[-1], "speedy" in sys.modules)
        out = tokenselect.attention(q, cache, cache, **small, backend="speedy")
        print(torch.equal(out, tokenselect.attention(q, cache, cache, **small, backend="cpu")))
        print(tokenselect.explain(q, cache, cache, **small).chosen)
        """),
        distribution,
    )
    assert printed.splitlines() == ["speedy False", "speedy scores", "True", fresh.AUTO]


def test_an_entry_point_is_found_by_name_alone(distribution: Path) -> None:
    printed = fresh.output(
        CALL + "tokenselect.attention(q, cache, cache, **small, backend='speedy')\n", distribution
    )
    assert printed == "speedy scores\n"


def test_an_entry_point_cannot_take_a_built_in_name(distribution: Path) -> None:
    """The built-in backend keeps its name, and explain tells of the one that did not get it."""
    entry = distribution / "speedy-1.0.dist-info" / "entry_points.txt"
    entry.write_text("[tokenselect.backends]\ncpu = speedy:BACKEND\nauto = speedy:BACKEND\n")
    printed = fresh.output(
        CALL
        + textwrap.dedent("""
        print(tokenselect.backends().count("cpu"), "auto" in tokenselect.backends())
        print(tokenselect.attention(q, cache, cache, **small, return_info=True)[1].backend)
        print(tokenselect.explain(q, cache, cache, **small))
        """),
        distribution,
    ).splitlines()
    assert printed[:2] == ["1 False", fresh.AUTO]
    assert f"chosen:  {fresh.AUTO}" in printed
    for name in ("cpu", "auto"):
        came = f"refused {name}: speedy declares '{name}' = 'speedy:BACKEND'; "
        assert any(line.startswith(came) for line in printed), printed


@pytest.fixture
def claimants(distribution: Path) -> Path:
    """Another installed distribution, which declares the same name."""
    info = distribution / "hasty-2.0.dist-info"
    info.mkdir()
    (info / "METADATA").write_text("Metadata-Version: 2.1\nName: hasty\nVersion: 2.0\n")
    (info / "entry_points.txt").write_text("[tokenselect.backends]\nspeedy = hasty:BACKEND\n")
    return distribution


def test_a_name_that_two_packages_declare_harms_only_those_who_ask_for_it(claimants: Path) -> None:
    printed = fresh.output(
        CALL
        + textwrap.dedent("""
        print(tokenselect.attention(q, cache, cache, **small, return_info=True)[1].backend)
        print("speedy" in tokenselect.backends())
        print(tokenselect.explain(q, cache, cache, **small))
        print(tokenselect.explain(q, cache, cache, **small, backend="speedy"))
        for _ in range(2):  # and not only at the first look
            try:
                tokenselect.attention(q, cache, cache, **small, backend="speedy")
            except tokenselect.InvalidProblem as error:
                print(error)
        """),
        claimants,
    )
    assert printed.startswith(f"{fresh.AUTO}\nTrue\n")
    rule = "a backend's name is declared by one installed package"
    came = re.search(r"refused speedy: (.*); " + rule, printed)
    assert came is not None, printed
    claims = (
        "speedy declares 'speedy' = 'speedy:BACKEND'",
        "hasty declares 'speedy' = 'hasty:BACKEND'",
    )
    assert sorted(came[1].split("; ")) == sorted(claims)
    assert f"passed over speedy: {came[1]}; {rule}; uninstall the others, or choose" in printed
    assert printed.count(f"{came[1]}\n  rule: {rule}\n  do:   uninstall") == 2


def test_one_of_the_packages_that_declare_a_name_can_be_chosen(claimants: Path) -> None:
    printed = fresh.output(
        CALL
        + textwrap.dedent("""
        tokenselect.register("speedy", "speedy:BACKEND")
        tokenselect.attention(q, cache, cache, **small, backend="speedy")
        print("refused" in str(tokenselect.explain(q, cache, cache, **small)))
        """),
        claimants,
    )
    assert printed.splitlines() == ["speedy scores", "False"]


def test_a_broken_entry_point_harms_only_those_who_ask_for_it(distribution: Path) -> None:
    (distribution / "speedy" / "__init__.py").write_text("raise ImportError('no libspeedy.so')\n")
    printed = fresh.output(
        CALL
        + textwrap.dedent("""
        print(tuple(tokenselect.attention(q, cache, cache, **small).shape))
        try:
            tokenselect.attention(q, cache, cache, **small, backend="speedy")
        except ImportError as error:
            print(error)
        """),
        distribution,
    )
    assert printed.splitlines() == ["(1, 4, 1, 8)", "no libspeedy.so"]


# --- who runs a problem -------------------------------------------------------------------


def test_a_backend_named_never_falls_back() -> None:
    backend, calls = counting("picky", dtypes=(torch.float16,))
    register("picky", backend)
    q, k_cache, v_cache = tensors()
    with pytest.raises(UnsupportedProblem) as caught:
        attention(q, k_cache, v_cache, **SMALL, backend="picky")
    assert caught.value.reasons == {"picky": ["dtype is torch.float32; picky takes torch.float16"]}
    assert not calls


def test_an_error_in_a_backend_is_its_own() -> None:
    def broken(_: object) -> None:
        raise RuntimeError("out of something")

    register("broken", Backend("broken", Capability(), broken, "cpu", "cpu"))
    q, k_cache, v_cache = tensors()
    with pytest.raises(RuntimeError, match="out of something"):
        attention(q, k_cache, v_cache, **SMALL, backend="broken")


def test_a_lenders_limits_are_the_borrowers() -> None:
    lender, _ = counting("lender", votes=("hard",))
    register("lender", lender)
    register("borrower", Backend("borrower", Capability(), "cpu", "cpu", "lender"))
    with pytest.raises(UnsupportedProblem) as caught:
        score(problem(), backend="borrower")
    assert caught.value.reasons == {
        "borrower": ["(stage borrowed from lender) vote is soft; lender takes hard"]
    }


def test_auto_takes_the_first_that_can_and_says_why_not_the_others() -> None:
    for name, limits in (("one", {"votes": ("hard",)}), ("two", {}), ("three", {})):
        register(name, counting(name, **limits)[0])
    registry.AUTO = ("one", "two", "three", "cpu")
    q, k_cache, v_cache = tensors()
    found = explain(q, k_cache, v_cache, **SMALL)
    assert found == Explanation(
        "two", {"one": ["vote is soft; one takes hard"]}, problem().describe()
    )
    assert str(found).splitlines() == [
        f"problem: {problem().describe()}",
        "chosen:  two",
        "passed over one: vote is soft; one takes hard",
        "not tried reference: not asked for",
        "not tried cpu: two comes first and can",
        "not tried native: not asked for",
        "not tried triton: not asked for",
        "not tried cuda_graph: not asked for",
        "not tried three: two comes first and can",
    ]
    assert "not tried cpu: not asked for" in str(
        explain(q, k_cache, v_cache, **SMALL, backend="two")
    )
    assert attention(q, k_cache, v_cache, **SMALL, return_info=True)[1].backend == "two"
    assert explain(q, k_cache, v_cache, **SMALL, vote="hard").chosen == "one"


def test_explain_tells_when_none_can() -> None:
    q, k_cache, v_cache = (x.to("meta") for x in tensors())
    registry._loaded.pop("native", None)
    found = explain(q, k_cache, v_cache, **SMALL)
    assert "native" not in registry._loaded, "it is compiled for a device that it does not take"
    assert found.passed_over["native"] == ["device is meta; native takes cpu"]
    assert found.chosen is None
    assert found.passed_over["cpu"] == ["device is meta; cpu takes cpu"]
    assert "chosen:  none" in str(found)
    with pytest.raises(UnsupportedProblem) as caught:
        attention(q, k_cache, v_cache, **SMALL)
    assert caught.value.reasons == found.passed_over
    assert all(why in str(caught.value) for whys in found.passed_over.values() for why in whys)


def test_explain_of_one_name() -> None:
    q, k_cache, v_cache = tensors()
    assert explain(q, k_cache, v_cache, backend="reference").chosen == "reference"
    with pytest.raises(UnknownBackend):
        explain(q, k_cache, v_cache, backend="nobody")


def test_auto_never_picks_the_reference_nor_a_graph() -> None:
    assert set(registry.AUTO) <= set(backends())
    assert not {"reference", "cuda_graph", "auto"} & set(registry.AUTO)


def test_registering_does_not_change_auto() -> None:
    backend, calls = counting("mine")
    register("mine", backend)
    p = problem()
    select(score(p).votes, p)
    assert not calls


def test_no_environment_variable_changes_the_choice(monkeypatch: pytest.MonkeyPatch) -> None:
    q, k_cache, v_cache = tensors()
    chosen = explain(q, k_cache, v_cache).chosen
    for name in ("TOKENSELECT_BACKEND", "TOKENSELECT", "BACKEND"):
        monkeypatch.setenv(name, "reference")
    assert explain(q, k_cache, v_cache).chosen == chosen


def test_a_choice_that_is_noted_is_made_anew_where_a_backend_changes(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """Problems that look the same share the note."""
    config = SelectConfig(**SMALL)
    first, again = (Problem.build(*tensors(), config) for _ in range(2))
    assert again.kind is first.kind is not None
    chosen = registry.resolve("auto", first)
    with monkeypatch.context() as patch:
        patch.setattr(registry, "AUTO", ("reference",))
        assert registry.resolve("auto", again) == "reference"
    gone = Backend(chosen, Capability(devices=()), "reference", "reference", "reference")
    monkeypatch.setitem(registry._loaded, chosen, registry.resolved(gone))
    assert registry.resolve("auto", again) != chosen
    with pytest.raises(UnsupportedProblem):
        registry.resolve(chosen, again)


def test_a_noted_choice_is_not_that_of_keys_that_arrive_otherwise() -> None:
    limited, _ = counting("rotated-only", ropes=("none", "rotated"))
    register("rotated-only", limited)
    config, inv_freq = SelectConfig(**SMALL), torch.ones(2)
    rotated, raw = (
        Problem.build(*tensors(), config, rope=Rope(inv_freq, cached=cached))
        for cached in ("rotated", "raw")
    )
    assert registry.resolve("rotated-only", rotated) == "rotated-only"
    with pytest.raises(UnsupportedProblem, match="rope is raw"):
        registry.resolve("rotated-only", raw)
