"""Image classification sets in parquet files, in the layouts of the Hugging Face hub.

A file belongs to the split its name, or the nearest folder's name, begins with:
``train.parquet``, ``data/train-00000-of-00001.parquet``, ``default/train/0000.parquet``.
Columns are found by the feature types that the hub writes into the file, else by Arrow type and name.
"""

from __future__ import annotations

import json
import re
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, NamedTuple

import numpy as np
import numpy.typing as npt

from fedsim.data.pixels import Mode, Pixels, decode
from fedsim.errors import DataError

if TYPE_CHECKING:
    import pyarrow as pa
    from pyarrow.parquet import ParquetFile

_SPLIT = re.compile(r"(train|test|validation|valid|val)(ing)?([-_.].*)?", re.IGNORECASE)
TEST_SPLITS = ("test", "validation", "valid", "val")
"""What serves as the central test set: the first of these that exists."""

_LABELS = ("label", "labels", "fine_label", "target", "class")
_ROWS_AT_ONCE = 1024


class Columns(NamedTuple):
    """The columns to read; `classes` are the names of the label's classes, () when not stored."""

    image: str
    label: str
    client: str | None
    classes: tuple[str, ...]


class Decoded(NamedTuple):
    """One split: images [n, ch, h, w], labels int64 [n], clients [n] names or None."""

    images: Pixels
    labels: npt.NDArray[np.int64]
    clients: list[str] | None


def find_splits(folder: Path, *, config: str | None = None) -> dict[str, list[Path]]:
    """The parquet files of each split, sorted; {} when there is none.

    Args:
        config: which of several configurations (sub-folders) to read.

    Raises:
        DataError: FS-DAT-002, files of no split, or of several configurations and none chosen.
    """
    found: dict[str, dict[str, list[Path]]] = {}
    files = sorted(folder.rglob("*.parquet"))
    for file in files:
        names = [*file.relative_to(folder).parts[:-1], file.stem]
        place = next((i for i in reversed(range(len(names))) if _SPLIT.fullmatch(names[i])), None)
        if place is None:
            continue
        matched = _SPLIT.fullmatch(names[place])
        split = matched[1].lower() if matched else ""
        found.setdefault("/".join(names[:place]), {}).setdefault(split, []).append(file)
    if not files:
        return {}
    if config is not None:
        found = {name: splits for name, splits in found.items() if name.split("/")[-1] == config}
    if len(found) == 1:
        return next(iter(found.values()))
    raise DataError(
        "it is not clear which parquet files to read",
        code="FS-DAT-002",
        where=str(folder),
        why=(
            f"there are several configurations: {', '.join(sorted(found))}"
            if found
            else f"none of {len(files)} files is named after a split"
            + (f" of configuration {config!r}" if config else "")
        ),
        hint="set data.config to one of them" if found else "name them train*.parquet, test*.parquet",
    )


def find_columns(
    file: Path,
    *,
    image: str | None = None,
    label: str | None = None,
    client: str | None = None,
) -> Columns:
    """The columns of a file that hold images, classes and, where asked for, client names.

    Raises:
        DataError: FS-DAT-003 for a file that cannot be read, FS-DAT-004 for a missing column or for
            several that could be meant.
    """
    import pyarrow as pa

    schema = _open(file).schema_arrow
    features = _features(schema)
    for named in (image, label, client):
        if named is not None and named not in schema.names:
            raise _no_column(file, f"there is no column {named!r}", schema)

    def holds_images(name: str) -> bool:
        kind = schema.field(name).type
        if features.get(name, {}).get("_type") == "Image":
            return True
        if pa.types.is_struct(kind):
            return any(kind.field(i).name == "bytes" for i in range(kind.num_fields))
        return bool(pa.types.is_binary(kind) or pa.types.is_large_binary(kind))

    if image is None:
        images = [name for name in schema.names if holds_images(name)]
        image = _only(images, ("image", "img"), file=file, what="image", schema=schema)
    if label is None:
        typed = [n for n in schema.names if features.get(n, {}).get("_type") == "ClassLabel"]
        labels = typed or [n for n in _LABELS if n in schema.names]
        label = _only(labels, _LABELS, file=file, what="label", schema=schema)
    names = features.get(label, {}).get("names")
    classes = tuple(str(name) for name in names) if isinstance(names, list) else ()
    return Columns(image, label, client, classes)


def decode_split(
    files: Sequence[Path], columns: Columns, *, mode: Mode | None = None, size: int | None = None
) -> Decoded:
    """Read and decode one split, a thousand rows at a time.

    Raises:
        DataError: a corrupt file (003), a missing column (004), an image (005, 006), a label (007).
    """
    opened = [_open(file) for file in files]
    counts = [file.metadata.num_rows for file in opened]
    starts = np.concatenate([[0], np.cumsum(counts)])
    labels = np.empty(int(starts[-1]), dtype=np.int64)
    clients: list[str] | None = None if columns.client is None else []

    def where(row: int) -> str:
        part = int(np.searchsorted(starts, row, side="right")) - 1
        return f"{files[min(part, len(files) - 1)]}, row {row - int(starts[part])}"

    def encoded() -> Iterator[pa.Buffer | None]:
        row = 0
        for path, file in zip(files, opened, strict=True):
            for batch in _batches(path, file, columns):
                stop = row + batch.num_rows
                labels[row:stop] = _integers(batch.column(columns.label), columns.label, where, row)
                if clients is not None:
                    clients.extend(str(name) for name in batch.column(columns.client).to_pylist())
                for picture in _bytes_of(batch.column(columns.image)):
                    yield picture.as_buffer()
                row = stop

    images = decode(encoded(), len(labels), where=where, mode=mode, size=size)
    return Decoded(images, labels, clients)


def _open(file: Path) -> ParquetFile:
    import pyarrow as pa
    from pyarrow.parquet import ParquetFile

    try:
        return ParquetFile(file)
    except (pa.ArrowException, OSError) as error:
        raise _corrupt(file, error) from error


def _batches(path: Path, file: ParquetFile, columns: Columns) -> Iterator[pa.RecordBatch]:
    import pyarrow as pa

    wanted = [c for c in (columns.image, columns.label, columns.client) if c is not None]
    missing = [c for c in wanted if c not in file.schema_arrow.names]
    if missing:
        raise _no_column(path, f"there is no column {missing[0]!r}", file.schema_arrow)
    try:
        yield from file.iter_batches(batch_size=_ROWS_AT_ONCE, columns=wanted)
    except (pa.ArrowException, OSError) as error:
        raise _corrupt(path, error) from error


def _bytes_of(column: pa.Array) -> pa.Array:
    """The encoded images of a column of bytes, or of a struct with a field ``bytes``."""
    import pyarrow as pa

    if not pa.types.is_struct(column.type):
        return column
    # Unlike field(), flatten() passes the nulls of the struct on to its fields.
    return column.flatten()[column.type.get_field_index("bytes")]


def _integers(column: pa.Array, name: str, where: Callable[[int], str], start: int) -> npt.NDArray[np.int64]:
    import pyarrow as pa

    if not pa.types.is_integer(column.type):
        raise DataError(
            f"label column {name!r} does not hold integers",
            code="FS-DAT-004",
            where=where(start),
            why=f"its type is {column.type}",
            hint="choose another column with data.label, or store class numbers from 0",
        )
    if column.null_count:
        row = start + int(np.flatnonzero(column.is_null().to_numpy(zero_copy_only=False))[0])
        raise DataError(
            "an example has no label",
            code="FS-DAT-007",
            where=where(row),
            why=f"column {name!r} is null",
            hint="remove the examples without label",
        )
    return np.asarray(column.to_numpy(), dtype=np.int64)


def _features(schema: pa.Schema) -> dict[str, dict[str, object]]:
    """Feature descriptions the hub's tools leave in a file's metadata; {} without them."""
    stored = (schema.metadata or {}).get(b"huggingface")
    if stored is None:
        return {}
    try:
        features = json.loads(stored)["info"]["features"]
    except (ValueError, KeyError, TypeError):
        # A third party's note that does not parse says nothing; types and names are still there.
        return {}
    return {name: kind for name, kind in features.items() if isinstance(kind, dict)}


def _only(
    candidates: list[str], preferred: Sequence[str], *, file: Path, what: str, schema: pa.Schema
) -> str:
    if len(candidates) == 1:
        return candidates[0]
    for name in preferred:
        if name in candidates:
            return name
    problem = (
        f"several columns could be the {what}: {', '.join(candidates)}"
        if candidates
        else f"no column holds the {what}"
    )
    raise _no_column(file, problem, schema)


def _no_column(file: Path, problem: str, schema: pa.Schema) -> DataError:
    return DataError(
        problem,
        code="FS-DAT-004",
        where=str(file),
        why="columns: " + ", ".join(f"{field.name} ({field.type})" for field in schema),
        hint="name the columns with data.image and data.label",
    )


def _corrupt(file: Path, error: Exception) -> DataError:
    return DataError(
        "a parquet file cannot be read",
        code="FS-DAT-003",
        where=str(file),
        why=f"{type(error).__name__}: {str(error).splitlines()[0] if str(error) else ''}",
        hint="it is damaged or incomplete: fetch it again and compare its size with the original",
    )
