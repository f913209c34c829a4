"""`fedsim plugins show` of a strategy: equation, paper, where it runs, what it costs."""

from __future__ import annotations

import pytest

from fedsim.registry import names
from tests.unit.cli.invoked import Program


def test_the_page_of_a_strategy_in_the_terminal_has_every_part(fedsim: Program) -> None:
    out = fedsim("plugins", "show", "feddyn").out
    for part in (
        'paper  Acar et al. 2021, "Federated learning based on dynamic regularization"\n',
        "    server:    h̄ <- h̄ + (1/N) Σ_S Δ_i ",
        "Symbols: w the broadcast model",
        "alpha      float                0.1 ",
        "schedulers                 sync\n",
        "engines                    fused, stacked, flat, loop\n",
        "opaque training functions  no\n",
        "local optimisers           sgd, adam, adamw\n",
        "reduces to                 no parameters make it fedavg",
        "page                       docs/strategies/feddyn.md\n",
        'state_at = "client"  4 D   4 D  4 D           4 D b         4 D\n',
        'state_at = "server"  8 D   4 D  4 D + 4 D n   4 D b         0\n',
    ):
        assert part in out, part


def test_costs_are_bytes_where_the_size_of_the_model_is_given(fedsim: Program) -> None:
    out = fedsim("plugins", "show", "feddyn", "--model-size", "1000").out
    assert 'state_at = "server"  8,000  4,000  4,000 + 4,000 n  4,000 b       0\n' in out
    shown = fedsim("plugins", "show", "feddyn", "--model-size", "1000", "--format", "json").document["data"]
    assert [cost["bytes"]["down"] for cost in shown["costs"]] == ["4,000", "8,000"]
    assert [cost["down"] for cost in shown["costs"]] == [1, 2]


def test_an_asynchronous_strategy_names_its_schedulers_and_what_it_must_be_told(fedsim: Program) -> None:
    out = fedsim("plugins", "show", "async_fedavg").out
    assert "schedulers                 immediate, buffer, window\n" in out
    assert "must be told               how long each client's task takes\n" in out
    assert "opaque training functions  yes\n" in out


def test_a_strategy_that_divides_by_step_lengths_takes_sgd_alone_and_no_opaque_function(
    fedsim: Program,
) -> None:
    out = fedsim("plugins", "show", "fednova").out
    assert "local optimisers           sgd\n" in out
    assert "opaque training functions  no\n" in out


@pytest.mark.parametrize("name", names("strategies"))
def test_every_strategy_has_an_equation_a_paper_and_costs(fedsim: Program, name: str) -> None:
    shown = fedsim("plugins", "show", name, "--format", "json").document["data"]
    assert shown["equation"]
    assert shown["papers"]
    assert shown["costs"]
    assert shown["traits"]["schedulers"]
    assert shown["traits"]["optimizers"]


@pytest.mark.parametrize(
    "words", [("feddyn", "--model-size", "0"), ("mlp", "--model-size", "5"), ("feddyn", "--model-size", "x")]
)
def test_a_size_that_means_nothing_is_refused(fedsim: Program, words: tuple[str, ...]) -> None:
    called = fedsim("plugins", "show", *words, "--format", "json")
    assert (called.code, called.document["data"]["code"]) == (2, "FS-CFG-020")
    assert "--model-size" in called.document["data"]["what"]
