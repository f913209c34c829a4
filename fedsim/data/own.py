"""A user's own data: arrays with client ids, or one torch data set per client."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, TypeAlias, overload

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from fedsim.data import transforms as pipelines
from fedsim.data.convert import Array, Examples, as_inputs, as_targets, check_same_shape, collected
from fedsim.data.dataset import TASKS, Dataset, Split, Task, make_dataset
from fedsim.data.federated import FederatedData
from fedsim.data.transforms import Transforms
from fedsim.errors import ConfigError, DataError

Ids: TypeAlias = Sequence[int] | Sequence[str] | npt.NDArray[Any]


@overload
def from_arrays(
    inputs: Array,
    targets: Array,
    *,
    client_ids: None = None,
    test: tuple[Array, Array] | None = None,
    task: Task | None = None,
    classes: int | None = None,
    transforms: Transforms | None = None,
    name: str = "own",
) -> Dataset: ...


@overload
def from_arrays(
    inputs: Array,
    targets: Array,
    *,
    client_ids: Ids,
    test: tuple[Array, Array] | None = None,
    task: Task | None = None,
    classes: int | None = None,
    transforms: Transforms | None = None,
    name: str = "own",
) -> FederatedData: ...


def from_arrays(
    inputs: Array,
    targets: Array,
    *,
    client_ids: Ids | None = None,
    test: tuple[Array, Array] | None = None,
    task: Task | None = None,
    classes: int | None = None,
    transforms: Transforms | None = None,
    name: str = "own",
) -> Dataset | FederatedData:
    """Arrays as data: divided by `client_ids`, or still to be divided when there are none.

    Args:
        inputs: [n, ...]: uint8 images [n, ch, h, w], real features, or integer characters [n, T].
        targets: [n] integers (classes from 0), [n, T] integers (next characters), or [n] reals
            (regression).
        client_ids: [n] integers or names; clients are numbered in sorted order of their ids.
        test: inputs and targets of a central test set.
        task: inferred from `targets` when None (binary for two classes counts as classification).
        classes: K; one more than the largest label, of the test set too, when None.
        transforms: None scales uint8 images to [0, 1] and leaves everything else as it is.
        name: what to call the data in outputs.

    Raises:
        DataError: shapes that do not fit (012), labels out of range (007), values not finite (008),
            element types that are neither (016), ids that are no ids (022).
    """
    train = Split(as_inputs(inputs, name), as_targets(targets, name))
    held = None if test is None else Split(as_inputs(test[0], name), as_targets(test[1], name))
    owners, owner_names = (None, ()) if client_ids is None else _owners(client_ids, len(train))
    dataset = _dataset(
        name,
        train,
        test=held,
        task=task,
        classes=classes,
        transforms=transforms,
        owners=owners,
        owner_names=owner_names,
    )
    return dataset if owners is None else _grouped(dataset, owners, owner_names)


def from_datasets(
    clients: Sequence[Examples],
    *,
    test: Examples | None = None,
    names: Sequence[str] = (),
    task: Task | None = None,
    classes: int | None = None,
    transforms: Transforms | None = None,
    name: str = "own",
) -> FederatedData:
    """One data set of (input, target) pairs per client, copied once into contiguous tensors.

    Args:
        clients: N map-style data sets; an empty one is a client without data.
        test: a data set of pairs for the central test.
        names: [N] client names.

    The other parameters and the errors are those of `from_arrays`; errors name client and example.
    """
    if not clients:
        raise DataError(
            "there are no clients",
            code="FS-DAT-022",
            where=name,
            hint="pass one data set per client",
        )
    if names and len(names) != len(clients):
        raise DataError(
            "names and clients differ in number",
            code="FS-DAT-022",
            where=name,
            why=f"{len(names)} names, {len(clients)} data sets",
            hint="give one name per client",
        )
    parts = [collected(part, f"client {i}") for i, part in enumerate(clients)]
    filled = [(i, part) for i, part in enumerate(parts) if part is not None]
    if not filled:
        raise DataError(
            "no client has any example", code="FS-DAT-017", where=name, hint="check the data sets"
        )
    first = filled[0][1]
    for i, part in filled:
        check_same_shape(part, first, f"client {i}")
    train = Split(
        torch.cat([part.inputs for _, part in filled]),
        torch.cat([part.targets for _, part in filled]),
    )
    held = None if test is None else collected(test, "test set")
    sizes = [0 if part is None else len(part) for part in parts]
    owners = np.repeat(np.arange(len(parts)), sizes).astype(np.int64)
    dataset = _dataset(
        name,
        train,
        test=held,
        task=task,
        classes=classes,
        transforms=transforms,
        owners=owners,
        owner_names=tuple(names),
    )
    return _grouped(dataset, owners, tuple(names), clients=len(parts))


def _dataset(
    name: str,
    train: Split,
    *,
    test: Split | None,
    task: Task | None,
    classes: int | None,
    transforms: Transforms | None,
    owners: npt.NDArray[np.int64] | None,
    owner_names: tuple[str, ...],
) -> Dataset:
    if task is None:
        if train.targets.is_floating_point():
            task = "regression"
        else:
            task = "next-token" if train.targets.ndim == 2 else "classification"
    if task not in TASKS:
        raise ConfigError(
            f"task = {task!r} is not known",
            code="FS-DAT-011",
            where=name,
            hint=f"use one of {', '.join(TASKS)}",
        )
    if train.targets.is_floating_point() != (task == "regression"):
        raise DataError(
            f"the targets do not fit the task {task}",
            code="FS-DAT-016",
            where=name,
            why=f"they are {'real numbers' if train.targets.is_floating_point() else 'integers'}",
            hint="regression takes real targets, every other task integers",
        )
    if task == "regression":
        classes = None
    elif classes is None:
        splits = [train] if test is None else [train, test]
        largest = max(int(split.targets.max()) if len(split) else 0 for split in splits)
        classes = max(largest + 1, 2)
    if transforms is None:
        transforms = _default_transforms(train.inputs)
    return make_dataset(
        name,
        task,
        train=train,
        test=test,
        transforms=transforms,
        classes=classes,
        owners=owners,
        owner_names=owner_names,
    )


def _default_transforms(inputs: Tensor) -> Transforms:
    if inputs.dtype != torch.uint8:
        return pipelines.identity()
    channels = int(inputs.shape[1])
    return pipelines.image([0.0] * channels, [1.0] * channels)


def _grouped(
    dataset: Dataset,
    owners: npt.NDArray[np.int64],
    names: tuple[str, ...],
    *,
    clients: int | None = None,
) -> FederatedData:
    """The division that `owners` describes; the rows of a client keep their order."""
    counts = np.bincount(owners, minlength=clients or 0)
    return FederatedData(
        dataset=dataset,
        index=np.argsort(owners, kind="stable").astype(np.int64),
        offsets=np.concatenate([[0], np.cumsum(counts)]).astype(np.int64),
        names=names,
        description="given clients",
    )


def _owners(ids: Ids, count: int) -> tuple[npt.NDArray[np.int64], tuple[str, ...]]:
    given = np.asarray(ids)
    if given.shape != (count,) or given.dtype.kind not in "iuUST":
        raise DataError(
            "client_ids are not one integer or name per example",
            code="FS-DAT-022",
            where="client_ids",
            why=f"shape {list(given.shape)} and type {given.dtype} for {count} examples",
            hint="pass a list of integers or of strings as long as the inputs",
        )
    unique, owners = np.unique(given, return_inverse=True)
    plain = unique.dtype.kind in "iu" and np.array_equal(unique, np.arange(len(unique)))
    names = () if plain else tuple(str(value) for value in unique)
    return owners.astype(np.int64), names
