"""`fedsim demo`: the built-in showcase."""

from __future__ import annotations

from typing import Annotated

import typer

from fedsim.cli.arguments import Sets
from fedsim.cli.run import start
from fedsim.cli.settings import settings_of
from fedsim.imports import uncollected


def demo(
    context: typer.Context,
    strategy: Annotated[str | None, typer.Option(help="Strategy; fedsim plugins lists them.")] = None,
    clients: Annotated[int | None, typer.Option(min=1, help="Number of clients.")] = None,
    rounds: Annotated[int | None, typer.Option(min=1, help="Number of rounds.")] = None,
    seed: Annotated[int | None, typer.Option(help="Seed of the run.")] = None,
    sets: Sets = None,
) -> None:
    """Train a small federation on handwritten digits; nothing is downloaded.

    20 clients that hold different digits, 20 rounds of FedAvg, a report at the end.
    """
    with uncollected(keep=True):
        from fedsim.config import load_config
    flags: dict[str, tuple[str, object]] = {
        "strategy.name": ("--strategy", strategy),
        "data.partition.clients": ("--clients", clients),
        "run.rounds": ("--rounds", rounds),
        "run.seed": ("--seed", seed),
    }
    given = {key: pair for key, pair in flags.items() if pair[1] is not None}
    start(settings_of(context), load_config(preset="demo", sets=sets or [], flags=given))
