"""Answers that are added up as they are read: the bits of one block after the other, or not at all."""

from __future__ import annotations

import hashlib
import math
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import Tensor

from fedsim import bundle
from fedsim.flat import ParamSpec
from fedsim.folding import update_norms
from fedsim.reduce import Sums
from fedsim.server.answers import Answer, block_of
from fedsim.server.objects import Objects
from fedsim.server.segments import Segments, Window
from fedsim.server.summing import block_of_all
from fedsim.strategy import fold_deltas
from fedsim.types import Floats, UpdateBlock

RUN = "0123456789ab"
SIZE = 700
MANY = 75  # more than two tiles
SPEC = ParamSpec(("w",), ((SIZE,),), torch.float32)


def by_examples(block: UpdateBlock) -> Floats:
    return block.examples.astype(np.float64)


class Inline:
    """Answers in a segment, and how they are folded one by one."""

    def __init__(self, folder: Path) -> None:
        self.objects, self.segments = Objects(folder / "objects"), Segments(folder / "segments")
        self.answers: list[Answer] = []
        self.draw = torch.Generator().manual_seed(5)

    def add(self, tensors: dict[str, Tensor] | None = None, **fields: object) -> None:
        number = len(self.answers)
        if tensors is None:
            tensors = {"vectors/delta": torch.randn(SIZE, generator=self.draw) * 10.0 ** (number % 9 - 4)}
        content = bundle.encode(tensors)
        (offset,) = self.segments.of(Window(RUN, 3, 0)).append([content])
        values: dict[str, object] = {
            "task_id": number.to_bytes(16, "big"), "client": number, "version": 3,
            "digest": hashlib.sha256(content).digest(), "size": len(content), "place": f"3/0/{offset}",
            "examples": number % 13 + 1, "local_steps": 2, "normaliser": math.nan, "seconds": 0.5 * number,
            "metrics": {"loss": 1.0 / (number + 1)},
        }  # fmt: skip
        self.answers.append(Answer(**{**values, **fields}))  # type: ignore[arg-type]

    def one_by_one(self) -> list[UpdateBlock]:
        return [
            block_of(
                answer, SPEC, state_version=answer.client, device=torch.device("cpu"), run_id=RUN,
                objects=self.objects, segments=self.segments,
            )
            for answer in self.answers
        ]  # fmt: skip

    def together(self, weigh: object = by_examples) -> UpdateBlock | None:
        return block_of_all(
            self.answers, SPEC, weigh, state_version=np.arange(len(self.answers)), run_id=RUN,  # type: ignore[arg-type]
            segments=self.segments,
        )  # fmt: skip


@pytest.fixture
def inline(tmp_path: Path) -> Inline:
    made = Inline(tmp_path)
    for _ in range(MANY):
        made.add()
    return made


def test_the_sum_has_the_bits_of_one_block_after_the_other(inline: Inline) -> None:
    whole, sums = inline.together(), Sums()
    assert whole is not None
    assert whole.summed is not None
    singles = inline.one_by_one()
    for single in singles:
        sums.add(fold_deltas(None, single, by_examples(single), None)[0])
    want = sums.result()
    got = fold_deltas(None, whole, by_examples(whole), None)[0]
    assert want.keys() == got.keys()
    for name in want:
        assert want[name].numpy().tobytes() == got[name].numpy().tobytes(), name
    assert whole.summed.norms.tolist() == [float(update_norms(single)[0][0]) for single in singles]


def test_what_is_said_of_each_client_is_the_same(inline: Inline) -> None:
    whole, singles = inline.together(), inline.one_by_one()
    assert whole is not None
    assert len(whole) == MANY
    numbers = ("examples", "local_steps", "normaliser", "train_seconds")
    for name in ("ids", "base_version", "state_version", *numbers):
        parts = [getattr(single, name) for single in singles]
        np.testing.assert_array_equal(getattr(whole, name), np.concatenate(parts), err_msg=name)
        assert getattr(whole, name).dtype == parts[0].dtype
    np.testing.assert_array_equal(
        whole.metrics["loss"], np.concatenate([single.metrics["loss"] for single in singles])
    )


@pytest.mark.parametrize(
    ("tensors", "fields"),
    [
        ({"vectors/delta": torch.full((SIZE,), math.inf)}, {}),
        ({"vectors/delta": torch.zeros(SIZE + 1)}, {}),
        ({"vectors/delta": torch.zeros(SIZE, dtype=torch.float64)}, {}),
        ({"vectors/delta": torch.zeros(SIZE), "scalars/rate": torch.zeros(1)}, {}),
        ({"vectors/other": torch.zeros(SIZE)}, {}),
        ({}, {}),
        (None, {"place": "object"}),
        (None, {"place": "3/0/100000000"}),
        (None, {"place": "3/0/1"}),  # not where an update begins
        (None, {"metrics": {"accuracy": 1.0}}),
    ],
)
def test_whatever_is_out_of_the_ordinary_is_left_to_the_general_way(
    inline: Inline, tensors: dict[str, Tensor] | None, fields: dict[str, object]
) -> None:
    inline.add(tensors, **fields)
    assert inline.together() is None


def test_weights_whose_sum_depends_on_the_order_are_left_to_the_general_way(inline: Inline) -> None:
    uneven = np.random.default_rng(0).random(MANY)
    assert np.add.accumulate(uneven)[-1] != uneven.sum()
    assert inline.together(lambda block: uneven) is None
    assert inline.together(lambda block: None) is None


def test_few_answers_are_left_to_the_general_way(tmp_path: Path) -> None:
    few = Inline(tmp_path)
    for _ in range(3):
        few.add()
    assert few.together() is None
