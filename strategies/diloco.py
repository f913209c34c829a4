"""DiLoCo: many local steps of an optimiser that is never reset, Nesterov momentum on the server.

Douillard et al. 2023, "DiLoCo: distributed low-communication training of language models",
Algorithm 1. Symbols: w model, m outer momentum, g outer gradient, μ momentum, η_o outer rate, H inner
steps, S the participants.

    client i:  x <- w;  H steps of AdamW, whose moments and step count go on from this client's last task
    server:    g = -(1/|S|) Σ_S Δ_i
               m <- μ m + g
               w <- w - η_o (g + μ m)

The server is FedAvgM with Nesterov's momentum (v = -m); the inner optimiser, its rate and H are those
of the ``[client]`` table.
"""

from __future__ import annotations

from typing import Literal

from fedsim.local import LocalAlgorithm, LocalSpec, affine
from fedsim.strategies.fedavg import check_finite
from fedsim.strategies.fedavgm import fedavgm
from fedsim.strategy import Strategy, Traits
from fedsim.types import GradFn


def diloco(
    *,
    outer_lr: float = 0.7,
    outer_momentum: float = 0.9,
    persist_optimizer: bool = True,
    weighting: Literal["uniform", "examples"] = "uniform",
) -> Strategy:
    """Nesterov steps along the mean update of clients that keep their optimiser.

    Args:
        outer_lr: η_o.
        outer_momentum: μ in [0, 1).
        persist_optimizer: each client keeps its optimiser's state between its tasks; false starts it
            anew, as every other strategy does.
        weighting: of the mean update, one client one vote or by examples.
    """
    check_finite(outer_lr=outer_lr)
    if not 0.0 <= outer_momentum < 1.0:
        raise ValueError(f"outer_momentum must lie in [0, 1), got {outer_momentum}")
    outer = fedavgm(server_lr=outer_lr, momentum=outer_momentum, nesterov=True, weighting=weighting)

    def local(grad_fn: GradFn, spec: LocalSpec) -> LocalAlgorithm:
        return affine(grad_fn)._replace(keeps_optimizer=persist_optimizer)

    return outer._replace(
        local=local,
        traits=Traits(
            client_state="client" if persist_optimizer else "none",
            # The driver cannot keep the optimiser of an opaque training function.
            client_hooks=persist_optimizer,
            affine=True,
            columnwise=True,
            sums_only=True,
            server_vectors=1,
            neutral="outer_momentum = 0, outer_lr = 1, persist_optimizer = false -> fedavg, weighting "
            "uniform",
        ),
    )
