"""Examples in local files, fitted by name to what a run says of its data.

Parquet, CSV, NPZ, or a folder of images by class: no code is needed and nothing is guessed. Classes,
columns and categories are found by their names; what the description does not know is refused with the
place where it was met. Columns that the run does not name are left alone.
"""

from __future__ import annotations

import zipfile
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import numpy.typing as npt
import torch

from fedsim.data import image_files, parquet
from fedsim.data.by_name_table import from_table, numbered, read_csv, read_parquet
from fedsim.data.dataset import Split, check_split
from fedsim.data.described import DTYPES, Description
from fedsim.data.pixels import decode
from fedsim.errors import DataError

if TYPE_CHECKING:
    import pyarrow as pa

_TABLES = (".parquet", ".csv", ".npz")


def read_examples(path: Path, run: Description) -> Split:
    """All examples of a file or folder, as the run's model takes them.

    Args:
        path: a .parquet, .csv or .npz file; a folder of such files of one kind, read in the order of
            their names (of parquet files named after splits, the training split); or a folder of
            images, ``<class>/*`` or ``train/<class>/*``.

    Raises:
        DataError: FS-CLI-041 nothing to read, FS-CLI-042 a column, FS-CLI-043 a class or category,
            FS-CLI-044 a shape or type; FS-DAT-003, 005, 006, 008 for damaged files and values.
    """
    kind, files = _found(path.expanduser())
    if kind == "images":
        split = _from_images(path.expanduser(), run)
    else:
        reader = {".npz": _from_npz, ".csv": _from_csv, ".parquet": _from_parquet}[kind]
        parts = [reader(file, run) for file in files]
        split = Split(torch.cat([part.inputs for part in parts]), torch.cat([part.targets for part in parts]))
    check_split(split, len(run.classes) or None, where=str(path))
    return split


def _found(path: Path) -> tuple[str, list[Path]]:
    """The kind of data at `path` and its files."""
    if path.is_file():
        if path.suffix.lower() in _TABLES:
            return path.suffix.lower(), [path]
        raise _nothing(path, f"a file of type {path.suffix or 'unknown'}")
    if not path.is_dir():
        raise _nothing(path, "nothing exists at this path")
    by_kind = {
        suffix: sorted(f for f in path.rglob("*") if f.suffix.lower() == suffix and f.is_file())
        for suffix in _TABLES
    }
    kinds = [suffix for suffix, files in by_kind.items() if files]
    if _class_folders(path):
        kinds.append("images")
    if len(kinds) != 1:
        raise _nothing(path, f"the folder holds {' and '.join(kinds) or 'none of these'}")
    if kinds[0] == ".parquet":
        splits = parquet.find_splits(path) if _named_after_splits(by_kind[".parquet"]) else {}
        return ".parquet", splits.get("train") or by_kind[".parquet"]
    return kinds[0], by_kind.get(kinds[0], [])


def _named_after_splits(files: list[Path]) -> bool:
    return any("train" in part.lower() for file in files for part in (file.stem, file.parent.name))


def _nothing(path: Path, why: str) -> DataError:
    return DataError(
        "there are no examples in a known form",
        code="FS-CLI-041",
        where=str(path),
        why=why,
        hint="give a .parquet, .csv or .npz file, a folder of files of one of these kinds, or a folder "
        "of images with one sub-folder for each class",
    )


def _class_folders(path: Path) -> dict[str, list[Path]]:
    """Class -> image files, sorted; {} where there are none."""
    splits = image_files.find_splits(path)
    if splits:
        return splits["train"]
    found = {
        sub.name: sorted(f for f in sub.rglob("*") if f.suffix.lower() in image_files.SUFFIXES)
        for sub in sorted(path.iterdir())
        if sub.is_dir() and not sub.name.startswith(".")
    }
    return {name: files for name, files in found.items() if files}


def _from_images(path: Path, run: Description) -> Split:
    _need(run, "image", path)
    folders = _class_folders(path)
    labels = numbered(list(folders), run, where=lambda row: str(path / list(folders)[row]))
    files = [file for group in folders.values() for file in group]
    counts = [len(group) for group in folders.values()]
    images = decode(files, len(files), where=lambda row: str(files[row]))
    return _pictures(images, np.repeat(labels, counts), run, path)


def _from_parquet(file: Path, run: Description) -> Split:
    if run.inputs == "table":
        return from_table(read_parquet(file), run, file)
    _need(run, "image", file)
    opened = parquet._open(file)
    columns = parquet.find_columns(
        file, label=run.target if run.target in opened.schema_arrow.names else None
    )
    classes: list[Any] = []

    def where(row: int) -> str:
        return f"{file}, row {row}"

    def encoded() -> Iterator[pa.Buffer | None]:
        for batch in parquet._batches(file, opened, columns):
            classes.extend(_words(batch.column(columns.label), columns.classes))
            for picture in parquet._bytes_of(batch.column(columns.image)):
                yield picture.as_buffer()

    images = decode(encoded(), opened.metadata.num_rows, where=where)
    return _pictures(images, numbered(classes, run, where=where), run, file)


def _words(column: pa.Array, names: tuple[str, ...]) -> list[Any]:
    """Class names of a column: numbers become names where the file stores those."""
    values: list[Any] = column.to_pylist()
    if not names:
        return values
    return [
        names[v] if isinstance(v, int) and not isinstance(v, bool) and 0 <= v < len(names) else v
        for v in values
    ]


def _from_csv(file: Path, run: Description) -> Split:
    _need(run, "table", file)
    return from_table(read_csv(file), run, file)


def _from_npz(file: Path, run: Description) -> Split:
    """Arrays ``inputs`` and ``targets``, with ``classes`` and ``columns`` where names are needed; or
    one array for each column."""
    try:
        with np.load(file, allow_pickle=False) as stored:
            arrays = {name: stored[name] for name in stored.files}
    except (OSError, ValueError, KeyError, zipfile.BadZipFile) as error:
        raise DataError(
            "the file cannot be read",
            code="FS-CLI-041",
            where=str(file),
            why=f"{type(error).__name__}: {error}",
            hint="write it with numpy.savez; arrays of Python objects are refused",
        ) from error
    names = [str(name) for name in arrays.get("columns", ())]
    if run.inputs == "table":
        return from_table(_as_table(arrays, names, run, file), run, file)
    for name in ("inputs", "targets"):
        if name not in arrays:
            raise _shape_error(file, f"there is no array {name!r}; the file holds {', '.join(arrays)}")
    inputs, targets = arrays["inputs"], arrays["targets"]
    if inputs.shape[1:] != run.input_shape or len(inputs) != len(targets):
        raise _shape_error(
            file,
            f"inputs {list(inputs.shape)} and targets {list(targets.shape)}; the run has examples "
            f"{list(run.input_shape)}",
        )
    kinds = {"image": "u", "tokens": "iu", "numbers": "f"}[run.inputs]
    if inputs.dtype.kind not in kinds or (run.inputs == "image" and inputs.dtype != np.uint8):
        wanted = {"image": "uint8", "tokens": "integers", "numbers": "real numbers"}[run.inputs]
        raise _shape_error(file, f"inputs are {inputs.dtype}, the run has {wanted}")
    stored_inputs = torch.from_numpy(np.ascontiguousarray(inputs)).to(DTYPES[run.inputs])
    if run.inputs == "tokens":
        _check_tokens(inputs, run, file)
    return Split(stored_inputs, torch.from_numpy(_targets(targets, arrays, run, file)))


def _targets(
    targets: npt.NDArray[Any], arrays: dict[str, npt.NDArray[Any]], run: Description, file: Path
) -> npt.NDArray[Any]:
    if run.task == "regression":
        if targets.dtype.kind not in "fiu" or targets.ndim != 1:
            raise _shape_error(file, f"targets are {targets.dtype} {list(targets.shape)}, not numbers [n]")
        return targets.astype(np.float32)
    if run.task == "next-token":
        if targets.shape[1:] != run.input_shape or targets.dtype.kind not in "iu":
            raise _shape_error(file, f"targets are {targets.dtype} {list(targets.shape)}")
        _check_tokens(targets, run, file)
        return targets.astype(np.int64)
    if targets.ndim != 1 or targets.dtype.kind not in "iuUb":
        raise _shape_error(file, f"targets are {targets.dtype} {list(targets.shape)}, not classes [n]")
    words = [str(name) for name in arrays.get("classes", ())]
    values = targets.tolist()
    if words and targets.dtype.kind in "iu":
        values = [words[v] if 0 <= v < len(words) else v for v in values]
    return numbered(values, run, where=lambda row: f"{file}, row {row}")


def _check_tokens(tokens: npt.NDArray[Any], run: Description, file: Path) -> None:
    size = len(run.classes)
    if run.task == "next-token" and tokens.size and (tokens.min() < 0 or tokens.max() >= size):
        raise _shape_error(file, f"tokens {tokens.min()} … {tokens.max()}, the vocabulary has {size}")


def _as_table(
    arrays: dict[str, npt.NDArray[Any]], names: list[str], run: Description, file: Path
) -> dict[str, npt.NDArray[Any]]:
    """Columns by name, from a matrix with ``columns`` or from one array each."""
    if "inputs" not in arrays or not names:
        flat = {name: values for name, values in arrays.items() if values.ndim == 1}
        if "inputs" in arrays:
            raise _shape_error(file, "the array `columns` with the names of the features is missing")
        return flat
    matrix = arrays["inputs"]
    if matrix.ndim != 2 or matrix.shape[1] != len(names):
        raise _shape_error(file, f"inputs {list(matrix.shape)} with {len(names)} names of columns")
    table: dict[str, npt.NDArray[Any]] = {name: matrix[:, i] for i, name in enumerate(names)}
    target = arrays.get("targets", arrays.get(run.target))
    if target is not None:
        words = arrays.get("classes")
        inside = words is not None and target.dtype.kind in "iu" and target.size
        if words is not None and inside and target.min() >= 0 and target.max() < len(words):
            target = words[target]
        table[run.target] = target
    return table


def _pictures(images: npt.NDArray[np.uint8], labels: Any, run: Description, path: Path) -> Split:
    if images.shape[1:] != run.input_shape:
        raise _shape_error(
            path, f"images are {list(images.shape[1:])}, the run has {list(run.input_shape)} (channels, h, w)"
        )
    return Split(torch.from_numpy(images), torch.from_numpy(labels))


def _need(run: Description, kind: str, path: Path) -> None:
    if run.inputs != kind:
        raise _shape_error(path, f"these are examples of kind {kind}, the run has {run.inputs}")


def _shape_error(path: Path, why: str) -> DataError:
    return DataError(
        "local data do not have the form that the run asks for",
        code="FS-CLI-044",
        where=str(path),
        why=why,
        hint="convert the data before, or give others with --data",
    )
