"""What waits for the ledger's writer: single operations, and small requests of one kind."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from concurrent.futures import Future
from typing import Any, Generic, NamedTuple, Protocol, TypeVar

from sqlalchemy import Connection

T = TypeVar("T")
ItemT = TypeVar("ItemT", contravariant=True)
FoundT = TypeVar("FoundT")
ResultT = TypeVar("ResultT", covariant=True)


class Kind(Protocol[ItemT, FoundT, ResultT]):
    """Small requests of one kind, which the writer carries out together where they wait together."""

    def carry_out(self, connection: Connection, items: Sequence[ItemT]) -> Sequence[FoundT]:
        """Execute the statements for these items, in their order; as an operation does, see `Writer.submit`.

        Should it raise, all of that is undone, and each item is carried out by itself.
        """
        ...

    def announce(self, found: Sequence[FoundT]) -> Sequence[ResultT]:
        """Called right after the commit with what was found: the results for the futures."""
        ...


class Operation(Generic[T]):
    """A kind of its own, for one request."""

    __slots__ = ("after", "operation")

    def __init__(self, operation: Callable[[Connection], T], after: Callable[[T], None] | None) -> None:
        self.operation = operation
        self.after = after

    def carry_out(self, connection: Connection, items: Sequence[None]) -> Sequence[T]:
        return [self.operation(connection)]

    def announce(self, found: Sequence[T]) -> Sequence[T]:
        """An exception in `after` is a mistake in the program, the row stays committed."""
        if self.after is not None:
            self.after(found[0])
        return found


class Job:
    """One request that waits, and who is told of its result."""

    __slots__ = ("future", "item", "kind")

    # Any: jobs of all types wait in one line.
    def __init__(self, kind: Kind[Any, Any, Any], item: Any) -> None:
        self.kind = kind
        self.item = item
        self.future: Future[Any] = Future()


class Kept(NamedTuple):
    """Jobs of one kind that were carried out, and what was found for each."""

    kind: Kind[Any, Any, Any]
    jobs: list[Job]
    found: Sequence[Any]
