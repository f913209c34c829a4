"""Evaluating a model: on the central test set, and on each client's own examples."""

from __future__ import annotations

import copy
from collections.abc import Callable, Sequence

import numpy as np
import torch
from torch import Tensor, nn

from fedsim.buffers import Buffers
from fedsim.data.federated import FederatedData
from fedsim.flat import ParamSpec, write_flat
from fedsim.keys import Purpose, generator
from fedsim.metrics import PerExample, by_client, joined, metrics_of, per_example, summary
from fedsim.models.layout import lay_out, takes_channels_last
from fedsim.types import Floats, Ids

_ROWS = 100
"""Examples of one pass through convolutions, so that what they leave behind still lies in the cache."""


class Evaluator:
    """Holds a copy of the module in evaluation mode; the values come with every call.

    Args:
        module: the model.
        spec, floating, integers: layouts of its parameters and buffers.
        data: the partitioned data set.
        batch_size: most examples of one forward pass.
        metrics: names asked for beside the task's own.
    """

    def __init__(
        self,
        module: nn.Module,
        spec: ParamSpec,
        floating: ParamSpec | None,
        integers: ParamSpec | None,
        data: FederatedData,
        *,
        batch_size: int,
        metrics: Sequence[str] = (),
    ) -> None:
        self.module = copy.deepcopy(module).eval()
        self.spec, self.floating, self.integers = spec, floating, integers
        self.data = data
        self.batch_size = batch_size
        self.names = metrics_of(data.dataset.task, metrics)
        self._like = next(self.module.parameters())
        self._images = self._like.device.type == "cpu" and takes_channels_last(
            self.module, self._inputs(self._anything(), images=False)
        )
        if self._images:
            lay_out(self.module, torch.channels_last)
            self.batch_size = min(batch_size, _ROWS)

    def _anything(self) -> Tensor:
        """[2, ...] stored examples; a coordinator has none, only their shape."""
        dataset = self.data.dataset
        return dataset.train.inputs.new_zeros((2, *dataset.input_shape))

    def _inputs(self, stored: Tensor, *, images: bool) -> Tensor:
        """What the module gets of stored examples."""
        batch = self.data.dataset.transforms.evaluate(stored.to(self._like.device))
        batch = batch.to(self._like.dtype) if batch.is_floating_point() else batch
        return batch.contiguous(memory_format=torch.channels_last) if images and batch.ndim == 4 else batch

    def set(self, x: Tensor, buffers: Buffers) -> None:
        """Put these values into the module."""
        write_flat(self.module, self.spec, x)
        named = dict(self.module.named_buffers())
        for spec, flat in ((self.floating, buffers.floating), (self.integers, buffers.integers)):
            if spec is not None:
                for name, value in spec.unflatten(flat).tensors.items():
                    named[name].copy_(value)

    def judge(self, inputs: Tensor, targets: Tensor) -> PerExample:
        """What the module does on stored examples [n, ...]."""
        dataset, like, parts = self.data.dataset, self._like, []
        with torch.inference_mode():
            for start in range(0, len(targets), self.batch_size):
                rows = slice(start, start + self.batch_size)
                batch = self._inputs(inputs[rows], images=self._images)
                wanted = targets[rows].to(like.device)
                wanted = wanted.to(like.dtype) if wanted.is_floating_point() else wanted
                parts.append(per_example(dataset.task, self.module(batch), wanted))
        return joined(parts)

    def _judge_rows(self, inputs: Tensor, targets: Tensor, rows: Tensor) -> PerExample:
        """`judge` on these rows, gathered some thousands at a time."""
        parts = torch.split(rows, self.batch_size * max(1, 4096 // self.batch_size))
        return joined([self.judge(inputs[part], targets[part]) for part in parts])

    def central(self, x: Tensor, buffers: Buffers) -> dict[str, float]:
        """The metrics on the central test set; {} where the data have none."""
        test = self.data.dataset.test
        if test is None:
            return {}
        self.set(x, buffers)
        return summary(self.judge(test.inputs, test.targets), self.names)

    def clients(
        self,
        x: Tensor,
        buffers: Buffers,
        *,
        cap: int,
        seed: int,
        personal: Callable[[Ids], Tensor] | None = None,
    ) -> dict[str, Floats]:
        """Accuracy and loss of each client on its hold-out, or on its training data without one.

        Args:
            cap: at most so many clients, drawn once for the run.
            personal: ids -> [b, D], what each client evaluates with; None for x.

        Returns:
            Columns ``client``, ``examples``, ``accuracy``, ``loss``.
        """
        data = self.data
        held = len(data.holdout_index) > 0
        rows_of = data.holdout_rows if held else data.rows
        ids = np.arange(data.clients, dtype=np.int64)
        if data.clients > cap:
            rng = generator(seed, Purpose.SAMPLE, -1)
            ids = np.sort(rng.choice(data.clients, cap, replace=False)).astype(np.int64)
        sizes = (data.holdout_sizes if held else data.sizes)[ids]
        place = np.repeat(np.arange(len(ids)), sizes).astype(np.int64)
        train = data.dataset.train
        if personal is None:
            index, offsets = (
                (data.holdout_index, data.holdout_offsets) if held else (data.index, data.offsets)
            )
            inside = np.arange(int(sizes.sum())) - np.repeat(np.cumsum(sizes) - sizes, sizes)
            rows = torch.from_numpy(index[np.repeat(offsets[ids], sizes) + inside])
            self.set(x, buffers)
            examples = self._judge_rows(train.inputs, train.targets, rows)
        else:
            parts = []
            for client in ids[sizes > 0].tolist():
                self.set(personal(np.array([client], np.int64))[0], buffers)
                rows = torch.from_numpy(rows_of(client).copy())
                parts.append(self.judge(train.inputs[rows], train.targets[rows]))
            examples = joined(parts)
        return {"client": ids.astype(np.float64), **by_client(examples, place, len(ids))}


def clients_due(when: str, round_index: int, *, last: bool) -> bool:
    """Whether ``[evaluation] clients`` asks for an evaluation after this round."""
    if when == "never":
        return False
    if when == "final":
        return last
    return last or round_index % int(when.removeprefix("every ")) == 0


def fairness(accuracy: Floats) -> dict[str, float]:
    """Mean, worst tenth and spread over clients."""
    worst = np.sort(accuracy)[: max(1, len(accuracy) // 10)]
    return {
        "client_accuracy_mean": float(accuracy.mean()),
        "client_accuracy_worst10": float(worst.mean()),
        "client_accuracy_std": float(accuracy.std()),
    }
