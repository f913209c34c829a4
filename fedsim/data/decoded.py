"""Image sets decoded once: from a folder or from the cache to a data set."""

from __future__ import annotations

import hashlib
import json
import logging
from collections.abc import Callable
from pathlib import Path
from typing import NamedTuple, TypeAlias

import numpy as np
import torch
from torch import Tensor

from fedsim.data import cache, image_files, parquet
from fedsim.data.dataset import Dataset, Split, make_dataset
from fedsim.data.heldout import split_rows
from fedsim.data.pixels import Mode, Pixels
from fedsim.data.transforms import WHITE, Transforms
from fedsim.errors import DataError

Statistics: TypeAlias = tuple[tuple[float, ...], tuple[float, ...]]

_log = logging.getLogger(__name__)


class ImageSource(NamedTuple):
    """A folder of images and how to read it; the fields are the parameters of `image_folder`."""

    folder: Path
    config: str | None = None
    image: str | None = None
    label: str | None = None
    client: str | None = None
    mode: Mode | None = None
    size: int | None = None
    test_fraction: float = 0.0
    seed: int = 0


class _Content(NamedTuple):
    """What the cache holds of one image set."""

    tensors: dict[str, Tensor]  # train_inputs, train_targets, and where present test_*, owners
    label_names: tuple[str, ...]
    owner_names: tuple[str, ...]
    classes: int
    statistics: Statistics  # mean and standard deviation per channel of the training pixels / 255


def decoded(
    name: str,
    source: ImageSource,
    *,
    prepare: Callable[[Statistics], Transforms],
    cached: bool,
) -> Dataset:
    """The data set in a folder, from the cache where the same content was decoded before.

    The content is digested again on every load, so a cache entry that was damaged is noticed (one
    warning) and replaced.

    Args:
        prepare: makes the transforms from the statistics of the training images.
        cached: look into the cache and write to it.

    Raises:
        DataError: nothing to read in the folder (002), or what is there cannot be read.
        EnvironmentProblem: FS-DAT-030, the cache cannot be written.
    """
    files = parquet.find_splits(source.folder, config=source.config)
    trees = {} if files else image_files.find_splits(source.folder)
    if "train" not in files and "train" not in trees:
        raise _nothing_to_read(source.folder)

    def build(content: _Content) -> Dataset:
        return _dataset(name, content, prepare, where=str(source.folder))

    def decode() -> _Content:
        return _from_parquet(files, source) if files else _from_images(trees, source)

    if not cached:
        return build(decode())
    fingerprint = _fingerprint(files) if files else image_files.fingerprint(source.folder, trees)
    entry = cache.entry(name, cache.key(fingerprint, *map(str, source[2:])))
    known = _from_cache(entry, build)
    if known is not None:
        return known
    content = decode()
    dataset = build(content)
    cache.store(entry, content.tensors, {**_described(content), "digest": dataset.digest})
    return dataset


def _from_cache(entry: Path, build: Callable[[_Content], Dataset]) -> Dataset | None:
    """The data set of a cache entry; None when there is none, or (with a warning) a damaged one."""
    stored = cache.fetch(entry)
    if stored is None:
        return None
    tensors, metadata = stored
    try:
        dataset = build(_unpacked(tensors, metadata))
        if dataset.digest == metadata["digest"]:
            return dataset
        problem = "its digest differs"
    except (DataError, KeyError, ValueError) as error:
        problem = f"{type(error).__name__}: {error.args[0] if error.args else ''}"
    _log.warning("cache=%s damaged=%r action=decode-again", entry, problem)
    return None


def _from_parquet(files: dict[str, list[Path]], source: ImageSource) -> _Content:
    columns = parquet.find_columns(
        files["train"][0], image=source.image, label=source.label, client=source.client
    )
    train = parquet.decode_split(files["train"], columns, mode=source.mode, size=source.size)
    part = next((part for part in parquet.TEST_SPLITS if part in files), None)
    test = None
    if part is not None:
        test = parquet.decode_split(
            files[part], columns._replace(client=None), mode=source.mode, size=source.size
        )
    return _content(train, test, columns.classes, source)


def _from_images(trees: dict[str, dict[str, list[Path]]], source: ImageSource) -> _Content:
    names = image_files.class_names(trees["train"])
    part = next((part for part in parquet.TEST_SPLITS if trees.get(part)), None)
    splits = [
        image_files.decode_split(trees[split], names, mode=source.mode, size=source.size)
        for split in ("train", part)
        if split is not None
    ]
    return _content(splits[0], splits[1] if part else None, names, source)


def _content(
    train: parquet.Decoded,
    test: parquet.Decoded | None,
    names: tuple[str, ...],
    source: ImageSource,
) -> _Content:
    # Of all training labels: the rows set aside below may hold the only examples of a class.
    classes = len(names) or int(train.labels.max()) + 1
    if test is None and source.test_fraction != 0:
        kept, held = split_rows(len(train.labels), source.test_fraction, seed=source.seed)
        test = parquet.Decoded(train.images[held], train.labels[held], None)
        clients = None if train.clients is None else [train.clients[i] for i in kept]
        train = parquet.Decoded(train.images[kept], train.labels[kept], clients)
    arrays = {"train_inputs": train.images, "train_targets": train.labels}
    if test is not None:
        arrays |= {"test_inputs": test.images, "test_targets": test.labels}
    owner_names: tuple[str, ...] = ()
    if train.clients is not None:
        unique, owners = np.unique(np.array(train.clients), return_inverse=True)
        owner_names = tuple(str(name) for name in unique)
        arrays["owners"] = owners.astype(np.int64)
    return _Content(
        tensors={key: torch.from_numpy(array) for key, array in arrays.items()},
        label_names=names,
        owner_names=owner_names,
        classes=classes,
        statistics=channel_statistics(train.images),
    )


def _dataset(
    name: str, content: _Content, prepare: Callable[[Statistics], Transforms], *, where: str
) -> Dataset:
    tensors = content.tensors
    owners = tensors.get("owners")
    return make_dataset(
        name,
        "classification",
        train=Split(tensors["train_inputs"], tensors["train_targets"]),
        test=(Split(tensors["test_inputs"], tensors["test_targets"]) if "test_inputs" in tensors else None),
        transforms=prepare(content.statistics),
        classes=content.classes,
        owners=None if owners is None else owners.numpy(),
        owner_names=content.owner_names,
        label_names=content.label_names,
        where=where,
    )


def _described(content: _Content) -> dict[str, str]:
    return {"content": json.dumps([*content[1:]])}


def _unpacked(tensors: dict[str, Tensor], metadata: dict[str, str]) -> _Content:
    labels, owners, classes, (mean, std) = json.loads(metadata["content"])
    return _Content(tensors, tuple(labels), tuple(owners), classes, (tuple(mean), tuple(std)))


def channel_statistics(images: Pixels) -> Statistics:
    """Mean and standard deviation per channel of pixels scaled to [0, 1].

    Sums of integers, so the result does not depend on the order of addition. A constant channel
    gets the standard deviation 1.

    Args:
        images: uint8 [n, ch, h, w].
    """
    total = np.zeros(images.shape[1], dtype=np.int64)
    squares = np.zeros(images.shape[1], dtype=np.int64)
    for start in range(0, len(images), 4096):
        block = images[start : start + 4096].astype(np.uint32)
        total += block.sum(axis=(0, 2, 3), dtype=np.int64)
        squares += (block * block).sum(axis=(0, 2, 3), dtype=np.int64)
    count = images.size // images.shape[1]
    mean = total / count
    deviation = np.sqrt(np.maximum(squares / count - mean**2, 0.0))
    deviation[deviation == 0] = WHITE
    return tuple((mean / WHITE).tolist()), tuple((deviation / WHITE).tolist())


def _fingerprint(files: dict[str, list[Path]]) -> str:
    """SHA-256 (hex) over the contents of parquet files.

    All of the content: there are few files, reading them is a small part of decoding them, and
    neither a copy (new time, same data) nor an edit that keeps the size fools it.
    """
    digest = hashlib.sha256()
    for split, paths in sorted(files.items()):
        for path in paths:
            with path.open("rb") as opened:
                content = hashlib.file_digest(opened, "sha256").hexdigest()
            digest.update(f"{split} {content}\n".encode())
    return digest.hexdigest()


def _nothing_to_read(folder: Path) -> DataError:
    inside = sorted(item.name for item in folder.iterdir())
    shown = ", ".join(inside[:8]) + (" …" if len(inside) > 8 else "")
    return DataError(
        "the folder has no training images in a known layout",
        code="FS-DAT-002",
        where=str(folder),
        why=f"it contains: {shown or 'nothing'}",
        hint="expected train*.parquet (and test*.parquet), or train/<class>/*.png",
    )
