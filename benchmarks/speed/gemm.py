"""The fastest float32 matrix product, the measure of all arithmetic: ``python -m benchmarks.speed.gemm``."""

from __future__ import annotations

import json
import sys
import time

import torch

SIZE = 2048
SECONDS = 1.5  # long enough to find a moment without other work


def peak(threads: int) -> float:
    """GFLOP/s of the fastest of many products of [2048, 2048] matrices."""
    torch.set_num_threads(threads)
    a, b = torch.rand(SIZE, SIZE), torch.rand(SIZE, SIZE)
    out = a @ b
    best, over = float("inf"), time.perf_counter() + SECONDS
    while time.perf_counter() < over:
        began = time.perf_counter()
        torch.mm(a, b, out=out)
        best = min(best, time.perf_counter() - began)
    return float(2 * SIZE**3 / best / 1e9)


if __name__ == "__main__":
    print(json.dumps({words: peak(int(words)) for words in sys.argv[1:] or ("1", "2")}))
