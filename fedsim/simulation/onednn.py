"""Products of float32 matrices by oneDNN, where it is faster than the BLAS that torch calls.

MKL does not use the widest instructions of AMD's processors: a product of 1024 x 1024 matrices ran at
101 GFLOP/s with it and at 220 with oneDNN (docs/performance.md). Numbers differ by rounding.
"""

from __future__ import annotations

from functools import cache
from pathlib import Path

import torch
from torch import Tensor


@cache
def pays() -> bool:
    """Whether float32 products are faster in oneDNN than in the BLAS that torch calls."""
    if not (torch._C._has_mkldnn and torch._C.has_mkl):
        return False
    if not hasattr(torch.ops.mkldnn, "_linear_pointwise") or not torch.cpu._is_avx512_supported():
        return False
    try:
        return "AuthenticAMD" in Path("/proc/cpuinfo").read_text(encoding="utf-8")
    except OSError:
        return False


def linear(inputs: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
    """inputs [n, in] · weight [out, in] transposed, + bias [out]; float32 on the CPU, views too."""
    found: Tensor = torch.ops.mkldnn._linear_pointwise(inputs, weight, bias, "none", [], "")
    return found
