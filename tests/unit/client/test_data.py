"""Local examples fitted by name, the user's function, and the run's own partition."""

from __future__ import annotations

import sys
import types
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import pytest
import torch
from PIL import Image
from torch.utils.data import TensorDataset

from fedsim import from_arrays
from fedsim.build import build_data
from fedsim.client.data import Request, Source, client_data, narrowed
from fedsim.config import Config, from_dict
from fedsim.data.federated import FederatedData
from fedsim.errors import ConfigError, DataError

TABLE: dict[str, Any] = {
    "columns": ["age", "sex", "smokes"],
    "dtypes": ["int", "bool"],
    "categories": {"sex": ["f", "m"]},
    "mean": [40.0, 0.0],
    "std": [10.0, 1.0],
    "classes": ["ill", "well"],
}
PICTURES: dict[str, Any] = {"input_shape": [1, 4, 4], "classes": ["cat", "dog"], "mean": [0.5], "std": [0.5]}
ROWS = {"smokes": [True, False, False], "label": ["well", "ill", "well"], "sex": ["m", "f", "f"],
        "age": [50, 40, 30], "name": ["A", "B", "C"]}  # fmt: skip
FITTED = [[1.0, 0.0, 1.0, 1.0], [0.0, 1.0, 0.0, 0.0], [-1.0, 1.0, 0.0, 0.0]]


def described(data: dict[str, Any], **tables: dict[str, Any]) -> Config:
    return from_dict({"data": {"name": "described", **data}, **tables})


def local(data: dict[str, Any], path: Path, **tables: dict[str, Any]) -> FederatedData:
    return client_data(described(data, **tables), Source(path), 2, 5)


def refused(data: dict[str, Any], path: Path) -> DataError:
    with pytest.raises(DataError) as caught:
        local(data, path)
    return caught.value


def csv(path: Path, rows: dict[str, list[Any]] = ROWS) -> Path:
    pd.DataFrame(rows).to_csv(path, index=False)
    return path


def parquet(path: Path, rows: dict[str, list[Any]] = ROWS) -> Path:
    pd.DataFrame(rows).to_parquet(path)
    return path


def columns_npz(path: Path) -> Path:
    np.savez(path, **{name: np.array(values) for name, values in ROWS.items()})
    return path


@pytest.mark.parametrize(
    ("name", "write"), [("own.csv", csv), ("own.parquet", parquet), ("own.npz", columns_npz)]
)
def test_a_table_is_fitted_by_names_in_any_format(
    tmp_path: Path, name: str, write: Callable[[Path], Path]
) -> None:
    data = local(TABLE, write(tmp_path / name))
    assert data.clients == 5
    assert data.sizes.tolist() == [0, 0, 3, 0, 0]
    assert np.array_equal(data.dataset.train.inputs.numpy(), FITTED)
    assert data.dataset.train.targets.tolist() == [1, 0, 1]
    assert data.dataset.label_names == ("ill", "well")


def test_several_files_of_a_folder_follow_each_other_by_name(tmp_path: Path) -> None:
    csv(tmp_path / "b.csv", {name: values[2:] for name, values in ROWS.items()})
    csv(tmp_path / "a.csv", {name: values[:2] for name, values in ROWS.items()})
    assert np.array_equal(local(TABLE, tmp_path).dataset.train.inputs.numpy(), FITTED)
    parquet(tmp_path / "c.parquet")
    problem = refused(TABLE, tmp_path)
    assert problem.code == "FS-CLI-041"
    assert ".parquet and .csv" in (problem.why or "")


@pytest.mark.parametrize(
    ("change", "code", "words"),
    [
        ({"age": None}, "FS-CLI-042", "'age'"),
        ({"age": ["old", "40", "30"]}, "FS-CLI-042", "words"),
        ({"age": [50.5, 40.0, 30.0]}, "FS-CLI-042", "real numbers"),
        ({"age": [50.0, None, 30.0]}, "FS-DAT-008", "row 1"),
        ({"smokes": [1, 0, 0]}, "FS-CLI-042", "'smokes'"),
        ({"sex": ["m", "x", "f"]}, "FS-CLI-043", "'x'"),
        ({"sex": ["m", None, "f"]}, "FS-DAT-008", "'sex'"),
        ({"label": ["well", "ill", "Well"]}, "FS-CLI-043", "row 2"),
        ({"label": [0, 1, 0]}, "FS-CLI-043", "class 0"),
        ({"label": None}, "FS-CLI-042", "'label'"),
    ],
)
def test_what_the_run_does_not_know_is_refused_with_its_place(
    tmp_path: Path, change: dict[str, Any], code: str, words: str
) -> None:
    rows = {name: values for name, values in {**ROWS, **change}.items() if values is not None}
    problem = refused(TABLE, csv(tmp_path / "own.csv", rows))
    assert problem.code == code
    assert words in str(problem)


def test_a_regression_takes_the_numbers_of_its_column(tmp_path: Path) -> None:
    run = {"task": "regression", "columns": ["age"], "target": "weight"}
    data = local(run, csv(tmp_path / "own.csv", {"weight": [70.5, 81.0], "age": [20, 30]}))
    assert data.dataset.train.targets.tolist() == [70.5, 81.0]
    assert data.dataset.task == "regression"
    assert (
        refused(run, csv(tmp_path / "bad.csv", {"weight": [70.5, np.inf], "age": [1, 2]})).code
        == "FS-DAT-008"
    )


def pictures(folder: Path, names: dict[str, int], *, size: int = 4) -> Path:
    """Grey pictures, one brightness for each class."""
    for name, brightness in names.items():
        (folder / name).mkdir(parents=True)
        for i in range(2):
            Image.new("L", (size, size), brightness + i).save(folder / name / f"{i}.png")
    return folder


@pytest.mark.parametrize("below", [".", "train"])
def test_folders_of_images_are_classes_by_their_names(tmp_path: Path, below: str) -> None:
    pictures(tmp_path / below, {"dog": 100, "cat": 10})
    train = local(PICTURES, tmp_path).dataset.train
    assert {int(p): int(t) for p, t in zip(train.inputs[:, 0, 0, 0], train.targets, strict=True)} == {
        10: 0, 11: 0, 100: 1, 101: 1,
    }  # fmt: skip


def test_images_are_normalised_as_the_run_states(tmp_path: Path) -> None:
    data = local(PICTURES, pictures(tmp_path, {"cat": 0, "dog": 254}))
    seen = data.dataset.transforms.evaluate(data.dataset.train.inputs)
    assert float(seen.min()) == pytest.approx(-1.0)
    assert float(seen.max()) == pytest.approx(1.0)


def test_images_of_another_size_class_or_kind_are_refused(tmp_path: Path) -> None:
    big = refused(PICTURES, pictures(tmp_path / "big", {"cat": 0}, size=5))
    assert (big.code, "[1, 5, 5]" in (big.why or "")) == ("FS-CLI-044", True)
    bird = refused(PICTURES, pictures(tmp_path / "bird", {"bird": 0}))
    assert (bird.code, "'bird'" in bird.what) == ("FS-CLI-043", True)
    assert refused(TABLE, tmp_path / "big").code == "FS-CLI-044"
    assert refused(PICTURES, csv(tmp_path / "own.csv")).code == "FS-CLI-044"


def encoded(brightness: int, folder: Path) -> bytes:
    file = folder / f"{brightness}.png"
    Image.new("L", (4, 4), brightness).save(file)
    return file.read_bytes()


def test_parquet_images_are_numbered_by_the_names_of_their_classes(tmp_path: Path) -> None:
    (tmp_path / "raw").mkdir()
    rows = {"image": [encoded(b, tmp_path / "raw") for b in (7, 9)], "label": ["dog", "cat"]}
    train = local(PICTURES, parquet(tmp_path / "own.parquet", rows)).dataset.train
    assert train.inputs[:, 0, 0, 0].tolist() == [7, 9]
    assert train.targets.tolist() == [1, 0]
    rows["label"] = [1, 0]  # numbers that name nothing
    assert refused(PICTURES, parquet(tmp_path / "bare.parquet", rows)).code == "FS-CLI-043"
    named = from_dict({"data": {"name": "described", **PICTURES, "classes": 2}})
    train = client_data(named, Source(tmp_path / "bare.parquet"), 0, 1).dataset.train
    assert train.targets.tolist() == [1, 0]


def test_arrays_name_their_classes_and_columns(tmp_path: Path) -> None:
    file = tmp_path / "own.npz"
    images = np.arange(32, dtype=np.uint8).reshape(2, 1, 4, 4)
    np.savez(file, inputs=images, targets=np.array([0, 1]), classes=np.array(["dog", "cat"]))
    train = local(PICTURES, file).dataset.train
    assert np.array_equal(train.inputs.numpy(), images)
    assert train.targets.tolist() == [1, 0]
    np.savez(file, inputs=np.array([[1.0, 2.0]]), columns=np.array(["b", "a"]), targets=np.array(["no"]))
    run = {"columns": ["a", "b"], "classes": ["no", "yes"]}
    assert local(run, file).dataset.train.inputs.tolist() == [[2.0, 1.0]]


@pytest.mark.parametrize(
    ("run", "arrays", "words"),
    [
        (PICTURES, {"inputs": np.zeros((2, 1, 4, 4), np.uint8)}, "'targets'"),
        (
            PICTURES,
            {"inputs": np.zeros((2, 4, 4), np.uint8), "targets": np.array(["cat", "dog"])},
            "[2, 4, 4]",
        ),
        (PICTURES, {"inputs": np.zeros((2, 1, 4, 4)), "targets": np.array(["cat", "dog"])}, "float64"),
        (PICTURES, {"inputs": np.zeros((2, 1, 4, 4), np.uint8), "targets": np.array(["cat"])}, "[1]"),
        (TABLE, {"inputs": np.zeros((2, 3)), "targets": np.array(["ill", "ill"])}, "columns"),
        (
            {"task": "next-token", "input_shape": [2], "classes": 3},
            {"inputs": np.array([[0, 1]]), "targets": np.array([[1, 3]])},
            "vocabulary",
        ),
        (PICTURES, {"inputs": np.array([{"a": 1}], dtype=object), "targets": np.array([0])}, "objects"),
    ],
)
def test_arrays_of_another_form_are_refused(
    tmp_path: Path, run: dict[str, Any], arrays: dict[str, Any], words: str
) -> None:
    np.savez(tmp_path / "own.npz", allow_pickle=True, **arrays)
    problem = refused(run, tmp_path / "own.npz")
    assert problem.code in ("FS-CLI-044", "FS-CLI-041")
    assert words in str(problem)


def test_text_is_integers_of_the_runs_vocabulary(tmp_path: Path) -> None:
    run = {"task": "next-token", "input_shape": [3], "classes": ["a", "b", "c"]}
    np.savez(tmp_path / "t.npz", inputs=np.array([[0, 1, 2]]), targets=np.array([[1, 2, 0]]))
    train = local(run, tmp_path / "t.npz").dataset.train
    assert train.inputs.tolist() == [[0, 1, 2]]
    assert train.targets.tolist() == [[1, 2, 0]]


def test_nothing_to_read_is_said_so(tmp_path: Path) -> None:
    (tmp_path / "notes.txt").write_text("x")
    (tmp_path / "bad.parquet").write_bytes(b"PAR1 no")
    for path in (tmp_path / "gone", tmp_path / "notes.txt"):
        assert refused(TABLE, path).code == "FS-CLI-041"
    assert refused(TABLE, tmp_path / "bad.parquet").code == "FS-CLI-041"
    assert refused(PICTURES, tmp_path / "bad.parquet").code == "FS-DAT-003"


def test_the_run_keeps_its_share_of_local_examples_back(tmp_path: Path) -> None:
    rows = {name: values * 10 for name, values in ROWS.items()}
    data = local(TABLE, csv(tmp_path / "own.csv", rows), evaluation={"holdout": 0.2})
    assert data.sizes.tolist() == [0, 0, 24, 0, 0]
    assert data.holdout_sizes.tolist() == [0, 0, 6, 0, 0]
    both = np.concatenate([data.rows(2), data.holdout_rows(2)])
    assert sorted(both.tolist()) == list(range(30))


def test_own_files_fit_a_named_data_set_that_states_its_form(tmp_path: Path) -> None:
    folder = pictures(tmp_path, {"7": 0}, size=8)
    config = from_dict({"data": {"name": "digits"}})
    data = client_data(config, Source(folder), 0, 20)
    assert data.dataset.train.targets.tolist() == [7, 7]
    silent = from_dict({"data": {"name": "synthetic", "partition": {"kind": "natural"}}})
    with pytest.raises(DataError) as caught:
        client_data(silent, Source(folder), 0, 20)
    assert caught.value.code == "FS-CLI-040"


def test_without_own_data_the_client_takes_its_part_of_the_run() -> None:
    config = from_dict({"data": {"name": "digits", "partition": {"kind": "iid", "clients": 6}}})
    assert client_data(config, Source(), 3, 6).digest == build_data(config).digest
    with pytest.raises(DataError) as caught:
        client_data(config, Source(), 3, 7)
    assert caught.value.code == "FS-CLI-047"
    with pytest.raises(DataError, match="no data set of its own"):
        client_data(described(PICTURES), Source(), 0, 5)
    with pytest.raises(DataError, match="client 5 is not one of 5"):
        client_data(described(PICTURES), Source(), 5, 5)


def test_narrowing_keeps_the_rows_and_the_order_of_one_client() -> None:
    config = from_dict({"data": {"name": "digits", "partition": {"kind": "iid", "clients": 6}}})
    data = build_data(config)
    alone = narrowed(data, 4)
    assert alone.sizes.tolist() == [0, 0, 0, 0, int(data.sizes[4]), 0]
    rows = torch.from_numpy(data.rows(4).copy())
    assert torch.equal(alone.dataset.train.inputs[alone.rows(4)], data.dataset.train.inputs[rows])
    assert torch.equal(alone.dataset.train.targets, data.dataset.train.targets[rows])


@pytest.mark.parametrize(
    "tables",
    [
        {"data": {"name": "image_folder", "path": "/etc"}},
        {"data": {"name": "tabular", "target": "y", "test_path": None, "path": "/etc/passwd"}},
        {"model": {"target": "os:system"}},
        {"model": {"weights": "/secret.safetensors"}},
    ],
)
def test_a_task_that_names_files_or_code_of_this_machine_is_refused(
    tables: dict[str, dict[str, Any]],
) -> None:
    with pytest.raises(ConfigError) as caught:
        client_data(from_dict(tables), Source(), 0, 20)
    assert caught.value.code == "FS-CLI-048"


@pytest.fixture
def functions(monkeypatch: pytest.MonkeyPatch) -> Callable[[Callable[[Request], Any]], Source]:
    """A module of the user's own with one data function in it."""

    def installed(function: Callable[[Request], Any]) -> Source:
        module = types.ModuleType("users_own_package")
        module.load = function  # type: ignore[attr-defined]
        monkeypatch.setitem(sys.modules, "users_own_package", module)
        return Source(function="users_own_package:load")

    return installed


Install = Callable[[Callable[[Request], Any]], Source]


def test_a_data_function_is_told_what_the_run_wants(functions: Install) -> None:
    seen: list[Request] = []

    def load(request: Request) -> TensorDataset:
        seen.append(request)
        return TensorDataset(torch.zeros(3, 1, 4, 4, dtype=torch.uint8), torch.tensor([0, 1, 1]))

    data = client_data(described(PICTURES, run={"seed": 9}), functions(load), 2, 5)
    assert data.sizes.tolist() == [0, 0, 3, 0, 0]
    (request,) = seen
    assert (request.client, request.population, request.seed) == (2, 5, 9)
    assert request.description is not None
    assert request.description.classes == ("cat", "dog")
    normalised = data.dataset.transforms.evaluate(data.dataset.train.inputs)
    assert float(normalised.max()) == -1.0  # the run's, though the function said nothing of it


def test_a_data_function_may_say_the_form_where_the_run_does_not(functions: Install) -> None:
    silent = from_dict({"data": {"name": "synthetic", "clients": 3, "partition": {"kind": "natural"}}})
    own = from_arrays(np.zeros((4, 60), np.float32), np.array([0, 1, 2, 9]))
    assert client_data(silent, functions(lambda r: own), 1, 3).sizes.tolist() == [0, 4, 0]
    pairs = TensorDataset(torch.zeros(2, 60), torch.tensor([0, 1]))
    with pytest.raises(DataError) as caught:
        client_data(silent, functions(lambda r: pairs), 1, 3)
    assert caught.value.code == "FS-CLI-040"


GOOD = torch.zeros(2, 1, 4, 4, dtype=torch.uint8)


@pytest.mark.parametrize(
    ("given", "code"),
    [
        (lambda r: 1 / 0, "FS-CLI-046"),
        (lambda r: 7, "FS-CLI-046"),
        (lambda r: [], "FS-CLI-046"),
        (lambda r: TensorDataset(GOOD[:, :, :3], torch.tensor([0, 1])), "FS-CLI-044"),
        (lambda r: TensorDataset(GOOD.float(), torch.tensor([0, 1])), "FS-CLI-044"),
        (lambda r: TensorDataset(GOOD, torch.tensor([0.0, 1.0])), "FS-CLI-044"),
        (lambda r: TensorDataset(GOOD, torch.tensor([0, 2])), "FS-DAT-007"),
    ],
)
def test_what_a_data_function_returns_is_held_to_the_run(
    functions: Install, given: Callable[[Request], Any], code: str
) -> None:
    with pytest.raises(DataError) as caught:
        client_data(described(PICTURES), functions(given), 0, 5)
    assert caught.value.code == code
    assert "division" not in str(caught.value)  # words of the user's code may quote the user's data


@pytest.mark.parametrize("name", ["no_such_package:load", "os:no_such_function", "os:sep"])
def test_a_data_function_that_is_none_is_refused(name: str) -> None:
    with pytest.raises(DataError) as caught:
        client_data(described(PICTURES), Source(function=name), 0, 5)
    assert caught.value.code == "FS-CLI-046"


def test_files_and_a_function_together_are_refused() -> None:
    with pytest.raises(ConfigError) as caught:
        Source(Path("x"), "a:b")
    assert caught.value.code == "FS-CLI-045"
