"""Setting rows aside for testing."""

from __future__ import annotations

import numpy as np
import numpy.typing as npt

from fedsim.errors import ConfigError

Ints = npt.NDArray[np.int64]


def split_rows(count: int, fraction: float, *, seed: int) -> tuple[Ints, Ints]:
    """Rows for training and rows for testing, both ascending; ``round(count * fraction)`` for testing.

    The rows are drawn with NumPy's legacy generator because its stream is frozen for ever: the same
    seed sets the same rows aside under every version of NumPy.

    Args:
        fraction: in [0, 1).

    Raises:
        ConfigError: FS-DAT-011 for a fraction outside the range.
    """
    if not 0.0 <= fraction < 1.0:
        raise ConfigError(
            f"test_fraction = {fraction} is not in [0, 1)",
            code="FS-DAT-011",
            where="data.test_fraction",
            hint="0.2 sets one example in five aside",
        )
    order = np.random.RandomState(seed).permutation(count).astype(np.int64)
    held = round(count * fraction)
    return np.sort(order[held:]), np.sort(order[:held])
