"""Named random streams: the published generator, independence of the block, and uniformity."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from fedsim.keys import Purpose, bits, generator, normal, seed_torch, stream_keys, torch_seed, uniform

MASK = (1 << 64) - 1
GOLDEN = 0x9E3779B97F4A7C15


def mixed(z: int) -> int:
    z = ((z ^ (z >> 30)) * 0xBF58476D1CE4E5B9) & MASK
    z = ((z ^ (z >> 27)) * 0x94D049BB133111EB) & MASK
    return z ^ (z >> 31)


def splitmix64(seed: int, count: int) -> list[int]:
    """The generator as published, in whole numbers."""
    return [mixed((seed + i * GOLDEN) & MASK) for i in range(1, count + 1)]


def hashed(seed: int, purpose: int, window: int, client: int) -> int:
    key = 0
    for part in (seed, purpose, window, client):
        key = mixed((key + part + GOLDEN) & MASK)
    return key


def test_the_reference_gives_the_published_numbers() -> None:
    # The first outputs of the public-domain splitmix64.c for the seeds 1234567 and 0.
    assert splitmix64(1234567, 5) == [
        6457827717110365317,
        3203168211198807973,
        9817491932198370423,
        4593380528125082431,
        16408922859458223821,
    ]
    assert splitmix64(0, 1) == [0xE220A8397B1DCDAF]


@given(
    seed=st.integers(-(2**63), 2**64 - 1),
    purpose=st.sampled_from(Purpose),
    window=st.integers(0, 2**40),
    clients=st.lists(st.integers(0, 2**40), min_size=1, max_size=4),
)
def test_every_word_is_splitmix64_of_the_hashed_key(
    seed: int, purpose: Purpose, window: int, clients: list[int]
) -> None:
    words = bits(seed, purpose, window, np.array(clients), 3)
    for row, client in zip(words.tolist(), clients, strict=True):
        assert row == splitmix64(hashed(seed, purpose, window, client), 3)


@given(st.lists(st.integers(0, 10**6), min_size=1, max_size=20, unique=True), st.data())
def test_a_client_draws_the_same_in_any_company_and_order(clients: list[int], data: st.DataObject) -> None:
    block = data.draw(st.permutations(clients))[: data.draw(st.integers(1, len(clients)))]
    everyone = dict(zip(clients, uniform(3, Purpose.BATCH, 5, np.array(clients), 6).tolist(), strict=True))
    some = uniform(3, Purpose.BATCH, 5, np.array(block), 6)
    assert some.tolist() == [everyone[c] for c in block]


def test_counters_can_be_entered_anywhere() -> None:
    ids = np.arange(4)
    whole = bits(1, Purpose.NOISE, 2, ids, 10)
    assert np.array_equal(bits(1, Purpose.NOISE, 2, ids, 4, start=6), whole[:, 6:])
    noise = normal(1, Purpose.NOISE, 2, ids, 10)
    assert np.array_equal(normal(1, Purpose.NOISE, 2, ids, 4, start=6), noise[:, 6:])


def test_streams_differ_in_every_part_of_their_name() -> None:
    reference = (1, Purpose.BATCH, 2, 3)
    others = [
        (0, Purpose.BATCH, 2, 3),
        (1, Purpose.SAMPLE, 2, 3),
        (1, Purpose.BATCH, 3, 3),
        (1, Purpose.BATCH, 2, 4),
    ]
    keys = [stream_keys(s, p, r, np.array([c]))[0] for s, p, r, c in [reference, *others]]
    assert len(set(keys)) == len(keys)
    # Exchanged parts are another name too.
    assert (
        stream_keys(2, Purpose.MODEL, 3, np.array([1]))[0]
        != stream_keys(3, Purpose.MODEL, 2, np.array([1]))[0]
    )


def test_a_hundred_thousand_streams_do_not_collide() -> None:
    assert len(np.unique(stream_keys(0, Purpose.BATCH, 0, np.arange(100_000)))) == 100_000


def test_purposes_have_fixed_numbers() -> None:
    assert {p.name: int(p) for p in Purpose} == {
        "MODEL": 1,
        "SAMPLE": 2,
        "BATCH": 3,
        "TRANSFORM": 4,
        "NOISE": 5,
        "DROPOUT": 6,
        "DEVICE": 7,
        "AVAILABILITY": 8,
        "ATTACK": 9,
        "ENCODE": 10,
    }


@pytest.mark.parametrize("along", ["counters", "clients", "rounds"])
def test_doubles_are_uniform_by_chi_square_along_each_index(along: str) -> None:
    n, bins = 100_000, 100
    if along == "counters":
        drawn = uniform(11, Purpose.SAMPLE, 0, np.array([0]), n)[0]
    elif along == "clients":
        drawn = uniform(11, Purpose.SAMPLE, 0, np.arange(n), 1)[:, 0]
    else:
        drawn = np.concatenate(
            [uniform(11, Purpose.SAMPLE, r, np.arange(1000), 1)[:, 0] for r in range(n // 1000)]
        )
    assert drawn.min() >= 0.0
    assert drawn.max() < 1.0
    counts = np.bincount((drawn * bins).astype(int), minlength=bins)
    statistic = float(((counts - n / bins) ** 2 / (n / bins)).sum())
    # 99 degrees of freedom: quantiles 0.0005 and 0.9995.
    assert 58.0 < statistic < 152.0


def test_neighbouring_streams_are_uncorrelated() -> None:
    drawn = uniform(5, Purpose.BATCH, 0, np.arange(2000), 64) - 0.5
    between_clients = (drawn[1:] * drawn[:-1]).mean() * 12
    between_counters = (drawn[:, 1:] * drawn[:, :-1]).mean() * 12
    # Standard deviation 1 / sqrt(126,000) = 0.0028.
    assert abs(between_clients) < 0.014
    assert abs(between_counters) < 0.014


def test_normal_draws_have_the_moments_and_tails_of_the_normal_distribution() -> None:
    drawn = normal(2, Purpose.NOISE, 0, np.arange(1000), 100).ravel()
    assert np.isfinite(drawn).all()
    assert abs(drawn.mean()) < 0.016
    assert abs(drawn.var() - 1) < 0.023
    assert abs((drawn**4).mean() - 3) < 0.16
    assert abs((np.abs(drawn) > 1.959964).mean() - 0.05) < 0.0035


def test_generators_and_torch_seeds_are_functions_of_their_names() -> None:
    def first(window: int, client: int) -> float:
        return float(generator(1, Purpose.SAMPLE, window, client).random())

    assert first(0, 0) == first(0, 0)
    assert len({first(w, c) for w in range(5) for c in range(5)}) == 25
    seeds = {torch_seed(1, Purpose.DROPOUT, w, c) for w in range(20) for c in range(20)}
    assert len(seeds) == 400
    assert all(0 <= s < 2**63 for s in seeds)


def test_seeding_torch_draws_the_numbers_of_torchs_own_seeding_and_keeps_no_list_of_calls() -> None:
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(1 << 62)
        wanted = torch.rand(5)
        kept = len(torch.cuda._queued_calls)
        seed_torch(1 << 62)
        assert torch.equal(torch.rand(5), wanted)
    assert len(torch.cuda._queued_calls) == kept
