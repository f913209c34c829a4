"""A data set in memory: two splits of contiguous tensors, and who naturally owns each example."""

from __future__ import annotations

import hashlib
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Literal, TypeAlias, get_args

import numpy as np
import numpy.typing as npt
from torch import Tensor

from fedsim.data.transforms import Transforms
from fedsim.errors import DataError

if TYPE_CHECKING:
    from fedsim.data.federated import FederatedData
    from fedsim.data.partition_scheme import Divide

Ints: TypeAlias = npt.NDArray[np.int64]
Task: TypeAlias = Literal["classification", "binary", "next-token", "regression"]
TASKS: tuple[str, ...] = get_args(Task)


@dataclass(frozen=True, slots=True, eq=False)
class Split:
    """Examples in memory, contiguous, in the order of the source.

    Attributes:
        inputs: [n, ...]: uint8 images [n, ch, h, w], float32 features [n, F], int64 characters
            [n, T].
        targets: int64 [n] classes; int64 [n, T] next characters; float32 [n] for regression.
    """

    inputs: Tensor
    targets: Tensor

    def __len__(self) -> int:
        return int(self.targets.shape[0])


@dataclass(frozen=True, slots=True, eq=False)
class Dataset:
    """A data set before it is divided among clients.

    Attributes:
        name: what it was loaded as.
        task: one of ``classification``, ``binary``, ``next-token``, ``regression``.
        classes: K, the number of classes or the size of the vocabulary; None for regression.
        train: what the clients will own.
        test: the central test set, or None where the source has none.
        owners: int64 [n], the natural client of each training example (a speaking role, the client
            column of a table), or None.
        owner_names: names of the natural clients, indexed by `owners`; () where they have none.
        transforms: from stored examples to model inputs.
        digest: SHA-256 (hex) of name, task and content.
        label_names: names of the classes, or the characters of the vocabulary; () where unknown.
    """

    name: str
    task: Task
    classes: int | None
    train: Split
    test: Split | None
    owners: Ints | None
    owner_names: tuple[str, ...]
    transforms: Transforms
    digest: str
    label_names: tuple[str, ...] = ()

    def __len__(self) -> int:
        return len(self.train)

    def __repr__(self) -> str:
        test = "no test set" if self.test is None else f"{len(self.test)} to test"
        return f"Dataset({self.name!r}, {self.task}, {len(self)} examples, {test}, inputs {self.input_shape})"

    @property
    def input_shape(self) -> tuple[int, ...]:
        """Shape of one example as the model sees it, without the batch dimension."""
        return tuple(self.train.inputs.shape[1:])

    @property
    def labels(self) -> Ints:
        """int64 [n], what partitioners divide by; for next-token data the last target of each window.

        Regression data have no classes: every label is 0 there.
        """
        targets = self.train.targets
        if self.task == "regression":
            return np.zeros(len(self.train), dtype=np.int64)
        return np.asarray((targets if targets.ndim == 1 else targets[:, -1]).numpy(), np.int64)

    def split(
        self,
        partitioner: str | Divide,
        *,
        clients: int | None = None,
        seed: int = 0,
        min_examples: int = 1,
        on_empty: Literal["error", "keep"] = "error",
        holdout: float = 0.0,
        **params: Any,  # Any: the partitioner's own parameters, checked by its factory
    ) -> FederatedData:
        """Divide the training examples among `clients`; see `fedsim.data.partition`."""
        from fedsim.data.partition import make_partition

        return make_partition(
            self,
            partitioner,
            clients=clients,
            seed=seed,
            min_examples=min_examples,
            on_empty=on_empty,
            holdout=holdout,
            **params,
        )


def make_dataset(
    name: str,
    task: Task,
    *,
    train: Split,
    test: Split | None,
    transforms: Transforms,
    classes: int | None = None,
    owners: Ints | None = None,
    owner_names: tuple[str, ...] = (),
    label_names: tuple[str, ...] = (),
    where: str | None = None,
) -> Dataset:
    """Check a data set's splits against each other and its labels, and give it its digest.

    Args:
        where: the file or argument to name in an error; the data set's name when None.

    Raises:
        DataError: no example, two counts that differ, a label out of range, a value not finite.
    """
    where = where or name
    for part, split in (("train", train), ("test", test)):
        if split is not None:
            check_split(split, classes, where=f"{where}, {part} split")
    if test is not None and test.inputs.shape[1:] != train.inputs.shape[1:]:
        raise DataError(
            "training and test examples have different shapes",
            code="FS-DAT-012",
            where=where,
            why=f"train {list(train.inputs.shape[1:])}, test {list(test.inputs.shape[1:])}",
            hint="both splits need the same features or the same image size",
        )
    if owners is not None and len(owners) != len(train):
        raise DataError(
            "not every training example has exactly one owner",
            code="FS-DAT-012",
            where=where,
            why=f"{len(owners)} owners for {len(train)} examples",
            hint="give one client id per training example",
        )
    return Dataset(
        name=name,
        task=task,
        classes=classes,
        train=train,
        test=test,
        owners=owners,
        owner_names=owner_names,
        transforms=transforms,
        digest=content_digest(name, task, train, test, owners),
        label_names=label_names,
    )


def check_split(split: Split, classes: int | None, *, where: str) -> None:
    """Refuse an empty split, counts that differ, labels out of range and values not finite.

    Args:
        classes: K; labels must be in 0 … K-1. None when targets are not classes.
    """
    if len(split) == 0:
        raise DataError("there are no examples", code="FS-DAT-017", where=where, hint="check the source")
    if split.inputs.shape[0] != split.targets.shape[0]:
        raise DataError(
            "inputs and targets differ in number",
            code="FS-DAT-012",
            where=where,
            why=f"{split.inputs.shape[0]} inputs, {split.targets.shape[0]} targets",
            hint="give one target for each input",
        )
    if classes is not None:
        check_labels(split.targets, classes, where=where)
    for what, values in (("input", split.inputs), ("target", split.targets)):
        if values.is_floating_point():
            check_finite(values, what=what, where=where)


def check_labels(targets: Tensor, classes: int, *, where: str) -> None:
    """Refuse labels outside 0 … `classes` - 1, naming the first row.

    Raises:
        DataError: FS-DAT-007.
    """
    wrong = (targets < 0) | (targets >= classes)
    if bool(wrong.any()):
        position: tuple[int, ...] = tuple(wrong.nonzero()[0].tolist())
        raise DataError(
            f"label {int(targets[position])} is outside 0 … {classes - 1}",
            code="FS-DAT-007",
            where=f"{where}, row {position[0]}",
            why=f"{int(wrong.sum())} of {targets.numel()} labels are outside the {classes} classes",
            hint="number the classes from 0, or correct the number of classes",
        )


def check_finite(values: Tensor, *, what: str, where: str) -> None:
    """Refuse NaN and infinity, naming the first row and column.

    Raises:
        DataError: FS-DAT-008.
    """
    finite = values.isfinite()
    if not bool(finite.all()):
        row, *rest = (~finite).nonzero()[0].tolist()
        raise DataError(
            f"{what} value {float(values[(row, *rest)])} is not a finite number",
            code="FS-DAT-008",
            where=f"{where}, row {row}" + (f", column {rest}" if rest else ""),
            why=f"{int((~finite).sum())} of {values.numel()} values are not finite",
            hint="remove these rows or fill in their values first",
        )


def content_digest(name: str, task: str, train: Split, test: Split | None, owners: Ints | None) -> str:
    """SHA-256 (hex) of name, task, shapes, types and every value of a data set."""
    digest = hashlib.sha256(f"fedsim data 1\n{name}\n{task}\n".encode())
    parts = [train.inputs, train.targets]
    parts += [test.inputs, test.targets] if test is not None else []
    arrays = [part.numpy() for part in parts] + ([owners] if owners is not None else [])
    for array in arrays:
        digest.update(f"{array.dtype.str} {array.shape}\n".encode())
        digest.update(np.ascontiguousarray(array).data)
    return digest.hexdigest()
