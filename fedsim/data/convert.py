"""Converting a user's arrays and torch data sets to contiguous tensors of the types we store."""

from __future__ import annotations

from typing import Any, Protocol, TypeAlias

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from fedsim.data.dataset import Split
from fedsim.errors import DataError

Array: TypeAlias = Tensor | npt.NDArray[Any]  # Any: every element type is converted


class Examples(Protocol):
    """What a map-style `torch.utils.data.Dataset` of (input, target) pairs offers."""

    def __len__(self) -> int: ...

    def __getitem__(self, index: int, /) -> Any: ...  # Any: a pair of whatever the user stores


def as_inputs(values: Array, where: str) -> Tensor:
    """Inputs as they are stored: uint8 images, float32 features (also of true/false), int64 characters.

    Raises:
        DataError: uint8 that are not images [n, 1 or 3, h, w] (012), no numbers (016).
    """
    tensor = _tensor(values)
    if tensor.dtype == torch.bool:
        return tensor.to(torch.float32)
    if tensor.dtype == torch.uint8:
        if tensor.ndim != 4 or tensor.shape[1] not in (1, 3):
            raise DataError(
                "uint8 inputs are not images",
                code="FS-DAT-012",
                where=f"{where}, inputs",
                why=f"shape {list(tensor.shape)}; images are [n, 1 or 3, height, width]",
                hint="move the channels to the second dimension, or pass floats for features",
            )
        return tensor
    if tensor.is_floating_point():
        return tensor.to(torch.float32)
    return _int64(tensor, f"{where}, inputs")


def as_targets(values: Array, where: str) -> Tensor:
    """Targets as they are stored: int64, or float32 for regression.

    Raises:
        DataError: FS-DAT-016, values that are no numbers.
    """
    tensor = _tensor(values)
    if tensor.is_floating_point():
        return tensor.to(torch.float32)
    return _int64(tensor, f"{where}, targets")


def _int64(tensor: Tensor, where: str) -> Tensor:
    if tensor.is_complex():
        raise DataError(
            "values are neither integers nor real numbers",
            code="FS-DAT-016",
            where=where,
            why=f"their type is {tensor.dtype}",
            hint="pass uint8 images, reals or integers",
        )
    return tensor.to(torch.int64)


def _tensor(values: Array) -> Tensor:
    """A contiguous tensor of its own memory, so that later changes by the caller do not show."""
    try:
        tensor = torch.as_tensor(values)
    except (TypeError, ValueError, RuntimeError) as error:
        raise DataError(
            "values cannot be made into a tensor",
            code="FS-DAT-016",
            where=type(values).__name__,
            why=str(error).splitlines()[0],
            hint="pass NumPy arrays or tensors of numbers, all examples of one shape",
        ) from error
    return tensor.detach().cpu().clone(memory_format=torch.contiguous_format)


def collected(examples: Examples, where: str) -> Split | None:
    """All examples of one data set of pairs; None when it is empty.

    Raises:
        DataError: not pairs, or of different shapes (012), no numbers (016).
    """
    count = len(examples)
    if count == 0:
        return None
    whole = getattr(examples, "tensors", None)
    if isinstance(whole, tuple) and len(whole) == 2:  # a TensorDataset: no loop over examples
        return Split(as_inputs(whole[0], where), as_targets(whole[1], where))
    inputs: list[Tensor] = []
    targets: list[Tensor] = []
    for i in range(count):
        pair = examples[i]
        if not (isinstance(pair, (tuple, list)) and len(pair) == 2):
            raise DataError(
                "an example is not a pair of input and target",
                code="FS-DAT-012",
                where=f"{where}, example {i}",
                why=f"it is a {type(pair).__name__}",
                hint="__getitem__ returns (input, target)",
            )
        inputs.append(_element(pair[0], f"{where}, example {i}"))
        targets.append(_element(pair[1], f"{where}, example {i}"))
        if inputs[i].shape != inputs[0].shape or targets[i].shape != targets[0].shape:
            raise DataError(
                "examples have different shapes",
                code="FS-DAT-012",
                where=f"{where}, example {i}",
                why=f"input {list(inputs[i].shape)}, the first has {list(inputs[0].shape)}",
                hint="resize or pad in the data set",
            )
    return Split(as_inputs(torch.stack(inputs), where), as_targets(torch.stack(targets), where))


def _element(value: object, where: str) -> Tensor:
    """One input or target as a tensor; a picture object becomes [ch, h, w]."""
    if isinstance(value, Tensor):
        return value
    array = np.asarray(value)
    if array.dtype.kind not in "iufb":
        raise DataError(
            "an example does not consist of numbers",
            code="FS-DAT-016",
            where=where,
            why=f"{type(value).__name__} of type {array.dtype}",
            hint="convert it to a tensor in the data set",
        )
    if hasattr(value, "mode") and hasattr(value, "size"):  # a Pillow image: height, width, channels
        array = array[None] if array.ndim == 2 else array.transpose(2, 0, 1)
    return torch.from_numpy(np.array(array))


def check_same_shape(part: Split, first: Split, where: str) -> None:
    """Refuse a client whose examples differ in shape or type from the first client's.

    Raises:
        DataError: FS-DAT-012.
    """
    ours, theirs = (part.inputs, part.targets), (first.inputs, first.targets)
    for what, mine, other in zip(("inputs", "targets"), ours, theirs, strict=True):
        if mine.shape[1:] != other.shape[1:] or mine.dtype != other.dtype:
            raise DataError(
                f"{what} differ between clients",
                code="FS-DAT-012",
                where=where,
                why=(
                    f"{list(mine.shape[1:])} {mine.dtype}, other clients "
                    f"{list(other.shape[1:])} {other.dtype}"
                ),
                hint="all clients' examples need one shape and one type",
            )
