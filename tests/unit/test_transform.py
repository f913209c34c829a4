"""Transforms on the way of an update: order, state, both directions, and central noise."""

from __future__ import annotations

from typing import Any, NamedTuple

import numpy as np
import pytest
import torch
from torch import Tensor

from fedsim.errors import AllRefused
from fedsim.reduce import Sums
from fedsim.strategies.fedavg import fedavg
from fedsim.transform import Observed, UpdateTransform, chain, identity
from tests.federations import Small, build

ENGINES = ["loop", "stacked"]


def scaled(factor: float) -> UpdateTransform:
    return UpdateTransform(
        lambda v: (),
        lambda s, v, k: ({n: t * factor for n, t in v.items()}, s),
        lambda m: {n: t / factor for n, t in m.items()},
        linear=True,
    )


def shifted(by: float) -> UpdateTransform:
    return UpdateTransform(
        lambda v: (),
        lambda s, v, k: ({n: t + by for n, t in v.items()}, s),
        lambda m: {n: t - by for n, t in m.items()},
    )


class Memory(NamedTuple):
    """What was left out so far, [b, D]."""

    error: Tensor


def signs_with_memory(step: float) -> UpdateTransform:
    """Sends step · sign(delta + error) and remembers the rest (error feedback)."""

    def encode(state: Memory, vectors: Any, keys: Any) -> Any:
        wanted = vectors["delta"] + state.error
        sent = step * wanted.sign()
        return {**vectors, "delta": sent}, Memory(wanted - sent)

    return UpdateTransform(lambda v: Memory(torch.zeros_like(v["delta"])), encode, lambda m: m)


def memory(small: Small) -> Tensor:
    """[5, D] the one thing that the clients keep."""
    (rows,) = small.store.read(np.arange(5)).values()
    return rows


def model_after(transform: UpdateTransform | None, *, engine: str = "loop", rounds: int = 3) -> Tensor:
    small = build(fedavg(), engine=engine, transform=transform)
    for _ in range(rounds):
        assert small.federation.run_window().error is None
    return small.federation.model


@pytest.mark.parametrize("engine", ENGINES)
def test_the_identity_is_bit_identical_to_no_transform(engine: str) -> None:
    assert torch.equal(model_after(identity(), engine=engine), model_after(None, engine=engine))
    assert torch.equal(
        model_after(chain(identity(), identity()), engine=engine), model_after(None, engine=engine)
    )


def test_a_chain_encodes_left_to_right_and_decodes_right_to_left() -> None:
    both = chain(scaled(2.0), shifted(1.0))
    vectors = {"delta": torch.tensor([[1.0, 2.0]])}
    message, _ = both.encode(both.init(vectors), vectors, None)
    assert message["delta"].tolist() == [[3.0, 5.0]]
    assert both.decode(message)["delta"].tolist() == [[1.0, 2.0]]
    assert not both.linear
    assert chain(scaled(2.0), identity()).linear
    one = scaled(2.0)
    assert chain(one) is one


def test_a_lossy_transform_loses_in_simulation_too() -> None:
    rounded = UpdateTransform(
        lambda v: (),
        lambda s, v, k: ({n: (t * 4).round() for n, t in v.items()}, s),
        lambda m: {n: t / 4 for n, t in m.items()},
    )
    assert (model_after(rounded) - model_after(None)).norm() > 1e-3


@pytest.mark.parametrize("engine", ENGINES)
def test_client_side_state_lasts_from_round_to_round(engine: str) -> None:
    step = 0.02
    small = build(fedavg(), engine=engine, transform=signs_with_memory(step))
    for _ in range(3):
        assert small.federation.run_window().error is None
    error = memory(small)
    assert error.shape == (5, small.place.spec.size)
    # Anything still owed beyond one step has been gathered over several rounds.
    assert (error.abs() > 2 * step).any()


def test_engines_agree_under_a_transform_with_state() -> None:
    one, other = (model_after(signs_with_memory(0.02), engine=engine) for engine in ENGINES)
    assert (one - other).norm() <= 1e-10 * one.norm()


def test_two_states_in_a_chain_are_kept_apart() -> None:
    small = build(fedavg(), transform=chain(signs_with_memory(0.02), signs_with_memory(0.01)))
    for _ in range(2):
        small.federation.run_window()
    rows = small.store.read(np.arange(5))
    assert len(rows) == 2
    first, second = rows.values()
    assert not torch.equal(first, second)


def test_a_refused_answer_leaves_the_state_of_the_transform() -> None:
    broken = {"now": False}

    def encode(state: Memory, vectors: Any, keys: Any) -> Any:
        message, kept = inner.encode(state, vectors, keys)
        factor = float("nan") if broken["now"] else 1.0
        return {n: t * factor for n, t in message.items()}, kept

    inner = signs_with_memory(0.02)
    small = build(fedavg(), transform=inner._replace(encode=encode))
    small.federation.run_window()
    before = small.store.read(np.arange(5))["transform-000"]
    broken["now"] = True
    assert isinstance(small.federation.run_window().error, AllRefused)
    assert torch.equal(small.store.read(np.arange(5))["transform-000"], before)
    broken["now"] = False
    clean = build(fedavg(), transform=inner)
    for _ in range(2):
        clean.federation.run_window()
    small.federation.run_window()
    assert torch.equal(small.federation.model, clean.federation.model)


def test_keys_are_a_function_of_client_and_round_and_not_of_the_block() -> None:
    def recorded(block: int) -> dict[tuple[int, int], int]:
        seen: dict[tuple[int, int], int] = {}
        batches: list[list[int]] = []

        def encode(state: Any, vectors: Any, keys: Any) -> Any:
            assert keys.dtype == np.uint64
            batches.append(keys.tolist())
            return vectors, state

        def note(observed: Observed) -> None:
            for client, key in zip(observed.block.ids.tolist(), batches.pop(0), strict=True):
                seen[observed.round_index, client] = key

        small = build(
            fedavg(),
            engine="stacked",
            block=block,
            transform=identity()._replace(encode=encode),
            observers=[note],
        )
        for _ in range(2):
            small.federation.run_window()
        return seen

    small_blocks, one_block = recorded(2), recorded(5)
    assert small_blocks == one_block
    assert len(small_blocks) == 10
    assert len(set(small_blocks.values())) == 10


def test_central_noise_is_added_once_after_the_sum_and_its_state_is_the_servers() -> None:
    calls: list[int] = []

    def after_reduce(state: int, reduced: dict[str, Tensor], info: Any, seed: int) -> Any:
        calls.append(info.window)
        return state + 1, {**reduced, "delta": reduced["delta"] + reduced["weight"] * 0.5}

    noisy = identity()._replace(init_server=lambda: 10, after_reduce=after_reduce)
    small = build(fedavg(), transform=chain(noisy, identity()))
    plain = build(fedavg())
    small.federation.run_window()
    plain.federation.run_window()
    torch.testing.assert_close(small.federation.model, plain.federation.model + 0.5, rtol=0, atol=1e-12)
    assert calls == [0]
    assert small.federation.state.transform == (11, ())


def test_a_transform_of_the_broadcast_changes_where_clients_start_and_what_the_delta_refers_to() -> None:
    seen: list[Observed] = []

    def rounded(vectors: Any) -> Any:
        return {n: (t * 8).round() for n, t in vectors.items()}

    down = identity()._replace(downlink=(rounded, lambda m: {n: t / 8 for n, t in m.items()}))
    small = build(fedavg(), transform=chain(down, identity()), observers=[seen.append])
    exact = small.federation.model.clone()
    small.federation.run_window()
    assert torch.equal(seen[0].message.vectors["x"], (exact * 8).round() / 8)
    mean = Sums()
    for observed in seen:
        weight = float(observed.block.examples[0])
        mean.add({"delta": weight * observed.block.vectors["delta"][0], "weight": torch.tensor(weight)})
    step = mean.result()["delta"] / mean.result()["weight"]
    torch.testing.assert_close(small.federation.model, exact + step, rtol=0, atol=1e-12)


@pytest.mark.parametrize("name", ["scaffold"])
def test_state_is_made_for_every_vector_that_a_strategy_reports(name: str) -> None:
    """A transform that remembers something of each vector, under a strategy that sends two."""
    from fedsim.registry import load, names

    if name not in names("strategies"):
        pytest.skip(f"no strategy {name!r} is installed")

    def encode(state: Any, vectors: Any, keys: Any) -> Any:
        return vectors, {n: state[n] + vectors[n] for n in vectors}

    summing = UpdateTransform(lambda v: {n: torch.zeros_like(t) for n, t in v.items()}, encode, lambda m: m)
    small = build(load("strategies", name)(), transform=summing)
    assert small.federation.run_window().error is None
