"""The embedded default: scikit-learn's handwritten digits, nothing to fetch."""

from __future__ import annotations

import importlib.util
from pathlib import Path

import numpy as np
import torch

from fedsim.data import transforms
from fedsim.data.dataset import Dataset, Split, make_dataset
from fedsim.data.decoded import channel_statistics
from fedsim.data.heldout import split_rows

_INK = 16  # scikit-learn's digits have 17 grey levels, 0 … 16
_TEST_FRACTION = 360 / 1797
_SPLIT_SEED = 2024
_FILE = Path("datasets", "data", "digits.csv.gz")  # in scikit-learn, 64 grey levels and the class of each


def digits() -> Dataset:
    """1,797 grey images of 8x8, 10 classes: 1,437 for training and 360 for testing, always the same.

    Alpaydin and Kaynak 1998, "Optical recognition of handwritten digits", the test part, as shipped
    with scikit-learn. The split is drawn at random, not by writer (the writers are not recorded) and
    not stratified. Pixels are stretched from 0–16 to 0–255, so that all image sets have one scale.
    """
    ink, classes = _table()
    stretched = np.asarray(ink, dtype=np.float64) * (transforms.WHITE / _INK)
    pixels = np.rint(stretched).astype(np.uint8).reshape(-1, 1, 8, 8)
    labels = np.asarray(classes, dtype=np.int64)
    kept, held = split_rows(len(labels), _TEST_FRACTION, seed=_SPLIT_SEED)
    mean, std = channel_statistics(pixels[kept])
    return make_dataset(
        "digits",
        "classification",
        train=Split(torch.from_numpy(pixels[kept]), torch.from_numpy(labels[kept])),
        test=Split(torch.from_numpy(pixels[held]), torch.from_numpy(labels[held])),
        transforms=transforms.image(mean, std),
        classes=10,
        label_names=tuple(str(digit) for digit in range(10)),
    )


def _table() -> tuple[np.ndarray, np.ndarray]:
    """[1797, 64] grey levels and [1797] classes.

    Read from the file in scikit-learn's folder: importing scikit-learn brings SciPy and pandas along, which
    takes longer than a short run. A version that keeps the file elsewhere is asked for it.
    """
    found = importlib.util.find_spec("sklearn")
    for folder in (found.submodule_search_locations if found else None) or ():
        if (path := Path(folder) / _FILE).is_file():
            table = np.loadtxt(path, delimiter=",", dtype=np.int64)
            return table[:, :-1], table[:, -1]
    from sklearn.datasets import load_digits

    ink, classes = load_digits(return_X_y=True)
    return np.asarray(ink), np.asarray(classes)
