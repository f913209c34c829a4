"""Partitioners of flwr-datasets through the adapter."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest

from fedsim.data.flower import flower
from fedsim.data.partition_scheme import Scheme
from fedsim.errors import ConfigError, DataError

LABELS = np.arange(600) % 10
OWNERS = (np.arange(600) // 7) % 12

pytestmark = pytest.mark.filterwarnings("ignore::UserWarning", "ignore::FutureWarning")


def divided(scheme: Scheme, clients: int, *, seed: int = 0) -> tuple[np.ndarray, np.ndarray]:
    answer = scheme(LABELS, OWNERS, clients, np.random.default_rng(seed))
    assert isinstance(answer, tuple)
    return answer


@pytest.mark.parametrize(
    ("method", "options", "clients"),
    [
        ("IidPartitioner", None, 6),
        ("DirichletPartitioner", {"alpha": 0.5, "min_partition_size": 1}, 6),
        ("PathologicalPartitioner", {"num_classes_per_partition": 3}, 10),
        ("ShardPartitioner", {"num_shards_per_partition": 2}, 6),
        ("LinearPartitioner", {}, 6),
        ("NaturalIdPartitioner", {}, 12),
        ("GroupedNaturalIdPartitioner", {"group_size": 3}, 4),
    ],
)
def test_partitions_cover_the_data(method: str, options: dict[str, Any] | None, clients: int) -> None:
    index, offsets = divided(flower(method=method, options=options), clients)
    assert len(offsets) == clients + 1
    assert np.array_equal(np.sort(index), np.arange(600))


def test_the_rows_are_those_of_the_original_class() -> None:
    import datasets
    from flwr_datasets.partitioner import PathologicalPartitioner

    options = {"num_classes_per_partition": 2, "class_assignment_mode": "deterministic", "seed": 9}
    index, offsets = divided(flower(method="PathologicalPartitioner", options=options), 5)
    original = PathologicalPartitioner(num_partitions=5, partition_by="label", **options)
    original.dataset = datasets.Dataset.from_dict({"label": LABELS, "row": np.arange(600)})
    for client in range(5):
        expected = list(original.load_partition(client)["row"])
        assert index[offsets[client] : offsets[client + 1]].tolist() == expected


def test_natural_ids_are_the_owners() -> None:
    index, offsets = divided(flower(method="NaturalIdPartitioner"), 0)
    for start, stop in zip(offsets[:-1], offsets[1:], strict=True):
        assert len(set(OWNERS[index[start:stop]])) == 1


def test_the_seed_of_the_partition_reaches_the_class() -> None:
    scheme = flower(method="DirichletPartitioner", options={"alpha": 1.0, "min_partition_size": 1})
    first, again, other = (divided(scheme, 5, seed=s)[0] for s in (1, 1, 2))
    assert np.array_equal(first, again)
    assert not np.array_equal(first, other)


def test_a_class_that_gives_up_is_reported_with_its_reason() -> None:
    scheme = flower(method="DirichletPartitioner", options={"alpha": 0.01, "min_partition_size": 5})
    with pytest.raises(DataError, match="could not divide") as caught:
        divided(scheme, 100)
    assert caught.value.code == "FS-DAT-047"
    assert "attempts" in str(caught.value.why)


@pytest.mark.parametrize("method", ["VerticalEvenPartitioner", "Partitioner", "DirichletPartitoner"])
def test_a_class_that_does_not_divide_examples_is_refused(method: str) -> None:
    with pytest.raises(ConfigError) as caught:
        flower(method=method)
    assert caught.value.code == "FS-DAT-046"
    assert "DirichletPartitioner" in str(caught.value.why)


def test_an_option_that_the_class_lacks_is_refused() -> None:
    with pytest.raises(ConfigError, match="alhpa") as caught:
        flower(method="DirichletPartitioner", options={"alhpa": 0.3})
    assert caught.value.code == "FS-DAT-046"


def test_the_number_of_clients_is_asked_for_where_the_class_needs_it() -> None:
    with pytest.raises(ConfigError) as caught:
        divided(flower(method="IidPartitioner"), 0)
    assert caught.value.code == "FS-DAT-040"


def test_natural_ids_need_owners() -> None:
    with pytest.raises(DataError) as caught:
        flower(method="NaturalIdPartitioner")(LABELS, None, 0, np.random.default_rng(0))
    assert caught.value.code == "FS-DAT-047"
