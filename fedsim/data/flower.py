"""Partitioners of flwr-datasets by name, for experiments that must match one made with them.

They work on a table with an object per partition and suit hundreds of clients, not thousands: its
Dirichlet partitioner gives up at 1,000 clients with alpha = 0.1 on MNIST, which ``dirichlet``
divides in milliseconds.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable, Mapping
from typing import Any

import numpy as np

from fedsim.data.partition_scheme import Ints, Scheme, offsets_of
from fedsim.errors import ConfigError, DataError

_LABEL, _OWNER, _ROW = "label", "owner", "row"
_BY_OWNER = frozenset({"NaturalIdPartitioner", "GroupedNaturalIdPartitioner"})


def flower(*, method: str, options: Mapping[str, Any] | None = None) -> Scheme:
    """Any flwr-datasets partitioner that divides examples.

    Args:
        method: class name, such as ``DirichletPartitioner``.
        options: its own keyword arguments, such as ``{alpha = 0.5}``. ``num_partitions`` is the
            number of clients, ``partition_by`` the label (or the owner for the natural-id classes)
            and ``seed`` comes from the partition's seed, unless they are given here.

    Raises:
        ConfigError: FS-DAT-046, no such class, or options that it does not take.
        DataError (when it divides): FS-DAT-047, the class gave up or needs what the data lack.
    """
    given = dict(options or {})
    build, accepted = _class_of(method)
    unknown = [key for key in given if key not in accepted]
    if unknown:
        raise _refused(f"{method} takes no option {unknown[0]!r}", f"it takes: {', '.join(accepted)}")

    def divide(
        labels: Ints, owners: Ints | None, clients: int, rng: np.random.Generator
    ) -> tuple[Ints, Ints]:
        by_owner = method in _BY_OWNER
        if by_owner and owners is None:
            raise DataError(
                f"{method} needs data with natural clients",
                code="FS-DAT-047",
                where="data.partition",
                why="no owner is recorded for any example",
                hint="choose another partitioner, or name the client column",
            )
        arguments: dict[str, Any] = {
            "num_partitions": clients,
            "partition_by": _OWNER if by_owner else _LABEL,
            "seed": int(rng.integers(2**31)),
        }
        arguments = {key: value for key, value in arguments.items() if key in accepted} | given
        if arguments.get("num_partitions") == 0:
            raise ConfigError(
                "the number of clients is missing",
                code="FS-DAT-040",
                where="data.partition.clients",
                why=f"{method} does not know it from the data",
                hint="set data.partition.clients",
            )
        return _rows_of(method, build, arguments, _columns(labels, owners))

    return Scheme(divide, needs_clients=False)


def _class_of(name: str) -> tuple[Callable[..., Any], list[str]]:
    """The class and the names of its arguments."""
    from flwr_datasets import partitioner as module

    usable = sorted(
        key
        for key in module.__all__
        # Vertical ones divide columns; the first name is the abstract class.
        if key != "Partitioner" and not key.startswith("Vertical")
    )
    if name not in usable:
        raise _refused(
            f"flwr-datasets has no partitioner {name!r} that divides examples",
            f"known: {', '.join(usable)}",
        )
    build: Callable[..., Any] = getattr(module, name)
    return build, list(inspect.signature(build).parameters)


def _columns(labels: Ints, owners: Ints | None) -> dict[str, Ints]:
    columns = {_ROW: np.arange(len(labels), dtype=np.int64), _LABEL: labels}
    return columns if owners is None else columns | {_OWNER: owners}


def _rows_of(
    name: str, build: Callable[..., Any], arguments: Mapping[str, Any], columns: Mapping[str, Ints]
) -> tuple[Ints, Ints]:
    """``(index, offsets)`` of the partitions that the class makes."""
    import datasets

    try:
        instance = build(**arguments)
        instance.dataset = datasets.Dataset.from_dict(dict(columns)).with_format("numpy")
        parts = [
            # A slice is one array; a column would be read row by row.
            np.asarray(instance.load_partition(i)[:][_ROW], dtype=np.int64)
            for i in range(int(instance.num_partitions))
        ]
    # Any: each class has its own ways of refusing, none of them documented.
    except Exception as error:
        raise DataError(
            f"{name} could not divide the data",
            code="FS-DAT-047",
            where="data.partition",
            why=f"{type(error).__name__}: {error}",
            hint="change its options, or use fedsim's own partitioner of the same kind",
        ) from error
    index = np.concatenate(parts) if parts else np.zeros(0, dtype=np.int64)
    return index, offsets_of(np.array([len(part) for part in parts], dtype=np.int64))


def _refused(what: str, why: str) -> ConfigError:
    return ConfigError(
        what,
        code="FS-DAT-046",
        where="data.partition",
        why=why,
        hint="see the flwr-datasets documentation of that class",
    )
