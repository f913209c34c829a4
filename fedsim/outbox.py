"""What the server sends to the clients of each version, made once, and what it weighs on the wire."""

from __future__ import annotations

from collections.abc import Mapping
from functools import partial
from typing import Any

from torch import Tensor
from torch.utils import _pytree as pytree

from fedsim.rows import RowStore
from fedsim.strategy import Strategy, lend_nothing
from fedsim.transform import UpdateTransform
from fedsim.types import Ids, Message


def lend_nothing_to(ids: Ids) -> tuple[()]:
    """What a task lends where the strategy lends nothing: such a task keeps no state alive."""
    return ()


def wire_bytes(message: Any, *, model: int, personal: int) -> int:
    """Bytes of the tensors of one client's message.

    Args:
        model: D; personal: values of each model-sized vector that stay on the client.
    """
    total = 0
    for leaf in pytree.tree_leaves(message):
        if isinstance(leaf, Tensor):
            kept = personal if leaf.numel() == model else 0
            total += (leaf.numel() - kept) * leaf.element_size()
    return total


class Outbox:
    """Broadcasts by version, as long as answers to them can come.

    Args:
        strategy: whose messages these are.
        rows: what the server holds for each client.
        transform: whose downlink encodes the broadcast, None for none.
        personal_size: values of each model-sized vector that are not sent.
    """

    def __init__(
        self, strategy: Strategy, rows: RowStore, *, transform: UpdateTransform | None, personal_size: int
    ) -> None:
        self.strategy = strategy
        self.rows = rows
        self.transform = transform
        self.personal_size = personal_size
        self.messages: dict[int, Message] = {}
        self.bytes = 0  # of the last broadcast

    def broadcast(self, version: int, state: Any) -> Message:
        """The message of this version; as the clients will see it."""
        if version not in self.messages:
            message = self.strategy.broadcast(state)
            sent: Any = message.vectors
            if self.transform is not None and self.transform.downlink is not None:
                encode, decode = self.transform.downlink
                sent = encode(message.vectors)
                message = message._replace(vectors=decode(sent))
            self.bytes = self.weigh(sent, state) + 8 * len(message.scalars)
            self.messages[version] = message
        return self.messages[version]

    def lending(self, state: Any) -> Any:
        """`Task.lend`, at this state of the strategy."""
        if self.strategy.lend is lend_nothing:
            return lend_nothing_to
        return partial(self.strategy.lend, state, self.rows)

    def weigh(self, message: Any, state: Any) -> int:
        """Bytes of one client's message under this state."""
        return wire_bytes(message, model=len(self.strategy.model(state)), personal=self.personal_size)

    def keep(self, versions: Ids) -> None:
        """Forget the messages of all other versions."""
        for version in self.messages.keys() - set(versions.tolist()):
            del self.messages[version]

    def restore(self, version: int, state: Any, messages: Mapping[int, Message]) -> None:
        """Take up messages that a checkpoint held, at this version and state."""
        self.messages.clear()
        if version in messages:
            self.broadcast(version, state)  # counts its bytes
        self.messages |= messages
