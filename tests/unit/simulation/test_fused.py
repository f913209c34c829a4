"""The fused engine against the loop: one definition of the algorithm, the same numbers."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from typing import Any

import numpy as np
import pytest
import torch
from torch import nn
from torch.utils._python_dispatch import TorchDispatchMode

from fedsim.data.dataset import Split, make_dataset
from fedsim.data.federated import FederatedData
from fedsim.data.transforms import identity, image
from fedsim.errors import FedsimError, ModelError
from fedsim.flat import buffer_specs, spec_of
from fedsim.grads import LOSSES, model_grad
from fedsim.local import LocalAlgorithm, LocalSpec, Phase, affine
from fedsim.schedulers import buffer
from fedsim.simulation import onednn
from fedsim.simulation.devices import instant
from fedsim.simulation.fused import FusedTrainer, fused_block
from fedsim.simulation.fused_fit import why_not_fused
from fedsim.simulation.fused_passes import descend
from fedsim.strategies.fedprox import proximal
from fedsim.strategy import Strategy, make_strategy
from fedsim.training.clients import ClientData
from fedsim.training.loop import LoopTrainer
from fedsim.training.work import Workplace
from tests.contract.registered import STRATEGIES, choices, chosen, registered
from tests.federations import CLASSES, SIZES, Small, build, random_data

PLAIN = LocalSpec(epochs=2, batch_size=4, lr=0.1)
EXACT = 1e-10


def both(strategy: Strategy, *, block: int = 3, **parameters: Any) -> tuple[Small, Small]:
    parameters = {"spec": PLAIN} | parameters
    loop = build(strategy, trainer=LoopTrainer, **parameters)
    fused = build(strategy, trainer=lambda place: FusedTrainer(place, block), **parameters)
    return loop, fused


def assert_rounds_agree(strategy: Strategy, *, rounds: int = 2, **parameters: Any) -> None:
    loop, fused = both(strategy, **parameters)
    for _ in range(rounds):
        before = loop.federation.model.clone()
        records = [small.federation.run_window().record for small in (loop, fused)]
        one, other = loop.federation.model, fused.federation.model
        moved = (one - before).norm()
        assert moved > 0
        assert (one - other).norm() <= EXACT * moved
        assert records[0]["received"] == records[1]["received"]
        assert records[0]["train_loss"] == pytest.approx(records[1]["train_loss"], rel=1e-9)
    everyone = np.arange(loop.federation.population)
    for kept, others in ((loop.store, fused.store), (loop.federation.rows, fused.federation.rows)):
        known = everyone[kept.has(everyone)]
        assert np.array_equal(kept.has(everyone), others.has(everyone))
        if len(known):
            rows, found = kept.read(known), others.read(known)
            assert list(rows) == list(found)
            for name, values in rows.items():
                assert torch.allclose(values.double(), found[name].double(), rtol=0, atol=1e-9)


def is_affine(name: str, parameters: dict[str, Any]) -> Strategy | None:
    strategy = chosen(name, parameters)
    if strategy is None or not strategy.traits.affine or "sync" not in strategy.traits.modes:
        return None
    return strategy


@pytest.mark.parametrize("name", STRATEGIES)
def test_every_affine_strategy_trains_as_in_the_loop(name: str) -> None:
    registered(name)
    strategies = [is_affine(name, parameters) for parameters in [{}, *choices(name)]]
    found = [strategy for strategy in strategies if strategy is not None]
    if not found:
        pytest.skip(f"{name!r} is not affine")
    for strategy in found:
        assert_rounds_agree(strategy)


@pytest.mark.parametrize("name", ["fedavg", "fedprox", "scaffold", "feddyn"])
@pytest.mark.parametrize(
    "spec",
    [
        replace(PLAIN, weight_decay=0.05),
        replace(PLAIN, batch_size=0),
        replace(PLAIN, steps=5),
        replace(PLAIN, steps=1, batch_size=8),
        replace(PLAIN, steps=1, batch_size=3, weight_decay=0.05),
        replace(PLAIN, batch_size=1, epochs=1),
    ],
)
def test_any_local_training_agrees(name: str, spec: LocalSpec) -> None:
    for block in (1, 2, 5):
        assert_rounds_agree(make_strategy(name), spec=spec, block=block)


ACTIVATIONS: dict[str, Callable[[], nn.Module]] = {
    "relu": nn.ReLU,
    "tanh": nn.Tanh,
    "sigmoid": nn.Sigmoid,
    "silu": nn.SiLU,
    "gelu": nn.GELU,
    "gelu by tanh": lambda: nn.GELU("tanh"),
    "leaky": lambda: nn.LeakyReLU(0.2),
    "falling leak": lambda: nn.LeakyReLU(-0.2),
    "identity": nn.Identity,
    "no dropout": lambda: nn.Dropout(0.0),
}


def between(make: Callable[[], nn.Module]) -> Callable[[], nn.Module]:
    return lambda: nn.Sequential(
        nn.Flatten(), nn.Linear(6, 8), make(), nn.Linear(8, 7), make(), nn.Linear(7, CLASSES)
    )


@pytest.mark.parametrize("name", ACTIVATIONS)
def test_every_activation_has_its_derivative(name: str) -> None:
    assert_rounds_agree(make_strategy("fedprox"), model=between(ACTIVATIONS[name]))


def odd_mlp() -> nn.Module:
    """Activations on the inputs, several in a row, after the last layer; no bias; nested."""
    return nn.Sequential(
        nn.Tanh(),
        nn.Sequential(nn.Linear(6, 9, bias=False), nn.Tanh(), nn.ReLU(), nn.SiLU(), nn.Sigmoid()),
        nn.Linear(9, CLASSES),
        nn.Tanh(),
    )


def test_activations_may_stand_anywhere() -> None:
    assert_rounds_agree(make_strategy("scaffold"), model=odd_mlp)


def test_one_layer_is_enough() -> None:
    assert_rounds_agree(make_strategy("feddyn"), model=lambda: nn.Linear(6, CLASSES))


@pytest.mark.parametrize("rows", [8, 12, 64])
@pytest.mark.parametrize("name", ["fedavg", "fedprox", "scaffold", "feddyn"])
def test_a_large_first_layer_that_waits_with_its_update_ends_where_it_would(
    name: str, rows: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("fedsim.simulation.fused._IN_ROWS_BYTES", 100)
    monkeypatch.setattr("fedsim.simulation.fused._WINDOW_ROWS", rows)
    for spec in (PLAIN, replace(PLAIN, weight_decay=0.05), replace(PLAIN, steps=1)):
        assert_rounds_agree(make_strategy(name), spec=spec, block=4)
    assert_rounds_agree(make_strategy(name), model=odd_mlp)


@pytest.mark.skipif(not hasattr(torch.ops.mkldnn, "_linear_pointwise"), reason="torch without oneDNN")
@pytest.mark.parametrize("name", ["fedavg", "fedprox"])
@pytest.mark.parametrize("decay", [0.0, 0.05])
def test_products_by_onednn_end_where_others_do(
    name: str, decay: float, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(onednn, "pays", lambda: True)
    monkeypatch.setattr("fedsim.simulation.fused._IN_ROWS_BYTES", 100)
    spec = replace(PLAIN, weight_decay=decay)
    # A smooth model: float32 differences do not jump over the kink of a ReLU.
    loop, fused = both(
        make_strategy(name),
        spec=spec,
        dtype=torch.float32,
        model=lambda: nn.Sequential(nn.Linear(6, 9), nn.Tanh(), nn.Linear(9, CLASSES)),
    )
    before = loop.federation.model.clone()
    for small in (loop, fused):
        small.federation.run_window()
    one, other = loop.federation.model, fused.federation.model
    assert (one - other).norm() <= 1e-5 * (one - before).norm()


def test_many_gathers_make_the_same_steps_as_one(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("fedsim.simulation.fused_data._INPUT_BYTES", 1)
    assert_rounds_agree(make_strategy("scaffold"))


def regression_data(*, outputs: int) -> FederatedData:
    draw = torch.Generator().manual_seed(1)
    inputs = torch.randn(sum(SIZES), 6, generator=draw)
    targets = inputs @ torch.randn(6, outputs, generator=draw)
    targets = targets.squeeze(1) if outputs == 1 else targets
    dataset = make_dataset(
        "random", "regression", train=Split(inputs, targets), test=None, transforms=identity(), classes=None
    )
    offsets = np.concatenate([[0], np.cumsum(SIZES)]).astype(np.int64)
    return FederatedData(dataset, np.arange(sum(SIZES)), offsets)


@pytest.mark.parametrize("outputs", [1, 2])
def test_squared_errors_agree(outputs: int, monkeypatch: pytest.MonkeyPatch) -> None:
    # `build` takes the loss of classification for every model.
    monkeypatch.setitem(LOSSES, "classification", LOSSES["regression"])
    assert_rounds_agree(
        make_strategy("fedprox"),
        model=lambda: nn.Sequential(nn.Linear(6, 5), nn.Tanh(), nn.Linear(5, outputs)),
        data=regression_data(outputs=outputs),
        spec=replace(PLAIN, lr=0.01),
    )


def test_random_transforms_draw_the_same_numbers() -> None:
    draw = torch.Generator().manual_seed(2)
    n = sum(SIZES)
    images = torch.randint(0, 256, (n, 1, 5, 5), generator=draw, dtype=torch.uint8)
    targets = torch.randint(0, CLASSES, (n,), generator=draw)
    dataset = make_dataset(
        "random",
        "classification",
        train=Split(images, targets),
        test=None,
        transforms=image([0.5], [0.5], crop=1, flip=True),
        classes=CLASSES,
    )
    offsets = np.concatenate([[0], np.cumsum(SIZES)]).astype(np.int64)
    data = FederatedData(dataset, np.arange(n), offsets)
    model = lambda: nn.Sequential(nn.Flatten(), nn.Linear(25, CLASSES))  # noqa: E731
    assert_rounds_agree(make_strategy("fedavg"), model=model, data=data)


@pytest.mark.parametrize("name", ["fedbuff", "fedasync", "async_fedavg"])
def test_clients_of_several_versions_share_a_block(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    uneven = instant()._replace(
        seconds=lambda ids, steps, moment: np.asarray(1.0 + (ids * 7 + moment) % 5 * 0.5, np.float64)
    )
    scheduler = buffer(cohort=4, population=len(SIZES), size=2)
    loop, fused = both(make_strategy(name), scheduler=scheduler, devices=uneven)
    seen: list[bool] = []
    train = fused.engine.trainer.train

    def watched(work: Any, *rest: Any) -> Any:
        seen.append(work.mixed)
        return train(work, *rest)

    monkeypatch.setattr(fused.engine.trainer, "train", watched)
    for _ in range(8):
        for small in (loop, fused):
            small.federation.run_window()
    assert any(seen)
    assert (loop.federation.model - fused.federation.model).norm() <= EXACT * loop.federation.model.norm()


def test_clients_need_not_come_in_the_order_of_their_steps() -> None:
    class InCohortOrder(FusedTrainer):
        def plan(self, steps: Any) -> Any:
            return [np.arange(len(steps))]

    loop = build(make_strategy("scaffold"), spec=PLAIN)
    fused = build(make_strategy("scaffold"), spec=PLAIN, trainer=lambda place: InCohortOrder(place, 9))
    for _ in range(3):
        for small in (loop, fused):
            small.federation.run_window()
    assert (loop.federation.model - fused.federation.model).norm() <= EXACT * loop.federation.model.norm()


@pytest.mark.parametrize("large", [1 << 30, 100])
@pytest.mark.parametrize("pulled", [False, True])
def test_an_own_decay_for_each_client_is_followed(
    large: int, pulled: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("fedsim.simulation.fused._IN_ROWS_BYTES", large)
    averaging = make_strategy("fedavg")

    def terms(msg: Any, lent: Any, state: Any) -> Any:
        return state, state * msg.x if pulled else None

    def fresh(msg: Any) -> Any:
        return torch.tensor(0.5, dtype=torch.float64)

    def finish(msg: Any, lent: Any, state: Any, x: Any, carry: Any, length: Any) -> Any:
        from fedsim.local import Result

        return Result({"delta": x - msg.x}), state + x.norm(), {}

    strategy = averaging._replace(
        local=lambda grad_fn, spec: affine(grad_fn, terms, fresh=fresh, finish=finish),
        traits=replace(averaging.traits, client_state="client"),
    )
    assert_rounds_agree(strategy, rounds=3)


class LargestNew(TorchDispatchMode):  # type: ignore[no-untyped-call]
    """The most bytes that one operation allocated anew, and the operations seen."""

    def __init__(self) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.largest = 0
        self.seen: set[str] = set()

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        given = {
            t.untyped_storage().data_ptr()
            for t in (*args, *(kwargs or {}).values())
            if isinstance(t, torch.Tensor)
        }
        out = func(*args, **(kwargs or {}))
        self.seen.add(str(func))
        for tensor in out if isinstance(out, tuple | list) else (out,):
            if isinstance(tensor, torch.Tensor) and tensor.untyped_storage().data_ptr() not in given:
                self.largest = max(self.largest, tensor.untyped_storage().nbytes())
        return out


def test_steps_keep_no_gradients_and_allocate_nothing_of_a_stack_s_size(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    wide = lambda: nn.Sequential(nn.Linear(6, 300), nn.ReLU(), nn.Linear(300, CLASSES))  # noqa: E731
    small = build(make_strategy("fedavg"), model=wide, spec=PLAIN, trainer=lambda p: FusedTrainer(p, 5))
    trainer = small.engine.trainer
    assert isinstance(trainer, FusedTrainer)
    small.federation.run_window()  # the memory that rounds share is there from now on
    mode = LargestNew()

    def watched(*args: Any) -> None:
        with mode:
            descend(*args)

    monkeypatch.setattr("fedsim.simulation.fused.descend", watched)
    small.federation.run_window()
    assert any("baddbmm_" in name for name in mode.seen)
    assert not any("autograd" in name or "clone" in name for name in mode.seen)
    stack = 5 * 6 * 300 * 8
    assert 0 < mode.largest < stack / 2


def place_of(module: nn.Module, *, grad: Any = None) -> Workplace:
    module = module.double()
    floating, integers = buffer_specs(module)
    clients = ClientData(random_data(), seed=0, dtype=torch.float64, device=torch.device("cpu"))
    gradient = grad or model_grad(module, LOSSES["classification"])
    return Workplace(module, spec_of(module), floating, integers, gradient, clients, 0)


def tied() -> nn.Module:
    layer = nn.Linear(6, 6)
    return nn.Sequential(layer, nn.ReLU(), layer, nn.Linear(6, CLASSES))


def frozen() -> nn.Module:
    module = nn.Sequential(nn.Linear(6, 6), nn.Linear(6, CLASSES))
    module[0].weight.requires_grad_(False)
    return module


def hooked() -> nn.Module:
    module = nn.Sequential(nn.Linear(6, CLASSES))
    module[0].register_forward_hook(lambda part, inputs, outputs: outputs * 2)
    return module


class Own(nn.Sequential):
    def forward(self, inputs: torch.Tensor) -> torch.Tensor:
        return 2 * torch.as_tensor(super().forward(inputs))  # type: ignore[no-untyped-call]


@pytest.mark.parametrize(
    ("make", "words"),
    [
        (lambda: Own(nn.Linear(6, CLASSES)), "not an nn.Sequential"),
        (lambda: nn.Sequential(nn.Linear(6, 4), nn.BatchNorm1d(4), nn.Linear(4, CLASSES)), "buffers"),
        (lambda: nn.Sequential(nn.Linear(6, 4), nn.LayerNorm(4), nn.Linear(4, CLASSES)), "LayerNorm"),
        (lambda: nn.Sequential(nn.Dropout(0.5), nn.Linear(6, CLASSES)), "Dropout"),
        (lambda: nn.Sequential(nn.ReLU()), "trainable|no linear layer"),
        (tied, "shared"),
        (frozen, "do not train"),
        (hooked, "hooks"),
        (lambda: nn.Sequential(nn.Linear(7, CLASSES)), "one row of numbers"),
    ],
)
def test_other_models_are_refused_with_the_reason(make: Callable[[], nn.Module], words: str) -> None:
    with pytest.raises(FedsimError) as refused:
        FusedTrainer(place_of(make()), 3)
    import re

    assert re.search(words, str(refused.value))


def test_other_algorithms_are_refused_with_the_reason() -> None:
    place = place_of(nn.Sequential(nn.Linear(6, CLASSES)))
    fits = affine(place.grad_fn, proximal(0.1))

    def reason(algorithm: LocalAlgorithm = fits, plain: bool = True, **spec: Any) -> str | None:
        return why_not_fused(place, replace(PLAIN, **spec), algorithm, plain=plain)

    assert reason() is None
    assert "replaced" in str(reason(plain=False))
    assert "momentum" in str(reason(momentum=0.5))
    assert "adamw" in str(reason(optimizer="adamw"))
    assert "clipped" in str(reason(clip_norm=1.0))
    assert "additive" in str(reason(fits._replace(terms=None)))
    assert "phases" in str(reason(fits._replace(phases=fits.phases * 2)))
    limited = fits.phases[0]._replace(trains=("0.weight",))
    assert "phase" in str(reason(fits._replace(phases=(limited,))))
    other = Phase(lambda *args: fits.phases[0].direction(*args))
    assert "describe" in str(reason(fits._replace(phases=(other,))))
    assert "describe" in str(reason(affine(lambda x, batch: place.grad_fn(x, batch))))


def test_a_task_that_does_not_fit_is_refused_and_not_trained_otherwise() -> None:
    small = build(
        make_strategy("fedavg"),
        spec=replace(PLAIN, momentum=0.9),
        trainer=lambda place: FusedTrainer(place, 3),
    )
    with pytest.raises(ModelError, match="fused"):
        small.federation.run_window()


def test_a_block_is_as_large_as_the_cache_allows() -> None:
    tiny = place_of(nn.Sequential(nn.Linear(6, CLASSES)))
    assert fused_block(tiny, 100, sums_only=False) == 100
    assert fused_block(tiny, 100_000, sums_only=True) == 1024
    large = place_of(nn.Sequential(nn.Linear(6, 4000), nn.Linear(4000, CLASSES)))
    of_rows, of_sums = (fused_block(large, 1000, sums_only=only) for only in (False, True))
    assert 1 <= of_rows < of_sums < 1000
