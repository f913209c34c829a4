"""A client at work: ask for a task, check it, train, hand the answer in, ask again.

    DISCONNECTED -> IDLE -> TRAINING -> SUBMITTING -> IDLE …

Losing the coordinator changes nothing of what the client is doing: calls wait until it is back, training goes
on, and an answer that was written down is sent until there is a verdict. Heartbeats run beside it all; they
keep the lease alive and bring cancellations. Between an answer and the next request nothing waits.
"""

from __future__ import annotations

import asyncio
import logging
import random
from collections.abc import Callable
from datetime import datetime
from enum import StrEnum
from typing import Any, Protocol

from fedsim.client.client_states import StateLost
from fedsim.client.connection import POLL_SECONDS, Connection
from fedsim.client.hand_in import hand_in, written
from fedsim.client.hands import Held, TaskFailed, line
from fedsim.client.offers import BadOffer, Offered, lends, read_offer
from fedsim.client.policy import Policy, PolicyFile, needs_examples, open_in, refusal
from fedsim.client.state import StateFolder
from fedsim.client.statuses import Refused
from fedsim.client.terms import Malformed, terms_of
from fedsim.client.transfer import BadObject, Unwanted, fetch
from fedsim.client.unsent import Unsent
from fedsim.client.worker import Answer, Facts, Job, WorkerFailed
from fedsim.errors import ConfigError, EnvironmentProblem
from fedsim.pb import federation_pb2 as pb

STOP_SECONDS = 30.0
"""For the batch under way, and for an answer that is being handed in, once the client shall stop."""

_FULL = "FS-ENV-021"  # no space left: may pass, other troubles of a disk do not
_NIGHT_STEP = 60.0  # outside the owner's hours the policy is looked at so often
_EMPTY_PAUSE = 0.2  # against a coordinator that answers "nothing" at once, again and again

log = logging.getLogger(__name__)


class State(StrEnum):
    """What a client is doing."""

    DISCONNECTED = "disconnected"
    IDLE = "idle"
    TRAINING = "training"
    SUBMITTING = "submitting"


class Trainer(Protocol):
    """What does the training: `fedsim.client.worker.Worker`."""

    async def train(self, job: Job, on_progress: Callable[[int, int], None]) -> Answer: ...

    async def facts(self, config: bytes, client: int, population: int) -> Facts: ...

    def cancel(self) -> None: ...


class Runtime:
    """The main loop of a client; belongs to one event loop.

    Args:
        connection: to the coordinator.
        folder: of this client.
        policy: of its owner.
        worker: does the training.
        request: what this client can run, for its first request of a session.
        backoff: seconds to wait after trouble number 1, 2, … in a row.
        now: local time.
    """

    def __init__(
        self,
        connection: Connection,
        folder: StateFolder,
        policy: PolicyFile,
        worker: Trainer,
        *,
        request: pb.LeaseRequest,
        backoff: Callable[[int], float],
        now: Callable[[], datetime] = datetime.now,
    ) -> None:
        self._connection = connection
        self._folder = folder
        self._policy_file = policy
        self._worker = worker
        self._request = request
        self._backoff = backoff
        self._now = now
        self._phase = State.DISCONNECTED
        self._held: Held | None = None
        self._at_work = False  # the worker trains
        self._resting = False  # outside the owner's hours
        self._stopping = False
        self._begun = asyncio.Event()  # logged in for the first time
        self._troubles = 0
        self._examples: dict[tuple[str, int, bytes], int] = {}
        self._main: asyncio.Task[None] | None = None

    @property
    def state(self) -> State:
        """What the client is doing; a client that trains does so with and without a coordinator."""
        if self._phase == State.IDLE and not self._connection.online:
            return State.DISCONNECTED
        return self._phase

    async def run(self) -> None:
        """Work until `stop` is called or the client cannot go on.

        Raises:
            CoordinatorProblem, SupersededError: the coordinator does not accept this client, or another
                process has taken its place.
            EnvironmentProblem: the folder cannot be written.
        """
        self._main = asyncio.create_task(self._work(), name="work")
        beat = asyncio.create_task(self._beat(), name="heartbeat")
        both: list[asyncio.Task[None]] = [self._main, beat]
        try:
            done, _ = await asyncio.wait(both, return_when=asyncio.FIRST_COMPLETED)
        finally:
            for task in both:
                task.cancel()
            await asyncio.gather(*both, return_exceptions=True)
        for task in done:
            if not task.cancelled() and (error := task.exception()) is not None:
                raise error
        await self._connection.bye("stopped")

    def stop(self) -> None:
        """Finish the batch under way, keep what is in hand, say goodbye; `run` returns then."""
        if self._stopping or self._main is None:
            return
        self._stopping = True
        log.info("state=%s stopping", self.state)
        loop = asyncio.get_running_loop()
        if self._at_work:
            self._worker.cancel()
            loop.call_later(STOP_SECONDS, self._main.cancel)
        elif self._phase == State.SUBMITTING and self._connection.online:
            loop.call_later(STOP_SECONDS, self._main.cancel)
        else:
            self._main.cancel()

    async def _work(self) -> None:
        await self._connection.start()
        self._phase = State.IDLE
        self._begun.set()
        await self._take_up()
        empty = 0
        while not self._stopping:
            await self._wait_for_hours()
            asked = asyncio.get_running_loop().time()
            reply = await self._connection.lease(self._asking())
            if reply.HasField("offer"):
                empty = 0
                await self._take(reply.offer)
                continue
            if reply.reason:
                log.debug("lease=nothing reason=%s", reply.reason)
            quick = asyncio.get_running_loop().time() - asked < _EMPTY_PAUSE
            empty = empty + 1 if quick else 0
            await asyncio.sleep(max(reply.delay_seconds, _EMPTY_PAUSE if empty > 2 else 0.0))

    async def _take_up(self) -> None:
        """What the process before this one left: answers that were not handed in, a task in hand."""
        for unsent in self._folder.unsent.load(self._connection.key.public):
            log.info("task=%s the answer is handed in again", unsent.body.task_id.hex())
            held = Held(pb.Task(task_id=unsent.body.task_id, attempt=unsent.body.attempt))
            await self._guarded(held, self._hand_in(unsent, held, resumed=True))
        task = self._folder.held()
        kept = (task.message.digest.hex(), task.lent.digest.hex()) if task is not None else ()
        self._folder.sweep_objects(frozenset(kept))

    def _asking(self) -> pb.LeaseRequest:
        """The next request; plugins and device are told once in a session, a round need not carry them."""
        request, self._request = self._request, pb.LeaseRequest(wait_seconds=POLL_SECONDS)
        return request

    async def _wait_for_hours(self) -> None:
        """Outside the owner's hours there is no session: the coordinator must not count on this client."""
        policy = self._policy()
        while policy is not None and (seconds := open_in(policy, self._now())) > 0:
            if not self._resting:
                log.info("hours=closed seconds=%.0f", seconds)
                self._resting = True
                await self._connection.bye("outside the owner's hours")
            await asyncio.sleep(min(seconds, _NIGHT_STEP))
            policy = self._policy()
        self._resting = False

    async def _take(self, offer: pb.Offer) -> None:
        """Do a task, from the offer to the verdict."""
        try:
            offered = read_offer(offer, self._connection.server_id)
        except BadOffer as bad:
            log.error("offer=refused why=%r", bad.why)
            self._folder.audit.write("offer_refused", reason=bad.why)
            if bad.task is not None:
                await self._connection.fail(bad.task.task_id, bad.task.attempt, "exception", bad.why)
            await self._rest_after_trouble()
            return
        held = Held(offered.task)
        await self._guarded(held, self._do(offered, held))

    async def _guarded(self, held: Held, work: Any) -> None:
        """Do `work`, a coroutine, with `held` in hand; its failure is told to the coordinator."""
        task, self._held = held.task, held
        try:
            await work
        except TaskFailed as failed:
            trouble = failed
        except WorkerFailed as failed:
            if failed.code == "cancelled" and self._stopping:
                return  # the note of the task in hand stays
            trouble = TaskFailed(failed.code, failed.text)
        except Unwanted:
            trouble = TaskFailed("cancelled", "cancelled by the coordinator")
        except EnvironmentProblem as problem:
            if problem.code != _FULL:
                raise
            trouble = TaskFailed("exception", "the client's disk is full")
        else:
            self._troubles = 0
            return
        finally:
            self._held, self._phase = None, State.IDLE
        text = line(trouble.text)
        log.warning("run=%s task=%s failed=%s %s", task.run_id, task.task_id.hex(), trouble.code, text)
        self._folder.unsent.remove(task.task_id)
        self._folder.release()
        await self._connection.fail(task.task_id, task.attempt, trouble.code, text)
        if trouble.code != "cancelled":
            await self._rest_after_trouble()

    async def _do(self, offered: Offered, held: Held) -> None:
        task = offered.task
        self._phase = State.TRAINING
        earlier = self._folder.unsent.find(task.task_id, self._connection.key.public)
        if earlier is not None:
            return await self._hand_in(earlier, held, resumed=True)
        await self._ask_the_owner(task)
        self._folder.hold(offered.body)
        held.phase = pb.FETCHING
        message = await self._object(offered.message, task.message, held)
        lent = await self._object(offered.lent, task.lent, held) if lends(task) else None
        held.phase = pb.TRAINING
        out = self._folder.unsent.folder(task.task_id)
        if held.cancelled:
            raise Unwanted
        self._at_work = True
        try:
            job = Job(offered.body, message, lent, self._state_of(task), out)
            answer = await self._worker.train(job, held.at_step)
        finally:
            self._at_work = False
        self._phase = State.SUBMITTING
        policy = self._policy() or Policy()
        unsent = await written(self._folder, self._connection, task, answer, policy)
        await self._hand_in(unsent, held, resumed=False)

    async def _hand_in(self, unsent: Unsent, held: Held, *, resumed: bool) -> None:
        self._phase = State.SUBMITTING
        held.phase = pb.UPLOADING
        try:
            reply = await hand_in(self._connection, unsent, held, resumed=resumed, backoff=self._backoff)
        except (TaskFailed, Unwanted):
            self._folder.states.drop(unsent.body.run_id, unsent.body.task_id)
            raise
        # Before the answer is forgotten: a note without an answer means that the task is still in training.
        self._folder.release()
        counts = self._folder.settle(unsent.body, reply)
        level = logging.INFO if counts else logging.WARNING
        name = pb.Verdict.Name(reply.verdict)
        run, number = unsent.body.run_id, held.task.round_index
        log.log(level, "run=%s round=%d verdict=%s %s", run, number, name, line(reply.text))

    async def _object(self, content: bytes | None, wanted: pb.Object, held: Held) -> Any:
        """The bundle itself, or the file that it was fetched into. Any: bytes or Path."""
        if content is not None:
            return content
        path = self._folder.object_path(wanted.digest)
        try:
            return await fetch(
                self._connection, wanted, path, on_bytes=held.at_byte, cancelled=lambda: held.cancelled
            )
        except BadObject as bad:
            self._folder.audit.write("object_refused", run=held.task.run_id, reason=str(bad))
            raise TaskFailed("exception", f"what was fetched is refused: {bad}") from bad
        except Refused as refused:
            raise TaskFailed("exception", f"the message cannot be fetched: {refused.text}") from refused

    def _state_of(self, task: pb.Task) -> Any:
        """The file with this client's state, None for the fresh one. Any: Path or None."""
        try:
            return self._folder.states.current(task.run_id, task.last_folded)
        except StateLost as lost:
            log.warning("run=%s state of task %s is not here: this client starts afresh", task.run_id, lost)
            self._folder.audit.write("state_lost", run=task.run_id, task=str(lost))
            return None

    def _policy(self) -> Policy | None:
        """The owner's policy, None where there is none or it is wrong; both refuse everything."""
        try:
            return self._policy_file.policy()
        except (ConfigError, EnvironmentProblem) as error:
            log.error("%s", error)
            return None

    async def _ask_the_owner(self, task: pb.Task) -> None:
        """Check a task against the policy.

        Raises:
            TaskFailed: it is refused, which is written into the audit file.
            WorkerFailed: the client's data cannot be read.
        """
        why: str | None
        policy = self._policy()
        try:
            terms = terms_of(task)
        except Malformed as malformed:
            raise TaskFailed("exception", f"the task cannot be understood: {malformed}") from malformed
        if policy is None:
            why = f"this client has no valid policy file: nothing is allowed ({self._policy_file.path.name})"
        else:
            closed = open_in(policy, self._now()) > 0
            why = "[hours] this client does not work now" if closed else refusal(policy, terms)
            if why is None and needs_examples(policy, terms):
                why = refusal(policy, terms, await self._count(task))
        if why is not None:
            self._folder.audit.write("policy_refused", run=task.run_id, name=task.run_name,
                                     task=task.task_id.hex(), reason=why)  # fmt: skip
            raise TaskFailed("policy_refused", why)

    async def _count(self, task: pb.Task) -> int:
        """Examples that this client has for a run; asked once."""
        key = (task.run_id, task.client, task.config)
        if key not in self._examples:
            facts = await self._worker.facts(task.config, task.client, task.population)
            self._examples = {key: facts.examples}
        return self._examples[key]

    async def _rest_after_trouble(self) -> None:
        """Nothing after the first trouble, then longer and longer: a coordinator may offer the same again."""
        self._troubles += 1
        if self._troubles > 1:
            await asyncio.sleep(self._backoff(self._troubles - 1))

    async def _beat(self) -> None:
        """Heartbeats, and one at once when the coordinator is back after a break."""
        rng = random.Random()
        draining = False
        await self._begun.wait()
        while True:
            seconds = self._connection.heartbeat_seconds * rng.uniform(0.8, 1.2)
            await self._connection.wait_for_return(seconds)
            if self._resting or not self._connection.online:
                continue
            held = self._held
            request = pb.HeartbeatRequest(
                held=[] if held is None else [held.progress()], free_bytes=self._folder.free_bytes()
            )
            reply = await self._connection.heartbeat(request)
            if reply.draining and not draining:
                log.info("the coordinator is about to stop")
            draining = reply.draining
            for lease in reply.held:
                if lease.cancelled and held is not None and lease.task_id == held.task.task_id:
                    self._cancel(held)

    def _cancel(self, held: Held) -> None:
        """The coordinator does not want the answer any more."""
        if not held.cancelled and held is self._held:
            log.info("task=%s cancelled by the coordinator", held.task.task_id.hex())
            held.cancelled = True
            if self._at_work:
                self._worker.cancel()
