"""A data set divided among clients: one index and one array of offsets, whatever the population."""

from __future__ import annotations

import hashlib
from dataclasses import dataclass, field, replace

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from fedsim.data.dataset import Dataset, Split, content_digest
from fedsim.data.transforms import WHITE
from fedsim.errors import DataError

Ints = npt.NDArray[np.int64]


def _nothing() -> Ints:
    return np.zeros(0, dtype=np.int64)


@dataclass(frozen=True, slots=True, eq=False)
class FederatedData:
    """Who owns which training examples.

    A population of 100,000 clients costs these arrays and no object per client; engines gather
    ``dataset.train.inputs[index[offsets[i] + positions]]`` themselves.

    Attributes:
        dataset: the data, shared by all clients.
        index: int64 [n_assigned], rows of ``dataset.train`` grouped by client. A row may occur at
            several clients.
        offsets: int64 [N + 1]; client i owns ``index[offsets[i]:offsets[i + 1]]``.
        holdout_index: like `index`, the examples each client keeps back for its own evaluation;
            empty without a hold-out.
        holdout_offsets: int64 [N + 1] like `offsets`; all zeros without a hold-out.
        names: client names, () when clients are just numbers.
        description: how the division was made, such as ``dirichlet(alpha=0.3), seed 1``.
        feature_shift: float32 [N], standard deviation of each client's feature noise (for images
            relative to full scale), already applied to `dataset`; None without noise.
    """

    dataset: Dataset
    index: Ints
    offsets: Ints
    holdout_index: Ints = field(default_factory=_nothing)
    holdout_offsets: Ints = field(default_factory=_nothing)
    names: tuple[str, ...] = ()
    description: str = ""
    feature_shift: Tensor | None = None

    def __post_init__(self) -> None:
        if len(self.holdout_offsets) == 0:
            object.__setattr__(self, "holdout_offsets", np.zeros_like(self.offsets))
        for index, offsets in (
            (self.index, self.offsets),
            (self.holdout_index, self.holdout_offsets),
        ):
            _check_ranges(index, offsets, rows=len(self.dataset.train), where=self.description)
        if len(self.holdout_offsets) != len(self.offsets):
            raise _malformed("index and hold-out are for different numbers of clients", self)
        if self.names and len(self.names) != self.clients:
            raise _malformed(f"{len(self.names)} names for {self.clients} clients", self)

    def __repr__(self) -> str:
        return f"FederatedData({self.dataset!r}, {self.clients} clients, {self.description})"

    @property
    def clients(self) -> int:
        """N, the number of clients."""
        return len(self.offsets) - 1

    @property
    def sizes(self) -> Ints:
        """int64 [N], training examples of each client."""
        return np.diff(self.offsets)

    @property
    def holdout_sizes(self) -> Ints:
        """int64 [N], held-out examples of each client."""
        return np.diff(self.holdout_offsets)

    def rows(self, client: int) -> Ints:
        """Rows of ``dataset.train`` that `client` trains on (a view)."""
        return self.index[self.offsets[client] : self.offsets[client + 1]]

    def holdout_rows(self, client: int) -> Ints:
        """Rows of ``dataset.train`` that `client` keeps for its own evaluation (a view)."""
        return self.holdout_index[self.holdout_offsets[client] : self.holdout_offsets[client + 1]]

    def label_histogram(self, labels: Ints | None = None) -> Ints:
        """int64 [N, K], how many training examples of each class each client owns.

        Args:
            labels: [n] class of each row of ``dataset.train``; its own labels when None (for
                next-token data the last target of each window).

        Raises:
            DataError: the data have no classes and no `labels` were given.
        """
        if labels is None:
            if self.dataset.classes is None:
                raise DataError(
                    "a regression data set has no labels to count",
                    code="FS-DAT-019",
                    where=self.dataset.name,
                    hint="pass labels, for instance the target divided into quantiles",
                )
            labels = self.dataset.labels
        known = self.dataset.classes or 0
        classes = max(known, int(labels.max(initial=-1)) + 1)
        owner = np.repeat(np.arange(self.clients, dtype=np.int64), self.sizes)
        flat = np.bincount(owner * classes + labels[self.index], minlength=self.clients * classes)
        return flat.reshape(self.clients, classes).astype(np.int64, copy=False)

    @property
    def digest(self) -> str:
        """SHA-256 (hex) of the data and of the division."""
        digest = hashlib.sha256(f"fedsim partition 1\n{self.dataset.digest}\n".encode())
        for array in (self.index, self.offsets, self.holdout_index, self.holdout_offsets):
            digest.update(f"{len(array)}\n".encode())
            digest.update(np.ascontiguousarray(array).data)
        digest.update("\0".join(self.names).encode())
        return digest.hexdigest()


def with_feature_noise(data: FederatedData, deviations: npt.ArrayLike, *, seed: int) -> FederatedData:
    """The same division over a data set in which every client's inputs carry its own noise.

    Li, Diao, Chen and He 2022, "Federated learning on non-IID data silos", section IV-B (noise-based
    feature imbalance). The training inputs become float32 copies in the order of the clients (its
    hold-out after its training examples), so a row that two clients own gets two noises. The central
    test set stays clean.

    Args:
        deviations: [N] >= 0, standard deviation of each client's noise: for images as a fraction of
            full scale, for features in their own (standardised) unit.
        seed: of the noise alone; client i's noise depends on `seed` and i.

    Raises:
        DataError: the inputs are characters.
    """
    source = data.dataset.train
    sigma = np.asarray(deviations, dtype=np.float32)
    if not (source.inputs.dtype == torch.uint8 or source.inputs.is_floating_point()):
        raise DataError(
            "feature noise needs images or real-valued features",
            code="FS-DAT-020",
            where=data.dataset.name,
            why=f"its inputs are {str(source.inputs.dtype).removeprefix('torch.')}",
            hint="use a partition by label, by quantity or the natural one",
        )
    unit = WHITE if source.inputs.dtype == torch.uint8 else 1.0
    rows = np.concatenate([part for i in range(data.clients) for part in _both(data, i)] or [_nothing()])
    inputs = source.inputs[torch.from_numpy(rows)].to(torch.float32)
    owned = data.sizes + data.holdout_sizes
    starts = np.concatenate([[0], np.cumsum(owned)]).astype(np.int64)
    for client in range(data.clients):
        part = inputs[starts[client] : starts[client + 1]]
        random = np.random.Generator(np.random.Philox(key=[seed, client]))
        noise = random.standard_normal(tuple(part.shape), dtype=np.float32)
        part.add_(torch.from_numpy(noise), alpha=float(sigma[client]) * unit)
    train = Split(inputs=inputs, targets=source.targets[torch.from_numpy(rows)])
    old_owners = data.dataset.owners
    owners = None if old_owners is None else old_owners[rows]
    dataset = replace(
        data.dataset,
        train=train,
        owners=owners,
        digest=content_digest(data.dataset.name, data.dataset.task, train, data.dataset.test, owners),
    )
    place = np.arange(len(rows), dtype=np.int64)
    local = place - np.repeat(starts[:-1], owned)
    kept = local >= np.repeat(data.sizes, owned)
    return replace(
        data,
        dataset=dataset,
        index=place[~kept],
        holdout_index=place[kept],
        feature_shift=torch.from_numpy(sigma.copy()),
    )


def _both(data: FederatedData, client: int) -> tuple[Ints, Ints]:
    return data.rows(client), data.holdout_rows(client)


def _check_ranges(index: Ints, offsets: Ints, *, rows: int, where: str) -> None:
    """Offsets start at 0, never fall, end at ``len(index)``; rows exist."""
    sound = (
        len(offsets) >= 1
        and int(offsets[0]) == 0
        and int(offsets[-1]) == len(index)
        and bool((np.diff(offsets) >= 0).all())
    )
    inside = len(index) == 0 or (int(index.min()) >= 0 and int(index.max()) < rows)
    if not (sound and inside):
        raise DataError(
            "a partition does not fit its data set",
            code="FS-DAT-018",
            where=where or None,
            why=(
                f"rows must lie in 0 … {rows - 1}"
                if sound
                else f"offsets must rise from 0 to {len(index)}, one more than there are clients"
            ),
            hint="check the partitioner's (index, offsets)",
        )


def _malformed(why: str, data: FederatedData) -> DataError:
    return DataError(
        "a partition does not fit its data set",
        code="FS-DAT-018",
        where=data.description or None,
        why=why,
        hint="check the partitioner's (index, offsets)",
    )
