"""What `enable` tells of a model's layers afterwards."""

import copy
import dataclasses
import json
import threading
from typing import Any

import pytest
import torch

from tests.models import SMALL, STEPWISE, THE_OLD_NAME, generated, mask_of, model_of, tokens
from tokenselect import InvalidProblem
from tokenselect.integrations.transformers import TokenSelectCache, enable, recorded

pytestmark = [pytest.mark.filterwarnings(THE_OLD_NAME), pytest.mark.usefixtures("no_grad")]


@pytest.mark.parametrize("record", [0, 2])
def test_a_report_is_of_all_calls_since_enable(record: int) -> None:
    model = model_of("llama")
    options = {**SMALL, "k": 0.3, "backend": "cpu", "layers": {0: "dense"}}
    with recorded() as infos, enable(model, **options, record=record) as handle:
        generated(model, tokens(2), attention_mask=mask_of("20#", "5. 15#"), max_new_tokens=4)
        report = handle.report()
    assert handle.report() == report
    dense, one = report.layers
    assert (dense.layer, dense.dense, dense.calls, dense.cached) == (0, 2 * 4, 0, None)
    assert (one.layer, one.dense, one.calls, one.backend, one.reused) == (1, 2, 6, "cpu", 0)
    assert one.cached == (21 + 22 + 23 + 16 + 17 + 18) / 6
    assert one.attended == torch.stack([info.selection.count for info in infos]).double().mean()
    masses = torch.stack([info.retained_mass for info in infos]).double()
    if record:
        assert one.mass == pytest.approx(float(masses.mean()))
        assert one.least_mass == masses.min()
    else:
        assert (one.mass, one.least_mass) == (None, None)
    found = handle.infos()
    assert {layer: len(kept) for layer, kept in found.items()} == {0: 0, 1: record}
    for kept, info in zip(found[1], infos[3 - record :], strict=True):
        assert torch.equal(kept.selection.positions, info.selection.positions)


def test_infos_are_asked_for_only_by_record(monkeypatch: pytest.MonkeyPatch) -> None:
    """But for each layer's first call, whose backend is told."""
    import tokenselect

    model, attention, asked = model_of("llama"), tokenselect.attention, []

    def watched(*args: Any, **more: Any) -> Any:
        asked.append(more.get("return_info", False))
        return attention(*args, **more)

    monkeypatch.setattr(tokenselect, "attention", watched)
    for record in (0, 1):
        asked.clear()
        with enable(model, **SMALL, record=record):
            generated(model, tokens(1), max_new_tokens=4)
        assert asked == [True] * 2 + [record > 0] * 4


@pytest.mark.parametrize("record", [0, 1])
def test_what_is_reused(record: int) -> None:
    model = model_of("llama")
    cache = TokenSelectCache(model)
    options = {**SMALL, "layers": {1: {"theta": -1.0}}}
    with recorded() as infos, enable(model, **options, record=record) as handle:
        generated(model, tokens(1), past_key_values=cache, max_new_tokens=8)
    one, other = handle.report().layers
    assert (one.reused, one.attended) == (0, 6)
    if not record:
        assert (other.reused, other.attended) == (None, None)
        return
    assert other.reused == cache.hits == 6
    of_other = infos[1::2]
    assert other.attended == sum(int(info.selection.count) for info in of_other) / 7
    assert other.mass == pytest.approx(float(of_other[0].retained_mass.mean()))  # unknown if reused


def test_mass_that_is_not_known() -> None:
    model = model_of("llama")
    with enable(model, **SMALL, prefill="selected", chunk=7, record=1) as handle:
        model(tokens(1))  # by several queries at once
    assert [one.calls for one in handle.report().layers] == [3, 3]
    assert {(one.mass, one.least_mass) for one in handle.report().layers} == {(None, None)}


def test_a_report_is_a_table_and_json() -> None:
    model = model_of("gemma2")  # the first layer slides
    with enable(model, **SMALL, backend="cpu", record=1) as handle:
        assert str(handle.report()).split("\n")[1:] == []
        generated(model, tokens(1), max_new_tokens=4)
    report = handle.report()
    titles, row = str(report).split("\n")
    assert titles.split()[:6] == ["layer", "dense", "calls", "reused", "cached", "attended"]
    assert row.split()[:6] == ["1", "1", "3", "0", "22.0", "6.0"]
    assert row.split()[-1] == "cpu"
    (layer,) = json.loads(json.dumps(dataclasses.asdict(report)))["layers"]
    assert layer["mass"] == report.layers[0].mass


def test_it_counts_for_the_last_enable_until_reset_or_disable() -> None:
    model, ids = model_of("llama"), tokens(1)
    outer = enable(model, **SMALL, **STEPWISE)
    with enable(model, **SMALL) as inner:
        model(ids)
    assert outer.report().layers == ()
    assert [one.dense for one in inner.report().layers] == [1, 1]
    model(ids)
    attended = sum(min(n, 6) for n in range(1, 21)) / 20
    assert [(one.calls, one.attended) for one in outer.report().layers] == [(20, attended)] * 2
    outer.reset()
    assert (outer.report().layers, outer.infos()) == ((), {})
    copied = copy.deepcopy(model)
    copied(ids)
    assert outer.report().layers == ()
    outer.disable()
    model.set_attn_implementation("tokenselect")
    model(ids)
    assert outer.report().layers == ()


def test_threads_count_together() -> None:
    model, ids, tried = model_of("llama"), tokens(1), 8
    with enable(model, **SMALL, **STEPWISE, record=1) as handle:
        threads = [
            threading.Thread(target=torch.no_grad()(model), args=[ids]) for _ in range(tried)
        ]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
    for one in handle.report().layers:
        assert (one.calls, one.cached) == (20 * tried, 10.5)


def test_record_is_checked_and_not_saved() -> None:
    model = model_of("llama")
    for wrong in (-1, 1.5, True, "all"):
        with pytest.raises(InvalidProblem, match="record is an integer"):
            enable(model, record=wrong)
    assert model.config._attn_implementation != "tokenselect"
    with enable(model, **SMALL, record=1):
        assert model.config.tokenselect == SMALL
