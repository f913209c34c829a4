"""Numbers that say how good a model is, from what it did on each example.

Every metric is a function of `PerExample`; the ones of a task are shown by default, others are asked
for by name in ``[evaluation] metrics``.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor

from fedsim.errors import ConfigError
from fedsim.grads import LOSSES
from fedsim.types import Floats, Ids


class PerExample(NamedTuple):
    """What a model did on n examples, each array [n].

    Args:
        loss: of the task; for sequences the mean over their positions.
        correct: 1 or 0; for sequences the share of correct positions; 0 for regression.
        predicted: class, or value for regression; -1 for sequences.
        target: likewise.
        score: probability of class 1 of a binary task, else 0.
    """

    loss: Floats
    correct: Floats
    predicted: Floats
    target: Floats
    score: Floats


def per_example(task: str, outputs: Tensor, targets: Tensor) -> PerExample:
    """Judge a batch of outputs."""
    loss = LOSSES[task](outputs, targets).double()
    zeros = torch.zeros_like(loss)
    if task == "regression":
        columns = (
            loss,
            zeros,
            outputs.reshape(len(loss), -1)[:, 0],
            targets.reshape(len(loss), -1)[:, 0],
            zeros,
        )
    elif outputs.ndim == 3:
        hits = (outputs.argmax(-1) == targets).double().mean(dim=1)
        columns = (loss, hits, zeros - 1, zeros - 1, zeros)
    else:
        predicted = outputs.argmax(-1)
        score = outputs.softmax(-1)[:, 1] if outputs.shape[-1] == 2 else zeros
        columns = (loss, (predicted == targets).double(), predicted, targets, score)
    return PerExample(*(c.double().cpu().numpy() for c in columns))


def joined(parts: Sequence[PerExample]) -> PerExample:
    return PerExample(*(np.concatenate(columns) for columns in zip(*parts, strict=True)))


def _f1(e: PerExample) -> float:
    """Macro F1: the mean over classes that occur in target or prediction."""
    classes = np.unique(np.concatenate([e.target, e.predicted]))
    values = []
    for c in classes:
        hits = float(((e.predicted == c) & (e.target == c)).sum())
        values.append(2 * hits / float((e.predicted == c).sum() + (e.target == c).sum()))
    return float(np.mean(values))


def _auc(e: PerExample) -> float:
    """Area under the ROC curve by ranks, ties counted half; NaN where one class is absent."""
    positive = e.target == 1
    pos, neg = int(positive.sum()), int((~positive).sum())
    if not pos or not neg:
        return math.nan
    _, inverse, counts = np.unique(e.score, return_inverse=True, return_counts=True)
    last = np.cumsum(counts)
    rank = (last - (counts - 1) / 2)[inverse]
    return float((rank[positive].sum() - pos * (pos + 1) / 2) / (pos * neg))


def _r2(e: PerExample) -> float:
    spread = float(((e.target - e.target.mean()) ** 2).sum())
    return 1.0 - float(((e.predicted - e.target) ** 2).sum()) / spread if spread else math.nan


METRICS: Mapping[str, Callable[[PerExample], float]] = {
    "accuracy": lambda e: float(e.correct.mean()),
    "loss": lambda e: float(e.loss.mean()),
    "f1": _f1,
    "auc": _auc,
    "mse": lambda e: float(((e.predicted - e.target) ** 2).mean()),
    "mae": lambda e: float(np.abs(e.predicted - e.target).mean()),
    "r2": _r2,
    "perplexity": lambda e: float(np.exp(min(float(e.loss.mean()), 700.0))),
}

OF_TASK: Mapping[str, tuple[str, ...]] = {
    "classification": ("accuracy", "loss"),
    "binary": ("accuracy", "loss", "f1", "auc"),
    "next-token": ("accuracy", "loss", "perplexity"),
    "regression": ("loss", "mse", "mae", "r2"),
}

_POSSIBLE: Mapping[str, tuple[str, ...]] = {
    "classification": ("accuracy", "loss", "f1"),
    "binary": ("accuracy", "loss", "f1", "auc"),
    "next-token": ("accuracy", "loss", "perplexity"),
    "regression": ("loss", "mse", "mae", "r2"),
}

SMALLER_IS_BETTER = frozenset({"loss", "mse", "mae", "perplexity", "train_loss"})


def metrics_of(task: str, asked: Sequence[str] = ()) -> tuple[str, ...]:
    """The metrics to compute: those asked for, or the task's.

    Raises:
        ConfigError: a metric that this task does not have.
    """
    possible = _POSSIBLE[task]
    for name in asked:
        if name not in possible:
            raise ConfigError(
                f"there is no metric {name!r} for {task} data",
                code="FS-CFG-066",
                where="[evaluation] metrics",
                why=f"possible: {', '.join(possible)}",
                hint="leave the key out for the usual ones",
            )
    return tuple(dict.fromkeys((*OF_TASK[task], *asked)))


def summary(examples: PerExample, names: Sequence[str]) -> dict[str, float]:
    return {name: METRICS[name](examples) for name in names}


def by_client(examples: PerExample, clients: Ids, count: int) -> dict[str, Floats]:
    """Accuracy and loss of each of `count` clients, given the position of each example's client.

    Clients without an example get NaN.
    """
    sizes = np.bincount(clients, minlength=count).astype(np.float64)
    with np.errstate(invalid="ignore", divide="ignore"):
        return {
            "examples": sizes,
            "accuracy": np.bincount(clients, weights=examples.correct, minlength=count) / sizes,
            "loss": np.bincount(clients, weights=examples.loss, minlength=count) / sizes,
        }
