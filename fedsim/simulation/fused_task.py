"""The functions of a block's local algorithm, called for all of its clients at once."""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.func import vmap

from fedsim.local import LocalAlgorithm, no_terms
from fedsim.simulation.fused_stacks import Motion
from fedsim.vector import Vector


class AffineTask(NamedTuple):
    """A block's algorithm and what its functions are given, called for all clients by vmap."""

    algorithm: LocalAlgorithm
    message: Any
    lent: Any
    state: Any
    mixed: bool
    clients: int
    device: torch.device

    def _each(self, function: Any, *more: Any) -> Any:
        # The first argument gives vmap an axis where nothing else does.
        axes = (0, 0 if self.mixed else None, 0, 0, *[0] * len(more))
        each = torch.arange(self.clients, device=self.device)
        return vmap(function, in_dims=axes)(each, self.message, self.lent, self.state, *more)

    def start(self) -> tuple[Vector, Any]:
        """x and the carry, from `init`."""

        def init(_: Tensor, msg: Any, lent: Any, state: Any) -> Any:
            return self.algorithm.init(msg, lent, state)

        x, carry = self._each(init)
        return x, carry

    def finish(self, x: Vector, carry: Any, length: Tensor) -> Any:
        def end(_: Tensor, msg: Any, lent: Any, state: Any, x: Any, carry: Any, length: Tensor) -> Any:
            return self.algorithm.finish(msg, lent, state, x, carry, length)

        return self._each(end, x, carry, length)

    def motion(self, rate: float, weight_decay: float) -> Motion:
        """a and b of all clients, as what a step does."""
        assert self.algorithm.terms is not None
        terms = self.algorithm.terms
        if terms is no_terms:
            return Motion(1.0 - rate * weight_decay, rate, None)
        numbers: list[float] = []  # a, where it is a plain number

        def found(_: Tensor, msg: Any, lent: Any, state: Any) -> Any:
            a, b = terms(msg, lent, state)
            if isinstance(a, Tensor):
                return a, () if b is None else b
            numbers.append(float(a))
            return (), () if b is None else b

        a, b = self._each(found)
        added = None if isinstance(b, tuple) else b.tensors
        if not isinstance(a, Tensor):
            return Motion(1.0 - rate * (numbers[0] + weight_decay), rate, added)
        if a.stride(0) == 0 or self.clients == 1:  # the same for all
            return Motion(1.0 - rate * (float(a[0]) + weight_decay), rate, added)
        dtype = next(iter(self.message.x.tensors.values())).dtype
        return Motion(1.0 - rate * (a.to(dtype) + weight_decay), rate, added)
