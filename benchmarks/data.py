"""How long decoding, the cache and partitioning take: ``python -m benchmarks.data``.

One thread. Decoding needs a folder with ``mnist/`` and ``cifar10/`` in parquet (``--data``, else
the variable ``FEDSIM_TEST_DATA``) and is left out, saying so, without one. Each time is the best of
the repetitions, except decoding, which is done once.
"""

from __future__ import annotations

import argparse
import os
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import torch

from fedsim.data import Dataset, from_arrays, load
from fedsim.data.partition import make_partition
from fedsim.data.transforms import image

PARTITIONERS: dict[str, dict[str, Any]] = {  # Any: each partitioner's own parameters
    "iid": {},
    "dirichlet": {"alpha": 0.1},
    "dirichlet_client": {"alpha": 0.1},
    "shards": {},
    "pathological": {"classes_per_client": 2},
    "quantity_skew": {"beta": 0.5},
    "quantity_lognormal": {"sigma": 1.0},
    "fixed_size": {"examples": 8},
    "feature_noise": {"sigma": 0.1},
    "natural": {},
}


def seconds(action: Callable[[], object], *, repeat: int = 1) -> float:
    """The shortest of `repeat` runs."""
    best = float("inf")
    for _ in range(repeat):
        start = time.perf_counter()
        action()
        best = min(best, time.perf_counter() - start)
    return best


def decoding(data: Path) -> None:
    for name in ("mnist", "cifar10"):
        with tempfile.TemporaryDirectory() as cache:
            os.environ["FEDSIM_CACHE"] = cache

            def once(name: str = name) -> Dataset:
                return load(name, data / name)

            first, again = seconds(once), seconds(once, repeat=3)
            size = sum(file.stat().st_size for file in Path(cache).rglob("*.safetensors"))
        print(
            f"decode {name:8} {first:7.2f} s   from the cache {again:6.3f} s   "
            f"cache entry {size / 2**20:.0f} MiB"
        )


def transforming() -> None:
    mean, std = (0.49, 0.48, 0.45), (0.25, 0.24, 0.26)
    batch = torch.randint(0, 256, (10, 64, 3, 32, 32), dtype=torch.uint8)
    keys = torch.randint(0, 2**62, (10, 64))
    for words, pipeline in (
        ("normalise", image(mean, std)),
        ("crop, flip and normalise", image(mean, std, crop=4, flip=True)),
    ):

        def run(train: Callable[..., torch.Tensor] = pipeline.train) -> torch.Tensor:
            return train(batch, keys)

        run()
        print(f"{words:26} 640 images of 3x32x32 {1e3 * seconds(run, repeat=10):6.2f} ms")


def partitioning(examples: int, clients: int) -> None:
    rng = np.random.default_rng(0)
    data = from_arrays(
        np.zeros((examples, 1), dtype=np.float32),
        rng.integers(0, 10, examples),
        client_ids=np.arange(examples) % clients,
    ).dataset
    for name, parameters in PARTITIONERS.items():

        def run(name: str = name, parameters: dict[str, Any] = parameters) -> object:
            return make_partition(data, name, clients=clients, seed=1, **parameters)

        print(f"{examples:>9,} labels {clients:>7,} clients {name:20} {seconds(run):7.3f} s")


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--data", type=Path, default=os.environ.get("FEDSIM_TEST_DATA"))
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    if arguments.data is None:
        print("decoding left out: no --data")
    else:
        decoding(arguments.data)
    transforming()
    partitioning(60_000, 1_000)
    partitioning(1_000_000, 100_000)


if __name__ == "__main__":
    main()
