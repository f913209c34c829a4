"""The static rule that picks an engine, and what is refused."""

from __future__ import annotations

from typing import Any

import pytest

from fedsim import Simulation
from fedsim.errors import ConfigError, FedsimError, ModelError
from fedsim.simulation import choose, trainers


def chosen(engine: dict[str, Any] | None = None, **sections: dict[str, Any]) -> Simulation:
    model = sections.pop("model", {"name": "mlp"})
    return Simulation(sections={"engine": engine or {}, "model": model, **sections})


@pytest.mark.parametrize(
    ("sections", "name"),
    [
        ({}, "fused"),
        ({"strategy": {"name": "scaffold"}}, "fused"),
        ({"client": {"weight_decay": 0.01}}, "fused"),
        ({"client": {"momentum": 0.9}}, "stacked"),
        ({"client": {"optimizer": "adam"}}, "stacked"),
        ({"strategy": {"name": "fedspeed"}}, "fused"),
        ({"strategy": {"name": "fedsmoo"}}, "stacked"),
        ({"model": {"name": "mlp", "hidden": [2000, 1000]}}, "flat"),
        ({"model": {"name": "mlp", "hidden": [300]}, "client": {"momentum": 0.9}}, "stacked"),
        ({"model": {"name": "mlp", "hidden": [4000]}, "client": {"momentum": 0.9}}, "flat"),
        ({"round": {"sample": 1}}, "flat"),
    ],
)
def test_the_rule_takes_the_fastest_engine_that_can(sections: dict[str, Any], name: str) -> None:
    sim = chosen(**sections)
    assert sim.config.engine.name == name
    assert sim.engine.trainer.name == name
    assert sim.facts["engine_reason"]


@pytest.mark.parametrize(
    ("engine", "sections", "why"),
    [
        ({"name": "fused"}, {"client": {"momentum": 0.9}}, "momentum"),
        ({"name": "fused"}, {"model": {"name": "cnn"}}, "Conv2d"),
        ({"name": "stacked", "precision": "bfloat16"}, {}, "flat alone"),
    ],
)
def test_an_engine_that_cannot_run_it_is_refused_with_the_reason(
    engine: dict[str, Any], sections: dict[str, Any], why: str
) -> None:
    with pytest.raises(ModelError, match="FS-MOD-033") as caught:
        chosen(engine, **sections)
    assert why in str(caught.value)


def test_short_rounds_stay_in_one_process_and_long_ones_take_the_cores(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(choose, "cores", lambda: 3)
    assert chosen().config.engine.workers == 1
    assert chosen(client={"epochs": 200}).config.engine.workers == 3
    assert chosen({"workers": 1}, client={"epochs": 200}).config.engine.workers == 1
    # A long round is cut into blocks that processes can share, on any machine.
    assert chosen().config.engine.block == 10
    assert chosen(client={"epochs": 200}).config.engine.block == 4  # of 10 clients, for 3 cores
    scaffold = {"name": "scaffold"}  # needs each update, so that blocks may take unequally long
    assert chosen(client={"epochs": 200}, strategy=scaffold).config.engine.block == 2
    assert chosen({"block": 5}, client={"epochs": 200}).config.engine.workers == 2


def test_bfloat16_is_refused_where_the_machine_has_none(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(trainers, "why_not_bfloat16", lambda device: "it is from 1987")
    with pytest.raises(ConfigError, match="FS-CFG-078") as caught:
        chosen({"precision": "bfloat16"})
    assert "1987" in str(caught.value)


def test_the_choice_can_be_given_back_to_the_run(tmp_path: Any) -> None:
    first = chosen()
    again = Simulation(first.config)
    assert again.config.engine == first.config.engine


def test_an_unknown_engine_is_refused() -> None:
    with pytest.raises(FedsimError, match="no engine is called"):
        chosen({"name": "warp"})
