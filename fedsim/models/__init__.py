"""Models: a small zoo, and any `nn.Module` of one's own.

A factory of the zoo has the signature ``(*, input_shape, classes, <its own parameters>)``; the
first two come from the data. Outputs are logits [B, classes] (binary data have two classes),
[B, T, classes] for next-token data, and [B, 1] for regression, where `classes` is 1. Weights are
initialised by torch's defaults from its global generator: the caller seeds it.
"""

from __future__ import annotations

from fedsim.models.check import check_model, has_batchnorm, has_dropout
from fedsim.models.load import make_model
from fedsim.models.stacking import Stackable, stackable

__all__ = [
    "Stackable",
    "check_model",
    "has_batchnorm",
    "has_dropout",
    "make_model",
    "stackable",
]
