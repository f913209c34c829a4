from __future__ import annotations

import subprocess
import sys

import numpy as np
import torch
from sklearn.datasets import load_digits

from fedsim.data import load
from fedsim.data.digits import digits


def test_digits_need_no_file_and_have_the_documented_sizes() -> None:
    data = load("digits")
    assert data.test is not None
    assert (len(data.train), len(data.test)) == (1437, 360)
    assert data.input_shape == (1, 8, 8)
    assert data.classes == 10
    assert data.owners is None


def test_every_digit_of_the_source_is_in_exactly_one_split_with_its_label() -> None:
    source = load_digits()
    expected = sorted(
        (tuple(np.rint(image * 255 / 16).astype(int).ravel()), int(label))
        for image, label in zip(source.images, source.target, strict=True)
    )
    data = digits()
    assert data.test is not None
    found = sorted(
        (tuple(image.flatten().tolist()), int(label))
        for split in (data.train, data.test)
        for image, label in zip(split.inputs, split.targets, strict=True)
    )
    assert found == expected


def test_all_grey_levels_stay_distinct_and_fill_the_scale() -> None:
    assert len(digits().train.inputs.unique()) == 17
    assert int(digits().train.inputs.max()) == 255


def test_the_split_is_the_same_in_every_version() -> None:
    assert digits().digest[:16] == "a0279f23b028ce67"
    assert digits().train.targets[:8].tolist() == [0, 1, 3, 6, 7, 8, 9, 0]


def test_inputs_reach_the_model_normalised() -> None:
    data = digits()
    seen = data.transforms.train(data.train.inputs, torch.zeros(1437, dtype=torch.int64))
    assert abs(float(seen.mean())) < 1e-5
    assert abs(float(seen.std()) - 1) < 1e-3


def test_the_digits_are_read_without_importing_scikit_learn() -> None:
    program = (
        "import sys, fedsim; d = fedsim.data.load('digits'); print(d.digest, 'sklearn' in sys.modules, "
        "'pandas' in sys.modules)"
    )
    said = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=True)
    assert said.stdout.split() == [load("digits").digest, "False", "False"]
