"""Every registered strategy, built-in or of another distribution, as parameters of the contract tests."""

from __future__ import annotations

import inspect
from typing import Any, Literal, get_args, get_origin, get_type_hints

import pytest

from fedsim.errors import FedsimError
from fedsim.registry import load, names
from fedsim.strategy import Strategy

STRATEGIES = names("strategies")


def registered(name: str) -> Strategy:
    """The strategy with its default parameters; skips where it has none, or needs another scheduler."""
    factory = load("strategies", name)
    needed = [
        p.name
        for p in inspect.signature(factory).parameters.values()
        if p.default is p.empty and p.kind in (p.KEYWORD_ONLY, p.POSITIONAL_OR_KEYWORD)
    ]
    if needed:
        pytest.skip(f"the strategy {name!r} has no default for {', '.join(needed)}")
    strategy = factory()
    assert isinstance(strategy, Strategy), f"the factory of {name!r} returned {type(strategy).__name__}"
    if "sync" not in strategy.traits.modes:
        pytest.skip(f"the strategy {name!r} runs under asynchronous schedulers only")
    return strategy


def with_defaults() -> dict[str, Strategy]:
    """All strategies with their default parameters, under any scheduler, without those that have none."""
    made: dict[str, Strategy] = {}
    for name in STRATEGIES:
        try:
            made[name] = load("strategies", name)()
        except TypeError:  # a parameter without default
            continue
    return made


def choices(name: str) -> list[dict[str, Any]]:
    """Every single parameter of a strategy set to every value that its `Literal` annotation allows."""
    factory = load("strategies", name)
    registered(name)
    hints = get_type_hints(factory)
    return [
        {parameter: value}
        for parameter, hint in hints.items()
        if get_origin(hint) is Literal
        for value in get_args(hint)
    ]


def chosen(name: str, parameters: dict[str, Any]) -> Strategy | None:
    """The strategy with these parameters; None where they need others beside them."""
    try:
        strategy = load("strategies", name)(**parameters)
    except (FedsimError, ValueError):
        return None
    assert isinstance(strategy, Strategy)
    return strategy


def placed(name: str, state_at: str | None) -> Strategy:
    """The strategy as registered, or with its client states held elsewhere; skips where it has no choice."""
    if state_at is None:
        return registered(name)
    strategy = chosen(name, {"state_at": state_at}) if {"state_at": state_at} in choices(name) else None
    if strategy is None:
        pytest.skip(f"{name!r} does not choose where client states are held")
    return strategy
