"""Named random streams: every draw is a function of (seed, purpose, round, client, counter).

No generator lives anywhere, so engines, cohort order, failures and restarts cannot shift anyone's
numbers. The streams are counter-based: SplitMix64 (Steele, Lea and Flood 2014, "Fast splittable
pseudorandom number generators", fig. 15) applied to a hashed key plus a counter, vectorised over a
whole cohort. Noise that carries a privacy guarantee in a real deployment must not come from here.
"""

from __future__ import annotations

import threading
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from enum import IntEnum

import numpy as np
import numpy.typing as npt
import torch

UInts = npt.NDArray[np.uint64]
Ints = npt.NDArray[np.int64]
Floats = npt.NDArray[np.float64]

_GOLDEN = np.uint64(0x9E3779B97F4A7C15)
_M1 = np.uint64(0xBF58476D1CE4E5B9)
_M2 = np.uint64(0x94D049BB133111EB)
_LOW = 0xFFFFFFFFFFFFFFFF
_STEP = int(_GOLDEN)


class Purpose(IntEnum):
    """What a stream is for; the numbers are part of the file formats and never change."""

    MODEL = 1
    SAMPLE = 2
    BATCH = 3
    TRANSFORM = 4
    NOISE = 5
    DROPOUT = 6
    DEVICE = 7
    AVAILABILITY = 8
    ATTACK = 9
    ENCODE = 10


def _mix(z: UInts) -> UInts:
    """SplitMix64's finaliser; arrays of whole numbers wrap around."""
    z = (z ^ (z >> np.uint64(30))) * _M1
    z = (z ^ (z >> np.uint64(27))) * _M2
    return z ^ (z >> np.uint64(31))


def _mixed_one(word: int) -> int:
    """`_mix` of the golden ratio and one number, without an array around it."""
    z = (word + _STEP) & _LOW
    z = ((z ^ (z >> 30)) * int(_M1)) & _LOW
    z = ((z ^ (z >> 27)) * int(_M2)) & _LOW
    return z ^ (z >> 31)


def stream_keys(seed: int, purpose: Purpose, round_index: int | Ints, clients: Ints) -> UInts:
    """[b] one 64-bit key per client; the round is one for all, or [b]."""
    key = _mixed_one(_mixed_one(int(seed)) + int(purpose))
    owners = np.asarray(clients, dtype=np.int64).astype(np.uint64)
    if isinstance(round_index, np.ndarray):
        keys = _mix(np.asarray(round_index, np.int64).astype(np.uint64) + np.uint64((key + _STEP) & _LOW))
        return _mix(keys + owners + _GOLDEN)
    return _mix(owners + np.uint64((_mixed_one(key + int(round_index)) + _STEP) & _LOW))


def bits(
    seed: int, purpose: Purpose, round_index: int | Ints, clients: Ints, count: int, *, start: int = 0
) -> UInts:
    """[b, count] random 64-bit words, the counters `start` … `start + count - 1` of each client."""
    keys = stream_keys(seed, purpose, round_index, clients)[:, None]
    counters = np.arange(start + 1, start + count + 1, dtype=np.uint64)[None, :]
    return _mix(keys + counters * _GOLDEN)


def stream_key(seed: int, purpose: Purpose, round_index: int, client: int) -> int:
    """The key of one client, the same as `stream_keys` gives, without arrays."""
    return _mixed_one(_mixed_one(_mixed_one(_mixed_one(seed) + int(purpose)) + round_index) + client)


def bits_of_one(
    seed: int, purpose: Purpose, round_index: int, client: int, count: int, *, start: int = 0
) -> UInts:
    """[count] random 64-bit words of one client, the same as a row of `bits`."""
    key = stream_key(seed, purpose, round_index, client)
    # Arrays wrap silently where numpy's scalars warn.
    first = np.array([(key + (start + 1) * _STEP) & _LOW], dtype=np.uint64)
    return _mix(first + np.arange(count, dtype=np.uint64) * _GOLDEN)


def uniform(
    seed: int, purpose: Purpose, round_index: int | Ints, clients: Ints, count: int, *, start: int = 0
) -> Floats:
    """[b, count] doubles in [0, 1) with 53 random bits."""
    words = bits(seed, purpose, round_index, clients, count, start=start)
    return (words >> np.uint64(11)).astype(np.float64) * 2.0**-53


def normal(
    seed: int, purpose: Purpose, round_index: int | Ints, clients: Ints, count: int, *, start: int = 0
) -> Floats:
    """[b, count] standard normal doubles (Box and Muller 1958), two uniforms for each."""
    u = uniform(seed, purpose, round_index, clients, 2 * count, start=2 * start)
    radius = np.sqrt(-2.0 * np.log1p(-u[:, 0::2]))
    return np.asarray(radius * np.cos(2.0 * np.pi * u[:, 1::2]), dtype=np.float64)


def generator(seed: int, purpose: Purpose, round_index: int, client: int = 0) -> np.random.Generator:
    """A NumPy generator of its own for draws that are not per client and step."""
    key = stream_keys(seed, purpose, round_index, np.array([client]))[0]
    return np.random.Generator(np.random.Philox(int(key)))


_HELD = threading.RLock()  # of the process, as the generator that it guards


@contextmanager
def own_torch_generator(devices: Sequence[int | torch.device] = ()) -> Iterator[None]:
    """torch's own generator in the hands of this thread alone, and afterwards as it was.

    A process has one of them. Whoever seeds it, or lets a model draw from it, does so in here: the
    initial weights of a run would not be those of its seed where another run in another thread draws,
    or puts the state back that it found, in the midst of them.

    Args:
        devices: the GPUs whose generators are meant too.
    """
    with _HELD, torch.random.fork_rng(devices=list(devices)):
        yield


def seed_torch(seed: int) -> None:
    """`torch.manual_seed` for the devices in use, a hundred times as fast.

    Call it inside `own_torch_generator`. torch's own function keeps a list of all calls, with the stack
    of each, for devices that are never used.
    """
    torch.default_generator.manual_seed(seed)
    if torch.cuda.is_initialized():  # type: ignore[no-untyped-call]
        torch.cuda.manual_seed_all(seed)


def torch_seed(seed: int, purpose: Purpose, round_index: int, client: int = 0) -> int:
    """A seed for torch's own generator, in its accepted range."""
    return stream_key(seed, purpose, round_index, client) >> 1
