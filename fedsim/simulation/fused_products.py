"""Products over the rows of many clients, in tiles of one height.

oneDNN makes a program for each new shape of a product, which takes as long as some hundred rows of a large
layer do. The number of rows is another one in every block, so they are cut into tiles of the same height, of
which the last overlaps with the one before it.
"""

from __future__ import annotations

from collections.abc import Iterator

import torch
from torch import Tensor

from fedsim.simulation import onednn

_TILE = 256  # from this height on the rate of a product with a large layer does not grow any more
_SMALL_TILE = 2048  # the same for a small layer
_GRAIN = 16  # products of one client's rows come in multiples of it
_LARGE = 1 << 14  # entries of the other factor, below which a layer is small


def outputs(inputs: Tensor, weight: Tensor, bias: Tensor | None, out: Tensor | None = None) -> Tensor:
    """inputs [R, in] · weight [out, in] transposed, + bias [out], into `out` [R, out] where it is given."""
    rows = inputs.shape[0]
    height = _TILE if weight.numel() >= _LARGE else _SMALL_TILE
    if not _by_onednn(inputs) or (rows < height and height > _TILE):
        if bias is None:
            return torch.mm(inputs, weight.t(), out=out)
        return torch.addmm(bias, inputs, weight.t(), out=out)
    found = inputs.new_empty((rows, weight.shape[0])) if out is None else out
    for tile, _ in _tiles(rows, height):
        found[tile] = onednn.linear(inputs[tile], weight, bias)
    return found


def sum_over_rows(moves: Tensor, inputs: Tensor) -> Tensor:
    """movesᵀ [out, R] · inputs [R, in], in float64 from tile to tile."""
    if moves.shape[1] * inputs.shape[1] < _LARGE or not _by_onednn(inputs):
        return (moves.t() @ inputs).double()
    total = torch.zeros((moves.shape[1], inputs.shape[1]), dtype=torch.float64)
    for tile, again in _tiles(inputs.shape[0], _TILE):
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


def _tiles(rows: int, height: int) -> Iterator[tuple[slice, int]]:
    """Tiles of all rows, and how many of a tile's first rows lay in the one before."""
    if rows <= height:
        yield slice(0, rows), 0
        return
    for start in range(0, rows, height):
        again = max(0, start + height - rows)
        yield slice(start - again, start - again + height), again
