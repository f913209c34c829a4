"""The arrays of a plan (`benchmarks.speed.plan`), as peers read them: NumPy alone."""

from __future__ import annotations

import json
from typing import Any

import numpy as np


class Planned:
    """One workload.

    Args:
        path: of ``plan.npz``.
    """

    def __init__(self, path: str) -> None:
        with np.load(path) as file:
            self.arrays = {name: file[name] for name in file.files}
        arrays = self.arrays
        self.inputs, self.targets = arrays["inputs"], arrays["targets"]
        self.cohorts, self.counts = arrays["cohorts"], arrays["counts"]
        self.batch, self.lr = int(arrays["batch_size"]), float(arrays["lr"])
        self.model: dict[str, Any] = json.loads(str(arrays["model"]))
        self._ends = np.concatenate([[0], np.cumsum(self.counts)])

    def rows(self, index: int, place: int) -> np.ndarray:
        """Rows of `inputs` that one client of round `index` sees, in its order."""
        at = index * self.cohorts.shape[1] + place
        return np.asarray(self.arrays["rows"][self._ends[at] : self._ends[at + 1]])

    def owned(self, client: int) -> np.ndarray:
        """Rows of `inputs` that a client owns."""
        offsets = self.arrays["offsets"]
        return np.asarray(self.arrays["index"][offsets[client] : offsets[client + 1]])

    @property
    def parameters(self) -> dict[str, np.ndarray]:
        """Starting parameters by the names of the PyTorch module."""
        prefix = "parameter/"
        return {n.removeprefix(prefix): a for n, a in self.arrays.items() if n.startswith(prefix)}
