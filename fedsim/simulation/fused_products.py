"""Products over the rows of many clients, in tiles of one height.

oneDNN makes a program for each new shape of a product, which takes as long as some hundred rows do. The
number of rows is another one in every block, so they are cut into tiles of the same height, of which the
last overlaps with the one before it.
"""

from __future__ import annotations

from collections.abc import Iterator

import torch
from torch import Tensor

from fedsim.simulation import onednn

_TILE = 256  # from this height on the rate of a product does not grow any more
_GRAIN = 16  # products of one client's rows come in multiples of it
_LARGE = 1 << 14  # entries of the other factor, below which a tile takes less time than a call


def outputs(inputs: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
    """inputs [R, in] · weight [out, in] transposed, + bias [out]."""
    if weight.numel() < _LARGE or not _by_onednn(inputs):
        return inputs @ weight.t() if bias is None else torch.addmm(bias, inputs, weight.t())
    found = inputs.new_empty((inputs.shape[0], weight.shape[0]))
    for tile, _ in _tiles(inputs.shape[0]):
        found[tile] = onednn.linear(inputs[tile], weight, bias)
    return found


def sum_over_rows(moves: Tensor, inputs: Tensor) -> Tensor:
    """movesᵀ [out, R] · inputs [R, in], in float64 from tile to tile."""
    if moves.shape[1] * inputs.shape[1] < _LARGE or not _by_onednn(inputs):
        return (moves.t() @ inputs).double()
    total = torch.zeros((moves.shape[1], inputs.shape[1]), dtype=torch.float64)
    for tile, again in _tiles(inputs.shape[0]):
        part = moves[tile]
        if again:
            part = part.clone()
            part[:again] = 0.0
        total.add_(onednn.linear(part.t(), inputs[tile].t(), None))
    return total


def table(inputs: Tensor, start: int, rows: int) -> Tensor:
    """x xᵀ [rows, rows] of the rows x of `inputs` [R, in] from `start` on."""
    if not _by_onednn(inputs):
        x = inputs[start : start + rows]
        return x @ x.t()
    rounded = -(-rows // _GRAIN) * _GRAIN
    end = min(start + rounded, inputs.shape[0])
    x = inputs[start:end]  # also some of the next client's
    return onednn.linear(x, x, None)[:rows, :rows]


def _by_onednn(inputs: Tensor) -> bool:
    return inputs.dtype == torch.float32 and inputs.device.type == "cpu" and onednn.pays()


def _tiles(rows: int) -> Iterator[tuple[slice, int]]:
    """Tiles of all rows, and how many of a tile's first rows lay in the one before."""
    if rows <= _TILE:
        yield slice(0, rows), 0
        return
    for start in range(0, rows, _TILE):
        again = max(0, start + _TILE - rows)
        yield slice(start - again, start - again + _TILE), again
