"""`fedsim plugins show` of a strategy: equation, where it runs, and what it costs."""

from __future__ import annotations

import textwrap
from typing import Any

from fedsim import describe_strategy as told
from fedsim.cli import output
from fedsim.schema import Factory
from fedsim.strategy import Strategy

WIDTH = 100
HEADER = ("parameters", "down", "up", "server keeps", "server reads", "client keeps")


def heading(factory: Factory) -> list[str]:
    """Summary, papers, equation and symbols; the whole docstring where it has no equation."""
    text = told.read(factory)
    if not text.equation:
        return text.whole.splitlines()
    lines = [text.summary, ""]
    for paper in text.papers:
        lines += textwrap.wrap(paper, WIDTH, initial_indent="paper  ", subsequent_indent=" " * 7)
    lines += ["", *(f"    {line}".rstrip() for line in text.equation.splitlines())]
    if text.symbols:
        lines += ["", *textwrap.wrap(text.symbols, WIDTH)]
    return lines


def abilities(factory: Factory, name: str, *, size: int | None) -> list[str]:
    """Where it can run, what it equals, its page, and the table of costs.

    Args:
        size: D of the model, None for the letter.
    """
    missing = told.required(factory)
    if missing:
        return [f"Where it runs and what it costs is known with {', '.join(missing)} alone."]
    strategy = factory()
    if not isinstance(strategy, Strategy):
        return []
    facts = told.runs(strategy)
    entries: dict[str, object] = {
        "schedulers": ", ".join(facts.schedulers),
        "engines": ", ".join(facts.engines),
        "opaque training functions": "yes" if facts.opaque else "no",
        "local optimisers": ", ".join(facts.optimizers) or "none under the default [client] table",
        "must be told": "; ".join(told.NEEDS[need] for need in facts.needs) or "nothing",
        "reduces to": strategy.traits.neutral or "nothing else",
        "page": told.page(factory, name) or "of its own distribution",
    }
    rows = []
    for cost in told.costs(factory):
        found = told.in_bytes(cost, size)
        rows.append([told.setting(cost.parameters) or "default", *found.values()])
    table = output.columns(HEADER, rows)
    return [*output.pairs(entries), "", *legend(size), "", *table]


def legend(size: int | None) -> list[str]:
    """What the letters of the table mean."""
    model = f"D = {size:,}" if size is not None else "D"
    more = "" if size is not None else "--model-size D gives numbers."
    return [
        f"Cost in bytes, for a model of {model} float32 values; down and up of one client's task, memory of",
        "the server beside the model. n clients took part so far, b are in a block, m in a window; buffers",
        f"and scalars come on top. {more}".rstrip(),
    ]


def data(factory: Factory, name: str, *, size: int | None) -> dict[str, Any]:
    """The same for a program (Any: JSON)."""
    text = told.read(factory)
    found: dict[str, Any] = {
        "papers": list(text.papers),
        "equation": text.equation,
        "symbols": text.symbols,
        "page": told.page(factory, name),
        "traits": {},
        "costs": [],
    }
    strategy = None if told.required(factory) else factory()
    if not isinstance(strategy, Strategy):
        return found
    traits, facts = strategy.traits, told.runs(strategy)
    found["traits"] = {
        "modes": list(facts.modes),
        "schedulers": list(facts.schedulers),
        "engines": list(facts.engines),
        "opaque": facts.opaque,
        "optimizers": list(facts.optimizers),
        "needs": list(facts.needs),
        "reduction": traits.reduction,
        "client_state": traits.client_state,
        "vectors_down": traits.down_factor,
        "vectors_up": traits.up_factor,
        "server_vectors": traits.server_vectors,
        "server_vectors_per_client": traits.server_vectors_per_client,
        "equals": traits.neutral,
    }
    found["costs"] = [{**cost._asdict(), "bytes": told.in_bytes(cost, size)} for cost in told.costs(factory)]
    return found
