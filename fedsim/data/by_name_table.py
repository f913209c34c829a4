"""Tables by name: the columns, categories and classes of a run found in a local file."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import torch

from fedsim.data.dataset import Split
from fedsim.data.described import Description
from fedsim.errors import DataError

Column = npt.NDArray[Any]
_KINDS = {"float": "fiu", "int": "iu", "bool": "b"}


def read_csv(file: Path) -> dict[str, Column]:
    """The columns of a CSV file with a header line; an empty field is NaN in any column."""
    import pandas as pd

    try:
        table = pd.read_csv(file)
    except (pd.errors.ParserError, pd.errors.EmptyDataError, UnicodeDecodeError, OSError) as error:
        raise _not_a_table(file, error) from error
    return {str(name): table[name].to_numpy() for name in table.columns}


def read_parquet(file: Path) -> dict[str, Column]:
    """The columns of a parquet file that hold numbers, words or true and false."""
    import pyarrow as pa
    from pyarrow import parquet

    try:
        table = parquet.read_table(file)
    except (pa.ArrowException, OSError) as error:
        raise _not_a_table(file, error) from error
    return {
        name: table.column(name).to_pandas().to_numpy()
        for name in table.column_names
        if not pa.types.is_nested(table.schema.field(name).type)
    }


def _not_a_table(file: Path, error: Exception) -> DataError:
    said = str(error)
    return DataError(
        "the file is not a table",
        code="FS-CLI-041",
        where=str(file),
        why=f"{type(error).__name__}: {said.splitlines()[0] if said else ''}",
        hint="a CSV file is UTF-8 text with one header line and the same number of fields in every line",
    )


def from_table(table: Mapping[str, Column], run: Description, file: Path) -> Split:
    """Features float32 [n, F] in the order of the run's columns, and targets [n].

    Raises:
        DataError: FS-CLI-042 a column is missing or of another type, FS-CLI-043 a value that the run
            does not know, FS-DAT-008 an empty or infinite value.
    """
    for name in (*run.columns, run.target):
        if name not in table:
            raise DataError(
                f"the data have no column {name!r}",
                code="FS-CLI-042",
                where=str(file),
                why=f"columns: {', '.join(table)}",
                hint="columns are found by their names; rename yours to those of the run",
            )
    features = _features(table, run, file)
    target = table[run.target]
    if run.task == "regression":
        values = _numbers(target, run.target, "float", file).astype(np.float32)
        return Split(torch.from_numpy(features), torch.from_numpy(values))
    _no_gaps(target, run.target, file)
    labels = numbered(target.tolist(), run, where=lambda row: f"{file}, row {row}, column {run.target}")
    return Split(torch.from_numpy(features), torch.from_numpy(labels))


def _features(table: Mapping[str, Column], run: Description, file: Path) -> npt.NDArray[np.float32]:
    kinds = dict(zip(run.numeric, run.dtypes or ("",) * len(run.numeric), strict=True))
    mean = dict(zip(run.numeric, run.mean or (0.0,) * len(run.numeric), strict=True))
    std = dict(zip(run.numeric, run.std or (1.0,) * len(run.numeric), strict=True))
    parts: list[npt.NDArray[np.float64]] = []
    for name in run.columns:
        if name in run.categories:
            parts.append(_one_hot(table[name], name, run.categories[name], file))
        else:
            values = _numbers(table[name], name, kinds[name], file)
            parts.append(((values - mean[name]) / std[name])[:, None])
    return np.concatenate(parts, axis=1).astype(np.float32)


def _numbers(values: Column, name: str, kind: str, file: Path) -> npt.NDArray[np.float64]:
    """float64 [n] of a column of the type that the run states, '' for any."""
    if values.dtype.kind not in _KINDS.get(kind, "fiub"):
        if values.dtype.kind == "f":  # a column of integers becomes real where a field is empty
            _no_gaps(values, name, file)
        raise DataError(
            f"column {name!r} does not hold what the run states",
            code="FS-CLI-042",
            where=f"{file}, column {name}",
            why=f"it holds {_said(values)}, the run has {kind or 'numbers'}",
            hint="convert the column before",
        )
    numbers = values.astype(np.float64)
    _no_gaps(numbers, name, file)
    return numbers


def _one_hot(values: Column, name: str, categories: tuple[str, ...], file: Path) -> npt.NDArray[np.float64]:
    _no_gaps(values, name, file)
    place = {value: i for i, value in enumerate(categories)}
    codes = _codes(
        values.tolist(), place, what=f"value of column {name!r}", where=lambda row: f"{file}, row {row}"
    )
    return np.eye(len(categories))[codes]


def _no_gaps(values: Column, name: str, file: Path) -> None:
    """No empty field and no infinite number."""
    if values.dtype.kind == "f":
        bad = ~np.isfinite(values)
    elif values.dtype.kind == "O":
        bad = np.array([v is None or v != v for v in values.tolist()], bool)
    else:
        return
    if bad.any():
        raise DataError(
            f"column {name!r} has an empty or infinite value",
            code="FS-DAT-008",
            where=f"{file}, row {int(np.flatnonzero(bad)[0])}, column {name}",
            why=f"{int(bad.sum())} of {len(values)} values",
            hint="fill the values in, or remove these rows",
        )


def numbered(
    values: Sequence[Any], run: Description, *, where: Callable[[int], str]
) -> npt.NDArray[np.int64]:
    """The number in the run of each class, found by its name; a number 3 is the class called "3".

    Raises:
        DataError: FS-CLI-043, a class that the run does not have.
    """
    place = {name: i for i, name in enumerate(run.classes)}
    return _codes(values, place, what="class", where=where)


def _codes(
    values: Sequence[Any], place: Mapping[str, int], *, what: str, where: Callable[[int], str]
) -> npt.NDArray[np.int64]:
    codes = np.array([place.get(_name(value), -1) for value in values], np.int64)
    strange = np.flatnonzero(codes < 0)
    if len(strange):
        row = int(strange[0])
        known = ", ".join(list(place)[:12]) + (" …" if len(place) > 12 else "")
        raise DataError(
            f"the run does not know the {what} {values[row]!r}",
            code="FS-CLI-043",
            where=where(row),
            why=f"known: {known}; {len(strange)} of {len(values)} are unknown",
            hint="names must be those of the run, letter by letter; rename or remove these examples",
        )
    return codes


def _name(value: Any) -> str:
    """A value as the run would write it: 3 and 3.0 are "3", true is "true"."""
    if isinstance(value, bool):
        return "true" if value else "false"
    if isinstance(value, float) and value.is_integer():
        return str(int(value))
    return str(value)


def _said(values: Column) -> str:
    return {"O": "words", "U": "words", "b": "true and false", "f": "real numbers"}.get(
        values.dtype.kind, str(values.dtype)
    )
