"""Answers that do not count: not finite, without weight, from clients whose training failed."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import numpy as np
import pytest
import torch

from fedsim.engine import Failed
from fedsim.types import Ids, UpdateBlock
from tests.scripted import Scripted, answer, arrive, federation, mean_of


def test_a_client_whose_training_raised_is_lost_and_named() -> None:
    engine = Scripted([(1.0, arrive(*range(6)))], broken=(2,))
    fed = federation(engine)
    outcome = fed.run_window()
    assert (outcome.record["received"], outcome.record["lost"]) == (5, 1)
    assert (2, "training raised") in outcome.reasons
    columns = outcome.clients.columns
    row = columns["client"].index(2)
    assert (columns["verdict"][row], columns["reason"][row]) == ("lost", "training raised")


def test_every_row_of_the_client_log_has_its_own_reason() -> None:
    # Refused first, accepted later, lost at the end: three shapes of row.
    engine = Scripted(
        [(1.0, arrive(0, 1, 2, 3)), (2.0, Failed(np.array([4, 5]), "the device dropped out"))],
        damaged=(0,),
        broken=(2,),
    )
    outcome = federation(engine).run_window()
    columns = outcome.clients.columns
    assert {len(column) for column in columns.values()} == {6}
    rows = {
        client: (verdict, reason)
        for client, verdict, reason in zip(
            columns["client"], columns["verdict"], columns["reason"], strict=True
        )
    }
    assert rows == {
        0: ("refused", "the update is not finite"),
        1: ("accepted", None),
        2: ("lost", "training raised"),
        3: ("accepted", None),
        4: ("lost", "the device dropped out"),
        5: ("lost", "the device dropped out"),
    }


@pytest.mark.parametrize("value", [float("nan"), float("inf"), -float("inf")])
def test_one_value_that_is_not_finite_refuses_the_whole_update(value: float) -> None:
    def damaged(ids: Ids, base_version: Ids, weigh: Any = None) -> Iterator[UpdateBlock]:
        block = answer(ids.tolist())
        block.vectors["delta"][1, 0] = value
        yield block

    engine = Scripted([(1.0, arrive(*range(6)))])
    engine.collect = damaged  # type: ignore[assignment, method-assign]
    fed = federation(engine)
    assert fed.run_window().record["refused"] == 1
    torch.testing.assert_close(fed.model, mean_of(0, 2, 3, 4, 5))


def test_a_large_but_finite_update_is_no_refusal() -> None:
    def large(ids: Ids, base_version: Ids, weigh: Any = None) -> Iterator[UpdateBlock]:
        block = answer(ids.tolist())
        yield UpdateBlock(
            block.ids, block.base_version, block.examples, block.local_steps, block.normaliser,
            block.train_seconds, {"delta": torch.full((6, 2), 3e38, dtype=torch.float32)},
        )  # fmt: skip

    engine = Scripted([(1.0, arrive(*range(6)))])
    engine.collect = large  # type: ignore[assignment, method-assign]
    outcome = federation(engine).run_window()
    assert outcome.record["refused"] == 0


def test_scalars_that_are_not_finite_refuse_the_update_too() -> None:
    def with_scalar(ids: Ids, base_version: Ids, weigh: Any = None) -> Iterator[UpdateBlock]:
        for client in ids.tolist():
            block = answer([client])
            value = torch.tensor([float("nan") if client == 3 else 1.0], dtype=torch.float64)
            yield UpdateBlock(
                block.ids, block.base_version, block.examples, block.local_steps, block.normaliser,
                block.train_seconds, block.vectors, {"tau": value},
            )  # fmt: skip

    engine = Scripted([(1.0, arrive(*range(6)))])
    engine.collect = with_scalar  # type: ignore[assignment, method-assign]
    outcome = federation(engine).run_window()
    assert [client for client, _ in outcome.reasons] == [3]


def test_a_weight_that_is_not_finite_refuses_the_update() -> None:
    engine = Scripted([(1.0, arrive(*range(6)))])
    fed = federation(engine)

    def weigh(state: Any, meta: Any) -> Any:
        return np.where(meta.ids == 4, np.nan, 1.0), meta.ids == 5

    fed.strategy = fed.strategy._replace(weigh=weigh)
    outcome = fed.run_window()
    assert dict(outcome.reasons) == {4: "the update has no weight", 5: "the update has no weight"}
    torch.testing.assert_close(fed.model, mean_of(0, 1, 2, 3))
