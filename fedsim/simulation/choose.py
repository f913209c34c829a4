"""Which engine runs a configuration, and in how many processes: a static rule, never a timing.

The rule looks at the model, at the local algorithm, at the cohort and at the number of cores. The choice
and its reason are written into the resolved configuration, from which a run is resumed and verified. The
number of processes changes no number: blocks are planned, and folded in the order of the plan, without it.
"""

from __future__ import annotations

from typing import NamedTuple

import numpy as np
from torch import nn

from fedsim.config import OWN_ENGINES
from fedsim.config_sections import EngineSection
from fedsim.errors import ConfigError, ModelError
from fedsim.grads import ModelGradient
from fedsim.local import LocalAlgorithm, LocalSpec
from fedsim.models import has_batchnorm, stackable
from fedsim.runs.manifest import cores
from fedsim.simulation.fused import fused_block
from fedsim.simulation.fused_fit import why_not_fused
from fedsim.simulation.pool_process import why_no_fork
from fedsim.training.work import Workplace
from fedsim.types import Ids

# Above these sizes of a model a stack of them leaves the cache, and one client at a time is faster on a
# CPU (docs/performance.md): soon for convolutions and recurrent layers, which are slow under vmap, later for
# linear layers. A fused update touches the parameters half as often, and pays for longer.
STACKED_PARAMETER_BYTES = 64 << 10
STACKED_DENSE_PARAMETER_BYTES = 1 << 20
FUSED_PARAMETER_BYTES = 4 << 20
STACKED_PARAMETER_BYTES_GPU = 8 << 20
# Parameters of one block under vmap: stays near the last-level cache.
BLOCK_BYTES = 8 << 20
LARGEST_BLOCK = 1024
# A round with less work is over before other processes have heard of it. One parameter counts as one
# multiply-add for an example and a pass; convolutions, which use theirs more often, only do more.
POOL_MULTIPLY_ADDS = 300_000_000
# Into so many blocks for each core such a round is cut at least, so that processes have something to share.
# Where sums are enough, blocks take equally long, and fewer of them share more.
LEAST_BLOCKS, LEAST_BLOCKS_OF_SUMS = 2, 1


_SLOW_IN_STACKS = (nn.Conv1d, nn.Conv2d, nn.Conv3d, nn.RNNBase)


class Choice(NamedTuple):
    """An engine, its block size, how many processes train, and the reason in words."""

    name: str
    block: int
    workers: int
    reason: str


def block_size(place: Workplace, spec: LocalSpec, cohort: int) -> int:
    """C under vmap: as many clients as keep the stacked parameters and one stacked batch within bounds."""
    parameters = place.spec.size * place.spec.dtype.itemsize
    sizes = place.clients.data.sizes
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
    asked: EngineSection,
    place: Workplace,
    *,
    spec: LocalSpec,
    algorithm: LocalAlgorithm | None,
    cohort: int,
    sums_only: bool = False,
) -> Choice:
    """The engine for this run.

    Args:
        asked: the ``[engine]`` table.
        algorithm: the client half of the strategy under `spec`; None for an opaque training function.
        cohort: clients of a round.
        sums_only: of the strategy's traits.

    Raises:
        ModelError: the engine that was asked for cannot run this.
    """
    if asked.name not in OWN_ENGINES:
        raise ConfigError(
            f"no engine is called {asked.name!r}",
            code="FS-CFG-076",
            where="[engine] name",
            why=f"known: {', '.join(OWN_ENGINES)}",
            hint="use auto",
        )
    name, reason = _named(asked.name, place, spec, algorithm, cohort)
    if asked.precision != "float32" and name != "flat":
        if asked.name != "auto":
            raise _refused(asked.name, f"flat alone computes in {asked.precision}")
        name, reason = "flat", f"{asked.precision} was asked for"
    long = _multiply_adds(place, spec, cohort) >= POOL_MULTIPLY_ADDS
    block = 1
    if name in ("fused", "stacked"):
        sums_only = sums_only and name == "fused"
        if name == "fused":
            sized = fused_block(place, cohort, sums_only=sums_only)
        else:
            sized = block_size(place, spec, cohort)
        blocks = cores() * (LEAST_BLOCKS_OF_SUMS if sums_only else LEAST_BLOCKS)
        block = asked.block or (min(sized, -(-cohort // blocks)) if long else sized)
    workers = 1
    if long and place.clients.device.type == "cpu" and why_no_fork(None) is None:
        workers = min(cores(), -(-cohort // block))
    return Choice(name, block, asked.workers or workers, reason)


def _named(
    asked: str, place: Workplace, spec: LocalSpec, algorithm: LocalAlgorithm | None, cohort: int
) -> tuple[str, str]:
    """The engine and the reason."""
    if algorithm is None:
        reason = "an opaque training function runs one client at a time"
        if asked not in ("auto", "loop"):
            raise _refused(asked, reason)
        return "loop", reason
    if asked in ("loop", "flat"):
        return asked, "asked for"
    plain = isinstance(place.grad_fn, ModelGradient)
    if asked == "fused":
        blocker = why_not_fused(place, spec, algorithm, plain=plain)
        if blocker is not None:
            raise _refused(asked, blocker)
        return asked, "asked for"
    sizes = place.clients.data.sizes
    if asked == "stacked":
        blocker = why_not_stacked(place, spec, sizes)
        if blocker is not None:
            raise _refused(asked, blocker)
        return asked, "asked for"
    if cohort == 1:
        return "flat", "one client a round"
    gpu = place.clients.device.type == "cuda"
    parameters = place.spec.size * place.spec.dtype.itemsize
    said = f"{parameters} bytes of parameters"
    if parameters <= FUSED_PARAMETER_BYTES:
        unfused = why_not_fused(place, spec, algorithm, plain=plain)
        if unfused is None:
            return "fused", f"linear layers under SGD, {said}; fusing pays up to {FUSED_PARAMETER_BYTES}"
    else:
        unfused = f"{said}, fusing pays up to {FUSED_PARAMETER_BYTES}"
    slow = any(isinstance(layer, _SLOW_IN_STACKS) for layer in place.module.modules())
    limit = STACKED_PARAMETER_BYTES if slow else STACKED_DENSE_PARAMETER_BYTES
    limit = STACKED_PARAMETER_BYTES_GPU if gpu else limit
    if parameters > limit:
        return "flat", f"not fused: {unfused}; not stacked: {said}, stacking pays up to {limit}"
    unstacked = why_not_stacked(place, spec, sizes)
    if unstacked is not None:
        return "flat", f"not fused: {unfused}; not stacked: {unstacked}"
    return "stacked", f"not fused: {unfused}; {said}, stacking pays up to {limit}"


def _multiply_adds(place: Workplace, spec: LocalSpec, cohort: int) -> float:
    """Of a forward pass of all that the clients of a round do, roughly."""
    sizes = place.clients.data.sizes
    if not spec.steps:
        return float(cohort * sizes.mean() * spec.epochs * place.spec.size)
    rows = np.minimum(sizes, spec.batch_size) if spec.batch_size else sizes
    return float(cohort * rows.mean() * spec.steps * place.spec.size)


def _refused(asked: str, why: str) -> ModelError:
    hint = "use engine 'auto', or 'flat', which runs everything"
    if "batch normalisation" in why:
        hint += "; or a batch_size that divides every client's examples, or a model with GroupNorm"
    return ModelError(
        f"this run cannot use the {asked} engine",
        code="FS-MOD-033",
        where=f"[engine] name = {asked!r}",
        why=why,
        hint=hint,
    )
