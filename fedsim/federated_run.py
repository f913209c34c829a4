"""The rounds of one federation, a record each: what a simulation and a coordinator have in common."""

from __future__ import annotations

import datetime
import resource
import sys
import time
from collections.abc import Iterator
from typing import Any

import numpy as np
from torch import Tensor

from fedsim.client_log import Column, listed
from fedsim.config import Config
from fedsim.data.federated import FederatedData
from fedsim.errors import RunFailed
from fedsim.evaluation import Evaluator, clients_due, fairness
from fedsim.federation import Federation
from fedsim.flat import ParamSpec
from fedsim.keys import own_torch_generator
from fedsim.local import LocalAlgorithm, LocalSpec
from fedsim.outcome import Outcome
from fedsim.personal import personalise
from fedsim.progress import progress_of, target_of
from fedsim.strategy import Strategy
from fedsim.types import GradFn

Record = dict[str, Any]  # Any: numbers, words and the sub-object `time`


class FederatedRun:
    """Iterated round by round; whoever derives from it brings the parts, and the engine inside `federation`.

    Raises:
        ConfigError: ``[evaluation] best`` or ``target`` cannot be followed.
    """

    config: Config
    data: FederatedData
    strategy: Strategy
    spec: ParamSpec
    grad_fn: GradFn
    federation: Federation
    evaluator: Evaluator

    def __init__(self) -> None:
        progress_of(self.config, self.evaluator.names)  # refuses a rule that it cannot follow
        target_of(self.config)
        self.last_outcome: Outcome | None = None
        self.client_evaluation: dict[str, Any] | None = None
        self.started = False
        self.failed_in_a_row = 0  # attempts, over skipped rounds too

    @property
    def facts(self) -> dict[str, Any]:
        """What the manifest says of this run; whoever derives from it adds how clients train."""
        dataset, traits = self.data.dataset, self.strategy.traits
        return {
            "model_parameters": self.spec.size,
            "model_digest": self.spec.digest,
            "clients": self.data.clients,
            "train_examples": int(self.data.sizes.sum()),
            "test_examples": 0 if dataset.test is None else len(dataset.test),
            "task": dataset.task,
            "classes": dataset.classes,
            "data_digest": self.data.digest,
            "partition": self.data.description,
            "down_factor": traits.down_factor,
            "up_factor": traits.up_factor,
            "metrics": list(self.evaluator.names),
        }

    def evaluate_clients(self) -> dict[str, Any]:
        """Each client's accuracy and loss."""
        raise NotImplementedError

    def __iter__(self) -> Iterator[Record]:
        """Records as the lines of ``metrics.jsonl``; the first is the evaluation before training.

        Raises:
            RunFailed: a round failed as often as ``[round] max_failed`` allows.
        """
        if not self.started:
            self.started = True
            yield self._timed(self._before_training)
        while not self.finished:
            record = self._timed(self._round)
            yield record
            outcome = self.last_outcome
            if outcome is not None and outcome.error is not None:
                self.after_failure(outcome.error)
            elif record["received"] or not self.federation.asynchronous:
                # A window in which nobody was due says nothing: those between two failures do not count.
                self.failed_in_a_row = 0

    @property
    def finished(self) -> bool:
        """Whether the last round is done, or the time of the run's clock is up."""
        limit = self.config.run.clock_limit
        over = limit is not None and self.federation.state.clock >= limit
        return over or self.federation.state.round_index >= self.config.run.rounds

    def _before_training(self, phases: dict[str, float]) -> Record:
        record: Record = {
            "round": 0, "version": 0, "outcome": "start", "cohort": 0, "received": 0,
            "refused": 0, "late": 0, "lost": 0,
        }  # fmt: skip
        record |= self._evaluate(0, phases)
        record |= {"bytes_down": 0, "bytes_up": 0, "clock_seconds": 0.0}
        self.last_outcome = None
        return record

    def _round(self, phases: dict[str, float]) -> Record:
        began = time.perf_counter()
        self.last_outcome = self._run_window()
        phases["train"] = time.perf_counter() - began
        record = dict(self.last_outcome.record)
        counts = ("round", "version", "outcome", "cohort", "received", "refused", "late", "lost")
        head = {name: record.pop(name) for name in counts}
        if head["outcome"] != "failed":
            head |= self._evaluate(head["round"], phases)
        return head | record

    def _run_window(self) -> Outcome:
        """The next window, with the training that it needs."""
        return self.federation.run_window()

    def _timed(self, work: Any) -> Record:
        began = time.perf_counter()
        phases: dict[str, float] = {}
        record: Record = work(phases)
        record["time"] = {
            "seconds": time.perf_counter() - began,
            "phases": phases,
            "rss_mb": resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
            // (1 << 20 if sys.platform == "darwin" else 1 << 10),
            "at": datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds"),
        }
        return record

    def after_failure(self, error: RunFailed) -> None:
        """What ``[round] on_failed`` wants after a failed round.

        Raises:
            RunFailed: the run ends with it.
        """
        policy = self.config.round
        self.failed_in_a_row += 1
        if policy.on_failed == "stop" or self.failed_in_a_row >= policy.max_failed:
            self.failed_in_a_row = 0  # whoever resumes the run counts anew
            raise error
        # Asynchronously a failed window means that every answer in it was refused: time goes on.
        if policy.on_failed == "skip" or self.federation.asynchronous:
            self.federation.skip_window()

    def _evaluate(self, round_index: int, phases: dict[str, float]) -> Record:
        """The metrics due after this round, in the order of the record."""
        config, last = self.config.evaluation, self.finished
        began = time.perf_counter()
        record: Record = {}
        buffers = self.federation.state.buffers
        due = last or round_index % config.every == 0
        self.client_evaluation = None
        # A model may draw here too.
        if config.central and due:
            with own_torch_generator():
                record |= self.evaluator.central(self.federation.model, buffers)
        if clients_due(config.clients, round_index, last=last):
            with own_torch_generator():
                self.client_evaluation = self.evaluate_clients()
            accuracy = self.client_evaluation["accuracy"]
            if np.isfinite(accuracy).any() and self.data.dataset.task != "regression":
                record |= fairness(accuracy[np.isfinite(accuracy)])
        phases["evaluate"] = time.perf_counter() - began
        return record

    def algorithm(self, spec: LocalSpec) -> LocalAlgorithm:
        """The strategy's client half under this local training."""
        algorithm = self.strategy.local(self.grad_fn, spec)
        if self.spec.personal:
            algorithm = personalise(algorithm, self.spec.personal)
        return algorithm

    @property
    def last_lines(self) -> dict[str, Column] | None:
        """Columns of ``clients.jsonl`` for the last round."""
        if self.last_outcome is None:
            return None
        columns = self.last_outcome.clients.as_held
        count = len(columns.get("client", []))
        return {"round": [self.last_outcome.record["round"]] * count, **columns}

    @property
    def last_clients(self) -> dict[str, list[Any]] | None:
        """The same as plain values."""
        lines = self.last_lines
        return None if lines is None else {name: listed(column) for name, column in lines.items()}

    def model_tensors(self, *, copy: bool = True) -> dict[str, Tensor]:
        """The global model under the module's own names, loadable with ``load_state_dict``.

        Args:
            copy: False where they are used before the next evaluation.
        """
        self.evaluator.set(self.federation.model, self.federation.state.buffers)
        tensors = self.evaluator.module.state_dict()
        plain = {name: t.detach().contiguous() for name, t in tensors.items()}
        return {
            n: t.clone() if copy and t.data_ptr() == tensors[n].data_ptr() else t for n, t in plain.items()
        }
