"""The weighted sum of a block's updates, made without the updates.

A linear layer's update is a product over the rows of a client's batches, Δ_i = d_iᵀ x_i with d_i minus η
times the derivatives of the outputs. So the sum over clients is one product over the rows of all,

    Σ_i w_i Δ_i = Σ_i (w_i d_i)ᵀ x_i,        ‖Δ_i‖² = Σ_ab (d_i d_iᵀ)_ab (x_i x_iᵀ)_ab,

and no client's update is ever written or read. The bias is the weight of an input that is always 1.
"""

from __future__ import annotations

import numpy as np
import torch
from torch import Tensor

from fedsim.flat import ParamSpec
from fedsim.simulation.fused_layers import Dense
from fedsim.simulation.fused_products import sum_over_rows
from fedsim.strategy import weighted_sum
from fedsim.types import Floats, Summed


class BlockSum:
    """Of C clients, part by part as each is finished.

    Args:
        spec: layout of the parameters.
        weights: [C] float64.
        device: of the parts.
        norms: whether the updates' norms are wanted.
    """

    def __init__(self, spec: ParamSpec, weights: Floats, device: torch.device, *, norms: bool = True) -> None:
        self.slices = spec.slices()
        self.given = weights
        self.weights = torch.from_numpy(weights).to(device)
        # In float32 a weight is rounded like any number, but it must not leave the range.
        self.scale = float(np.abs(weights).max(initial=0.0)) or 1.0
        self.shares = (self.weights / self.scale).to(spec.dtype)
        self.total = torch.zeros(spec.size, dtype=torch.float64, device=device)
        self.norms = norms
        self.squares = torch.zeros(len(weights), dtype=torch.float64, device=device)  # of the norms
        self.largest = torch.zeros((), dtype=torch.float64, device=device)  # no update has larger entries

    def add_product(self, layer: Dense, moves: Tensor, inputs: Tensor, owners: Tensor) -> None:
        """Σ w movesᵀ inputs of a layer's weights, and of its bias.

        Args:
            moves: [R, out]; inputs: [R, in]; owners: [R] clients.
        """
        weighted = moves * self.shares[owners].unsqueeze(1)
        self._part(layer.weight).add_(sum_over_rows(weighted, inputs).view(-1), alpha=self.scale)
        if not self.norms:
            # |dᵀ x| <= ‖d‖ ‖x‖, and of a bias the input is 1.
            length = torch.linalg.vector_norm(inputs).double().square() + len(inputs)
            most = torch.linalg.vector_norm(moves).double() * length.sqrt()
            self.largest = torch.maximum(self.largest, most)
        if layer.bias:
            self._part(layer.bias).add_(weighted.sum(0).double(), alpha=self.scale)

    def add_changes(self, name: str, changes: Tensor, clients: slice) -> None:
        """Changes [k, *shape] of one parameter, as they are."""
        rows = changes.reshape(len(changes), -1)
        self._part(name).add_(weighted_sum(self.weights[clients], rows))
        if self.norms:
            self.squares[clients].add_(torch.linalg.vector_norm(rows, dim=1).double().square())

    def add_scaled(self, name: str, values: Tensor, factor: float) -> None:
        """The same values times a number that holds the weights already."""
        if factor:
            self._part(name).add_(values.reshape(-1).double(), alpha=factor)

    def result(self) -> Summed | None:
        """None where something is not finite: then it must be seen whose update that is."""
        if not bool(torch.isfinite(self.total).all()):
            return None
        if not self.norms:
            # By a small weight an update may stay in the range that it leaves by itself.
            inside = bool(self.largest < torch.finfo(self.shares.dtype).max / 4)
            return Summed(self.given, self.total, None) if inside else None
        # Of a difference of large squares, rounding may leave a little less than nothing.
        norms = self.squares.clamp_min(0.0).sqrt()
        return (
            Summed(self.given, self.total, norms.cpu().numpy()) if bool(torch.isfinite(norms).all()) else None
        )

    def _part(self, name: str) -> Tensor:
        return self.total[self.slices[name]]


def pays(layer: Dense, rows: int) -> bool:
    """Whether the norms of products over so many rows cost less than the products themselves."""
    return rows * (layer.inputs + layer.outputs) <= 2 * layer.inputs * layer.outputs


def squared_norms(moves: Tensor, inputs: Tensor, *, bias: bool) -> Tensor:
    """[k] float64, ‖d_iᵀ x_i‖² of moves d [k, B, out] and inputs x [k, B, in]; `bias`: x has a further 1."""
    table = torch.bmm(inputs, inputs.transpose(1, 2))
    if bias:
        table.add_(1.0)
    between = torch.bmm(moves, moves.transpose(1, 2))
    found: Tensor = torch.linalg.vecdot(between.flatten(1), table.flatten(1))
    return found.double()


def inner(one: Tensor, other: Tensor) -> Tensor:
    """0-d float64, Σ_ab one_ab other_ab."""
    return torch.dot(one.reshape(-1), other.reshape(-1)).double()
