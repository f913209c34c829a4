"""The task that a client has in hand, as its heartbeats describe it, and how it ends in failure."""

from __future__ import annotations

from dataclasses import dataclass

from fedsim.pb import federation_pb2 as pb

_MOST_TEXT = 500


class TaskFailed(Exception):
    """A task came to nothing.

    Args:
        code: of the contract: oom, cuda_oom, data, policy_refused, exception, cancelled, timeout.
        text: what the coordinator may read; never a traceback.
    """

    def __init__(self, code: str, text: str) -> None:
        super().__init__(text)
        self.code = code
        self.text = text


@dataclass(slots=True, eq=False)
class Held:
    """One task in hand.

    Args:
        task: what is to be done.
        phase: of the contract; step, steps, bytes: how far it is.
        cancelled: the coordinator does not want the answer any more.
    """

    task: pb.Task
    phase: pb.Phase = pb.PHASE_UNSPECIFIED
    step: int = 0
    steps: int = 0
    bytes: int = 0
    cancelled: bool = False

    def at_step(self, step: int, steps: int) -> None:
        """The worker has done `step` of `steps`."""
        self.step, self.steps = step, steps

    def at_byte(self, count: int) -> None:
        """So many bytes of an object have moved."""
        self.bytes = count

    def progress(self) -> pb.Progress:
        """What a heartbeat says of it; a phase without a counter has none of another phase."""
        training = self.phase == pb.TRAINING
        return pb.Progress(
            task_id=self.task.task_id,
            phase=self.phase,
            step=self.step if training else 0,
            steps=self.steps if training else 0,
            bytes=0 if training else self.bytes,
        )


def line(text: str) -> str:
    """A text of one line of bounded length, for the coordinator."""
    return " ".join("".join(c if c.isprintable() else " " for c in text).split())[:_MOST_TEXT]
