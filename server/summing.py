"""Small answers of a window, added up as they are read: one block instead of one for each client.

A block costs the fold a few hundred microseconds whatever it holds, which is most of what the answer of a
small model costs. Where the strategy needs nothing but the sum of the updates, the rows are read, checked
and added here, in the order of the plan and by the very operations of one block after the other: the sum
has the same bits. Whatever is out of the ordinary (files, other tensors, a damaged update, weights whose
sum depends on the order) is left to the general way.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

import numpy as np
import torch

from fedsim.bundle import BundleError, TensorSpec, check_schema, read_header
from fedsim.engine import Weigh
from fedsim.errors import EnvironmentProblem
from fedsim.flat import ParamSpec
from fedsim.folding import row_norms
from fedsim.server.answers import Answer, placed
from fedsim.server.segments import Segment, Segments
from fedsim.types import Floats, Ids, Summed, UpdateBlock
from fedsim.wire import VECTORS

FEW = 8
"""Below so many answers a block for each is quick enough."""
_DELTA = f"{VECTORS}delta"
_CODES = {torch.float32: ("F32", "<f4"), torch.float64: ("F64", "<f8")}
_TILE = 32  # rows that are in memory at a time


def block_of_all(
    answers: Sequence[Answer],
    spec: ParamSpec,
    weigh: Weigh,
    *,
    state_version: Ids,
    run_id: str,
    segments: Segments,
) -> UpdateBlock | None:
    """All these answers as one block whose updates are added up; None where they have to be looked at singly.

    Args:
        answers: in the order of the plan.
        spec: layout of the model, which lies on the CPU.
        weigh: answers -> weights.
        state_version: [b], see `UpdateBlock`.
    """
    if len(answers) < FEW or spec.personal or spec.dtype not in _CODES:
        return None
    if any(answer.place == "object" for answer in answers):
        return None
    if any(answer.metrics.keys() != answers[0].metrics.keys() for answer in answers):
        return None
    block = _without_rows(answers, state_version)
    weights = weigh(block)
    if weights is None or np.add.accumulate(weights)[-1] != weights.sum():
        return None
    summed = _added_up(answers, weights, spec, run_id, segments)
    return None if summed is None else replace(block, summed=summed)


def _without_rows(answers: Sequence[Answer], state_version: Ids) -> UpdateBlock:
    metrics = {name: np.array([a.metrics[name] for a in answers]) for name in answers[0].metrics}
    return UpdateBlock(
        np.array([a.client for a in answers], np.int64),
        np.array([a.version for a in answers], np.int64),
        np.array([a.examples for a in answers], np.int64),
        np.array([a.local_steps for a in answers], np.int64),
        np.array([a.normaliser for a in answers]),
        np.array([a.seconds for a in answers]),
        {},
        {},
        metrics,
        state_version=state_version,
    )


def _added_up(
    answers: Sequence[Answer], weights: Floats, spec: ParamSpec, run_id: str, segments: Segments
) -> Summed | None:
    """Σ weight · update in float64; None where an update cannot be read, is of another form or not finite."""
    code, dtype = _CODES[spec.dtype]
    wanted = [TensorSpec(_DELTA, code, (spec.size,))]
    total, part = np.empty(spec.size), np.empty(spec.size)
    tile = np.empty((_TILE, spec.size), dtype)
    norms: list[Floats] = []
    opened: dict[str, Segment] = {}
    for start in range(0, len(answers), _TILE):
        some = answers[start : start + _TILE]
        rows = tile[: len(some)]
        for row, answer in zip(rows, some, strict=True):
            content = _content(answer, wanted, opened, run_id, segments)
            if content is None:
                return None
            row[:] = np.frombuffer(content, dtype)
        found, finite = row_norms(torch.from_numpy(rows))
        if not finite.all():
            return None  # whoever refuses some of them needs the others
        norms.append(found)
        for position, row in enumerate(rows, start):
            # As `weighted_sum` of one row and `Sums.add`: the product in float64, then the sum.
            np.multiply(row, weights[position], out=part if position else total, dtype=np.float64)
            if position:
                np.add(total, part, out=total)
    return Summed(weights, torch.from_numpy(total), np.concatenate(norms))


def _content(
    answer: Answer, wanted: Sequence[TensorSpec], opened: dict[str, Segment], run_id: str, segments: Segments
) -> memoryview | None:
    """The values of an update; None where it cannot be read, or holds something else."""
    name, _, offset = answer.place.rpartition("/")
    try:
        if name not in opened:
            opened[name] = segments.of(placed(answer.place, run_id)[0])
        content = opened[name].read(int(offset), answer.size)
        header = read_header(content, len(content))
        check_schema(header, wanted)
    except (BundleError, EnvironmentProblem, OSError):
        return None  # the general way says so
    return content[header.body :]
