"""The picture of a partition and the numbers behind it."""

from __future__ import annotations

import csv
from pathlib import Path

import numpy as np
import pytest
import torch

from fedsim.data.dataset import Dataset, Split, make_dataset
from fedsim.data.partition import make_partition
from fedsim.data.picture import draw_partition, label_counts
from fedsim.data.transforms import identity


def labelled(targets: np.ndarray, *, classes: int | None, label_names: tuple[str, ...] = ()) -> Dataset:
    values = torch.from_numpy(targets)
    return make_dataset(
        "toy",
        "classification" if classes else "regression",
        train=Split(torch.zeros(len(targets), 2), values),
        test=None,
        transforms=identity(),
        classes=classes,
        owners=(np.arange(len(targets)) % 3).astype(np.int64),
        owner_names=("Ann & <Co>", "Ben", "Cy" * 30),
        label_names=label_names,
    )


TEN_CLASSES = labelled(np.arange(6000) % 10, classes=10)


def table(path: Path) -> list[list[str]]:
    with path.open(encoding="utf-8", newline="") as file:
        return list(csv.reader(file))


@pytest.mark.parametrize("clients", [1, 20, 41, 1000, 2500])
def test_picture_and_numbers_are_written_for_any_number_of_clients(clients: int, tmp_path: Path) -> None:
    data = make_partition(TEN_CLASSES, "dirichlet", clients=clients, alpha=0.3)
    files = draw_partition(data, tmp_path / "plots")
    assert files.png.read_bytes().startswith(b"\x89PNG")
    drawing = files.svg.read_text(encoding="utf-8")
    assert "dirichlet(alpha=0.3)" in drawing
    # However many clients, the drawing stays one that a report can embed.
    assert len(drawing) < 400_000
    rows = table(files.csv)
    assert rows[0] == ["client", "name", "examples", *(str(k) for k in range(10))]
    numbers = np.array([[int(value) for value in row[2:]] for row in rows[1:]])
    assert numbers[:, 0].tolist() == data.sizes.tolist()
    assert np.array_equal(numbers[:, 1:], data.label_histogram())


def test_the_same_partition_gives_the_same_bytes(tmp_path: Path) -> None:
    data = make_partition(TEN_CLASSES, "shards", clients=60)
    first = draw_partition(data, tmp_path / "a")
    again = draw_partition(data, tmp_path / "b")
    for one, other in zip(first, again, strict=True):
        assert one.read_bytes() == other.read_bytes()


def test_names_of_clients_and_classes_are_shown(tmp_path: Path) -> None:
    named = labelled(np.arange(30) % 2, classes=2, label_names=("cat", "dog"))
    files = draw_partition(make_partition(named, "natural"), tmp_path, name="who")
    drawing = files.svg.read_text(encoding="utf-8")
    assert "Ann &amp; &lt;Co&gt;" in drawing
    assert "dog" in drawing
    assert files.csv.name == "who.csv"
    assert [row[1] for row in table(files.csv)[1:]] == list(named.owner_names)


def test_many_classes_are_a_heat_map_also_for_few_clients(tmp_path: Path) -> None:
    hundred = labelled(np.arange(1000) % 100, classes=100)
    files = draw_partition(make_partition(hundred, "iid", clients=5), tmp_path)
    assert "most frequent class" in files.svg.read_text(encoding="utf-8")


def test_a_regression_target_is_counted_by_quantile(tmp_path: Path) -> None:
    values = np.linspace(0.0, 1.0, 500, dtype=np.float32)
    data = make_partition(labelled(values, classes=None), "iid", clients=4)
    histogram, names = label_counts(data)
    assert histogram.sum(axis=0).tolist() == [100] * 5
    assert names[0] == "0 … 0.2"
    draw_partition(data, tmp_path)


def test_a_regression_target_of_equal_values_can_be_drawn(tmp_path: Path) -> None:
    constant = np.full(50, 2.0, dtype=np.float32)
    data = make_partition(labelled(constant, classes=None), "iid", clients=4)
    histogram, names = label_counts(data)
    assert histogram.shape == (4, 5)
    assert histogram.sum() == 50
    assert len(names) == 5
    draw_partition(data, tmp_path)


def test_kept_empty_clients_can_be_drawn(tmp_path: Path) -> None:
    few = labelled(np.arange(30) % 3, classes=3)
    data = make_partition(few, "iid", clients=60, on_empty="keep")
    files = draw_partition(data, tmp_path)
    assert table(files.csv)[-1] == ["59", "", "0", "0", "0", "0"]


def test_invisible_characters_get_a_name() -> None:
    text = labelled(np.arange(12) % 3, classes=3, label_names=("\n", " ", "a"))
    assert label_counts(make_partition(text, "iid", clients=2))[1] == ("\\n", " ", "a")
