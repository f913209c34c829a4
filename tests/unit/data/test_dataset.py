from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest
import torch

from fedsim.data import transforms
from fedsim.data.dataset import Dataset, Split, check_labels, make_dataset
from fedsim.errors import DataError


def tiny(**changed: object) -> Dataset:
    settings: dict[str, object] = {
        "train": Split(torch.arange(8.0).reshape(4, 2), torch.tensor([0, 1, 2, 1])),
        "test": Split(torch.zeros(2, 2), torch.tensor([2, 0])),
        "transforms": transforms.identity(),
        "classes": 3,
        **changed,
    }
    return make_dataset("tiny", "classification", **settings)  # type: ignore[arg-type]


def test_shape_length_and_labels_describe_the_training_split() -> None:
    data = tiny()
    assert data.input_shape == (2,)
    assert len(data) == 4
    assert data.labels.tolist() == [0, 1, 2, 1]
    assert data.labels.dtype == np.int64


def test_next_token_data_are_labelled_by_the_last_target_of_each_window() -> None:
    text = torch.tensor([[0, 1, 2], [1, 2, 0]])
    data = make_dataset(
        "t",
        "next-token",
        train=Split(text, text.flip(1)),
        test=None,
        transforms=transforms.identity(),
        classes=3,
    )
    assert data.labels.tolist() == [0, 1]


def test_regression_data_have_one_label_for_partitioners() -> None:
    train = Split(torch.zeros(3, 1), torch.tensor([0.5, 1.0, 2.0]))
    data = tiny(train=train, test=None, classes=None)
    assert replace(data, task="regression").labels.tolist() == [0, 0, 0]


def test_digest_is_stable_and_changes_with_every_part() -> None:
    base = tiny()
    assert tiny().digest == base.digest
    assert len(base.digest) == 64
    train = Split(base.train.inputs.clone(), base.train.targets.clone())
    train.inputs[3, 1] += 1e-6
    assert tiny(train=train).digest != base.digest
    other = Split(base.train.inputs, torch.tensor([0, 1, 2, 2]))
    assert tiny(train=other).digest != base.digest
    assert tiny(test=None).digest != base.digest
    assert tiny(owners=np.zeros(4, dtype=np.int64)).digest != base.digest


def test_digest_is_pinned_so_that_old_manifests_stay_comparable() -> None:
    assert tiny().digest[:16] == "a63937b60c103052"


@pytest.mark.parametrize("label", [-1, 3, 255])
def test_a_label_outside_the_classes_is_refused_with_row_and_value(label: int) -> None:
    train = Split(torch.zeros(4, 2), torch.tensor([0, 1, label, 1]))
    with pytest.raises(DataError) as caught:
        tiny(train=train, where="somewhere.csv")
    assert caught.value.code == "FS-DAT-007"
    assert f"label {label} is outside 0 … 2" in caught.value.what
    assert caught.value.where == "somewhere.csv, train split, row 2"


def test_labels_of_windows_are_checked_at_every_position() -> None:
    with pytest.raises(DataError) as caught:
        check_labels(torch.tensor([[0, 1], [1, 9]]), 3, where="text")
    assert caught.value.where == "text, row 1"


@pytest.mark.parametrize("value", [float("nan"), float("inf"), float("-inf")])
def test_a_value_that_is_not_finite_is_refused_with_row_and_column(value: float) -> None:
    inputs = torch.zeros(4, 2)
    inputs[2, 1] = value
    with pytest.raises(DataError) as caught:
        tiny(train=Split(inputs, torch.zeros(4, dtype=torch.int64)))
    assert caught.value.code == "FS-DAT-008"
    assert caught.value.where == "tiny, train split, row 2, column [1]"


def test_the_test_split_is_checked_as_well() -> None:
    with pytest.raises(DataError, match="test split"):
        tiny(test=Split(torch.zeros(1, 2), torch.tensor([7])))


def test_counts_shapes_and_owners_must_fit_each_other() -> None:
    for wrong in (
        {"train": Split(torch.zeros(3, 2), torch.zeros(4, dtype=torch.int64))},
        {"test": Split(torch.zeros(1, 5), torch.zeros(1, dtype=torch.int64))},
        {"owners": np.zeros(3, dtype=np.int64)},
    ):
        with pytest.raises(DataError) as caught:
            tiny(**wrong)
        assert caught.value.code == "FS-DAT-012"


def test_an_empty_split_is_refused() -> None:
    with pytest.raises(DataError) as caught:
        tiny(train=Split(torch.zeros(0, 2), torch.zeros(0, dtype=torch.int64)))
    assert caught.value.code == "FS-DAT-017"
