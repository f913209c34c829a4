"""Tables: a CSV file to standardised features, for logistic regression and small networks."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Literal, NamedTuple, TypeAlias, cast

import numpy as np
import numpy.typing as npt
import torch

from fedsim.data import transforms
from fedsim.data.dataset import Dataset, Split, make_dataset
from fedsim.data.heldout import split_rows
from fedsim.errors import ConfigError, DataError

if TYPE_CHECKING:
    import pandas as pd

TableTask: TypeAlias = Literal["auto", "binary", "classification", "regression"]

_MOST_CLASSES = 50
"""With ``task = "auto"`` an integer target with more distinct values is a quantity."""


class _Target(NamedTuple):
    task: Literal["binary", "classification", "regression"]
    values: npt.NDArray[np.float32] | npt.NDArray[np.int64]
    names: tuple[str, ...]  # of the classes; () for regression


def tabular(
    *,
    path: Path | str,
    target: str,
    client: str | None = None,
    task: TableTask = "auto",
    drop: tuple[str, ...] = (),
    categorical: Literal["one-hot", "error"] = "one-hot",
    standardise: bool = True,
    test_path: Path | str | None = None,
    test_fraction: float = 0.2,
    seed: int = 0,
    delimiter: str = ",",
) -> Dataset:
    """A CSV file with a header line: one example per line, features float32 [n, F].

    Args:
        path: the file.
        target: column to predict. Class names or numbers are sorted and numbered from 0.
        client: column that names each example's natural client; not a feature.
        task: ``auto`` takes text, true/false and integers with at most 50 distinct values for
            classes (two of them: binary) and everything else for regression.
        drop: columns to leave out (identifiers, dates).
        categorical: columns of text or true/false become one column of 0 and 1 per value
            (``one-hot``), or are refused (``error``).
        standardise: subtract the training mean from each numeric column and divide by the training
            standard deviation; a constant column becomes 0. Columns from text are left alone.
        test_path: a second file as the test set, with the same columns (`client` may be missing).
        test_fraction: without `test_path`, share of the rows set aside; 0 for no test set.
        seed: of that choice.
        delimiter: between the fields of a line.

    Raises:
        DataError: no file (001), not a table or a column missing (015), an empty or infinite value
            (008), a column that does not fit its use (016).
        ConfigError: FS-DAT-011, a parameter out of range.
    """
    import pandas as pd

    file = Path(path).expanduser()
    aside = [target, *([client] if client else [])]
    table = _usable(file, delimiter, drop=drop, needed=[*aside, *drop])
    rows = len(table)
    if test_path is None:
        kept, held = split_rows(rows, test_fraction, seed=seed)
    else:
        test_file = Path(test_path).expanduser()
        # The owner of a test example is nobody's concern: its file may lack the client column.
        needed = [name for name in table.columns if name != client]
        second = _usable(test_file, delimiter, drop=drop, needed=needed)
        table = cast("pd.DataFrame", pd.concat([table, second[needed]], ignore_index=True))
        kept, held = np.arange(rows), np.arange(rows, len(table))
    goal = _target(_column(table, target), task, file=file)
    features = _features(
        table,
        [name for name in table.columns if name not in aside],
        train=kept,
        file=file,
        categorical=categorical,
        standardise=standardise,
    )
    mine = None if client is None else _numbered(_column(table, client).iloc[kept])
    inputs, targets = torch.from_numpy(features), torch.from_numpy(goal.values)
    return make_dataset(
        "tabular",
        goal.task,
        train=Split(inputs[kept], targets[kept]),
        test=Split(inputs[held], targets[held]) if len(held) else None,
        transforms=transforms.identity(),
        classes=None if goal.task == "regression" else len(goal.names),
        owners=None if mine is None else mine[0],
        owner_names=() if mine is None else mine[1],
        label_names=goal.names,
        where=str(file),
    )


def _read(file: Path, delimiter: str) -> pd.DataFrame:
    import pandas as pd

    if not file.is_file():
        raise DataError(
            f"there is no file {str(file)!r}",
            code="FS-DAT-001",
            where="data.path",
            hint="data.path names a CSV file with a header line",
        )
    try:
        table = pd.read_csv(file, sep=delimiter)
    except (pd.errors.ParserError, pd.errors.EmptyDataError, UnicodeDecodeError) as error:
        raise DataError(
            "the file is not a table",
            code="FS-DAT-015",
            where=str(file),
            why=f"{type(error).__name__}: {error}",
            hint="expected UTF-8 text, one header line, the same number of fields in every line",
        ) from error
    if not len(table):
        raise DataError("the table has no rows", code="FS-DAT-017", where=str(file), hint="check the file")
    return table


def _usable(file: Path, delimiter: str, *, drop: Sequence[str], needed: list[str]) -> pd.DataFrame:
    """The table without the columns to `drop`, if it had all `needed` ones and has no gaps."""
    table = _read(file, delimiter)
    _need_columns(table, file, needed)
    table = table.drop(columns=list(drop), errors="ignore")
    _refuse_gaps(table, file)
    return table


def _need_columns(table: pd.DataFrame, file: Path, columns: list[str]) -> None:
    for column in columns:
        if column not in table.columns:
            raise DataError(
                f"the table has no column {column!r}",
                code="FS-DAT-015",
                where=str(file),
                why=f"columns: {', '.join(map(str, table.columns))}",
                hint="correct data.target, data.client or data.drop, or data.delimiter",
            )


def _refuse_gaps(table: pd.DataFrame, file: Path) -> None:
    """No empty field and no infinite number anywhere."""
    bad = table.isna().to_numpy().copy()
    for place, name in enumerate(table.columns):
        if table[name].dtype.kind == "f":
            bad[:, place] |= np.isinf(table[name].to_numpy())
    if bad.any():
        row, column = (int(i) for i in np.argwhere(bad)[0])
        raise DataError(
            f"column {table.columns[column]!r} has an empty or infinite value",
            code="FS-DAT-008",
            where=f"{file}, row {row + 1} after the header, column {table.columns[column]}",
            why=f"{int(bad.sum())} such values in {int(bad.any(axis=1).sum())} of {len(table)} rows",
            hint="fill the values in, remove these rows, or leave the column out with data.drop",
        )


def _target(column: pd.Series, task: TableTask, *, file: Path) -> _Target:
    from pandas.api import types

    if task not in ("auto", "binary", "classification", "regression"):
        raise ConfigError(
            f"task = {task!r} is not known",
            code="FS-DAT-011",
            where="data.task",
            hint="use 'auto', 'binary', 'classification' or 'regression'",
        )
    is_number = types.is_numeric_dtype(column) and not types.is_bool_dtype(column)
    distinct = int(column.nunique())
    if task == "auto":
        few = not is_number or (types.is_integer_dtype(column) and distinct <= _MOST_CLASSES)
        task = ("binary" if distinct == 2 else "classification") if few else "regression"
    problem = None
    if task == "regression" and not is_number:
        problem = "regression needs numbers"
    elif task == "binary" and distinct != 2:
        problem = f"a binary target has 2 values, this one {distinct}"
    elif task == "classification" and distinct < 2:
        problem = "there is only one class"
    if problem:
        raise DataError(
            f"target {column.name!r} does not fit the task {task}",
            code="FS-DAT-016",
            where=f"{file}, column {column.name}",
            why=problem,
            hint="set data.task, or choose another data.target",
        )
    if task == "regression":
        return _Target("regression", column.to_numpy(dtype=np.float32), ())
    codes, names = _numbered(column)
    return _Target("binary" if task == "binary" else "classification", codes, names)


def _column(table: pd.DataFrame, name: str) -> pd.Series:
    """One column: `read_csv` gives equal headers different names, so there is only one of a name."""
    return cast("pd.Series", table[name])


def _features(
    table: pd.DataFrame,
    columns: list[str],
    *,
    train: npt.NDArray[np.int64],
    file: Path,
    categorical: str,
    standardise: bool,
) -> npt.NDArray[np.float32]:
    """[n, F]: numeric `columns` first, in the file's order, then one column per value of the others."""
    import pandas as pd

    if categorical not in ("one-hot", "error"):
        raise ConfigError(
            f"categorical = {categorical!r} is not known",
            code="FS-DAT-011",
            where="data.categorical",
            hint="use 'one-hot' or 'error'",
        )
    numeric = [name for name in columns if table[name].dtype.kind in "iuf"]
    other = [name for name in columns if name not in numeric]
    if not columns:
        raise DataError(
            "there are no features",
            code="FS-DAT-016",
            where=str(file),
            hint="the table needs a column besides target and client",
        )
    if other and categorical == "error":
        raise DataError(
            f"column {other[0]!r} does not hold numbers",
            code="FS-DAT-016",
            where=f"{file}, column {other[0]}",
            hint="leave it out with data.drop, or set data.categorical = 'one-hot'",
        )
    values = table[numeric].to_numpy(dtype=np.float64)
    if standardise:
        mean, std = values[train].mean(axis=0), values[train].std(axis=0)
        values = (values - mean) / np.where(std > 0, std, 1.0)
    if other:
        one_hot = pd.get_dummies(table[other].astype(str)).to_numpy(dtype=np.float64)
        values = np.concatenate([values, one_hot], axis=1)
    return np.asarray(values, dtype=np.float32)


def _numbered(column: pd.Series) -> tuple[npt.NDArray[np.int64], tuple[str, ...]]:
    """[n] position of each value among the sorted distinct values, and these values as text."""
    # Text as text: a column may mix numbers and words, which have no order among each other.
    plain = column.to_numpy() if column.dtype.kind in "iufb" else column.astype(str).to_numpy(str)
    values, codes = np.unique(plain, return_inverse=True)
    return codes.astype(np.int64), tuple(str(value) for value in values)
