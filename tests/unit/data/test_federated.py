from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest
import torch

from fedsim.data import FederatedData, from_arrays
from fedsim.data.federated import with_feature_noise
from fedsim.errors import DataError


def four_clients() -> FederatedData:
    inputs = np.arange(12, dtype=np.float32).reshape(6, 2)
    data = from_arrays(inputs, np.array([0, 1, 2, 0, 1, 2]), client_ids=[0, 0, 0, 0, 0, 0])
    return FederatedData(
        dataset=data.dataset,
        index=np.array([4, 1, 0, 0]),
        offsets=np.array([0, 2, 2, 3, 4]),
        holdout_index=np.array([5, 3]),
        holdout_offsets=np.array([0, 1, 1, 1, 2]),
    )


def test_sizes_rows_and_holdout_follow_from_the_offsets() -> None:
    data = four_clients()
    assert data.clients == 4
    assert data.sizes.tolist() == [2, 0, 1, 1]
    assert data.holdout_sizes.tolist() == [1, 0, 0, 1]
    assert data.rows(0).tolist() == [4, 1]
    assert data.rows(1).tolist() == []
    assert data.holdout_rows(3).tolist() == [3]


def test_label_histogram_counts_each_clients_training_examples() -> None:
    data = four_clients()
    assert data.label_histogram().tolist() == [[0, 2, 0], [0, 0, 0], [1, 0, 0], [1, 0, 0]]


def test_label_histogram_takes_labels_of_the_callers_choice() -> None:
    counts = four_clients().label_histogram(np.array([3, 3, 3, 3, 0, 0]))
    assert counts.tolist() == [[1, 0, 0, 1], [0, 0, 0, 0], [0, 0, 0, 1], [0, 0, 0, 1]]


def test_regression_has_no_label_histogram_unless_labels_are_given() -> None:
    data = from_arrays(np.zeros((2, 1)), np.array([0.5, 1.5]), client_ids=["a", "b"])
    with pytest.raises(DataError) as caught:
        data.label_histogram()
    assert caught.value.code == "FS-DAT-019"
    assert data.label_histogram(np.array([0, 1])).tolist() == [[1, 0], [0, 1]]


def test_without_a_holdout_its_arrays_are_empty_and_fit() -> None:
    data = from_arrays(np.zeros((3, 1)), np.array([0, 1, 1]), client_ids=[0, 1, 1])
    assert data.holdout_sizes.tolist() == [0, 0]
    assert len(data.digest) == 64


@pytest.mark.parametrize(
    "wrong",
    [
        {"offsets": np.array([0, 2, 2, 3])},
        {"offsets": np.array([0, 3, 2, 3, 4])},
        {"offsets": np.array([1, 2, 2, 3, 4])},
        {"index": np.array([4, 1, 0, 6])},
        {"index": np.array([4, 1, 0, -1])},
        {"holdout_offsets": np.array([0, 2])},
        {"names": ("a", "b")},
    ],
)
def test_a_malformed_partition_is_refused(wrong: dict[str, object]) -> None:
    with pytest.raises(DataError) as caught:
        replace(four_clients(), **wrong)  # type: ignore[arg-type]
    assert caught.value.code == "FS-DAT-018"


def test_digest_depends_on_data_division_and_names() -> None:
    base = four_clients()
    assert four_clients().digest == base.digest
    assert replace(base, index=np.array([4, 1, 0, 1])).digest != base.digest
    assert replace(base, names=("a", "b", "c", "d")).digest != base.digest
    # The same rows cut elsewhere: index and hold-out must not run together in the digest.
    moved = replace(base, offsets=np.array([0, 1, 2, 3, 4]))
    assert moved.digest != base.digest


def test_feature_noise_gives_each_client_its_own_deviation_in_client_order() -> None:
    count = 4000
    images = np.full((3 * count, 1, 2, 2), 100, dtype=np.uint8)
    clean = from_arrays(images, np.arange(3 * count) % 5, client_ids=np.arange(3 * count) % 3)
    noisy = with_feature_noise(clean, [0.0, 0.1, 0.3], seed=3)
    assert noisy.index.tolist() == list(range(3 * count))
    assert noisy.dataset.train.inputs.dtype == torch.float32
    for client, deviation in enumerate([0.0, 0.1, 0.3]):
        rows = torch.from_numpy(noisy.rows(client))
        mine = noisy.dataset.train.inputs[rows]
        assert float((mine - 100).std()) / 255 == pytest.approx(deviation, rel=0.03)
        before = clean.dataset.train.targets[torch.from_numpy(clean.rows(client))]
        assert torch.equal(noisy.dataset.train.targets[rows], before)
    # In model units the noise is that fraction of full scale: the transforms divide by 255.
    seen = noisy.dataset.transforms.evaluate(noisy.dataset.train.inputs)
    assert float(seen[torch.from_numpy(noisy.rows(2))].std()) == pytest.approx(0.3, rel=0.03)
    assert noisy.feature_shift is not None
    assert noisy.feature_shift.tolist() == pytest.approx([0.0, 0.1, 0.3])
    assert noisy.dataset.digest != clean.dataset.digest


def test_feature_noise_keeps_holdout_sizes_and_labels_and_is_seeded() -> None:
    base = four_clients()
    noisy = with_feature_noise(base, np.ones(4), seed=1)
    assert noisy.sizes.tolist() == base.sizes.tolist()
    assert noisy.holdout_sizes.tolist() == base.holdout_sizes.tolist()
    labels = noisy.dataset.train.targets.numpy()
    assert labels[noisy.rows(0)].tolist() == [1, 1]
    assert labels[noisy.holdout_rows(3)].tolist() == [0]
    assert with_feature_noise(base, np.ones(4), seed=1).digest == noisy.digest
    assert with_feature_noise(base, np.ones(4), seed=2).digest != noisy.digest
    # Row 0 belongs to clients 2 and 3: each has its own noise on it.
    inputs = noisy.dataset.train.inputs
    assert not torch.equal(inputs[noisy.rows(2)[0]], inputs[noisy.rows(3)[0]])


def test_feature_noise_on_characters_is_refused() -> None:
    text = np.zeros((4, 3), dtype=np.int64)
    data = from_arrays(text, text, client_ids=[0, 0, 1, 1])
    with pytest.raises(DataError) as caught:
        with_feature_noise(data, [0.1, 0.1], seed=0)
    assert caught.value.code == "FS-DAT-020"
