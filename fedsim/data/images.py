"""Image classification: MNIST, Fashion-MNIST, CIFAR-10, CIFAR-100, any set of the hub, any folder.

Each is decoded once to uint8 pixels and kept in the cache (`fedsim.data.cache`). A local folder
holds parquet files (`fedsim.data.parquet`) or images in class sub-folders
(`fedsim.data.image_files`); without one, the parquet files are fetched from the hub.
"""

from __future__ import annotations

from pathlib import Path
from typing import Literal, TypeAlias

from fedsim.data import transforms
from fedsim.data.dataset import Dataset
from fedsim.data.decoded import ImageSource, decoded
from fedsim.data.hub import download
from fedsim.data.pixels import Mode
from fedsim.errors import ConfigError, DataError

Normalise: TypeAlias = Literal["channel", "unit"]
Statistics: TypeAlias = tuple[tuple[float, ...], tuple[float, ...]]

# Mean and standard deviation per channel of the original training sets, as commonly published.
_MNIST: Statistics = ((0.1307,), (0.3081,))
_FASHION: Statistics = ((0.2860,), (0.3530,))
_CIFAR10: Statistics = ((0.4914, 0.4822, 0.4465), (0.2470, 0.2435, 0.2616))
_CIFAR100: Statistics = ((0.5071, 0.4865, 0.4409), (0.2673, 0.2564, 0.2762))


def mnist(*, path: Path | str | None = None, normalise: Normalise = "channel", cache: bool = True) -> Dataset:
    """MNIST handwritten digits: 60,000 + 10,000 grey images of 28x28, 10 classes.

    LeCun, Bottou, Bengio and Haffner 1998. Hub name ``ylecun/mnist``.

    Args:
        path: local folder of parquet files or class sub-folders; fetched from the hub when None.
        normalise: ``channel`` subtracts the training set's mean and divides by its standard
            deviation, ``unit`` only scales to [0, 1].
        cache: keep the decoded images on disk.
    """
    source = _source("ylecun/mnist", path)
    found = _load("mnist", source, normalise=normalise, known=_MNIST, cache=cache)
    return _expect(found, shape=(1, 28, 28), classes=10, folder=source.folder)


def fashion_mnist(
    *, path: Path | str | None = None, normalise: Normalise = "channel", cache: bool = True
) -> Dataset:
    """Fashion-MNIST: 60,000 + 10,000 grey images of clothing, 28x28, 10 classes.

    Xiao, Rasul and Vollgraf 2017. Hub name ``zalando-datasets/fashion_mnist``. Parameters as in
    `mnist`.
    """
    source = _source("zalando-datasets/fashion_mnist", path)
    found = _load("fashion_mnist", source, normalise=normalise, known=_FASHION, cache=cache)
    return _expect(found, shape=(1, 28, 28), classes=10, folder=source.folder)


def cifar10(
    *,
    path: Path | str | None = None,
    normalise: Normalise = "channel",
    crop: int = 4,
    flip: bool = True,
    cache: bool = True,
) -> Dataset:
    """CIFAR-10: 50,000 + 10,000 colour images of 32x32, 10 classes.

    Krizhevsky 2009. Hub name ``uoft-cs/cifar10``.

    Args:
        path: local folder of parquet files or class sub-folders; fetched from the hub when None.
        normalise: as in `mnist`.
        crop: for training, pad by this many pixels and cut a window out at random; 0 for none.
        flip: for training, mirror each image with probability 1/2.
        cache: keep the decoded images on disk.
    """
    source = _source("uoft-cs/cifar10", path)
    found = _load("cifar10", source, normalise=normalise, known=_CIFAR10, crop=crop, flip=flip, cache=cache)
    return _expect(found, shape=(3, 32, 32), classes=10, folder=source.folder)


def cifar100(
    *,
    path: Path | str | None = None,
    labels: Literal["fine", "coarse"] = "fine",
    normalise: Normalise = "channel",
    crop: int = 4,
    flip: bool = True,
    cache: bool = True,
) -> Dataset:
    """CIFAR-100: 50,000 + 10,000 colour images of 32x32, 100 fine or 20 coarse classes.

    Krizhevsky 2009. Hub name ``uoft-cs/cifar100``. Parameters as in `cifar10`; `labels` chooses the
    column ``fine_label`` or ``coarse_label``.
    """
    source = _source("uoft-cs/cifar100", path)._replace(label=f"{labels}_label")
    found = _load("cifar100", source, normalise=normalise, known=_CIFAR100, crop=crop, flip=flip, cache=cache)
    classes = 100 if labels == "fine" else 20
    return _expect(found, shape=(3, 32, 32), classes=classes, folder=source.folder)


def image_folder(
    *,
    path: Path | str,
    config: str | None = None,
    image: str | None = None,
    label: str | None = None,
    client: str | None = None,
    mode: Mode | None = None,
    size: int | None = None,
    normalise: Normalise = "channel",
    crop: int = 0,
    flip: bool = False,
    test_fraction: float = 0.0,
    seed: int = 0,
    cache: bool = True,
) -> Dataset:
    """Images of your own: a folder of parquet files, or ``train/<class>/*.png``.

    Args:
        path: the folder.
        config: sub-folder to read where parquet files of several configurations lie together.
        image: parquet column of the images; found by type when None.
        label: parquet column of the classes; found by type and name when None.
        client: parquet column that names each example's natural client (a writer, a device).
        mode: convert to grey (``L``) or colour (``RGB``); None requires one mode throughout.
        size: resize to this many pixels square; None requires one size throughout.
        normalise: ``channel`` uses mean and standard deviation of the training images.
        crop: for training, pad by this many pixels and cut a window out at random.
        flip: for training, mirror each image with probability 1/2.
        test_fraction: without a test split, set this share of the training images aside.
        seed: of that choice.
        cache: keep the decoded images on disk.
    """
    source = ImageSource(_folder(path), config, image, label, client, mode, size, test_fraction, seed)
    return _load("image_folder", source, normalise=normalise, crop=crop, flip=flip, cache=cache)


def hub(
    *,
    repo: str,
    revision: str = "main",
    config: str | None = None,
    image: str | None = None,
    label: str | None = None,
    client: str | None = None,
    mode: Mode | None = None,
    size: int | None = None,
    normalise: Normalise = "channel",
    crop: int = 0,
    flip: bool = False,
    test_fraction: float = 0.0,
    seed: int = 0,
    cache: bool = True,
) -> Dataset:
    """Any image classification set of the Hugging Face hub that is stored as parquet.

    Args:
        repo: its name, such as ``flwrlabs/femnist``.
        revision: branch, tag or commit; ``refs/convert/parquet`` for the hub's own conversion.

    The other parameters are those of `image_folder`.
    """
    folder = download(repo, revision=revision, config=config)
    source = ImageSource(folder, config, image, label, client, mode, size, test_fraction, seed)
    return _load(repo, source, normalise=normalise, crop=crop, flip=flip, cache=cache)


def _source(repo: str, path: Path | str | None) -> ImageSource:
    return ImageSource(download(repo) if path is None else _folder(path))


def _folder(path: Path | str) -> Path:
    folder = Path(path).expanduser()
    if not folder.is_dir():
        raise DataError(
            f"there is no folder {str(path)!r}",
            code="FS-DAT-001",
            where="data.path",
            why="it is a file" if folder.exists() else "nothing exists at this path",
            hint="data.path names the folder that holds the train and test files",
        )
    return folder


def _load(
    name: str,
    source: ImageSource,
    *,
    normalise: Normalise,
    cache: bool,
    known: Statistics | None = None,
    crop: int = 0,
    flip: bool = False,
) -> Dataset:
    """The decoded set with its transforms; `known` replaces the statistics of the training images."""
    if normalise not in ("channel", "unit"):
        raise ConfigError(
            f"normalise = {normalise!r} is not known",
            code="FS-DAT-011",
            where="data.normalise",
            hint="use 'channel' or 'unit'",
        )
    if crop < 0:
        raise ConfigError(
            f"crop = {crop} is negative", code="FS-DAT-011", where="data.crop", hint="use 0 or more"
        )

    def prepare(measured: Statistics) -> transforms.Transforms:
        mean, std = known or measured
        if normalise == "unit":
            mean, std = (0.0,) * len(measured[0]), (1.0,) * len(measured[0])
        return transforms.image(mean, std, crop=crop, flip=flip)

    return decoded(name, source, prepare=prepare, cached=cache)


def _expect(found: Dataset, *, shape: tuple[int, ...], classes: int, folder: Path) -> Dataset:
    """`found`, if it can be the set it was loaded as."""
    if found.input_shape != shape or found.classes != classes or found.test is None:
        raise DataError(
            f"these data are not {found.name}",
            code="FS-DAT-021",
            where=str(folder),
            why=(
                f"expected {classes} classes, images {list(shape)} and a test split; found "
                f"{found.classes} classes, images {list(found.input_shape)} and "
                f"{'a' if found.test is not None else 'no'} test split"
            ),
            hint="correct data.path, or load them with name = 'image_folder'",
        )
    return found
