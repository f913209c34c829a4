"""One definition of local training serves engines, robust rules, attackers and observers.

The median goes through the gather reducer in both engines; an attacker differentiates through the
very `run_local` that trains and recovers a digit; a replaced gradient, a transform with state and an
observer act on the same run.
"""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn
from torch.func import grad, vmap

from fedsim.buffers import no_buffers
from fedsim.flat import flat_of, spec_of
from fedsim.grads import LOSSES, batch_loss, model_grad
from fedsim.local import LocalSpec, affine, run_local
from fedsim.strategies.fedavg import fedavg
from fedsim.strategies.median import median
from fedsim.training.clients import Schedule
from fedsim.transform import Observed, UpdateTransform, identity
from fedsim.types import Aux, Batch, GradFn, Message, Task
from fedsim.vector import Vector
from tests.federations import Small, build, random_data

ENGINES = ["loop", "stacked"]


# -- robust rules see rows -------------------------------------------------------------------------


@pytest.mark.parametrize("cohort", [4, 5])
@pytest.mark.parametrize("engine", ENGINES)
def test_the_median_takes_the_middle_of_the_answers_coordinate_by_coordinate(
    engine: str, cohort: int
) -> None:
    seen: list[Observed] = []
    small = build(median(), engine=engine, cohort=cohort, block=2, observers=[seen.append])
    for _ in range(2):
        seen.clear()
        start = small.federation.model.clone()
        small.federation.run_window()
        deltas = torch.cat([o.block.vectors["delta"] for o in seen]).numpy()
        assert deltas.shape[0] == cohort
        expected = torch.from_numpy(np.median(deltas, axis=0))
        torch.testing.assert_close(small.federation.model, start + expected, rtol=0, atol=1e-14)


def test_the_median_is_the_same_in_both_engines() -> None:
    models = []
    for engine in ENGINES:
        small = build(median(), engine=engine)
        for _ in range(3):
            small.federation.run_window()
        models.append(small.federation.model)
    assert (models[0] - models[1]).norm() <= 1e-10 * models[0].norm()


@pytest.mark.parametrize("engine", ENGINES)
def test_two_wild_clients_of_five_move_a_mean_and_not_a_median(engine: str) -> None:
    def poisoned(inner: UpdateTransform) -> UpdateTransform:
        def encode(state: Any, vectors: Any, keys: Any) -> Any:
            wild = torch.from_numpy(np.isin(keys, list(attackers)))
            scale = torch.where(wild, -1e6, 1.0)[:, None]
            return {name: rows * scale for name, rows in vectors.items()}, state

        return inner._replace(encode=encode)

    from fedsim.keys import Purpose, stream_keys
    from tests.federations import SEED

    attackers = set(stream_keys(SEED, Purpose.ENCODE, 0, np.array([1, 4])).tolist())
    moved = {}
    for name, strategy in (("mean", fedavg(weighting="uniform")), ("median", median())):
        small = build(strategy, engine=engine, transform=poisoned(identity()))
        start = small.federation.model.clone()
        small.federation.run_window()
        moved[name] = float((small.federation.model - start).norm())
    assert moved["mean"] > 1e4
    assert moved["median"] < 10


# -- an attacker differentiates through the code that trains ---------------------------------------


def digit(index: int) -> tuple[Tensor, Tensor]:
    """[1, 64] pixels in 0 … 1 and its label [1]."""
    from sklearn.datasets import load_digits

    source = load_digits()
    pixels = torch.from_numpy(source.data[index] / 16).double()[None]
    return pixels, torch.tensor([int(source.target[index])])


def local_answer(module: nn.Module, inputs: Tensor, targets: Tensor, spec: LocalSpec) -> Tensor:
    """[D] the delta of a client that owns these examples, one of them a step: the code that trains."""
    layout = spec_of(module)

    def batches(phase: Any, local: LocalSpec) -> list[Batch]:
        real = torch.float64
        return [
            Batch(
                inputs[step : step + 1],
                targets[step : step + 1],
                torch.ones(1, dtype=real),
                torch.tensor(local.lr, dtype=real),
                torch.tensor(step),
                torch.tensor(len(targets)),
                torch.tensor(step == 0),
                torch.tensor(True),
                torch.tensor(1.0 / len(targets), dtype=real),
            )
            for step in range(len(targets))
        ]

    outcome = run_local(
        affine(model_grad(module, LOSSES["classification"])),
        Message({"x": layout.unflatten(flat_of(module, layout))}),
        (),
        (),
        batches,
        spec=spec,
        differentiable=True,
    )
    return layout.flatten(outcome.result.vectors["delta"])


def invert(module: nn.Module, observed: Tensor, targets: Tensor, spec: LocalSpec) -> Tensor:
    """Pixels whose local training would have given the observed delta; the labels are known."""
    draw = torch.Generator().manual_seed(1)
    candidates = torch.rand(len(targets), 64, generator=draw, dtype=torch.float64).requires_grad_()
    optimizer = torch.optim.LBFGS(
        [candidates], lr=1.0, max_iter=300, history_size=100, line_search_fn="strong_wolfe",
        tolerance_grad=1e-14, tolerance_change=1e-16,
    )  # fmt: skip

    def distance() -> Tensor:
        optimizer.zero_grad()
        answer = local_answer(module, candidates, targets, spec)
        loss = (answer - observed).square().sum() / observed.square().sum()
        loss.backward()
        return loss

    optimizer.step(distance)  # type: ignore[arg-type]
    return candidates.detach()


@pytest.mark.parametrize(
    "spec",
    [LocalSpec(lr=0.1), LocalSpec(lr=0.1, momentum=0.9, weight_decay=0.01)],
    ids=["plain", "momentum and weight decay"],
)
def test_two_digits_are_recovered_from_the_delta_of_two_local_steps(spec: LocalSpec) -> None:
    torch.manual_seed(0)
    # A smooth activation, so that the distance has derivatives of all orders.
    module = nn.Sequential(nn.Linear(64, 16), nn.Tanh(), nn.Linear(16, 10)).double()
    (first, label), (second, other) = digit(0), digit(17)
    pixels, labels = torch.cat([first, second]), torch.cat([label, other])
    observed = local_answer(module, pixels, labels, spec).detach()
    recovered = invert(module, observed, labels, spec)
    assert (recovered - pixels).abs().max() < 1e-3


def test_what_the_attacker_differentiates_is_what_the_engine_computed() -> None:
    spec = LocalSpec(steps=2, batch_size=4, lr=0.1, momentum=0.9)
    seen: list[Observed] = []
    small = build(fedavg(), spec=spec, observers=[seen.append])
    x = small.federation.model.clone()
    small.federation.run_window()
    for observed in seen:
        ids = observed.block.ids
        task = Task(ids, 0, 0, 0, Message({"x": x}), lambda some: (), no_buffers(), spec)
        steps = small.place.clients.steps(task, ids)
        outcome = run_local(
            fedavg().local(small.place.grad_fn, spec),
            Message({"x": small.place.spec.unflatten(x)}),
            (),
            (),
            lambda phase, s, ids=ids, steps=steps: Schedule(
                small.place.clients, ids, np.zeros(1, np.int64), steps, phases=[phase], number=0, spec=s
            ),
            spec=spec,
            differentiable=True,
        )
        delta = small.place.spec.flatten(outcome.result.vectors["delta"])
        torch.testing.assert_close(delta, observed.block.vectors["delta"][0], rtol=0, atol=1e-15)


# -- the gradient can be replaced ------------------------------------------------------------------


def clipped_per_example(module: nn.Module, bound: float) -> Any:
    """Mean over the real rows of each example's gradient, clipped to `bound`: DP-SGD without its noise."""
    loss = batch_loss(module, LOSSES["classification"])

    def replace_it(_: GradFn) -> GradFn:
        def grad_fn(x: Vector, batch: Batch) -> tuple[Vector, Aux]:
            def one(inputs: Tensor, target: Tensor) -> Any:
                alone = batch._replace(
                    inputs=inputs[None], targets=target[None], mask=torch.ones_like(batch.mask[:1])
                )
                gradient, _ = grad(loss, has_aux=True)(x.tensors, alone)
                vector = Vector(gradient)
                return vector * torch.clamp(bound / (vector.norm() + 1e-12), max=1.0)

            rows = vmap(one)(batch.inputs, batch.targets)
            count = torch.clamp(batch.mask.sum(), min=1)
            mean = rows.map(lambda t: torch.einsum("b...,b->...", t, batch.mask) / count)
            value, buffers = loss(x.tensors, batch)
            return mean, Aux(value, {}, buffers)

        return grad_fn

    return replace_it


def per_example(bound: float, engine: str) -> Small:
    torch.manual_seed(0)
    module = nn.Sequential(nn.Linear(6, 8), nn.Tanh(), nn.Linear(8, 3)).double()
    return build(
        fedavg(),
        engine=engine,
        model=lambda: module,
        grad=clipped_per_example(module, bound),
        spec=LocalSpec(epochs=2, batch_size=4, lr=0.1),
    )


def test_clipped_gradients_of_single_examples_agree_in_both_engines() -> None:
    models = []
    for engine in ENGINES:
        small = per_example(0.3, engine)
        for _ in range(2):
            small.federation.run_window()
        models.append(small.federation.model)
    assert (models[0] - models[1]).norm() <= 1e-10 * models[0].norm()


@pytest.mark.parametrize("engine", ENGINES)
def test_a_step_of_clipped_gradients_is_no_longer_than_rate_times_bound(engine: str) -> None:
    small = per_example(0.3, engine)
    outcome = small.federation.run_window()
    columns = outcome.clients.columns
    for norm, steps in zip(columns["norm"], columns["steps"], strict=True):
        assert 0 < norm <= 0.1 * 0.3 * steps + 1e-12


def test_a_bound_that_nothing_reaches_gives_plain_training() -> None:
    replaced = per_example(1e9, "loop")
    plain = build(
        fedavg(),
        model=lambda: replaced.place.module,
        spec=LocalSpec(epochs=2, batch_size=4, lr=0.1),
    )
    for small in (replaced, plain):
        small.federation.run_window()
    torch.testing.assert_close(replaced.federation.model, plain.federation.model, rtol=0, atol=1e-12)


# -- transforms with state, and what a curious server sees ------------------------------------------


def quantised_with_memory(step: float) -> UpdateTransform:
    """Whole multiples of `step` go up; what rounding left is added to the next update."""

    def encode(state: Any, vectors: Any, keys: Any) -> Any:
        wanted = vectors["delta"] + state["error"]
        levels = (wanted / step).round()
        return {**vectors, "delta": levels}, {"error": wanted - levels * step}

    return UpdateTransform(
        lambda vectors: {"error": torch.zeros_like(vectors["delta"])},
        encode,
        lambda message: {**message, "delta": message["delta"] * step},
    )


@pytest.mark.parametrize("engine", ENGINES)
def test_an_observer_sees_exactly_what_the_server_decodes_and_nothing_of_the_clients_memory(
    engine: str,
) -> None:
    step = 0.05
    seen: list[Observed] = []
    small = build(
        fedavg(weighting="uniform"),
        engine=engine,
        transform=quantised_with_memory(step),
        observers=[seen.append],
    )
    for window in range(3):
        seen.clear()
        start = small.federation.model.clone()
        small.federation.run_window()
        deltas = torch.cat([o.block.vectors["delta"] for o in seen])
        levels = deltas / step
        assert torch.equal(levels, levels.round()) or (levels - levels.round()).abs().max() < 1e-9
        torch.testing.assert_close(small.federation.model, start + deltas.mean(0), rtol=0, atol=1e-13)
        assert {o.round_index for o in seen} == {window}
        assert all(torch.equal(o.message.vectors["x"], start) for o in seen)
    errors = small.store.read(np.arange(5))["transform-000"]
    assert errors.abs().max() <= step / 2 + 1e-12
    assert errors.any()


def test_error_feedback_makes_up_in_sum_for_what_rounding_lost() -> None:
    # At rate zero after the first round the memory alone would be sent: here every round trains, and
    # the sum of what was sent differs from the sum of what was meant by one memory at most.
    step, rounds = 0.5, 6
    sent: dict[int, Tensor] = {}
    meant: dict[int, Tensor] = {}
    inner = quantised_with_memory(step)
    queue: list[Tensor] = []

    def encode(state: Any, vectors: Any, keys: Any) -> Any:
        queue.append(vectors["delta"].clone())
        return inner.encode(state, vectors, keys)

    def note(observed: Observed) -> None:
        client = int(observed.block.ids[0])
        sent[client] = sent.get(client, torch.zeros(())) + observed.block.vectors["delta"][0]
        meant[client] = meant.get(client, torch.zeros(())) + queue.pop(0)[0]

    small = build(
        fedavg(), transform=inner._replace(encode=encode), observers=[note], data=random_data(sizes=(6, 9, 4))
    )
    for _ in range(rounds):
        small.federation.run_window()
    for client in range(3):
        assert (sent[client] - meant[client]).abs().max() <= step / 2 + 1e-12
        assert sent[client].any()
