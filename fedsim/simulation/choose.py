"""Which engine runs a configuration: a static rule, never a timing.

The rule looks at the model's size, at whether `torch.func.vmap` takes its gradient, and at the
cohort. The choice and its reason are written into the resolved configuration.
"""

from __future__ import annotations

from typing import NamedTuple

import numpy as np

from fedsim.errors import ConfigError, ModelError
from fedsim.local import LocalSpec
from fedsim.models import has_batchnorm, stackable
from fedsim.training.work import Workplace
from fedsim.types import Ids

# Above this a stack of parameters no longer pays on a CPU: the products are then large enough by
# themselves and the stack leaves the cache (docs/architecture.md, Engines).
STACKED_PARAMETER_BYTES = 64 << 10
STACKED_PARAMETER_BYTES_GPU = 8 << 20
# Parameters of one block: stays near the last-level cache.
BLOCK_BYTES = 8 << 20
LARGEST_BLOCK = 1024


class Choice(NamedTuple):
    """An engine, its block size, and the reason in words."""

    name: str
    block: int
    reason: str


def block_size(place: Workplace, spec: LocalSpec, cohort: int, sizes: Ids) -> int:
    """C: as many clients as keep the stacked parameters and one stacked batch within bounds."""
    parameters = place.spec.size * place.spec.dtype.itemsize
    rows = int(sizes.max(initial=1)) if spec.batch_size == 0 else spec.batch_size
    example = place.clients.data.dataset.train.inputs[0].numel() * place.spec.dtype.itemsize
    by_parameters = BLOCK_BYTES // max(1, parameters)
    by_batch = (64 << 20) // max(1, rows * example)
    return int(np.clip(min(by_parameters, by_batch), 1, min(cohort, LARGEST_BLOCK)))


def why_not_stacked(place: Workplace, spec: LocalSpec, sizes: Ids) -> str | None:
    """Why the stacked engine cannot run this model on these clients, None where it can."""
    ragged = (sizes % spec.batch_size).any() if spec.batch_size else len(np.unique(sizes)) > 1
    if has_batchnorm(place.module) and ragged:
        return (
            "batch normalisation takes statistics over the batch, and some clients have a short batch "
            "that a stack would have to pad"
        )
    clients = place.clients
    owner = int(np.argmax(sizes))
    rows = np.zeros((1, 2), np.int64)
    inputs, _ = clients.gather(np.array([owner]), rows, None, train=False)
    verdict = stackable(place.module, inputs[0])
    return None if verdict.possible else verdict.reason


def choose(
    asked: str,
    place: Workplace,
    *,
    spec: LocalSpec,
    cohort: int,
    block: int | None,
    opaque: bool,
) -> Choice:
    """The engine for this run.

    Raises:
        ModelError: ``stacked`` was asked for and cannot be.
    """
    if asked not in ("auto", "loop", "stacked"):
        raise ConfigError(
            f"no engine is called {asked!r}",
            code="FS-CFG-076",
            where="[engine] name",
            why="known: auto, loop, stacked",
            hint="use auto",
        )
    if opaque:
        if asked == "stacked":
            raise _refused("an opaque training function runs one client at a time")
        return Choice("loop", 1, "an opaque training function runs one client at a time")
    if asked == "loop":
        return Choice("loop", 1, "asked for")
    gpu = place.clients.device.type == "cuda"
    limit = STACKED_PARAMETER_BYTES_GPU if gpu else STACKED_PARAMETER_BYTES
    parameters = place.spec.size * place.spec.dtype.itemsize
    sizes_rule = f"{parameters} bytes of parameters, stacking pays up to {limit}"
    if asked == "auto" and parameters > limit:
        return Choice("loop", 1, sizes_rule)
    if asked == "auto" and cohort == 1:
        return Choice("loop", 1, "one client a round")
    sizes = place.clients.data.sizes
    blocker = why_not_stacked(place, spec, sizes)
    if blocker is not None and asked == "stacked":
        raise _refused(blocker)
    if blocker is not None:
        return Choice("loop", 1, blocker)
    size = block or block_size(place, spec, cohort, sizes)
    return Choice("stacked", size, sizes_rule if asked == "auto" else "asked for")


def _refused(why: str) -> ModelError:
    return ModelError(
        "this run cannot use the stacked engine",
        code="FS-MOD-033",
        where="[engine] name = 'stacked'",
        why=why,
        hint="use engine 'loop' or 'auto'; for BatchNorm choose a batch_size that divides every "
        "client's examples, or a model with GroupNorm",
    )
