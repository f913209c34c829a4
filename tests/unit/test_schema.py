"""A factory's keyword parameters as the schema of a table."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, Literal

import numpy as np
import pytest

from fedsim.errors import ConfigError, RegistryError
from fedsim.schema import build, describe, type_name, validate


def factory(
    *,
    rate: float,
    count: int = 3,
    mode: Literal["fast", "exact"] = "fast",
    sizes: Sequence[int] = (1, 2),
    pair: tuple[int, ...] = (),
    path: Path | str | None = None,
    wait_seconds: float = 1.0,
    classes: int = 10,
) -> dict[str, Any]:
    """A factory.

    Args:
        rate: of learning,
            in two lines.
        count, mode: described together.
        classes: filled in.
    """
    if rate > 1.0:
        raise ValueError(f"rate must be at most 1, got {rate}")
    return dict(locals())


def refused(parameters: dict[str, Any], code: str, function: Callable[..., Any] = factory) -> ConfigError:
    with pytest.raises(ConfigError) as caught:
        build(function, parameters, where="[strategy] name = 'x'")
    assert caught.value.code == code, caught.value
    return caught.value


def test_a_table_becomes_the_arguments_with_the_defaults_filled_in() -> None:
    made = build(factory, {"rate": 1, "sizes": [4, 5], "pair": [7], "wait_seconds": "2m"}, where="[x]")
    assert made["rate"] == 1.0
    assert isinstance(made["rate"], float)
    assert list(made["sizes"]) == [4, 5]
    assert made["pair"] == (7,)
    assert made["wait_seconds"] == 120.0
    assert made["count"] == 3


def test_what_fedsim_fills_in_reaches_the_factory_and_is_no_key_of_the_table() -> None:
    made = build(factory, {"rate": 0.1}, where="[x]", given={"classes": 4, "unused": 1})
    assert made["classes"] == 4
    with pytest.raises(ConfigError) as caught:
        build(factory, {"rate": 0.1, "classes": 4}, where="[model]", given={"classes": 4})
    assert caught.value.code == "FS-CFG-004"


def test_validate_gives_every_parameter_but_the_given_ones() -> None:
    values = validate(factory, {"rate": 0.5}, "[x]", given=("classes",))
    assert list(values) == ["rate", "count", "mode", "sizes", "pair", "path", "wait_seconds"]


def test_an_unknown_key_is_refused_with_the_nearest_known_one() -> None:
    error = refused({"rate": 0.1, "cuont": 3}, "FS-CFG-004")
    assert error.what == "unknown key `cuont` in [strategy], did you mean `count`?"
    assert error.why is not None
    assert "rate, count, mode" in error.why


def test_an_unknown_key_like_no_other_is_refused_with_the_known_ones() -> None:
    error = refused({"rate": 0.1, "zzzzzz": 3}, "FS-CFG-004")
    assert "did you mean" not in error.what


@pytest.mark.parametrize(
    ("key", "value", "wanted"),
    [
        ("rate", "0.1", "expected a number"),
        ("rate", True, "expected a number"),
        ("count", 2.5, "expected a whole number"),
        ("count", True, "expected a whole number"),
        ("mode", "slow", "expected 'fast' or 'exact'"),
        ("sizes", 3, "expected a list"),
        ("sizes", ["a"], "expected a whole number"),
        ("path", 3, "expected"),
        ("wait_seconds", "2 weeks", "a time is"),
    ],
)
def test_a_wrong_type_is_refused_with_the_value_and_what_was_wanted(
    key: str, value: Any, wanted: str
) -> None:
    error = refused({"rate": 0.1, key: value}, "FS-CFG-005")
    assert key in error.what
    assert error.why is not None
    assert wanted in error.why


def test_a_missing_parameter_is_named() -> None:
    assert "`rate`" in refused({}, "FS-CFG-007").what


def test_a_value_that_the_factory_refuses_names_the_table() -> None:
    error = refused({"rate": 2.0}, "FS-CFG-006")
    assert error.where == "[strategy] name = 'x'"
    assert error.why == "rate must be at most 1, got 2.0"


def test_numbers_of_numpy_and_paths_of_a_program_are_taken() -> None:
    made = build(factory, {"rate": np.float32(0.5), "count": np.int64(4), "path": Path("a")}, where="[x]")
    assert (made["rate"], made["count"], str(made["path"])) == (0.5, 4, "a")


def test_objects_that_json_does_not_hold_are_checked_as_they_are() -> None:
    def with_function(*, rule: Callable[[int], int], count: int = 1) -> tuple[Any, int]:
        return rule, count

    rule, count = build(with_function, {"rule": abs, "count": 2}, where="[x]")
    assert (rule(-3), count) == (3, 2)
    refused({"rule": abs, "count": "2"}, "FS-CFG-005", with_function)


def test_a_factory_with_a_type_that_cannot_be_found_is_an_error_of_the_plugin() -> None:
    def broken(*, rate: Missing = 1.0) -> None:  # type: ignore[name-defined]  # noqa: F821
        return None

    with pytest.raises(RegistryError) as caught:
        build(broken, {}, where="[x]")
    assert caught.value.code == "FS-REG-003"


def test_parameters_are_described_from_signature_and_docstring() -> None:
    found = {p.name: p for p in describe(factory)}
    assert found["rate"].required
    assert found["rate"].doc == "of learning, in two lines."
    assert found["mode"].type == '"fast" | "exact"'
    assert found["mode"].doc == found["count"].doc == "described together."
    assert found["sizes"].type == "list of int"
    assert found["path"].type == "path | text | none"
    assert (found["count"].default, found["count"].required) == (3, False)


def test_types_are_named_in_words() -> None:
    assert type_name(list[str]) == "list of text"
    assert type_name(dict[str, int]) == "table"
    assert type_name(int | None) == "int | none"
