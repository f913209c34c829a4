"""Plugins by name: one table of entry points for the built-in ones and for third parties.

An entry point of group ``fedsim.<kind>`` names a factory; the factory's keyword parameters are its
configuration schema. Nothing is scanned and nothing registers itself by being imported.
"""

from __future__ import annotations

import difflib
from collections.abc import Callable
from functools import cache
from importlib.metadata import EntryPoint, entry_points
from typing import Any

from fedsim.errors import RegistryError

Factory = Callable[..., Any]  # Any: each group's factories return that group's own type

_PREFIX = "fedsim."


@cache
def _plugins() -> tuple[EntryPoint, ...]:
    """Of every kind; to find them the files of all installed distributions are read, so it is done once."""
    found = entry_points()
    groups = [group for group in found.groups if group.startswith(_PREFIX)]
    return tuple(entry for group in sorted(groups) for entry in found.select(group=group))


@cache
def _group(kind: str) -> dict[str, EntryPoint]:
    return {entry.name: entry for entry in _plugins() if entry.group == _PREFIX + kind}


def distributions() -> set[str]:
    """Names of the installed distributions that have plugins."""
    owners = {id(entry.dist): entry.dist for entry in _plugins()}
    return {owner.name for owner in owners.values() if owner is not None}


def names(kind: str) -> list[str]:
    """The known names of one kind (``strategies``, ``models``, ``datasets``, …), sorted."""
    return sorted(_group(kind))


def load(kind: str, name: str) -> Factory:
    """The factory registered as `name` in the group ``fedsim.<kind>``.

    Raises:
        RegistryError: the name is unknown (near misses are listed) or its module fails to import.
    """
    known = _group(kind)
    entry = known.get(name)
    if entry is None:
        near = difflib.get_close_matches(name, known, n=3)
        hint = f"did you mean {' or '.join(repr(n) for n in near)}?" if near else None
        raise RegistryError(
            f"no {kind} plugin is called {name!r}",
            why=f"known: {', '.join(sorted(known)) or 'none'}",
            hint=hint or f"fedsim plugins lists what is installed under {kind}",
        )
    try:
        factory: Factory = entry.load()
    except (ImportError, AttributeError) as error:
        raise RegistryError(
            f"the {kind} plugin {name!r} cannot be loaded",
            code="FS-REG-002",
            where=entry.value,
            why=f"{type(error).__name__}: {error}",
            hint="reinstall the distribution that provides it",
        ) from error
    return factory
