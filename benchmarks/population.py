"""What registered clients cost: seconds of a round and peak memory for populations of any size.

    python -m benchmarks.population 1000 100000

Digits, an MLP, 8 examples a client, 100 clients a round; each population in a process of its own.
"""

from __future__ import annotations

import multiprocessing
import resource
import statistics
import sys
import time

import fedsim

ROUNDS = 8


def measure(population: int, strategy: str) -> tuple[float, int]:
    """Median seconds of a round, the first left out, and the peak memory of the process in MB."""
    data = fedsim.data.load("digits").split("fixed_size", clients=population, examples=8)
    sim = fedsim.Simulation(
        data=data,
        model="mlp",
        strategy=strategy,
        client={"steps": 1, "batch_size": 8},
        sample=100,
        rounds=ROUNDS,
        sections={"evaluation": {"central": False, "clients": "never"}},
    )
    seconds = []
    for _ in range(ROUNDS):
        began = time.perf_counter()
        sim.federation.run_window()
        seconds.append(time.perf_counter() - began)
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return statistics.median(seconds[1:]), peak // (1 << 20 if sys.platform == "darwin" else 1 << 10)


def main() -> None:
    populations = [int(word) for word in sys.argv[1:]] or [1_000, 100_000]
    print(f"{'clients':>9}  {'strategy':9}  s/round  peak MB")
    with multiprocessing.get_context("spawn").Pool(1, maxtasksperchild=1) as pool:
        for strategy in ("fedavg", "scaffold"):
            for population in populations:
                seconds, peak = pool.apply(measure, (population, strategy))
                print(f"{population:9,}  {strategy:9}  {seconds:7.4f}  {peak:7}")


if __name__ == "__main__":
    main()
