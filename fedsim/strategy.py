"""The server half of an algorithm, and the parts that most strategies share.

A strategy is a named tuple of pure functions; its factory captures the hyper-parameters. What is not
special to an algorithm is taken from here or, with `_replace`, from FedAvg.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any, Literal, NamedTuple

import numpy as np
import torch
from torch import Tensor

from fedsim.errors import RegistryError
from fedsim.flat import ParamSpec
from fedsim.local import LocalAlgorithm, LocalSpec
from fedsim.registry import load
from fedsim.types import (
    Bools,
    Floats,
    GradFn,
    Ids,
    Message,
    Meta,
    Population,
    UpdateBlock,
    WindowInfo,
)

_BLOCK = 1 << 18  # values of a piece: few enough for the cache, and enough to share between threads
_TABLE = 1 << 20  # float64 values of many rows at a time, on a GPU
# Rows and columns that are added at a time on a CPU, measured: tiles of 2 to 4 MB of float64.
_FLAT_TILE, _TALL_TILE, _MANY_ROWS = (16, 1 << 15), (64, 1 << 12), 256

State = Any  # each strategy's own named tuple of tensors and numbers
Sums = dict[str, Tensor]


@dataclass(frozen=True, slots=True)
class Traits:
    """What a strategy needs and where it can run; checked when a run is configured.

    Args:
        modes: schedulers allowed.
        reduction: ``linear`` streams sums; ``gather`` hands `apply` all rows.
        client_state: where a per-client vector persists.
        client_hooks: needs its own direction, so an opaque training function is refused.
        needs_normaliser: divides by the sum of local step lengths.
        needs: what `init` asks of the population: its long-run participation ``rates``, the
            ``durations`` of its tasks; and ``period``: windows of a fixed length.
        affine: the direction is g + a·x + b, g the gradient or one taken uphill (`fedsim.uphill`).
        columnwise: `fold` and `apply` treat each entry of the model by itself, with nothing but scalars in
            common, and `fold` makes no rows: a large model may be given to them piece by piece.
        sums_only: `fold` is `fold_deltas`, and `weigh` reads nothing that training finds out (neither
            scalars nor the normaliser): an engine may add the updates up itself and make no row of any.
        down_factor, up_factor: model-sized vectors per task in each direction.
        server_vectors: model-sized vectors that the server keeps beside the model; `per_client` of
            them for each client that took part.
        neutral: "parameters -> what it then equals", for the documentation.
    """

    modes: frozenset[Literal["sync", "async"]] = field(default=frozenset({"sync"}))
    reduction: Literal["linear", "gather"] = "linear"
    client_state: Literal["none", "client", "server"] = "none"
    client_hooks: bool = False
    needs_normaliser: bool = False
    needs: frozenset[Literal["rates", "durations", "period"]] = field(default=frozenset())
    affine: bool = False
    columnwise: bool = False
    sums_only: bool = False
    down_factor: int = 1
    up_factor: int = 1
    server_vectors: int = 0
    server_vectors_per_client: int = 0
    neutral: str = ""


class Strategy(NamedTuple):
    """An algorithm's server half and its choice of client half.

    Args:
        init: (x0 [D], spec, population) -> state.
        broadcast: (state) -> Message with flat vectors; "x" is the model.
        local: (grad_fn, local spec) -> LocalAlgorithm.
        weigh: (state, meta) -> weights [b] float64, refused [b] bool; never sees tensors.
        fold: (state, block, weights, rows) -> sums, new rows; or the string ``"gather"``.
        apply: (state, reduced, info) -> state, metrics. `reduced` holds the sums of `fold` over the
            window in float64, or is a `Rows` under ``"gather"``.
        model: (state) -> x [D], what is evaluated, checkpointed and exported.
        plan: (state, spec, window, ids) -> spec, steps [b] or None.
        lend: (state, rows, ids) -> named tensors with a leading b that the server holds for these
            clients, or ().
        traits: see Traits.
    """

    init: Callable[[Tensor, ParamSpec, Population], State]
    broadcast: Callable[[State], Message]
    local: Callable[[GradFn, LocalSpec], LocalAlgorithm]
    weigh: Callable[[State, Meta], tuple[Floats, Bools]]
    fold: Callable[..., tuple[Sums, Mapping[str, Tensor]]] | Literal["gather"]
    apply: Callable[[State, Any, WindowInfo], tuple[State, Mapping[str, float]]]
    model: Callable[[State], Tensor]
    plan: Callable[[State, LocalSpec, int, Ids], tuple[LocalSpec, Ids | None]]
    lend: Callable[[State, Any, Ids], Any]
    traits: Traits


def as_planned(state: State, spec: LocalSpec, window: int, ids: Ids) -> tuple[LocalSpec, Ids | None]:
    """Default `plan`: local training as configured."""
    return spec, None


def lend_nothing(state: State, rows: Any, ids: Ids) -> tuple[()]:
    """Default `lend`."""
    return ()


def by_examples(state: State, meta: Meta) -> tuple[Floats, Bools]:
    """Weight by the number of examples; a client without any is refused."""
    weights = meta.examples.astype(np.float64)
    return weights, meta.examples <= 0


def uniformly(state: State, meta: Meta) -> tuple[Floats, Bools]:
    """Weight 1; a client without examples is refused."""
    return np.ones(len(meta.ids)), meta.examples <= 0


def weighted_sum(weights: Floats | Tensor, rows: Tensor) -> Tensor:
    """Σ_i w_i rows_i over [b, D] in float64, by tiles so that no [b, D] copy is made."""
    w = torch.as_tensor(weights, dtype=torch.float64, device=rows.device)
    if len(rows) == 1:
        return _by_blocks(lambda row: row.double() * w[0], rows[0], dtype=torch.float64)
    if rows.device.type != "cpu":
        width = max(1, _TABLE // len(rows))
        return torch.cat([w @ part.double() for part in torch.split(rows, width, dim=1)])
    # The shape of a tile must not depend on D: columns of a piece of the rows get the same bits.
    height, width = _FLAT_TILE if len(rows) < _MANY_ROWS else _TALL_TILE
    memory = torch.empty(min(height, len(rows)) * min(width, rows.shape[1]), dtype=torch.float64)
    total = torch.zeros(rows.shape[1], dtype=torch.float64)
    for columns, sums in zip(torch.split(rows, width, dim=1), torch.split(total, width), strict=True):
        for tile, part in zip(torch.split(columns, height), torch.split(w, height), strict=True):
            sums.add_(part @ _doubled(tile, memory))
    return total


def _doubled(part: Tensor, memory: Tensor) -> Tensor:
    """[b, w] in float64, in memory that is used again.

    By one thread: a new table each time, and threads that wait for one another after each, took four to
    twenty times as long.
    """
    table = memory[: part.numel()].view(part.shape)
    if part.dtype == torch.bfloat16:  # unknown to NumPy
        for row, values in zip(table, part, strict=True):
            row.copy_(values)
    else:
        np.copyto(table.numpy(), part.detach().numpy())
    return table


def fold_deltas(
    state: State, block: UpdateBlock, weights: Floats, rows: Any
) -> tuple[Sums, Mapping[str, Tensor]]:
    """Default `fold`: {"delta": Σ w·delta, "weight": Σ w, "count": Σ 1}."""
    delta = _delta_sum(block, weights)
    sums = {
        "delta": delta,
        "weight": torch.tensor(float(weights.sum()), dtype=torch.float64, device=delta.device),
        "count": torch.tensor(float(len(block)), dtype=torch.float64, device=delta.device),
    }
    return sums, {}


def _delta_sum(block: UpdateBlock, weights: Floats) -> Tensor:
    """Σ w·delta, [D] in float64."""
    summed = block.summed
    if summed is None:
        return weighted_sum(weights, block.vectors["delta"])
    if not np.array_equal(summed.weights, weights):
        raise RegistryError(
            "the strategy weighs answers otherwise than it said before they were there",
            code="FS-REG-006",
            where="[strategy]",
            why="its traits say `sums_only`, so the engine had added the updates up under the first weights",
            hint="let `weigh` read neither scalars nor the normaliser, or set sums_only=False",
        )
    return summed.delta


def moved(x: Tensor, step: Tensor, scaled: Callable[[Tensor], Tensor] | None = None) -> Tensor:
    """x + step, computed in float64 and rounded once to the dtype of x.

    Args:
        scaled: what makes the step of `step`, elementwise; it then needs no vector of its own.
    """
    if scaled is None:
        return _by_blocks(lambda old, change: old.double() + change, x, step.expand_as(x), dtype=x.dtype)
    return _by_blocks(lambda old, change: old.double() + scaled(change), x, step, dtype=x.dtype)


def _by_blocks(compute: Callable[..., Tensor], *vectors: Tensor, dtype: torch.dtype) -> Tensor:
    """An elementwise function of vectors [D], cast to `dtype`, a piece at a time.

    The same bits as in one go; for large D without intermediate vectors, and two to four times as fast,
    as each piece stays in the cache.
    """
    first = vectors[0]
    if first.device.type != "cpu" or len(first) <= _BLOCK:
        return compute(*vectors).to(dtype)
    result = torch.empty(len(first), dtype=dtype)
    pieces = zip(*(torch.split(vector, _BLOCK) for vector in (result, *vectors)), strict=True)
    for out, *parts in pieces:
        out.copy_(compute(*parts))
    return result


def make_strategy(name: str, **parameters: Any) -> Strategy:
    """A strategy by its registered name, built in or third party.

    Raises:
        RegistryError: the name is unknown.
        ConfigError: a parameter is unknown, missing, or out of range.
    """
    from fedsim.schema import build

    strategy = build(load("strategies", name), parameters, where=f"[strategy] name = {name!r}")
    assert isinstance(strategy, Strategy)
    return strategy
