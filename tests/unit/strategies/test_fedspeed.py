from __future__ import annotations

from collections.abc import Sequence
from typing import Any, Literal

import numpy as np
import pytest
import torch
from torch.utils import _pytree as pytree

from fedsim.errors import ConfigError
from fedsim.federation import Federation
from fedsim.local import LocalSpec
from fedsim.strategies.feddyn import feddyn
from fedsim.strategies.fedprox import fedprox
from fedsim.strategies.fedsam import fedsam
from fedsim.strategies.fedspeed import fedspeed
from fedsim.strategies.perturbation import perturbed
from fedsim.types import Batch
from fedsim.vector import Vector
from tests.quadratics import (
    ENGINES,
    Array,
    Quadratics,
    client_held,
    diagonal,
    federate,
    heterogeneous,
    quadratic_grad,
    run,
    server_held,
)

PLACES: tuple[Literal["client", "server"], ...] = ("client", "server")
AVERAGES: tuple[Literal["all", "participants"], ...] = ("all", "participants")
COHORTS = [[0, 1, 4], [2, 3, 5], [1], [0, 2, 4, 5]]
LIMITS = {1: 2, 4: 1, 5: 0}


def sharp(problem: Quadratics, client: int, x: Array, rho: float, alpha: float = 1.0) -> Array:
    """(1 - α) g1 + α g2."""
    g = problem.gradient(client, x)
    e = rho * g / (np.linalg.norm(g) + 1e-7)
    return (1 - alpha) * g + alpha * problem.gradient(client, x + e)


def clipped(v: Array, bound: float) -> Array:
    return v * min(1.0, bound / (float(np.linalg.norm(v)) + 1e-6))


def duals(federation: Federation, place: str) -> Array:
    """[N, d] every h_i, wherever it is."""
    return client_held(federation) if place == "client" else server_held(federation, "dual")


def one_example(problem: Quadratics, client: int) -> Batch:
    row = np.concatenate([problem.A[client].ravel(), problem.b[client]])
    zero, one = torch.zeros((), dtype=torch.float64), torch.ones(1, dtype=torch.float64)
    flag = torch.tensor(True)
    return Batch(torch.from_numpy(row)[None], one, one, zero, zero.long(), zero.long(), flag, flag, one[0])


@pytest.mark.parametrize("engine", ENGINES)
@pytest.mark.parametrize("place", PLACES)
def test_one_round_by_hand(engine: str, place: Literal["client", "server"]) -> None:
    """Curvatures 1, ρ = 0.5: at 0 the gradients are (-3, -4, 0) and (0, 0, 2), of lengths 5 and 2.

    e = (-0.3, -0.4, 0), (0, 0, 0.5); g2 = (-3.3, -4.4, 0), (0, 0, 2.5); with rate 0.1
    Δ = (0.33, 0.44, 0), (0, 0, -0.25), which are the duals; w = mean Δ + h̄ = (0.33, 0.44, -0.25).
    """
    pair = diagonal([[1, 1, 1], [1, 1, 1]], [[3, 4, 0], [0, 0, -2]], sizes=[1, 3])
    federation = federate(pair, fedspeed(rho=0.5, state_at=place), engine=engine)
    np.testing.assert_allclose(run(federation, 1)[0], [0.33, 0.44, -0.25], atol=1e-7)
    np.testing.assert_allclose(federation.state.strategy.h, [0.165, 0.22, -0.125], atol=1e-7)
    np.testing.assert_allclose(duals(federation, place), [[0.33, 0.44, 0], [0, 0, -0.25]], atol=1e-7)


@pytest.mark.parametrize("engine", ENGINES)
@pytest.mark.parametrize("place", PLACES)
@pytest.mark.parametrize("average", AVERAGES)
@pytest.mark.parametrize("alpha", [1.0, 0.6])
def test_it_follows_the_equations_round_by_round(
    engine: str, place: Literal["client", "server"], average: Literal["all", "participants"], alpha: float
) -> None:
    """Partial participation, unequal numbers of steps, and one client that manages none."""
    problem, prox, rho = heterogeneous(sizes=[4, 1, 3, 2, 5, 2]), 0.7, 0.4
    strategy = fedspeed(prox=prox, rho=rho, alpha=alpha, dual_average=average, state_at=place)
    federation = federate(problem, strategy, engine=engine, steps=5, cohorts=COHORTS, limits=LIMITS)
    w, h, held = np.zeros(4), np.zeros(4), np.zeros((6, 4))
    for r in range(8):
        cohort, local = COHORTS[r % 4], []
        for i in cohort:
            x = w
            for _ in range(LIMITS.get(i, 5)):
                x = x - 0.1 * (sharp(problem, i, x, rho, alpha) + prox * (x - w) + prox * held[i])
            held[i] = held[i] + x - w
            local.append(x)
        h = h + sum(x - w for x in local) / 6
        if average == "all":
            w = np.mean(local, axis=0) + h
        else:
            w = np.mean([x + held[i] for i, x in zip(cohort, local, strict=True)], axis=0)
        np.testing.assert_allclose(run(federation, 1)[0], w, rtol=0, atol=1e-10)
        np.testing.assert_allclose(duals(federation, place), held, rtol=0, atol=1e-10)
        if average == "all":
            np.testing.assert_allclose(federation.state.strategy.h.numpy(), h, rtol=0, atol=1e-10)


@pytest.mark.parametrize("engine", ENGINES)
@pytest.mark.parametrize("place", PLACES)
@pytest.mark.parametrize("parameters", [{"rho": 0.0}, {"alpha": 0.0}])
def test_without_a_perturbation_it_is_feddyn_exactly(
    engine: str, place: Literal["client", "server"], parameters: dict[str, float]
) -> None:
    problem = heterogeneous(sizes=[4, 1, 3, 2, 5, 2])
    spec = LocalSpec(epochs=2, batch_size=2, lr=0.05, momentum=0.5, weight_decay=0.01, clip_norm=5.0)
    one, two = (
        run(federate(problem, strategy, engine=engine, spec=spec, cohorts=COHORTS), 6)
        for strategy in (fedspeed(prox=0.7, state_at=place, **parameters), feddyn(alpha=0.7, state_at=place))  # type: ignore[arg-type]
    )
    np.testing.assert_array_equal(one, two)


@pytest.mark.parametrize("engine", ENGINES)
def test_without_duals_and_perturbation_it_is_fedprox(engine: str) -> None:
    problem = heterogeneous(sizes=[4, 1, 3, 2, 5, 2])
    one, two = (
        run(federate(problem, strategy, engine=engine, steps=4, cohorts=COHORTS), 6)
        for strategy in (fedspeed(prox=0.5, rho=0.0, dual=False), fedprox(mu=0.5, weighting="uniform"))
    )
    np.testing.assert_array_equal(one, two)


def test_without_duals_and_proximal_term_it_is_fedsam() -> None:
    problem = heterogeneous(sizes=[4, 1, 3, 2, 5, 2])
    one, two = (
        run(federate(problem, strategy, steps=4, cohorts=COHORTS), 6)
        for strategy in (fedspeed(prox=0.0, rho=0.3, dual=False), fedsam(rho=0.3, weighting="uniform"))
    )
    np.testing.assert_array_equal(one, two)


def test_no_proximal_term_is_refused_while_there_are_duals() -> None:
    with pytest.raises(ValueError, match=r"set prox above 0, or dual = false"):
        fedspeed(prox=0.0)


def test_a_vanishing_proximal_term_does_not_make_it_fedavg() -> None:
    """ρ = 0, everybody takes part: w_{t+1} = w_t + Δ̄_t + Σ_{s <= t} Δ̄_s."""
    problem = heterogeneous()
    models = run(federate(problem, fedspeed(prox=1e-13, rho=0.0), steps=3, lr=0.02), 5)
    w, total = np.zeros(4), np.zeros(4)
    for model in models:
        deltas = [problem.descend(i, w, steps=3, lr=0.02) - w for i in range(6)]
        total = total + np.mean(deltas, axis=0)
        w = w + np.mean(deltas, axis=0) + total
        np.testing.assert_allclose(model, w, rtol=0, atol=1e-10)


@pytest.mark.parametrize("place", PLACES)
def test_the_server_dual_is_always_the_mean_over_the_population(place: Literal["client", "server"]) -> None:
    strategy = fedspeed(state_at=place)
    federation = federate(heterogeneous(), strategy, steps=4, cohorts=[*COHORTS, []], limits={2: 0})
    for _ in range(7):
        run(federation, 1)
        mean = duals(federation, place).mean(axis=0)
        np.testing.assert_allclose(federation.state.strategy.h, mean, rtol=0, atol=1e-13)


@pytest.mark.parametrize("place", PLACES)
def test_both_averages_of_the_duals_agree_when_everybody_takes_part_and_differ_otherwise(
    place: Literal["client", "server"],
) -> None:
    def models(average: Literal["all", "participants"], cohorts: Sequence[Sequence[int]] | None) -> Array:
        strategy = fedspeed(prox=0.5, dual_average=average, state_at=place)
        return run(federate(heterogeneous(), strategy, steps=4, cohorts=cohorts), 6)

    np.testing.assert_allclose(models("all", None), models("participants", None), rtol=0, atol=1e-12)
    assert np.abs(models("all", COHORTS) - models("participants", COHORTS)).max() > 1e-2


@pytest.mark.parametrize("engine", ENGINES)
def test_without_a_perturbation_it_reaches_the_mean_optimum(engine: str) -> None:
    problem = heterogeneous(clients=4, dimensions=3, seed=3)
    models = run(federate(problem, fedspeed(prox=2.0, rho=0.0), engine=engine, steps=8), 60)
    assert np.linalg.norm(models[-1] - problem.optimum()) < 1e-12


def test_the_distance_at_which_it_comes_to_rest_shrinks_linearly_with_the_radius() -> None:
    problem = heterogeneous(clients=4, dimensions=3, seed=3)
    distances = []
    for rho in (0.4, 0.2, 0.1):
        models = run(federate(problem, fedspeed(prox=2.0, rho=rho), engine="stacked", steps=6), 30)
        assert np.linalg.norm(models[-1] - models[-2]) < 1e-5
        distances.append(np.linalg.norm(models[-1] - problem.optimum()))
    np.testing.assert_allclose(distances, [0.124, 0.064, 0.033], atol=1e-3)
    np.testing.assert_allclose(np.divide(distances[:-1], distances[1:]), 2.0, rtol=0.1)


@pytest.mark.parametrize("parameters", [{}, {"dual_average": "participants"}, {"clip_scope": "reference"}])
@pytest.mark.parametrize("init_beta", [0.0, 0.1])
def test_both_placements_give_the_same_trajectory(parameters: dict[str, Any], init_beta: float) -> None:
    problem = heterogeneous(sizes=[4, 1, 3, 2, 5, 2])
    spec = LocalSpec(
        epochs=2, batch_size=2, lr=0.05, lr_decay=0.9, momentum=0.9, weight_decay=0.01, clip_norm=1.0
    )
    one, two = (
        run(
            federate(
                problem, fedspeed(state_at=p, init_beta=init_beta, **parameters), spec=spec, cohorts=COHORTS
            ),
            8,
        )
        for p in PLACES
    )
    np.testing.assert_allclose(one, two, rtol=0, atol=1e-12)


@pytest.mark.parametrize("engine", ENGINES)
@pytest.mark.parametrize("scope", ["total", "data", "reference"])
def test_a_clip_acts_where_its_scope_says_and_only_there(
    engine: str, scope: Literal["total", "data", "reference"]
) -> None:
    """Clipped at nearly every step, with weight decay outside; clients with fewer steps keep them."""
    problem, prox, rho, bound, decay = heterogeneous(), 0.7, 0.4, 1.5, 0.05
    spec = LocalSpec(steps=5, batch_size=1, lr=0.1, clip_norm=bound, weight_decay=decay)
    strategy = fedspeed(prox=prox, rho=rho, clip_scope=scope)
    federation = federate(problem, strategy, engine=engine, spec=spec, cohorts=COHORTS, limits=LIMITS)
    w, h, held = np.zeros(4), np.zeros(4), np.zeros((6, 4))
    for r in range(8):
        cohort, local = COHORTS[r % 4], []
        for i in cohort:
            x = w
            for _ in range(LIMITS.get(i, 5)):
                g = sharp(problem, i, x, rho)
                v = {
                    "total": clipped(g + prox * (x - w + held[i]), bound),
                    "data": clipped(g, bound) + prox * (x - w + held[i]),
                    "reference": clipped(g + prox * (held[i] - w), bound) + prox * x,
                }[scope]
                x = x - 0.1 * (v + decay * x)
            held[i] = held[i] + x - w
            local.append(x)
        h = h + sum(x - w for x in local) / 6
        w = np.mean(local, axis=0) + h
        np.testing.assert_allclose(run(federation, 1)[0], w, rtol=0, atol=1e-10)


def test_the_reference_scope_is_the_step_of_an_optimiser_whose_weight_decay_holds_the_proximal_term() -> None:
    """As the authors arrange it, with torch.optim: ℓ⟨x, h_i - w⟩ joins the loss, ℓ the weight decay."""
    problem, prox, rho, bound, decay = heterogeneous(clients=1), 0.7, 0.4, 1.5, 0.05
    spec = LocalSpec(steps=5, batch_size=1, lr=0.1, clip_norm=bound, weight_decay=decay)
    models = run(federate(problem, fedspeed(prox=prox, rho=rho, clip_scope="reference"), spec=spec), 4)
    A, b = torch.from_numpy(problem.A[0]), torch.from_numpy(problem.b[0])
    w, h = torch.zeros(4, dtype=torch.float64), torch.zeros(4, dtype=torch.float64)
    for model in models:
        x = w.clone().requires_grad_()
        optimizer = torch.optim.SGD([x], lr=0.1, weight_decay=decay + prox)
        for _ in range(5):
            (uphill,) = torch.autograd.grad((x - b) @ A @ (x - b) / 2, x)
            x.grad = A @ (x.detach() + rho * uphill / (uphill.norm() + 1e-7) - b)
            x.grad = x.grad + torch.autograd.grad(prox * (x * (h - w)).sum(), x)[0]
            torch.nn.utils.clip_grad_norm_([x], bound)
            optimizer.step()
        h = h + x.detach() - w
        w = x.detach() + h
        np.testing.assert_allclose(model, w.numpy(), rtol=0, atol=1e-10)


def test_the_clip_scopes_are_the_same_while_the_clip_is_inactive() -> None:
    spec = LocalSpec(steps=4, batch_size=1, lr=0.05, clip_norm=1e6, weight_decay=0.01, momentum=0.5)
    one, *others = (
        run(federate(heterogeneous(), fedspeed(clip_scope=s), spec=spec, cohorts=COHORTS), 6)
        for s in ("total", "data", "reference")
    )
    for other in others:
        np.testing.assert_allclose(other, one, rtol=0, atol=1e-12)


@pytest.mark.parametrize("engine", ENGINES)
@pytest.mark.parametrize("place", PLACES)
def test_a_relaxed_start_lies_beyond_the_model_away_from_where_the_client_ended(
    engine: str, place: Literal["client", "server"]
) -> None:
    problem, prox, rho, beta = heterogeneous(), 0.7, 0.4, 0.2
    strategy = fedspeed(prox=prox, rho=rho, init_beta=beta, state_at=place)
    federation = federate(problem, strategy, engine=engine, steps=3, cohorts=COHORTS)
    w, held, last = np.zeros(4), np.zeros((6, 4)), dict[int, Array]()
    for r in range(8):
        cohort, local = COHORTS[r % 4], []
        for i in cohort:
            x = w + beta * (w - last.get(i, w))
            for _ in range(3):
                x = x - 0.1 * (sharp(problem, i, x, rho) + prox * (x - w) + prox * held[i])
            held[i], last[i] = held[i] + x - w, x
            local.append(x)
        w = np.mean(local, axis=0) + held.mean(axis=0)
        np.testing.assert_allclose(run(federation, 1)[0], w, rtol=0, atol=1e-10)
        np.testing.assert_allclose(duals(federation, place), held, rtol=0, atol=1e-10)


VARIANTS: list[tuple[dict[str, Any], tuple[str, int, int, int]]] = [
    ({}, ("client", 1, 1, 0)),
    ({"init_beta": 0.1}, ("client", 1, 1, 0)),
    ({"dual_average": "participants"}, ("client", 1, 0, 0)),
    ({"dual": False}, ("none", 1, 0, 0)),
    ({"dual": False, "init_beta": 0.1}, ("client", 1, 0, 0)),
    ({"state_at": "server"}, ("server", 2, 1, 1)),
    ({"state_at": "server", "init_beta": 0.1}, ("server", 3, 1, 2)),
    ({"state_at": "server", "dual_average": "participants"}, ("server", 2, 0, 1)),
    ({"state_at": "server", "dual": False}, ("none", 1, 0, 0)),
    ({"state_at": "server", "dual": False, "init_beta": 0.1}, ("server", 2, 0, 1)),
]


@pytest.mark.parametrize(("parameters", "expected"), VARIANTS)
def test_the_server_keeps_and_sends_no_more_than_it_says(
    parameters: dict[str, Any], expected: tuple[str, int, int, int]
) -> None:
    """By default one vector beside the model, measured on the state after two rounds."""
    strategy, d = fedspeed(**parameters), 8
    federation = federate(heterogeneous(clients=3, dimensions=d), strategy, steps=2)
    run(federation, 1)
    record = federation.run_window().record
    leaves = pytree.tree_leaves(federation.state.strategy)
    vectors = [leaf for leaf in leaves if isinstance(leaf, torch.Tensor) and leaf.numel() == d]
    traits = strategy.traits
    where = "client" if federation.engine.store.has(np.array([0]))[0] else "server"  # type: ignore[attr-defined]
    measured = (
        where if where == "client" or federation.rows.layout else "none",
        record["bytes_down"] // (3 * d * 8),
        len(vectors) - 1,
        len(federation.rows.layout),
    )
    said = (traits.client_state, traits.down_factor, traits.server_vectors, traits.server_vectors_per_client)
    assert measured == said == expected
    assert record["bytes_up"] // (3 * d * 8) == traits.up_factor == 1


@pytest.mark.parametrize(
    ("parameters", "gradients"),
    [({}, 2), ({"alpha": 0.5}, 2), ({"alpha": 0.0}, 1), ({"rho": 0.0}, 1)],
)
def test_a_second_gradient_is_evaluated_only_where_it_counts(
    parameters: dict[str, float], gradients: int
) -> None:
    calls, problem = [0], heterogeneous()

    def counting(x: Vector, batch: Batch) -> Any:
        calls[0] += 1
        return quadratic_grad(x, batch)

    strategy = fedspeed(**parameters)  # type: ignore[arg-type]
    algorithm = strategy.local(counting, LocalSpec())
    msg = strategy.broadcast(fedspeed().init(torch.zeros(4, dtype=torch.float64), None, None))  # type: ignore[arg-type]
    msg = msg._replace(vectors={"x": Vector({"x": msg.vectors["x"]})})
    x, carry = algorithm.init(msg, (), algorithm.fresh(msg))
    algorithm.phases[0].direction(msg, (), algorithm.fresh(msg), x, carry, one_example(problem, 0))
    assert calls[0] == gradients
    assert strategy.traits.affine
    assert algorithm.terms is not None
    assert (algorithm.gradient is counting) == (gradients == 1)


def test_a_clip_inside_the_direction_is_not_affine() -> None:
    strategy = fedspeed(rho=0.0, clip_scope="data")
    assert not strategy.traits.affine
    assert strategy.local(quadratic_grad, LocalSpec()).terms is None


def test_the_loss_is_that_of_the_unperturbed_point() -> None:
    problem, x = heterogeneous(), Vector({"x": torch.full((4,), 2.0, dtype=torch.float64)})
    batch = one_example(problem, 0)
    plain, uphill = quadratic_grad(x, batch), perturbed(quadratic_grad, rho=0.5)(x, batch)
    torch.testing.assert_close(uphill[1].loss, plain[1].loss, rtol=0, atol=0)
    assert (uphill[0] - plain[0]).norm() > 0.1


@pytest.mark.parametrize("engine", ENGINES)
def test_where_the_gradient_is_zero_nothing_is_perturbed(engine: str) -> None:
    problem = heterogeneous(clients=1)
    federation = federate(problem, fedspeed(rho=1.0), engine=engine, steps=3, x0=problem.b[0])
    np.testing.assert_array_equal(run(federation, 2), [problem.b[0]] * 2)


@pytest.mark.parametrize("average", AVERAGES)
def test_an_empty_window_changes_nothing(average: Literal["all", "participants"]) -> None:
    federation = federate(heterogeneous(), fedspeed(dual_average=average), cohorts=[[0, 1], []])
    run(federation, 1)
    before = federation.state.strategy
    run(federation, 1)
    for one, two in zip(before, federation.state.strategy, strict=True):
        assert torch.equal(torch.as_tensor(one), torch.as_tensor(two))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("place", PLACES)
def test_the_model_and_the_messages_keep_their_dtype(
    dtype: torch.dtype, place: Literal["client", "server"]
) -> None:
    strategy = fedspeed(state_at=place, init_beta=0.1)
    federation = federate(heterogeneous(), strategy, steps=2, dtype=dtype)
    run(federation, 2)
    assert (federation.model.dtype, federation.state.strategy.h.dtype) == (dtype, torch.float32)
    lent = strategy.lend(federation.state.strategy, federation.rows, np.arange(2))
    assert all(rows.dtype == dtype for rows in (lent or {}).values())


@pytest.mark.parametrize(
    ("parameters", "message"),
    [
        ({"prox": -0.1}, "prox"),
        ({"prox": float("nan")}, "prox"),
        ({"rho": -0.1}, "rho"),
        ({"rho": float("inf")}, "rho"),
        ({"alpha": 1.1}, "alpha"),
        ({"alpha": float("nan")}, "alpha"),
        ({"init_beta": -0.1}, "init_beta"),
        ({"dual": False, "dual_average": "participants"}, "dual_average"),
    ],
)
def test_a_parameter_out_of_its_range_is_refused(parameters: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        fedspeed(**parameters)


def test_a_proximal_term_too_strong_for_the_rate_is_refused() -> None:
    with pytest.raises(ConfigError, match="lr times prox must be less than 2") as caught:
        fedspeed(prox=1.0).local(quadratic_grad, LocalSpec(lr=2.0))
    assert caught.value.code == "FS-CFG-080"
