"""Which engine runs a configuration: a static rule, never a timing.

The rule looks at the model's size, at whether `torch.func.vmap` takes its gradient, and at the
cohort. The choice and its reason are written into the resolved configuration.
"""

from __future__ import annotations

from typing import NamedTuple

import numpy as np
import torch
from torch.func import vmap
from torch.nn.modules.batchnorm import _BatchNorm

from fedsim.buffers import Buffers
from fedsim.errors import ModelError
from fedsim.flat import flat_of
from fedsim.local import LocalSpec
from fedsim.simulation.trainer import Workplace, buffer_dict
from fedsim.types import Batch, Ids

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


def why_not_stacked(place: Workplace, buffers: Buffers, spec: LocalSpec, sizes: Ids) -> str | None:
    """Why the stacked engine cannot run this model on these clients, None where it can."""
    batch_norm = [n for n, m in place.module.named_modules() if isinstance(m, _BatchNorm)]
    ragged = (sizes % spec.batch_size).any() if spec.batch_size else len(np.unique(sizes)) > 1
    if batch_norm and ragged:
        return (
            f"{batch_norm[0]} takes statistics over the batch, and some clients have a short batch "
            "that a stack would have to pad"
        )
    two = place.clients.gather(np.array([0, 0]), np.zeros((2, 2), np.int64), None, train=False)
    like = torch.zeros((), dtype=place.clients.dtype, device=place.clients.device)
    x = place.spec.stack(flat_of(place.module, place.spec).to(like.device), 2)
    stacked_buffers = {n: torch.stack([b, b]) for n, b in buffer_dict(place, buffers).items()}
    batch = Batch(
        two[0],
        two[1],
        like.new_ones(2, 2),
        like,
        like.long(),
        like.long(),
        like.bool(),
        like.bool(),
        like,
        stacked_buffers,
    )
    dims = Batch(0, 0, 0, None, None, None, None, None, None, 0, 0)  # type: ignore[arg-type]
    try:
        vmap(place.grad_fn, in_dims=(0, dims), randomness="different")(x, batch)
    except (RuntimeError, ValueError, TypeError) as error:
        return f"torch.func.vmap refuses the model: {str(error).splitlines()[0]}"
    return None


def choose(
    asked: str,
    place: Workplace,
    buffers: Buffers,
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
    if opaque:
        if asked == "stacked":
            raise _refused("an opaque training function runs one client at a time")
        return Choice("loop", 1, "an opaque training function runs one client at a time")
    if asked == "loop":
        return Choice("loop", 1, "asked for")
    sizes = place.clients.data.sizes
    blocker = why_not_stacked(place, buffers, spec, sizes)
    size = block or block_size(place, spec, cohort, sizes)
    if asked == "stacked":
        if blocker is not None:
            raise _refused(blocker)
        return Choice("stacked", size, "asked for")
    if blocker is not None:
        return Choice("loop", 1, blocker)
    gpu = place.clients.device.type == "cuda"
    limit = STACKED_PARAMETER_BYTES_GPU if gpu else STACKED_PARAMETER_BYTES
    parameters = place.spec.size * place.spec.dtype.itemsize
    if parameters > limit:
        return Choice("loop", 1, f"{parameters} bytes of parameters, stacking pays up to {limit}")
    if cohort == 1:
        return Choice("loop", 1, "one client a round")
    return Choice("stacked", size, f"{parameters} bytes of parameters, stacking pays up to {limit}")


def _refused(why: str) -> ModelError:
    return ModelError(
        "this run cannot use the stacked engine",
        code="FS-MOD-033",
        where="[engine] name = 'stacked'",
        why=why,
        hint="use engine 'loop' or 'auto'; for BatchNorm choose a batch_size that divides every "
        "client's examples, or a model with GroupNorm",
    )
