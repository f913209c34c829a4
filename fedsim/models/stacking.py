"""Can a block of clients be trained at once? Found out by trying, never by the names of layers."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import NamedTuple

import torch
from torch import Tensor, nn
from torch.func import functional_call, grad, vmap

from fedsim.keys import own_torch_generator
from fedsim.models.check import forward_once

Tensors = Mapping[str, Tensor]

# The second trial client: 10 % away from the first, and nowhere zero.
_SCALE, _SHIFT = 1.1, 1e-3
# Batched and single kernels sum in different orders: over the zoo in float32 on a CPU the largest
# relative difference was 3.1e-6. Graphics processors may round each product to 11 bits (TF32).
_TOLERANCE = 1e-2


class Stackable(NamedTuple):
    """The verdict; `reason` says why not, or what is different in a stack ("" if nothing is)."""

    possible: bool
    reason: str


def stackable(model: nn.Module, inputs: Tensor) -> Stackable:
    """Whether gradients of several clients can be computed by one `torch.func.vmap`.

    Two clients with different parameters, buffers of their own and different halves of a small
    batch are differentiated one by one and stacked; the gradients must agree. Tried in the mode
    (training or evaluation) the model is in. The model and torch's generator are left as they were.

    Args:
        inputs: [B, ...] with B >= 1; a few examples are enough.

    Raises:
        ModelError: FS-MOD-006, the model cannot take the inputs at all.
    """
    forward_once(model, inputs)
    trained = {n: p.detach() for n, p in model.named_parameters() if p.requires_grad}
    if not trained:
        return Stackable(False, "the model has no trainable parameter")
    devices = [inputs.device] if inputs.device.type == "cuda" else []
    with own_torch_generator(devices):
        parameters = {n: torch.stack([p, p * _SCALE + _SHIFT]) for n, p in trained.items()}
        buffers = {n: torch.stack([b, b]) for n, b in model.named_buffers()}
        batches = torch.stack([inputs, inputs.roll(1, 0)])
        return _try(model, parameters, buffers, batches)


def _try(model: nn.Module, parameters: Tensors, buffers: Tensors, batches: Tensor) -> Stackable:
    def loss(x: Tensors, state: Tensors, batch: Tensor) -> Tensor:
        # Normalisation layers write into the buffers they are given: give them copies.
        copies = {name: buffer.clone() for name, buffer in state.items()}
        output: object = functional_call(model, {**x, **copies}, (batch,))
        if not isinstance(output, Tensor):
            raise TypeError(f"the model returns {type(output).__name__}, not one tensor")
        return output.square().mean()

    gradient = grad(loss)
    try:
        single = [
            gradient(
                {n: p[c] for n, p in parameters.items()},
                {n: b[c] for n, b in buffers.items()},
                batches[c],
            )
            for c in range(2)
        ]
    # A model can refuse in any way; the verdict repeats what it said.
    except Exception as error:
        return Stackable(False, f"no gradient by torch.func: {_said(error)}")
    try:
        stacked = vmap(gradient)(parameters, buffers, batches)
    except Exception as refused:
        try:
            vmap(gradient, randomness="different")(parameters, buffers, batches)
        except Exception as error:
            return Stackable(False, f"vmap refuses it: {_said(error)}")
        if "randomness" not in str(refused):
            return Stackable(False, f"vmap refuses it: {_said(refused)}")
        return Stackable(True, "random layers: same distribution as one by one, not same numbers")
    difference = _relative_difference(stacked, single)
    if difference <= _TOLERANCE:
        return Stackable(True, "")
    return Stackable(
        False,
        f"stacked and single gradients differ by {difference:.1e} of their size: "
        "some operation mixes the clients, or draws at random",
    )


def _relative_difference(stacked: Tensors, single: Sequence[Tensors]) -> float:
    """Largest distance between a client's gradients, relative to the length of the single one.

    Over the whole vector: the gradient of a bias before a normalisation is nothing but rounding.
    """
    worst = 0.0
    for client, gradients in enumerate(single):
        expected = torch.cat([g.flatten() for g in gradients.values()])
        found = torch.cat([stacked[name][client].flatten() for name in gradients])
        if not torch.equal(found, expected):
            distance = float((found - expected).norm() / expected.norm())
            worst = max(worst, distance if distance == distance else float("inf"))
    return worst


def _said(error: Exception) -> str:
    """The first sentence of what an exception says, on one line."""
    text = " ".join(str(error).split())
    return f"{type(error).__name__}: {text[:200]}" if text else type(error).__name__
