"""Where only the weighted sum of the updates is wanted, an engine adds them up itself: the same sum."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from typing import Any

import numpy as np
import pytest
import torch
from torch import nn

from fedsim import Simulation
from fedsim.errors import RegistryError
from fedsim.flat import spec_of
from fedsim.local import LocalSpec
from fedsim.server_ema import with_server_ema
from fedsim.simulation import fused_products, onednn
from fedsim.simulation.fused import FusedTrainer
from fedsim.simulation.fused_layers import Dense
from fedsim.simulation.fused_sums import BlockSum, squared_norms
from fedsim.simulation.stacked import StackedTrainer
from fedsim.strategy import Strategy, fold_deltas, make_strategy
from fedsim.training.work import Trainer, Workplace, by_work
from fedsim.types import UpdateBlock
from tests.contract.registered import choices, chosen, with_defaults
from tests.federations import CLASSES, SIZES, Small, build
from tests.wired import config

PLAIN = LocalSpec(epochs=2, batch_size=4, lr=0.1)
TRAINERS: dict[str, Callable[[Workplace], Trainer]] = {
    "fused": lambda place: FusedTrainer(place, 3),
    "stacked": lambda place: StackedTrainer(place, 3),
}


def pair(strategy: Strategy, trainer: str = "fused", **parameters: Any) -> tuple[Small, Small, list[bool]]:
    """Two federations, of which the second has an observer and so gets rows; of the first: whose are sums."""
    parameters = {"spec": PLAIN, "trainer": TRAINERS[trainer]} | parameters
    small = build(strategy, **parameters)
    rows = build(strategy, observers=[lambda seen: None], **parameters)
    summed: list[bool] = []
    collect = small.engine.collect

    def watched(*args: Any) -> Any:
        for block in collect(*args):
            assert isinstance(block, UpdateBlock)
            summed.append(block.summed is not None and not block.vectors)
            yield block

    small.engine.collect = watched  # type: ignore[method-assign]
    return small, rows, summed


def assert_same(one: Small, other: Small, *, rounds: int = 2, exact: float = 1e-10) -> None:
    for _ in range(rounds):
        before = one.federation.model.clone()
        first, second = one.federation.run_window(), other.federation.run_window()
        moved = (one.federation.model - before).norm()
        assert moved > 0
        assert (one.federation.model - other.federation.model).norm() <= exact * moved
        assert first.record.keys() == second.record.keys()
        for name, value in first.record.items():
            expected = second.record[name]
            assert value == (expected if isinstance(value, str) else pytest.approx(expected, rel=1e-6)), name
        lines, others = first.clients.columns, second.clients.columns
        order, other_order = np.argsort(lines["client"]), np.argsort(others["client"])
        for name in ("client", "verdict", "examples", "steps", "bytes_up"):
            assert [lines[name][i] for i in order] == [others[name][i] for i in other_order]
        for name in ("norm", "loss"):
            found = np.array(lines[name])[order]
            assert found == pytest.approx(np.array(others[name])[other_order], rel=1e-6, abs=1e-9)


def summable() -> list[Strategy]:
    synchronous = [name for name, strategy in with_defaults().items() if "sync" in strategy.traits.modes]
    made = [chosen(name, parameters) for name in synchronous for parameters in [{}, *choices(name)]]
    found = [strategy for strategy in made if strategy is not None]
    return [s for s in found if s.traits.sums_only and "sync" in s.traits.modes]


def test_many_strategies_need_sums_only_and_all_of_them_fold_so() -> None:
    strategies = summable()
    assert len(strategies) > 15
    assert all(strategy.fold is fold_deltas for strategy in strategies)


@pytest.mark.parametrize("number", range(len(summable())))
def test_sums_are_those_of_the_rows(number: int) -> None:
    strategy = summable()[number]
    if not strategy.traits.affine:
        pytest.skip("not for the fused engine")
    one, other, summed = pair(strategy)
    assert_same(one, other)
    assert any(summed)


@pytest.mark.parametrize("name", ["fedavg", "fedsam"])
def test_any_trainer_s_rows_are_added_up_beside_it(name: str) -> None:
    one, other, summed = pair(make_strategy(name), "stacked")
    assert_same(one, other)
    assert any(summed)


@pytest.mark.parametrize("rows", [8, 12, 64, 256])
@pytest.mark.parametrize("name", ["fedavg", "fedprox", "fedhyper"])
@pytest.mark.parametrize("decay", [0.0, 0.05])
def test_windows_of_a_large_first_layer_are_added_up(
    name: str, rows: int, decay: float, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("fedsim.simulation.fused._IN_ROWS_BYTES", 100)
    monkeypatch.setattr("fedsim.simulation.fused._SUMMED_ROWS", rows)
    monkeypatch.setattr("fedsim.simulation.fused._WINDOW_ROWS", min(rows, 16))
    for spec in (PLAIN, replace(PLAIN, steps=1, batch_size=8), replace(PLAIN, batch_size=0)):
        one, other, summed = pair(make_strategy(name), spec=replace(spec, weight_decay=decay))
        assert_same(one, other)
        assert all(summed)


def no_bias() -> nn.Module:
    return nn.Sequential(nn.Linear(6, 9, bias=False), nn.Tanh(), nn.Linear(9, CLASSES, bias=False))


@pytest.mark.parametrize("name", ["fedavg", "fedprox"])
def test_layers_need_no_bias(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    for large in (1 << 30, 100):
        monkeypatch.setattr("fedsim.simulation.fused._IN_ROWS_BYTES", large)
        for spec in (PLAIN, replace(PLAIN, steps=1)):
            one, other, summed = pair(make_strategy(name), model=no_bias, spec=spec)
            assert_same(one, other)
            assert all(summed)


@pytest.mark.skipif(not hasattr(torch.ops.mkldnn, "_linear_pointwise"), reason="torch without oneDNN")
@pytest.mark.parametrize("tile", [4, 7, 1000])
def test_tiles_of_onednn_give_the_same_sums(tile: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(onednn, "pays", lambda: True)
    monkeypatch.setattr(fused_products, "_TILE", tile)
    monkeypatch.setattr(fused_products, "_SMALL_TILE", tile + 1)
    monkeypatch.setattr(fused_products, "_LARGE", 1)
    monkeypatch.setattr(fused_products, "_GRAIN", 3)
    monkeypatch.setattr("fedsim.simulation.fused._IN_ROWS_BYTES", 100)
    one, other, summed = pair(make_strategy("fedprox"), dtype=torch.float32, model=no_bias)
    assert_same(one, other, rounds=1, exact=1e-5)
    assert all(summed)


@pytest.mark.parametrize("large", [1, 1 << 20])
@pytest.mark.parametrize("rows", [1, 5, 300, 1000, 2048, 5000])
def test_products_over_rows_are_products(rows: int, large: int, monkeypatch: pytest.MonkeyPatch) -> None:
    draw = torch.Generator().manual_seed(rows)
    monkeypatch.setattr(fused_products, "_LARGE", large)
    moves, inputs = torch.randn(rows, 5, generator=draw), torch.randn(rows, 7, generator=draw)
    weight, bias = torch.randn(5, 7, generator=draw), torch.randn(5, generator=draw)
    exact = moves.double().t() @ inputs.double()
    assert torch.allclose(fused_products.sum_over_rows(moves, inputs), exact, rtol=1e-4, atol=1e-4)
    expected = inputs @ weight.t()
    assert torch.allclose(fused_products.outputs(inputs, weight, None), expected, atol=1e-5)
    assert torch.allclose(fused_products.outputs(inputs, weight, bias), expected + bias, atol=1e-5)
    place = torch.empty(rows, 5)
    assert fused_products.outputs(inputs, weight, bias, place) is place
    assert torch.allclose(place, expected + bias, atol=1e-5)
    start, count = rows // 3, rows - rows // 2
    x = inputs[start : start + count]
    assert torch.allclose(fused_products.table(inputs, start, count), x @ x.t(), atol=1e-5)


@pytest.mark.parametrize("trainer", TRAINERS)
def test_who_is_not_finite_is_refused_by_name_and_the_others_count(trainer: str) -> None:
    """A huge step: some clients leave the range of float32 and some do not."""

    def sick(strategy: Strategy) -> Strategy:
        return strategy._replace(
            plan=lambda state, spec, window, ids: (replace(spec, lr=1e30), np.where(ids == 1, 0, 2))
        )

    averaging = sick(make_strategy("fedavg"))
    one, other, summed = pair(averaging, trainer, dtype=torch.float32, spec=replace(PLAIN, steps=2))
    first, second = one.federation.run_window(), other.federation.run_window()
    assert first.record["refused"] == second.record["refused"] > 0
    assert sorted(first.clients.troubles) == sorted(second.clients.troubles)
    assert torch.equal(one.federation.model, other.federation.model)
    assert not all(summed)


@pytest.mark.parametrize("workers", [1, 2])
@pytest.mark.parametrize("large", [100, 1 << 30])
@pytest.mark.parametrize("decay", [0.0, 0.05])
def test_norms_that_nobody_asks_for_are_not_taken(
    workers: int, large: int, decay: float, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("fedsim.simulation.fused._IN_ROWS_BYTES", large)
    models = []
    for lines in (True, False):
        values = config(engine={"name": "fused", "block": 2, "workers": workers}, output={"clients": lines})
        values["client"]["weight_decay"] = decay
        simulation = Simulation(values)
        for record in simulation:
            found = simulation.last_clients or {}
            assert ("norm" in found) == (lines and record["round"] > 0)
            assert ("loss" in found) == (record["round"] > 0)
        models.append(simulation.federation.model)
        simulation.engine.close()
    assert torch.equal(*models)


def test_who_is_not_finite_is_refused_where_nobody_asks_for_norms() -> None:
    averaging = make_strategy("fedavg")

    def plan(state: Any, spec: Any, window: int, ids: Any) -> Any:
        return replace(spec, lr=1e30), np.where(ids == 1, 0, 2)

    sick = averaging._replace(plan=plan)
    parameters: dict[str, Any] = {"spec": replace(PLAIN, steps=2), "dtype": torch.float32}
    one, other, _ = pair(sick, **parameters)
    one.engine.norms = False
    first, second = one.federation.run_window(), other.federation.run_window()
    assert first.record["refused"] == second.record["refused"] > 0
    assert sorted(first.clients.troubles) == sorted(second.clients.troubles)
    assert torch.equal(one.federation.model, other.federation.model)


@pytest.mark.parametrize("weight", [0.0, 0.1])
@pytest.mark.parametrize("norms", [True, False])
def test_an_update_out_of_range_is_looked_at_also_by_a_small_weight(weight: float, norms: bool) -> None:
    """Its share of the sum would fit into float32, the update itself does not."""
    module = nn.Sequential(nn.Linear(1, 1))
    spec = spec_of(module)
    owners = torch.tensor([0, 1])
    sums = BlockSum(spec, np.array([0.9, weight]), torch.device("cpu"), norms=norms)
    layer = Dense("0.weight", "0.bias", 1, 1, ())
    moves, inputs = torch.tensor([[1.0], [3e38]]), torch.tensor([[1.0], [2.0]])
    sums.add_product(layer, moves, inputs, owners)
    if norms:
        sums.squares += squared_norms(moves.view(2, 1, 1), inputs.view(2, 1, 1), bias=True)
    assert sums.result() is None


def test_a_client_without_weight_is_refused_and_the_others_count() -> None:
    averaging = make_strategy("fedavg")

    def weigh(state: Any, meta: Any) -> Any:
        weights, refused = averaging.weigh(state, meta)
        return weights, refused | (meta.ids == 2)

    one, other, _ = pair(averaging._replace(weigh=weigh))
    first, second = one.federation.run_window(), other.federation.run_window()
    assert first.record["refused"] == second.record["refused"] == 1
    assert first.clients.troubles == second.clients.troubles == [(2, "the update has no weight")]
    assert torch.allclose(one.federation.model, other.federation.model, rtol=0, atol=1e-12)


def test_a_strategy_that_weighs_by_what_training_finds_out_is_told_so() -> None:
    averaging = make_strategy("fedavg")

    def weigh(state: Any, meta: Any) -> Any:
        weights, refused = averaging.weigh(state, meta)
        return weights * np.where(np.isnan(meta.normaliser), 1.0, 2.0), refused

    small = build(averaging._replace(weigh=weigh), spec=PLAIN, trainer=TRAINERS["fused"])
    with pytest.raises(RegistryError, match="sums_only"):
        small.federation.run_window()


def test_an_average_of_models_needs_no_more() -> None:
    one, other, summed = pair(with_server_ema(make_strategy("fedavg"), 0.5))
    assert_same(one, other)
    assert all(summed)


def test_a_strategy_that_does_not_say_so_gets_rows() -> None:
    strategy = make_strategy("fedavg")
    small, _, summed = pair(strategy._replace(traits=replace(strategy.traits, sums_only=False)))
    small.federation.run_window()
    assert not any(summed)


@pytest.mark.parametrize("block", [1, 2, 3, 5, 20])
@pytest.mark.parametrize("clients", [1, 2, 7, 40])
def test_blocks_of_equal_work_hold_everybody_once(clients: int, block: int) -> None:
    steps = np.random.default_rng(clients * block).integers(0, 30, clients)
    parts = by_work(steps, block)
    assert sorted(np.concatenate(parts).tolist()) == list(range(clients))
    assert len(parts) == -(-clients // block)
    assert all(0 < len(part) <= 2 * block for part in parts)
    assert (np.diff(steps[np.concatenate(parts)]) <= 0).all()


def test_blocks_of_equal_work_take_about_equally_long() -> None:
    steps = np.sort(np.random.default_rng(0).geometric(0.1, 100))
    work = [int(steps[part].sum()) for part in by_work(steps, 50)]
    assert len(work) == 2
    assert max(work) < 1.3 * min(work)
    assert len(SIZES) == 5  # the federations above have two blocks
