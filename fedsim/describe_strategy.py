"""What a strategy is, where it can run and what it costs, told from its docstring and its traits.

The command line prints this, and the pages of ``docs/strategies`` are checked against it. Nothing here
is typed by hand for one strategy, so that a strategy of another distribution is described as well.
"""

from __future__ import annotations

import inspect
import re
import sys
from collections.abc import Iterable, Mapping
from typing import Any, Literal, NamedTuple, get_args, get_origin, get_type_hints

import numpy as np
import torch
from torch import Tensor
from torch.utils import _pytree as pytree

from fedsim.errors import ConfigError, FedsimError
from fedsim.flat import ParamSpec
from fedsim.local import LocalAlgorithm, LocalSpec
from fedsim.optimizers import make_optimizer
from fedsim.schema import Factory, shown
from fedsim.strategy import Strategy
from fedsim.types import Aux, Batch, Message, Population
from fedsim.vector import Vector

SCHEDULERS: Mapping[str, tuple[str, ...]] = {"sync": ("sync",), "async": ("immediate", "buffer", "window")}
"""The built-in schedulers of each mode."""

NEEDS: Mapping[str, str] = {
    "rates": "how often each client takes part",
    "durations": "how long each client's task takes",
    "period": "how long a window is, by the scheduler window",
}
"""What a strategy may have to be told of the population, in words."""

FLOAT_BYTES = 4
"""Of one value of a model in the default dtype, float32."""

OPTIMIZERS: tuple[str, ...] = get_args(get_type_hints(LocalSpec)["optimizer"])

_PLACEMENT = "state_at"
_D = 7  # of the model that client states are counted on: no number of scalars is taken for it by chance


class Text(NamedTuple):
    """What a module's docstring says of a strategy, "" or () where it does not follow the convention.

    Args:
        summary: first line.
        papers: authors, year and title of each work that is cited.
        symbols: what the letters of `equation` mean, on one line.
        equation: the algorithm box, both halves, without its indent.
        whole: the docstring.
    """

    summary: str
    papers: tuple[str, ...]
    symbols: str
    equation: str
    whole: str


class Cost(NamedTuple):
    """What a strategy costs under some parameters, in model-sized vectors.

    Args:
        parameters: those that differ from the defaults, name -> value.
        down, up: of one task.
        server: that the server keeps beside the model.
        per_client: that it keeps besides for each client that took part.
        gathered: whether all answers of a window are in memory at once, else one block of them.
        client: that a client keeps between its tasks.
        optimizer: whether it keeps the state of its local optimiser too.
    """

    parameters: Mapping[str, Any]
    down: int
    up: int
    server: int
    per_client: int
    gathered: bool
    client: int
    optimizer: bool


class Runs(NamedTuple):
    """Where a strategy can run.

    Args:
        modes: of schedulers, ``sync`` and ``async``.
        engines: of the simulation, the fastest first where the model allows it.
        optimizers: local ones that it takes.
        opaque: whether it takes a user's own training function.
        needs: what it must be told of the population.
    """

    modes: tuple[str, ...]
    engines: tuple[str, ...]
    optimizers: tuple[str, ...]
    opaque: bool
    needs: tuple[str, ...]

    @property
    def schedulers(self) -> tuple[str, ...]:
        """Names of the built-in schedulers that it can run under."""
        return tuple(name for mode in self.modes for name in SCHEDULERS[mode])


def read(factory: Factory) -> Text:
    """What the docstring of the factory's module says."""
    whole = inspect.getdoc(sys.modules[factory.__module__]) or ""
    found = re.search(r"(?:^|(?<=\s))Symbols\b.*?(?=\n\n|\Z)", whole, re.DOTALL)
    symbols = re.sub(r"\s+", " ", found[0]) if found else ""
    return Text(whole.partition("\n")[0], papers(whole), symbols, equation(whole), whole)


def papers(text: str) -> tuple[str, ...]:
    """Every ``Authors year, "title"`` of a text, on one line each."""
    joined = re.sub(r"\s+", " ", text)
    name = r"(?:[A-Z][\w'’-]+|et al\.|and)"
    cited = re.findall(rf'((?:{name},? )+(?:19|20)\d\d), "([^"]+)"', joined)
    return tuple(f'{authors.removeprefix("and ")}, "{title}"' for authors, title in cited)


def equation(text: str) -> str:
    """The first indented block of a docstring, with the blank lines inside it."""
    lines = text.splitlines()
    inside = [bool(line.strip()) and line.startswith("    ") for line in lines]
    if True not in inside:
        return ""
    first = inside.index(True)
    last = first
    for at in range(first, len(lines)):
        if inside[at]:
            last = at
        elif lines[at].strip():
            break
    return inspect.cleandoc("\n" + "\n".join(lines[first : last + 1]))


def required(factory: Factory) -> list[str]:
    """Names of the parameters without a default: without them nothing is known of the costs."""
    parameters = inspect.signature(factory).parameters.values()
    return [p.name for p in parameters if p.default is inspect.Parameter.empty]


def runs(strategy: Strategy) -> Runs:
    """Where it can run, by its traits and by what its client half refuses."""
    traits = strategy.traits
    modes = tuple(mode for mode in SCHEDULERS if mode in traits.modes)
    # A user's own function neither shows its direction nor says how long its steps were.
    opaque = not traits.client_hooks and not traits.needs_normaliser
    fitting = tuple(name for name in OPTIMIZERS if _takes(strategy, name))
    engines = (*(("fused",) if traits.affine else ()), "stacked", "flat", "loop")
    return Runs(modes, engines, fitting, opaque, tuple(sorted(traits.needs)))


def costs(factory: Factory) -> list[Cost]:
    """Under the default parameters, and under every one or two others that change them.

    Tried are all values of ``state_at``, and with each of them every other parameter that has a finite
    number of values; parameters that are numbers are left at their defaults.
    """
    choices = dict(_choices(factory))
    placements = [{_PLACEMENT: value} for value in choices.pop(_PLACEMENT, ())] or [{}]
    found: list[Cost] = []
    for placement in placements:
        usual = _cost(factory, placement)
        if usual is None:
            continue
        found.append(usual)
        for name, values in choices.items():
            for value in values:
                other = _cost(factory, {**placement, name: value})
                if other is not None and other[1:] != usual[1:]:
                    found.append(other)
    return found


def in_bytes(cost: Cost, size: int | None = None) -> dict[str, str]:
    """The costs in bytes, as texts; ``0`` for none.

    Args:
        size: D; None leaves it a letter.

    Returns:
        down and up for a client and a task; server, what it keeps beside the model; reads, the answers
        that it holds while it aggregates; client, what a client keeps. n is the number of clients that
        took part so far, b that of a block, m that of a window.
    """
    rows = "m" if cost.gathered else "b"
    kept = [_amount(cost.client, size)] if cost.client else []
    kept += ["its optimiser's state"] if cost.optimizer else []
    held = [_amount(cost.server, size)] if cost.server else []
    held += [f"{_amount(cost.per_client, size)} n"] if cost.per_client else []
    return {
        "down": _amount(cost.down, size),
        "up": _amount(cost.up, size),
        "server": " + ".join(held) or "0",
        "reads": f"{_amount(cost.up, size)} {rows}",
        "client": " + ".join(kept) or "0",
    }


def setting(parameters: Mapping[str, Any]) -> str:
    """Parameters as they are written in a configuration; "" of none."""
    return ", ".join(f"{name} = {shown(value)}" for name, value in parameters.items())


def page(factory: Factory, name: str) -> str | None:
    """Path of its page from the root of the repository; None for a strategy of another distribution."""
    own = factory.__module__.partition(".")[0] == "fedsim"
    return f"docs/strategies/{name}.md" if own else None


def _amount(vectors: int, size: int | None) -> str:
    if not vectors:
        return "0"
    return f"{FLOAT_BYTES * vectors} D" if size is None else f"{FLOAT_BYTES * vectors * size:,}"


def _choices(factory: Factory) -> Iterable[tuple[str, tuple[Any, ...]]]:
    """Parameters that have finitely many values, and these."""
    hints = get_type_hints(factory)
    for name in inspect.signature(factory).parameters:
        hint = hints.get(name)
        if hint is bool:
            yield name, (False, True)
        elif get_origin(hint) is Literal:
            yield name, get_args(hint)


def _cost(factory: Factory, parameters: Mapping[str, Any]) -> Cost | None:
    """None where the strategy refuses these parameters beside its other defaults."""
    try:
        strategy = factory(**parameters)
    except (FedsimError, ValueError):
        return None
    traits = strategy.traits
    held, optimizer = _held_by_client(strategy) if traits.client_state == "client" else (0, False)
    return Cost(
        parameters,
        traits.down_factor,
        traits.up_factor,
        traits.server_vectors,
        traits.server_vectors_per_client,
        traits.reduction == "gather",
        held,
        optimizer,
    )


def _held_by_client(strategy: Strategy) -> tuple[int, bool]:
    """Model-sized vectors in a fresh client state, and whether the optimiser's state is kept too."""
    spec = ParamSpec(("x",), ((_D,),), torch.float32)
    ones = np.ones(1)
    everybody = Population(1, np.ones(1, np.int64), ones, ones)
    sent = strategy.broadcast(strategy.init(torch.zeros(_D), spec, everybody))
    algorithm = _client_half(strategy, LocalSpec())
    message = Message({name: spec.unflatten(v) for name, v in sent.vectors.items()}, sent.scalars)
    leaves = pytree.tree_leaves(algorithm.fresh(message))
    vectors = [leaf for leaf in leaves if isinstance(leaf, Tensor) and leaf.numel() == _D]
    return len(vectors), algorithm.keeps_optimizer


def _takes(strategy: Strategy, optimizer: Any) -> bool:
    spec = LocalSpec(optimizer=optimizer)
    if strategy.traits.needs_normaliser and not make_optimizer(spec).has_normaliser:
        return False
    try:
        _client_half(strategy, spec)
    except ConfigError:
        return False
    return True


def _client_half(strategy: Strategy, spec: LocalSpec) -> LocalAlgorithm:
    def never(x: Vector, batch: Batch) -> tuple[Vector, Aux]:
        raise AssertionError("nothing is trained here")

    return strategy.local(never, spec)
