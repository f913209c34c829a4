"""Who computes the blocks of a simulated engine: this process, or a pool of others.

The engine decides which clients share a block, what each of them is given and in which order the answers
are folded. A crew only computes. As nothing of a block depends on another, the numbers are the same
whoever computes it and whenever.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import NamedTuple, Protocol

from torch import Tensor

from fedsim.local import LocalAlgorithm, LocalSpec
from fedsim.row_segments import RowsAt
from fedsim.training.answer import Answer, answer
from fedsim.training.work import ClientFailed, Trainer, Work, Workplace
from fedsim.transform import UpdateTransform
from fedsim.types import Bools


class Bench(NamedTuple):
    """What it takes to compute any block of a run.

    Args:
        place: what the clients share.
        trainer: how blocks of them are trained.
        transform: applied on the client side of each update, None for none.
        algorithm: local spec -> the strategy's client half.
    """

    place: Workplace
    trainer: Trainer
    transform: UpdateTransform | None
    algorithm: Callable[[LocalSpec], LocalAlgorithm]


class Order(NamedTuple):
    """One block to be computed.

    Args:
        work: of C clients.
        known: [C] which of them have states; rows: {name: [k, *shape]} of those k.
        at: where the states lie instead of in `rows`, and where the new ones go instead of into the answer.
    """

    work: Work
    known: Bools
    rows: Mapping[str, Tensor]
    at: RowsAt | None = None

    def carry_out(self, bench: Bench, algorithm: LocalAlgorithm) -> Answer:
        """The answers of the block.

        Raises:
            ClientFailed: the training of a client raised.
        """
        rows = self.rows if self.at is None else self.at.read()
        found = answer(
            bench.place, bench.trainer, bench.transform, self.work, algorithm, lambda ids: (self.known, rows)
        )
        if self.at is None:
            return found
        self.at.write(found.kept)
        return found._replace(kept={})


class Crew(Protocol):
    """Computes the blocks of one engine."""

    @property
    def width(self) -> int:
        """Blocks that are computed at once."""
        ...

    @property
    def apart(self) -> bool:
        """Whether blocks are computed by processes of their own."""
        ...

    def answers(
        self, bench: Bench, spec: LocalSpec, costs: Sequence[float], order: Callable[[int], Order]
    ) -> Iterator[Answer | ClientFailed]:
        """The answers of all blocks, in their order.

        Args:
            bench: the same in every call.
            spec: local training of all the blocks.
            costs: how much there is to do in each block, in any unit.
            order: number of a block -> the block; asked for once, when its turn comes near.
        """
        ...

    def close(self) -> None:
        """No block will be asked for any more."""
        ...


class Alone:
    """This process, block after block."""

    width = 1
    apart = False

    def answers(
        self, bench: Bench, spec: LocalSpec, costs: Sequence[float], order: Callable[[int], Order]
    ) -> Iterator[Answer | ClientFailed]:
        algorithm = bench.algorithm(spec)
        for number in range(len(costs)):
            yield _carried_out(order(number), bench, algorithm)

    def close(self) -> None:
        """Nothing is held."""


def _carried_out(order: Order, bench: Bench, algorithm: LocalAlgorithm) -> Answer | ClientFailed:
    try:
        return order.carry_out(bench, algorithm)
    except ClientFailed as failure:
        return failure
