from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest

from fedsim.data import load
from fedsim.data.tabular import tabular
from fedsim.errors import ConfigError, DataError

TABLE = """age,city,income,site,sick
30,Rome,10.5,north,yes
40,Oslo,11.5,south,no
50,Rome,12.5,north,no
60,Bonn,13.5,east,yes
70,Oslo,14.5,south,no
"""


@pytest.fixture
def table(tmp_path: Path) -> Path:
    file = tmp_path / "people.csv"
    file.write_text(TABLE)
    return file


def test_numbers_are_standardised_and_text_becomes_one_column_per_value(table: Path) -> None:
    data = tabular(path=table, target="sick", client="site", test_fraction=0.0)
    assert data.task == "binary"
    assert data.classes == 2
    assert data.label_names == ("no", "yes")
    assert data.train.targets.tolist() == [1, 0, 0, 1, 0]
    features = data.train.inputs.numpy()
    step = np.array([-2, -1, 0, 1, 2]) / np.sqrt(2)
    np.testing.assert_allclose(features[:, 0], step, atol=1e-6)
    np.testing.assert_allclose(features[:, 1], step, atol=1e-6)
    # Bonn, Oslo, Rome
    assert features[:, 2:].tolist() == [[0, 0, 1], [0, 1, 0], [0, 0, 1], [1, 0, 0], [0, 1, 0]]


def test_the_client_column_gives_owners_and_is_no_feature(table: Path) -> None:
    data = tabular(path=table, target="sick", client="site", test_fraction=0.0)
    assert data.owner_names == ("east", "north", "south")
    assert data.owners is not None
    assert data.owners.tolist() == [1, 2, 1, 0, 2]
    assert data.input_shape == (5,)


def test_standardisation_looks_at_training_rows_only(table: Path, tmp_path: Path) -> None:
    other = tmp_path / "test.csv"
    other.write_text("age,city,income,site,sick\n150,Rome,12.5,west,no\n")
    data = tabular(path=table, target="sick", test_path=other, drop=("city", "site"))
    assert data.test is not None
    assert float(data.train.inputs[:, 0].mean()) == pytest.approx(0, abs=1e-6)
    assert float(data.test.inputs[0, 0]) == pytest.approx(100 / np.sqrt(200))
    assert float(data.test.inputs[0, 1]) == pytest.approx(0)


def test_a_test_file_needs_no_client_column_and_may_bring_new_categories(table: Path, tmp_path: Path) -> None:
    other = tmp_path / "test.csv"
    other.write_text("city,age,income,sick\nPisa,50,12.5,no\n")
    data = tabular(path=table, target="sick", client="site", test_path=other)
    assert data.test is not None
    # age, income, then Bonn, Oslo, Pisa, Rome
    assert data.test.inputs.tolist() == [[0, 0, 0, 0, 1, 0]]
    assert data.owners is not None
    assert len(data.owners) == 5


def test_numbers_and_words_may_mix_in_a_client_column(tmp_path: Path) -> None:
    file = tmp_path / "t.csv"
    file.write_text("x,who,y\n1,7,0\n2,eve,1\n3,10,0\n")
    data = tabular(path=file, target="y", client="who", test_fraction=0.0)
    assert data.owner_names == ("10", "7", "eve")


def test_rows_are_set_aside_by_fraction_and_seed(table: Path) -> None:
    data = tabular(path=table, target="sick", test_fraction=0.4, seed=1)
    assert data.test is not None
    assert (len(data.train), len(data.test)) == (3, 2)
    assert tabular(path=table, target="sick", test_fraction=0.4, seed=1).digest == data.digest
    digests = {tabular(path=table, target="sick", test_fraction=0.4, seed=s).digest for s in range(6)}
    assert len(digests) > 1


def test_tasks_are_inferred_from_the_target(table: Path) -> None:
    assert tabular(path=table, target="city").task == "classification"
    money = tabular(path=table, target="income", test_fraction=0.0)
    assert money.task == "regression"
    assert money.classes is None
    assert money.train.targets.tolist() == [10.5, 11.5, 12.5, 13.5, 14.5]
    assert tabular(path=table, target="age").classes == 5
    forced = tabular(path=table, target="age", task="regression", test_fraction=0.0)
    assert forced.train.targets.tolist() == [30, 40, 50, 60, 70]


def test_many_distinct_integers_are_a_quantity(tmp_path: Path) -> None:
    file = tmp_path / "t.csv"
    file.write_text("x,y\n" + "\n".join(f"{i % 3},{i}" for i in range(60)))
    assert tabular(path=file, target="y").task == "regression"
    assert tabular(path=file, target="y", task="classification").classes == 60


def test_a_constant_column_becomes_zero(tmp_path: Path) -> None:
    file = tmp_path / "t.csv"
    file.write_text("x,c,y\n1,7,0\n2,7,1\n3,7,0\n")
    data = tabular(path=file, target="y", test_fraction=0.0)
    assert data.train.inputs[:, 1].tolist() == [0, 0, 0]


def test_other_delimiters_and_unscaled_features(tmp_path: Path) -> None:
    file = tmp_path / "t.csv"
    file.write_text("x;y\n1;0\n2;1\n")
    data = tabular(path=file, target="y", delimiter=";", standardise=False, test_fraction=0.0)
    assert data.train.inputs.tolist() == [[1], [2]]


@pytest.mark.parametrize(
    ("value", "column"), [("", "age"), ("nan", "income"), ("inf", "income"), ("", "sick")]
)
def test_an_empty_or_infinite_value_is_named_by_file_row_and_column(
    tmp_path: Path, value: str, column: str
) -> None:
    lines = [line.split(",") for line in TABLE.splitlines()]
    lines[3][lines[0].index(column)] = value
    file = tmp_path / "holes.csv"
    file.write_text("\n".join(",".join(line) for line in lines))
    with pytest.raises(DataError) as caught:
        tabular(path=file, target="sick")
    assert caught.value.code == "FS-DAT-008"
    assert caught.value.where == f"{file}, row 3 after the header, column {column}"


def test_a_hole_in_a_dropped_column_does_not_matter(tmp_path: Path) -> None:
    file = tmp_path / "t.csv"
    file.write_text("x,note,y\n1,,0\n2,a,1\n3,,1\n")
    assert tabular(path=file, target="y", drop=("note",), test_fraction=0.0).input_shape == (1,)


def test_a_hole_in_the_test_file_is_said_to_be_there(table: Path, tmp_path: Path) -> None:
    other = tmp_path / "test.csv"
    other.write_text("age,city,income,site,sick\n1,Rome,1,west,no\n,Rome,1,west,no\n")
    with pytest.raises(DataError) as caught:
        tabular(path=table, target="sick", test_path=other)
    assert caught.value.where == f"{other}, row 2 after the header, column age"


@pytest.mark.parametrize(
    ("arguments", "code"),
    [
        ({"target": "nothing"}, "FS-DAT-015"),
        ({"target": "sick", "client": "nothing"}, "FS-DAT-015"),
        ({"target": "sick", "drop": ("nothing",)}, "FS-DAT-015"),
        ({"target": "city", "task": "regression"}, "FS-DAT-016"),
        ({"target": "city", "task": "binary"}, "FS-DAT-016"),
        ({"target": "sick", "categorical": "error"}, "FS-DAT-016"),
        ({"target": "sick", "drop": ("age", "city", "income", "site")}, "FS-DAT-016"),
    ],
)
def test_columns_that_do_not_fit_their_use_are_refused(
    table: Path, arguments: dict[str, Any], code: str
) -> None:
    with pytest.raises(DataError) as caught:
        tabular(path=table, **arguments)
    assert caught.value.code == code
    assert str(table) in str(caught.value)


@pytest.mark.parametrize("wrong", [{"task": "guess"}, {"categorical": "hash"}, {"test_fraction": 2.0}])
def test_parameters_out_of_range_are_refused(table: Path, wrong: dict[str, Any]) -> None:
    with pytest.raises(ConfigError) as caught:
        tabular(path=table, target="sick", **wrong)
    assert caught.value.code == "FS-DAT-011"


@pytest.mark.parametrize(
    ("content", "code"),
    [(b"", "FS-DAT-015"), (b"a,b\n", "FS-DAT-017"), (b"a,b\n1,2,3\n4,5\n6\n7,8,9,10\n", "FS-DAT-015")],
)
def test_files_that_are_no_tables_are_refused(tmp_path: Path, content: bytes, code: str) -> None:
    file = tmp_path / "t.csv"
    file.write_bytes(content)
    with pytest.raises(DataError) as caught:
        tabular(path=file, target="b")
    assert caught.value.code == code


def test_a_missing_file_names_the_key(tmp_path: Path) -> None:
    with pytest.raises(DataError) as caught:
        load("tabular", tmp_path / "none.csv", target="y")
    assert (caught.value.code, caught.value.where) == ("FS-DAT-001", "data.path")
