"""What federation is compared with: one model on all data, and every client alone.

Both are ordinary runs of the same configuration with two keys changed, so that nothing about the
model, the optimiser or the evaluation can differ.
"""

from __future__ import annotations

from typing import Any, Literal

import numpy as np

from fedsim.data.federated import FederatedData

Baseline = Literal["centralised", "local"]


def pooled(data: FederatedData) -> FederatedData:
    """One client that owns what all clients own; hold-outs stay held out."""
    return FederatedData(
        dataset=data.dataset,
        index=data.index,
        offsets=np.array([0, len(data.index)], np.int64),
        holdout_index=data.holdout_index,
        holdout_offsets=np.array([0, len(data.holdout_index)], np.int64),
        description=f"all data of {data.clients} clients ({data.description})",
    )


def baseline_sections(baseline: Baseline) -> dict[str, dict[str, Any]]:
    """The keys that a baseline changes.

    ``centralised``: one client with all data; FedAvg of one client is plain SGD, a round being one
    task of ``[client]``. ``local``: every parameter is personal and everybody works in every round, so
    nothing is shared; the clients' own accuracies are what counts.
    """
    plain: dict[str, Any] = {"name": "fedavg"}
    if baseline == "centralised":
        return {"strategy": plain, "round": {"sample": 1, "overcommit": 1.0, "quorum": None}}
    return {
        "strategy": plain,
        "round": {"sample": "all", "overcommit": 1.0, "quorum": None},
        "model": {"personal": [""]},
        "evaluation": {"clients": "final"},
    }
