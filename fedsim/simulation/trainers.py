"""From the ``[engine]`` table to who trains: the trainer, its gradient function, and the crew."""

from __future__ import annotations

from typing import NamedTuple

from fedsim.config import Config, to_dict
from fedsim.config_sections import EngineSection
from fedsim.errors import ConfigError
from fedsim.grads import ModelGradient
from fedsim.opaque_client import OpaqueClient
from fedsim.simulation.allocator import settle_allocator
from fedsim.simulation.choose import Choice
from fedsim.simulation.crew import Crew
from fedsim.simulation.flat import FlatTrainer
from fedsim.simulation.flat_precision import why_not_bfloat16
from fedsim.simulation.fused import FusedTrainer
from fedsim.simulation.opaque import OpaqueTrainer
from fedsim.simulation.pool import Pool
from fedsim.simulation.pool_process import Recipe
from fedsim.simulation.stacked import StackedTrainer
from fedsim.training.loop import LoopTrainer
from fedsim.training.place import eager
from fedsim.training.work import Trainer, Workplace


class Training(NamedTuple):
    """How the clients of a run train.

    Args:
        place: what they share; its gradient function is the one to make algorithms with.
        trainer: of blocks of them.
    """

    place: Workplace
    trainer: Trainer


def make_training(
    choice: Choice, place: Workplace, asked: EngineSection, opaque: OpaqueClient | None
) -> Training:
    """The trainer that was chosen.

    Args:
        asked: the ``[engine]`` table; opaque: the user's own training function, None without.

    Raises:
        ConfigError: FS-CFG-078, this machine does not compute in bfloat16.
    """
    if opaque is not None:
        return Training(place, OpaqueTrainer(place, opaque))
    if choice.workers > 1 or choice.name in ("fused", "flat"):
        settle_allocator()  # also where workers train: their clients' states go through this process
    if choice.name == "fused":
        return Training(place, FusedTrainer(place, choice.block))
    if choice.name == "stacked":
        return Training(place, StackedTrainer(place, choice.block))
    if choice.name == "flat":
        _check_precision(place, asked)
        flat = FlatTrainer(place, layout=asked.layout, precision=asked.precision)
        return Training(flat.place, flat)
    # By backward it is faster where nothing is stacked; what replaces the gradient stays as it is.
    place = eager(place) if isinstance(place.grad_fn, ModelGradient) else place
    return Training(place, LoopTrainer(place))


def make_crew(choice: Choice, config: Config, python_objects: list[str]) -> Crew | None:
    """The processes that train, None for this one alone."""
    if choice.workers == 1:
        return None
    names = [name.strip() for name in config.engine.device.split(",")]
    devices = names if len(names) > 1 else []
    return Pool(choice.workers, devices=devices, recipe=Recipe(to_dict(config), python_objects))


def _check_precision(place: Workplace, asked: EngineSection) -> None:
    why = why_not_bfloat16(place.clients.device) if asked.precision == "bfloat16" else None
    if why is not None:
        raise ConfigError(
            "this machine does not compute in bfloat16",
            code="FS-CFG-078",
            where="[engine] precision = 'bfloat16'",
            why=why,
            hint="use precision = 'float32'",
        )
