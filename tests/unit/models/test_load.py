"""Models by name, by target, by factory, by instance."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from fedsim.errors import ConfigError, ModelError, RegistryError
from fedsim.models import make_model

SHAPE = (1, 8, 8)


class Plain(nn.Module):
    """A model of one's own that knows its sizes."""

    def __init__(self, width: int = 4) -> None:
        super().__init__()
        self.layer = nn.Linear(64, width)

    def forward(self, inputs: Tensor) -> Tensor:
        out: Tensor = self.layer(inputs.flatten(1))
        return out


class Told(nn.Module):
    def __init__(self, input_shape: tuple[int, ...], classes: int, *, depth: int = 1) -> None:
        super().__init__()
        self.told = (input_shape, classes, depth)


def only_classes(classes: int) -> nn.Module:
    return nn.Linear(64, classes)


def anything(**options: Any) -> nn.Module:
    assert not options
    return nn.Linear(1, 1)


def test_a_name_is_looked_up_in_the_registry() -> None:
    model = make_model("mlp", input_shape=SHAPE, classes=3, params={"hidden": [5]})
    assert model(torch.zeros(2, *SHAPE)).shape == (2, 3)


def test_a_class_without_the_offered_parameters_is_called_without_them() -> None:
    model = make_model(Plain, input_shape=SHAPE, classes=3, params={"width": 7})
    assert model(torch.zeros(2, *SHAPE)).shape == (2, 7)


def test_a_class_with_them_is_told_the_shapes_of_the_data() -> None:
    model = make_model(Told, input_shape=SHAPE, classes=3, params={"depth": 2})
    assert isinstance(model, Told)
    assert model.told == (SHAPE, 3, 2)


def test_what_the_user_sets_wins_over_what_the_data_offer() -> None:
    model = make_model(only_classes, input_shape=SHAPE, classes=3, params={"classes": 5})
    assert isinstance(model, nn.Linear)
    assert model.out_features == 5


def test_nothing_is_offered_to_open_keyword_arguments() -> None:
    assert isinstance(make_model(anything, input_shape=SHAPE, classes=3), nn.Linear)


def test_a_module_is_returned_as_it_is() -> None:
    model = Plain()
    assert make_model(model, input_shape=SHAPE, classes=3) is model


def test_a_module_takes_no_parameters() -> None:
    with pytest.raises(ModelError) as caught:
        make_model(Plain(), input_shape=SHAPE, classes=3, params={"width": 2})
    assert caught.value.code == "FS-MOD-003"


@pytest.fixture
def own_code(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A package of the user's in a folder that can be imported from."""
    package = tmp_path / "users_task"
    package.mkdir()
    (package / "__init__.py").write_text("")
    (package / "models.py").write_text(
        "from torch import nn\n"
        "class Net(nn.Module):\n"
        "    def __init__(self, classes, width=2):\n"
        "        super().__init__()\n"
        "        self.layer = nn.Linear(width, classes)\n"
        "class Zoo:\n"
        "    inner = Net\n"
        "ready = Net(4)\n"
        "number = 3\n"
        "def boom():\n"
        "    raise ZeroDivisionError('in the constructor')\n"
        "def wrong():\n"
        "    return {'not': 'a module'}\n"
    )
    (package / "broken.py").write_text("import surely_not_installed_anywhere\n")
    monkeypatch.syspath_prepend(str(tmp_path))
    return package


def test_a_target_names_a_class_in_a_module(own_code: Path) -> None:
    model = make_model("users_task.models:Net", input_shape=SHAPE, classes=6, params={"width": 3})
    assert [tuple(p.shape) for p in model.parameters()] == [(6, 3), (6,)]


def test_a_target_may_have_dots_and_may_be_a_finished_module(own_code: Path) -> None:
    nested = make_model("users_task.models:Zoo.inner", input_shape=SHAPE, classes=6)
    assert type(nested).__name__ == "Net"
    ready = make_model("users_task.models:ready", input_shape=SHAPE, classes=6)
    assert [tuple(p.shape) for p in ready.parameters()] == [(4, 2), (4,)]


@pytest.mark.parametrize(
    ("target", "code", "said"),
    [
        ("users_nowhere.models:Net", "FS-MOD-002", "No module named"),
        ("users_task.models:Nett", "FS-MOD-002", "Nett"),
        ("users_task.broken:Net", "FS-MOD-002", "surely_not_installed_anywhere"),
        (":Net", "FS-MOD-002", "Empty module name"),
        ("users_task.models:boom", "FS-MOD-004", "ZeroDivisionError: in the constructor"),
        ("users_task.models:wrong", "FS-MOD-005", "got dict"),
        ("users_task.models:number", "FS-MOD-005", "got int"),
    ],
)
def test_a_target_that_yields_no_model_is_an_error_with_its_reason(
    own_code: Path, target: str, code: str, said: str
) -> None:
    with pytest.raises(ModelError) as caught:
        make_model(target, input_shape=SHAPE, classes=3)
    assert caught.value.code == code
    assert said in str(caught.value.why)


def test_a_missing_package_and_a_missing_import_get_different_advice(own_code: Path) -> None:
    hints = []
    for target in ("users_nowhere.models:Net", "users_task.broken:Net"):
        with pytest.raises(ModelError) as caught:
            make_model(target, input_shape=SHAPE, classes=3)
        hints.append(caught.value.hint)
    assert "run from the folder" in str(hints[0])
    assert "surely_not_installed_anywhere" in str(hints[1])


def test_an_unknown_name_lists_the_near_misses() -> None:
    with pytest.raises(RegistryError) as caught:
        make_model("resnet81", input_shape=SHAPE, classes=3)
    assert "resnet18" in str(caught.value.hint)


def test_an_unknown_parameter_suggests_the_right_one() -> None:
    with pytest.raises(ModelError) as caught:
        make_model("mlp", input_shape=SHAPE, classes=3, params={"hiden": [5]})
    assert caught.value.code == "FS-MOD-003"
    assert caught.value.hint == "did you mean 'hidden'?"


def test_a_missing_parameter_is_named() -> None:
    def needs(size: int) -> nn.Module:
        return nn.Linear(size, 1)

    with pytest.raises(ModelError) as caught:
        make_model(needs, input_shape=SHAPE, classes=3)
    assert caught.value.code == "FS-MOD-003"
    assert "size" in str(caught.value.why)


def test_an_error_that_a_constructor_raises_on_purpose_is_not_wrapped() -> None:
    def refuses(classes: int) -> nn.Module:
        raise ConfigError("not with these data", code="FS-CFG-999")

    with pytest.raises(ConfigError, match="not with these data"):
        make_model(refuses, input_shape=SHAPE, classes=3)
