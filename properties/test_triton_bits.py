"""Why the triton backend keeps logits in three bytes: two do not hold the votes to float32."""

import pytest

from tokenselect import SelectConfig
from tokenselect.conformance.problems import Case
from tokenselect.conformance.tolerances import score_tolerance

# One key of the tile points along a query, as keys of rare tokens do; the others do not.
STANDS_OUT = Case(
    lengths=(120,),
    Hkv=3,
    G=3,
    D=64,
    content="needles",
    config=SelectConfig(k=20, n_sink=0, n_local=2, normalize="candidates", scope="group"),
    seed=4,
)


@pytest.mark.parametrize(("bits", "holds"), [(16, False), (18, False), (24, True)])
def test_bits_of_a_logit(bits: int, holds: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    """The share of the tolerance that votes take if a logit has this many bits."""
    import triton.language as tl

    from tokenselect.kernels.triton import configs, launch, score

    if not launch.INTERPRETED:
        pytest.skip("compiled kernels have this constant in them; CI tries it in the interpreter")
    wide = configs.TABLE["interpreter"]._replace(tile=128)
    monkeypatch.setitem(configs.TABLE, "interpreter", wide)
    monkeypatch.setattr(score, "_LAST", tl.constexpr(2**bits - 2))
    problem = STANDS_OUT.problem()
    finding = score_tolerance(problem).compare(score.score(problem))
    print(f"{bits} bits: {finding.share:.3g} of the tolerance")
    assert finding.holds == holds, finding
