"""Dividing a data set among clients: `make_partition`.

The partition has its own seed, so the same clients can be trained under many training seeds. Its
steps (division, choice of natural clients, filling, hold-out, noise) draw from separate streams of
that seed: asking for a hold-out does not change who owns what.
"""

from __future__ import annotations

import difflib
import inspect
from collections.abc import Mapping
from dataclasses import dataclass
from enum import IntEnum
from typing import Any, Literal

import numpy as np

from fedsim.data.dataset import Dataset
from fedsim.data.federated import FederatedData, with_feature_noise
from fedsim.data.partition_answer import checked_division
from fedsim.data.partition_repair import (
    fill_short_clients,
    hold_out,
    missing_examples,
    too_few,
    without_clients,
)
from fedsim.data.partition_scheme import Divide, Ints, Scheme, at_least, out_of_range
from fedsim.errors import ConfigError, DataError
from fedsim.registry import load


class _Stream(IntEnum):
    """Children of the partition's seed; the numbers are part of what a seed means."""

    DIVIDE = 0
    CHOOSE = 1
    FILL = 2
    HOLD_OUT = 3
    NOISE = 4


@dataclass(frozen=True, slots=True)
class _Division:
    """Who owns which rows, before hold-outs."""

    index: Ints
    offsets: Ints
    clients: Ints  # [N] number of each client before any was dropped
    note: str  # what the rules changed, for the description

    @property
    def sizes(self) -> Ints:
        return np.diff(self.offsets)


def make_partition(
    dataset: Dataset,
    partitioner: str | Divide,
    *,
    clients: int | None = None,
    seed: int = 0,
    min_examples: int = 1,
    on_empty: Literal["error", "keep"] = "error",
    holdout: float = 0.0,
    **params: Any,  # Any: the partitioner's own parameters, checked against its factory
) -> FederatedData:
    """Divide the training examples of `dataset` among clients.

    Args:
        partitioner: a name registered under ``fedsim.partitioners``, or a function
            ``(labels, owners, clients, rng) -> assignment`` or ``(index, offsets)``.
        clients: N; may be left out where the data know their clients (``natural``), where a smaller
            number takes that many of them at random.
        seed: of the partition alone, >= 0.
        min_examples: every client ends with at least this many examples: short clients are filled
            from the largest ones (`fedsim.data.partition_repair`), short natural clients are
            dropped. 0 switches the rule off. A hold-out never takes a client below it.
        on_empty: ``error`` refuses clients that are still without any example; ``keep`` leaves
            clients that the partitioner left empty as they are and fills only the others.
        holdout: fraction in [0, 1) of each client's examples kept back for its own evaluation.
        params: of the partitioner, such as ``alpha=0.3``.

    Raises:
        RegistryError: no partitioner of that name.
        ConfigError: FS-DAT-040 number of clients missing or impossible, FS-DAT-043 unknown or
            missing parameter, FS-DAT-044 a value out of range.
        DataError: FS-DAT-041 clients without examples, FS-DAT-042 no natural clients, FS-DAT-045 a
            partitioner returned something else than a division.
    """
    if on_empty not in ("error", "keep"):
        raise out_of_range("on_empty", on_empty, "'error' or 'keep'")
    if clients is not None:
        at_least("clients", clients, 1)
    at_least("seed", seed, 0)
    at_least("min_examples", min_examples, 0)
    if not 0.0 <= holdout < 1.0:
        raise out_of_range("holdout", holdout, "a fraction, at least 0 and below 1")
    name = partitioner if isinstance(partitioner, str) else _name_of(partitioner)
    scheme, complete = _scheme(partitioner, params)
    keep_empty = on_empty == "keep"

    division = _divide(
        dataset,
        scheme,
        clients,
        seed=seed,
        min_examples=min_examples,
        keep_empty=keep_empty,
        name=name,
    )
    empty = int((division.sizes == 0).sum())
    if empty and not keep_empty:
        raise DataError(
            f"{empty} of {len(division.sizes)} clients have no example",
            code="FS-DAT-041",
            where="data.partition",
            why=f"{name} left them empty and min_examples = {min_examples} does not fill them",
            hint='set min_examples = 1 or more, use fewer clients, or set on_empty = "keep"',
        )
    parts = hold_out(
        division.index,
        division.offsets,
        fraction=holdout,
        min_examples=min_examples,
        rng=_stream(seed, _Stream.HOLD_OUT),
    )
    names = tuple(dataset.owner_names[c] for c in division.clients) if _named(dataset, scheme) else ()
    data = FederatedData(
        dataset=dataset,
        index=parts.index,
        offsets=parts.offsets,
        holdout_index=parts.holdout_index,
        holdout_offsets=parts.holdout_offsets,
        names=names,
        description=_describe(name, complete, seed) + division.note,
    )
    if scheme.deviations is None:
        return data
    noise_seed = int(_stream(seed, _Stream.NOISE).integers(2**63))
    return with_feature_noise(data, scheme.deviations(data.clients), seed=noise_seed)


def _stream(seed: int, purpose: _Stream) -> np.random.Generator:
    return np.random.default_rng(np.random.SeedSequence(seed, spawn_key=(int(purpose),)))


def _named(dataset: Dataset, scheme: Scheme) -> bool:
    return scheme.short == "drop" and bool(dataset.owner_names)


def _name_of(partitioner: Divide) -> str:
    return str(getattr(partitioner, "__qualname__", type(partitioner).__name__))


def _describe(name: str, params: Mapping[str, Any], seed: int) -> str:
    """``dirichlet(alpha=0.3), seed 1``."""
    inside = ", ".join(f"{key}={value}" for key, value in params.items())
    return f"{name}({inside}), seed {seed}"


def _scheme(partitioner: str | Divide, params: Mapping[str, Any]) -> tuple[Scheme, Mapping[str, Any]]:
    """The partitioner with its parameters, and all of these, defaults included."""
    if isinstance(partitioner, str):
        factory = load("partitioners", partitioner)
        signature = inspect.signature(factory)
        try:
            bound = signature.bind(**params)
        except TypeError as error:
            accepted = list(signature.parameters)
            raise _bad_parameters(partitioner, params, accepted, str(error)) from error
        bound.apply_defaults()
        built, params = factory(**params), bound.arguments
    else:
        if params:
            raise _bad_parameters(_name_of(partitioner), params, [], "a function takes none")
        built = partitioner
    return built if isinstance(built, Scheme) else Scheme(built), params


def _bad_parameters(name: str, params: Mapping[str, Any], accepted: list[str], why: str) -> ConfigError:
    unknown = [key for key in params if key not in accepted]
    near = [match for key in unknown for match in difflib.get_close_matches(key, accepted, n=1)]
    return ConfigError(
        f"the parameters do not fit the partitioner {name!r}",
        code="FS-DAT-043",
        where="data.partition",
        why=why,
        hint=f"did you mean {near[0]!r}?" if near else f"it takes: {', '.join(accepted) or 'no parameters'}",
    )


def _divide(
    dataset: Dataset,
    scheme: Scheme,
    clients: int | None,
    *,
    seed: int,
    min_examples: int,
    keep_empty: bool,
    name: str,
) -> _Division:
    """Run the partitioner and apply the rule for short clients."""
    labels = dataset.labels
    if scheme.needs_clients and clients is None:
        raise ConfigError(
            "the number of clients is missing",
            code="FS-DAT-040",
            where="data.partition.clients",
            why='only data with owners (kind = "natural") know it themselves',
            hint="set data.partition.clients",
        )
    answer = scheme(labels, dataset.owners, clients or 0, _stream(seed, _Stream.DIVIDE))
    index, offsets = checked_division(answer, labels, clients, scheme, name)
    everyone = np.arange(len(offsets) - 1, dtype=np.int64)
    short = too_few(np.diff(offsets), min_examples, keep_empty=keep_empty)
    if scheme.short == "drop":
        kept = _choose(
            everyone[~short],
            clients,
            rng=_stream(seed, _Stream.CHOOSE),
            owners=len(everyone),
            min_examples=min_examples,
        )
        index, offsets = without_clients(index, offsets, kept)
        note = f", {int(short.sum())} short clients dropped" if short.any() else ""
        return _Division(index, offsets, kept, note)
    if not short.any():
        return _Division(index, offsets, everyone, "")
    if _shared(index, len(labels)):
        # Moving a row that several clients own would not make anyone larger by a new example.
        raise DataError(
            f"{int(short.sum())} of {len(everyone)} clients have under {min_examples} examples",
            code="FS-DAT-041",
            where="data.partition",
            why=f"{name} lets clients share rows, so none can be moved between them",
            hint="lower min_examples, or give each client more examples in the partitioner",
        )
    lacking = missing_examples(np.diff(offsets), min_examples, keep_empty=keep_empty)
    if lacking:
        raise _impossible(len(everyone), len(index), min_examples=min_examples)
    filled = fill_short_clients(
        index,
        offsets,
        min_examples=min_examples,
        keep_empty=keep_empty,
        rng=_stream(seed, _Stream.FILL),
    )
    note = f", {filled.moved} examples moved to {filled.clients} short clients"
    return _Division(filled.index, filled.offsets, everyone, note)


def _impossible(clients: int, examples: int, *, min_examples: int) -> ConfigError:
    return ConfigError(
        f"{clients} clients of at least {min_examples} examples each cannot be made",
        code="FS-DAT-040",
        where="data.partition.clients",
        why=f"the data have {examples} training examples",
        hint=f"use at most {examples // max(min_examples, 1)} clients, lower min_examples, or let "
        'clients share examples (kind = "fixed_size")',
    )


def _choose(
    available: Ints,
    clients: int | None,
    *,
    rng: np.random.Generator,
    owners: int,
    min_examples: int,
) -> Ints:
    """The natural clients to keep, in their own order."""
    if len(available) == 0 or (clients is not None and clients > len(available)):
        wanted = "clients" if clients is None else f"{clients} clients"
        raise ConfigError(
            f"the data have too few natural clients for {wanted}",
            code="FS-DAT-040",
            where="data.partition.clients",
            why=f"{len(available)} of {owners} have at least {min_examples} examples",
            hint="lower min_examples or leave data.partition.clients out",
        )
    if clients is None:
        return available
    return np.sort(rng.choice(available, size=clients, replace=False))


def _shared(index: Ints, rows: int) -> bool:
    return bool((np.bincount(index, minlength=rows) > 1).any())
