from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from torch.utils.data import Dataset as TorchDataset
from torch.utils.data import TensorDataset

from fedsim.data import Dataset, FederatedData, from_arrays, from_datasets
from fedsim.errors import ConfigError, DataError


class Pairs(TorchDataset[Any]):
    def __init__(self, pairs: list[Any]) -> None:
        self.pairs = pairs

    def __len__(self) -> int:
        return len(self.pairs)

    def __getitem__(self, index: int) -> Any:
        return self.pairs[index]


def test_arrays_with_client_ids_are_grouped_by_client_in_their_order() -> None:
    data = from_arrays(
        np.arange(10.0).reshape(5, 2), np.array([0, 1, 2, 1, 0]), client_ids=["b", "a", "b", "b", "a"]
    )
    assert isinstance(data, FederatedData)
    assert data.names == ("a", "b")
    assert data.rows(0).tolist() == [1, 4]
    assert data.rows(1).tolist() == [0, 2, 3]
    assert data.dataset.classes == 3
    assert data.dataset.train.inputs.dtype == torch.float32
    assert data.dataset.owners is not None
    assert data.dataset.owners.tolist() == [1, 0, 1, 1, 0]


def test_ids_that_count_from_0_are_the_clients_numbers_and_others_their_names() -> None:
    inputs, targets = np.zeros((3, 1)), np.array([0, 1, 0])
    assert from_arrays(inputs, targets, client_ids=[1, 0, 1]).names == ()
    assert from_arrays(inputs, targets, client_ids=[7, 3, 7]).names == ("3", "7")


def test_arrays_without_client_ids_are_still_to_be_divided() -> None:
    data = from_arrays(np.zeros((3, 1)), np.array([0, 1, 0]))
    assert isinstance(data, Dataset)
    assert data.owners is None


def test_the_users_arrays_can_change_afterwards() -> None:
    inputs = np.zeros((2, 1), dtype=np.float32)
    data = from_arrays(inputs, np.array([0, 1]))
    inputs[:] = 9
    assert float(data.train.inputs.max()) == 0


def test_tasks_follow_from_the_targets_and_images_are_scaled() -> None:
    images = np.full((2, 1, 3, 3), 255, dtype=np.uint8)
    data = from_arrays(images, np.array([0, 1]))
    assert data.task == "classification"
    assert float(data.transforms.evaluate(data.train.inputs).max()) == 1.0
    assert from_arrays(np.zeros((2, 1)), np.array([0.5, 1])).task == "regression"
    text = np.zeros((2, 4), dtype=np.int32)
    assert from_arrays(text, text, classes=5).task == "next-token"
    assert from_arrays(text, text, classes=5).train.inputs.dtype == torch.int64
    assert from_arrays(np.zeros((2, 1)), np.array([0, 1]), task="binary").task == "binary"
    assert from_arrays(np.array([[True], [False]]), np.array([0, 1])).train.inputs.tolist() == [
        [1.0],
        [0.0],
    ]


def test_classes_are_counted_over_training_and_test_labels() -> None:
    test = (np.zeros((1, 1)), np.array([4]))
    assert from_arrays(np.zeros((2, 1)), np.array([0, 1]), test=test).classes == 5


@pytest.mark.parametrize(
    ("change", "code"),
    [
        ({"targets": np.array([0, -1, 1])}, "FS-DAT-007"),
        ({"targets": np.array([0, 5, 1]), "classes": 3}, "FS-DAT-007"),
        ({"inputs": np.array([[0.0], [np.nan], [0.0]])}, "FS-DAT-008"),
        ({"targets": np.array([0.5, np.inf, 1.0])}, "FS-DAT-008"),
        ({"targets": np.array([0, 1])}, "FS-DAT-012"),
        ({"inputs": np.zeros((3, 4), dtype=np.uint8)}, "FS-DAT-012"),
        ({"inputs": np.zeros((3, 28, 28, 3), dtype=np.uint8)}, "FS-DAT-012"),
        ({"inputs": np.array([["a"], ["b"], ["c"]])}, "FS-DAT-016"),
        ({"inputs": np.zeros((3, 1), dtype=np.complex64)}, "FS-DAT-016"),
        ({"targets": np.array([0.0, 1.0, 1.0]), "task": "binary"}, "FS-DAT-016"),
        ({"task": "regression"}, "FS-DAT-016"),
        ({"client_ids": [0, 1]}, "FS-DAT-022"),
        ({"client_ids": [0.0, 1.0, 1.0]}, "FS-DAT-022"),
        ({"client_ids": [[0], [1], [1]]}, "FS-DAT-022"),
        ({"inputs": np.zeros((0, 1)), "targets": np.zeros(0, dtype=int)}, "FS-DAT-017"),
    ],
)
def test_arrays_that_do_not_fit_are_refused(change: dict[str, Any], code: str) -> None:
    arguments: dict[str, Any] = {
        "inputs": np.zeros((3, 1)),
        "targets": np.array([0, 1, 1]),
        **change,
    }
    with pytest.raises(DataError) as caught:
        from_arrays(arguments.pop("inputs"), arguments.pop("targets"), **arguments)
    assert caught.value.code == code


def test_an_unknown_task_is_refused() -> None:
    wrong: Any = "clustering"
    with pytest.raises(ConfigError) as caught:
        from_arrays(np.zeros((2, 1)), np.array([0, 1]), task=wrong)
    assert caught.value.code == "FS-DAT-011"


def test_a_list_of_data_sets_is_one_client_each_and_an_empty_one_a_client_without_data() -> None:
    data = from_datasets(
        [
            Pairs([(torch.tensor([1.0, 2.0]), 0), (torch.tensor([3.0, 4.0]), 1)]),
            Pairs([]),
            TensorDataset(torch.tensor([[5.0, 6.0]]), torch.tensor([2])),
            Pairs([(np.array([7.0, 8.0]), np.int64(1))]),
        ],
        test=Pairs([([9.0, 9.0], 0)]),
        names=["a", "b", "c", "d"],
    )
    assert data.sizes.tolist() == [2, 0, 1, 1]
    assert data.names == ("a", "b", "c", "d")
    assert data.dataset.train.inputs.tolist() == [[1, 2], [3, 4], [5, 6], [7, 8]]
    assert data.dataset.train.targets.tolist() == [0, 1, 2, 1]
    assert data.dataset.test is not None
    assert data.dataset.test.inputs.tolist() == [[9, 9]]


def test_trailing_clients_without_data_are_kept() -> None:
    data = from_datasets([Pairs([([1.0], 0)]), Pairs([])])
    assert data.clients == 2


def test_pictures_become_channels_height_width() -> None:
    grey = Image.fromarray(np.full((4, 6), 9, dtype=np.uint8))
    colour = Image.fromarray(np.arange(72, dtype=np.uint8).reshape(4, 6, 3))
    assert from_datasets([Pairs([(grey, 0)])]).dataset.input_shape == (1, 4, 6)
    data = from_datasets([Pairs([(colour, 1)])])
    assert data.dataset.input_shape == (3, 4, 6)
    assert data.dataset.train.inputs[0, 2, 0, 1] == 5


@pytest.mark.parametrize(
    ("clients", "code", "where"),
    [
        ([], "FS-DAT-022", "own"),
        ([Pairs([])], "FS-DAT-017", "own"),
        ([Pairs([([1.0], 0), ([1.0, 2.0], 0)])], "FS-DAT-012", "client 0, example 1"),
        ([Pairs([([1.0], 0)]), Pairs([([1.0, 2.0], 0)])], "FS-DAT-012", "client 1"),
        ([Pairs([([1.0], 0)]), Pairs([([1.0], 0.5)])], "FS-DAT-012", "client 1"),
        ([Pairs([([1.0], 0)]), Pairs([[1.0]])], "FS-DAT-012", "client 1, example 0"),
        ([Pairs([("text", 0)])], "FS-DAT-016", "client 0, example 0"),
    ],
)
def test_data_sets_that_do_not_fit_are_refused_naming_client_and_example(
    clients: list[Any], code: str, where: str
) -> None:
    with pytest.raises(DataError) as caught:
        from_datasets(clients)
    assert (caught.value.code, caught.value.where) == (code, where)


def test_names_must_be_one_per_client() -> None:
    with pytest.raises(DataError) as caught:
        from_datasets([Pairs([([1.0], 0)])], names=["a", "b"])
    assert caught.value.code == "FS-DAT-022"
