"""A data set in words: what it may say, what follows from it, and what it refuses."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from fedsim.build import build_model
from fedsim.config import from_dict
from fedsim.data.described import DescribedDataset, Description, described
from fedsim.data.digits import digits
from fedsim.data.stated import stated_by
from fedsim.errors import ConfigError, DataError
from fedsim.schema import build

IMAGES: dict[str, Any] = {"input_shape": (1, 4, 4), "classes": ("cat", "dog"), "mean": (0.5,), "std": (0.25,)}


def test_clients_own_nothing_whatever_the_partition() -> None:
    data = described(**IMAGES).split("dirichlet", clients=5, alpha=0.1, holdout=0.2)
    assert data.clients == 5
    assert data.sizes.tolist() == data.holdout_sizes.tolist() == [0] * 5
    with pytest.raises(ConfigError, match="number of clients"):
        described(**IMAGES).split("natural")


@pytest.mark.parametrize(
    ("given", "shape", "inputs", "classes"),
    [
        (IMAGES, (1, 4, 4), torch.uint8, 2),
        ({"input_shape": (3, 4, 4), "classes": 7}, (3, 4, 4), torch.uint8, 7),
        ({"columns": ("a", "b"), "task": "regression", "target": "y"}, (2,), torch.float32, None),
        (
            {
                "columns": ("a", "c"),
                "categories": {"c": ("x", "y", "z")},
                "classes": ("no", "yes"),
                "task": "binary",
            },
            (4,),
            torch.float32,
            2,
        ),
        ({"task": "next-token", "input_shape": (5,), "classes": ("a", "b", "c")}, (5,), torch.int64, 3),
        ({"input_shape": (8,), "classes": 2}, (8,), torch.float32, 2),
    ],
)
def test_a_model_sees_the_form_without_any_example(
    given: dict[str, Any], shape: tuple[int, ...], inputs: torch.dtype, classes: int | None
) -> None:
    dataset = described(**given)
    assert dataset.input_shape == shape
    assert dataset.train.inputs.dtype == inputs
    assert dataset.classes == classes
    assert dataset.test is None
    assert dataset.train.targets.is_floating_point() == (dataset.task == "regression")


def test_a_model_with_batch_normalisation_is_built_from_the_description_alone() -> None:
    dataset = described(input_shape=(3, 8, 8), classes=2)
    config = from_dict({"model": {"name": "resnet18", "norm": "batch", "width": 4}})
    model = build_model(config, dataset.split("iid", clients=2))
    assert sum(p.numel() for p in model.parameters()) > 0


def test_the_same_words_give_the_same_digest_and_others_another() -> None:
    assert described(**IMAGES).digest == described(**IMAGES).digest
    assert described(**IMAGES).digest != described(**{**IMAGES, "classes": ("dog", "cat")}).digest
    assert described(**IMAGES).digest != described(**{**IMAGES, "mean": (0.4,)}).digest


@pytest.mark.parametrize(
    ("given", "word"),
    [
        ({}, "input_shape"),
        ({"input_shape": (1, 4, 4)}, "classes"),
        ({"input_shape": (2, 4, 4), "classes": 3}, "images"),
        ({"input_shape": (1, 4, 4), "classes": ("a", "a")}, "twice"),
        ({"input_shape": (4,), "classes": 3, "flip": True}, "images"),
        ({"input_shape": (4,), "classes": 3, "task": "regression"}, "no classes"),
        ({"input_shape": (4,), "classes": 3, "task": "binary"}, "binary"),
        ({**IMAGES, "mean": (0.1, 0.2)}, "mean"),
        ({**IMAGES, "std": ()}, "neither"),
        ({**IMAGES, "std": (0.0,)}, "above 0"),
        ({"columns": ("a", "a"), "classes": 2}, "twice"),
        ({"columns": ("a", "label"), "classes": 2}, "target"),
        ({"columns": ("a",), "classes": 2, "categories": {"b": ("x",)}}, "'b'"),
        ({"columns": ("a",), "classes": 2, "dtypes": ("float", "int")}, "dtypes"),
        ({"columns": ("a",), "classes": 2, "dtypes": ("double",)}, "double"),
        ({"columns": ("a",), "classes": 2, "input_shape": (3,)}, "input_shape"),
        ({"input_shape": (4,), "classes": 2, "inputs": "table"}, "columns"),
        ({"input_shape": (4, 4), "classes": 2, "task": "next-token"}, "tokens"),
    ],
)
def test_statements_that_contradict_each_other_are_refused(given: dict[str, Any], word: str) -> None:
    with pytest.raises(ConfigError) as refused:
        build(described, given, where="[data]")
    assert refused.value.code == "FS-CFG-006"
    assert word in (refused.value.why or "")


def test_a_configuration_file_says_all_of_it() -> None:
    """Through the strict types of a table, nested categories included."""
    values = {
        "columns": ["age", "sex"], "categories": {"sex": ["f", "m"]}, "dtypes": ["int"],
        "classes": ["ill", "well"], "target": "state", "mean": [40.0], "std": [12.0],
    }  # fmt: skip
    config = from_dict({"data": {"name": "described", **values}})
    run = stated_by(config.data.name, config.data.parameters)
    assert run is not None
    assert run.columns == ("age", "sex")
    assert run.numeric == ("age",)
    assert run.categories["sex"] == ("f", "m")
    assert run.target == "state"
    assert run.input_shape == (3,)


def test_known_data_sets_state_what_they_are_made_of() -> None:
    run = stated_by("digits", {})
    real = digits()
    assert run is not None
    assert (run.input_shape, run.classes) == (real.input_shape, real.label_names)
    pixels = real.train.inputs[:9]
    assert torch.equal(run.transforms.evaluate(pixels), real.transforms.evaluate(pixels))
    mnist = stated_by("mnist", {"normalise": "unit"})
    assert mnist is not None
    assert mnist.mean == ()
    cifar = stated_by("cifar10", {"crop": 2, "flip": False})
    assert isinstance(cifar, Description)
    assert (cifar.crop, cifar.flip, cifar.classes[3]) == (2, False, "cat")
    assert stated_by("tabular", {"path": "x.csv", "target": "y"}) is None


def test_a_test_set_on_the_coordinator_is_fitted_by_name(tmp_path: Path) -> None:
    file = tmp_path / "test.csv"
    file.write_text("b,label,a\n2,yes,1\n4,no,3\n")
    given: dict[str, Any] = {"columns": ("a", "b"), "classes": ("no", "yes")}
    dataset = described(**given, test_path=str(file))
    assert isinstance(dataset, DescribedDataset)
    assert dataset.test is not None
    assert np.array_equal(dataset.test.inputs.numpy(), [[1, 2], [3, 4]])
    assert dataset.test.targets.tolist() == [1, 0]
    stated = stated_by("described", {**given, "test_path": "/nowhere"})  # a client does not look there
    assert stated == dataset.description
    with pytest.raises(DataError):
        described(**given, test_path=str(tmp_path / "none.csv"))
