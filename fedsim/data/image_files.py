"""Image classification sets as files: ``train/<class>/*.png`` and ``test/<class>/*.png``."""

from __future__ import annotations

import hashlib
from pathlib import Path

import numpy as np

from fedsim.data.parquet import TEST_SPLITS, Decoded
from fedsim.data.pixels import Mode, decode
from fedsim.errors import DataError

SUFFIXES = frozenset({".png", ".jpg", ".jpeg", ".bmp", ".gif", ".webp", ".pgm", ".ppm", ".tif", ".tiff"})


def find_splits(folder: Path) -> dict[str, dict[str, list[Path]]]:
    """Split to class to image files, each sorted; {} when `folder` has no ``train`` with classes.

    A class is a sub-folder of a split's folder; its images may lie deeper. Other files are ignored.
    """
    splits: dict[str, dict[str, list[Path]]] = {}
    for split in ("train", *TEST_SPLITS):
        if not (folder / split).is_dir():
            continue
        classes = {
            sub.name: sorted(f for f in sub.rglob("*") if f.suffix.lower() in SUFFIXES)
            for sub in sorted((folder / split).iterdir())
            if sub.is_dir() and not sub.name.startswith(".")
        }
        splits[split] = {name: files for name, files in classes.items() if files}
    return splits if splits.get("train") else {}


def class_names(train: dict[str, list[Path]]) -> tuple[str, ...]:
    """Names of the classes in the order of their numbers: numeric when all are numbers."""
    if all(name.isdecimal() for name in train):
        return tuple(sorted(train, key=int))
    return tuple(sorted(train))


def decode_split(
    classes: dict[str, list[Path]],
    names: tuple[str, ...],
    *,
    mode: Mode | None = None,
    size: int | None = None,
) -> Decoded:
    """Decode one split, class by class.

    Raises:
        DataError: a class that training data do not have (007), an image (005, 006).
    """
    unknown = sorted(set(classes) - set(names))
    if unknown:
        raise DataError(
            f"class {unknown[0]!r} does not occur in the training images",
            code="FS-DAT-007",
            where=str(classes[unknown[0]][0].parent),
            why=f"the training images have the classes {', '.join(names)}",
            hint="add training images of this class, or remove the folder",
        )
    pairs = [(file, names.index(name)) for name in names for file in classes.get(name, [])]
    files = [file for file, _ in pairs]
    labels = np.array([label for _, label in pairs], dtype=np.int64)
    images = decode(files, len(files), where=lambda row: str(files[row]), mode=mode, size=size)
    return Decoded(images, labels, None)


def fingerprint(folder: Path, splits: dict[str, dict[str, list[Path]]]) -> str:
    """SHA-256 (hex) over each file's path, size and time of change.

    Not over the contents: opening tens of thousands of small files would cost as much as decoding.
    """
    digest = hashlib.sha256()
    for split, classes in sorted(splits.items()):
        for file in (file for files in classes.values() for file in files):
            stat = file.stat()
            line = f"{split}\0{file.relative_to(folder)}\0{stat.st_size}\0{stat.st_mtime_ns}\n"
            digest.update(line.encode())
    return digest.hexdigest()
