"""A data set that is only described: shape, classes, columns and normalisation, but no examples.

A coordinator that has no data of its own names this data set; every client brings its examples and fits
them to the description by name (`fedsim.data.by_name`). What the run states here is all that a client
needs to know: none of it depends on anybody's data.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from types import MappingProxyType
from typing import TYPE_CHECKING, Any, Literal

import numpy as np
import torch

from fedsim.data import transforms as pipelines
from fedsim.data.dataset import Dataset, Split, Task, content_digest
from fedsim.data.federated import FederatedData
from fedsim.data.transforms import Transforms
from fedsim.errors import ConfigError

if TYPE_CHECKING:
    from fedsim.data.partition_scheme import Divide

Inputs = Literal["image", "table", "numbers", "tokens"]
DTYPES = {
    "image": torch.uint8,
    "table": torch.float32,
    "numbers": torch.float32,
    "tokens": torch.int64,
}
COLUMN_TYPES = ("float", "int", "bool")
_BLANK = 2  # rows that check a model; batch normalisation cannot take one alone


@dataclass(frozen=True, slots=True)
class Description:
    """What a run says of its data; everything that a client maps its own onto.

    Args:
        task: as in `Dataset`.
        inputs: ``image`` (uint8 [ch, h, w]), ``table`` (named columns), ``numbers`` (real arrays) or
            ``tokens`` (integers [T]).
        input_shape: of one example as the model sees it.
        classes: names in the order of their numbers, or the vocabulary; () for regression.
        target: column of the classes or of the quantity to predict.
        columns: of a table, in order.
        dtypes: of those without categories, ``float``, ``int`` or ``bool``; () takes any numbers.
        categories: column of text -> the values that it may have; each is a feature of 0 and 1.
        mean, std: for each channel (of pixels scaled to [0, 1]) or for each column without categories;
            () leaves the values alone.
        crop, flip: random changes of training images.
    """

    task: Task
    inputs: Inputs
    input_shape: tuple[int, ...]
    classes: tuple[str, ...] = ()
    target: str = "label"
    columns: tuple[str, ...] = ()
    dtypes: tuple[str, ...] = ()
    categories: Mapping[str, tuple[str, ...]] = field(default_factory=lambda: MappingProxyType({}))
    mean: tuple[float, ...] = ()
    std: tuple[float, ...] = ()
    crop: int = 0
    flip: bool = False

    @property
    def numeric(self) -> tuple[str, ...]:
        """The columns that hold numbers."""
        return tuple(name for name in self.columns if name not in self.categories)

    @property
    def transforms(self) -> Transforms:
        """From stored examples to model inputs; a table is normalised when it is read."""
        if self.inputs != "image":
            return pipelines.identity()
        channels = self.input_shape[0]
        mean, std = self.mean or (0.0,) * channels, self.std or (1.0,) * channels
        return pipelines.image(mean, std, crop=self.crop, flip=self.flip)


@dataclass(frozen=True, slots=True, eq=False)
class DescribedDataset(Dataset):
    """A data set whose training examples are elsewhere.

    `train` holds blank rows that no client owns: they only show a model the shape of its inputs.
    """

    description: Description | None = None

    def split(
        self,
        partitioner: str | Divide,
        *,
        clients: int | None = None,
        seed: int = 0,
        min_examples: int = 1,
        on_empty: Literal["error", "keep"] = "error",
        holdout: float = 0.0,
        **params: Any,  # Any: of a partitioner that has nothing to divide
    ) -> FederatedData:
        """N clients that own nothing here; only their number counts.

        Raises:
            ConfigError: FS-DAT-040, their number is missing.
        """
        if clients is None:
            raise ConfigError(
                "the number of clients is missing",
                code="FS-DAT-040",
                where="[data.partition] clients",
                why="a described data set does not know its clients",
                hint="set clients = N",
            )
        nothing = np.zeros(clients + 1, np.int64)
        return FederatedData(self, np.empty(0, np.int64), nothing, description="each client's own data")


def described(
    *,
    task: Task = "classification",
    inputs: Literal["auto", "image", "table", "numbers", "tokens"] = "auto",
    input_shape: tuple[int, ...] = (),
    classes: tuple[str, ...] | int = (),
    target: str = "label",
    columns: tuple[str, ...] = (),
    dtypes: tuple[str, ...] = (),
    categories: Mapping[str, tuple[str, ...]] | None = None,
    mean: tuple[float, ...] = (),
    std: tuple[float, ...] = (),
    crop: int = 0,
    flip: bool = False,
    test_path: str | None = None,
) -> Dataset:
    """Data that only the clients have: what they look like, in words that every client understands.

    Args:
        task: ``classification``, ``binary``, ``next-token`` or ``regression``.
        inputs: ``image``, ``table``, ``numbers`` or ``tokens``; ``auto`` goes by columns, shape and task.
        input_shape: of one example; of a table it follows from the columns.
        classes: their names in order, or how many there are (then they are called 0, 1, …).
        target: column of the class, or of the quantity to predict.
        columns: of a table, in the order of the features.
        dtypes: of each column of numbers, ``float``, ``int`` or ``bool``; without them any will do.
        categories: columns that hold words, with the values that may occur; one feature for each value.
        mean: of each channel (pixels in [0, 1]) or of each column of numbers; the same for every client.
        std: likewise, each above 0.
        crop: for training images, pad by this many pixels and cut a window out at random.
        flip: mirror training images with probability 1/2.
        test_path: a file or folder on the coordinator to evaluate on; clients do not read it.

    Raises:
        ValueError: statements that contradict each other.
        DataError: the test set does not fit the description.
    """
    names = tuple(str(k) for k in range(classes)) if isinstance(classes, int) else tuple(classes)
    values = {name: tuple(v) for name, v in (categories or {}).items()}
    if inputs != "auto":
        kind: Inputs = inputs
    elif columns:
        kind = "table"
    elif len(input_shape) == 3:
        kind = "image"
    else:
        kind = "tokens" if task == "next-token" else "numbers"
    if kind == "table":
        width = sum(len(values.get(name, ("",))) for name in columns)
        if input_shape and tuple(input_shape) != (width,):
            raise ValueError(f"input_shape = {list(input_shape)}, but the columns make {width} features")
        input_shape = (width,)
    description = Description(
        task, kind, tuple(input_shape), names, target, tuple(columns), tuple(dtypes),
        MappingProxyType(values), tuple(mean), tuple(std), crop, flip,
    )  # fmt: skip
    _check(description)
    return dataset_of(description, None if test_path is None else Path(test_path))


def dataset_of(description: Description, test_path: Path | None = None) -> DescribedDataset:
    """The data set without examples that `description` stands for."""
    sequence = description.task == "next-token"
    shape = (_BLANK, *description.input_shape)
    blank = Split(
        torch.zeros(shape, dtype=DTYPES[description.inputs]),
        torch.zeros(
            shape if sequence else _BLANK,
            dtype=torch.float32 if description.task == "regression" else torch.int64,
        ),
    )
    test = None
    if test_path is not None:
        from fedsim.data.by_name import read_examples

        test = read_examples(test_path, description)
    return DescribedDataset(
        name="described",
        task=description.task,
        classes=None if description.task == "regression" else len(description.classes),
        train=blank,
        test=test,
        owners=None,
        owner_names=(),
        transforms=description.transforms,
        digest=content_digest(repr(description), description.task, blank, test, None),
        label_names=description.classes,
        description=description,
    )


def _check(run: Description) -> None:
    """Refuse statements that contradict each other.

    Raises:
        ValueError: naming the parameters.
    """
    shape = run.input_shape
    problem = None
    if not shape or min(shape) < 1:
        problem = "input_shape needs a number of at least 1 for each dimension"
    elif run.task == "regression" and run.classes:
        problem = "regression has no classes"
    elif run.task != "regression" and len(run.classes) < 2:
        problem = f"classes: {len(run.classes)} given, {run.task} needs at least 2"
    elif run.task == "binary" and len(run.classes) != 2:
        problem = f"classes: {len(run.classes)} given, a binary task has 2"
    elif len(set(run.classes)) != len(run.classes):
        problem = "a class is named twice"
    elif run.inputs == "image" and (len(shape) != 3 or shape[0] not in (1, 3)):
        problem = f"input_shape = {list(shape)}; images are [1 or 3, height, width]"
    elif run.inputs != "table" and (run.columns or run.dtypes or run.categories):
        problem = 'columns, dtypes and categories belong to inputs = "table"'
    elif run.inputs != "image" and (run.crop or run.flip):
        problem = "crop and flip are for images"
    elif run.crop < 0:
        problem = f"crop = {run.crop} is negative"
    elif run.inputs == "tokens" and len(shape) != 1:
        problem = f"input_shape = {list(shape)}; tokens are [length]"
    elif run.task == "next-token" and run.inputs != "tokens":
        problem = 'next-token needs inputs = "tokens"'
    problem = problem or (_table_problem(run) if run.inputs == "table" else None)
    if problem is None:
        places = {"image": shape[0], "table": len(run.numeric)}.get(run.inputs, 0)
        for name, given in (("mean", run.mean), ("std", run.std)):
            if given and len(given) != places:
                problem = f"{name} has {len(given)} numbers, {places} are needed"
        if bool(run.mean) != bool(run.std):
            problem = "give mean and std, or neither"
        elif not np.isfinite([*run.mean, *run.std]).all() or min(run.std, default=1.0) <= 0:
            problem = "mean must be finite and std above 0"
    if problem is not None:
        raise ValueError(problem)


def _table_problem(run: Description) -> str | None:
    """What is wrong with the columns of a table, None if nothing."""
    if not run.columns:
        return "a table needs columns"
    if len(set(run.columns)) != len(run.columns) or run.target in run.columns:
        return "a column is named twice, or is the target"
    strange = sorted(set(run.categories) - set(run.columns))
    if strange:
        return f"categories names {strange[0]!r}, which is not among the columns"
    if any(not values or len(set(values)) != len(values) for values in run.categories.values()):
        return "each column of categories needs values, each once"
    if run.dtypes and len(run.dtypes) != len(run.numeric):
        return f"dtypes has {len(run.dtypes)} entries for {len(run.numeric)} columns of numbers"
    wrong = [kind for kind in run.dtypes if kind not in COLUMN_TYPES]
    return f"dtype {wrong[0]!r} is none of {', '.join(COLUMN_TYPES)}" if wrong else None
