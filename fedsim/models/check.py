"""Does a model fit its data, and what layers does it have that need care?"""

from __future__ import annotations

import torch
from torch import Tensor, nn
from torch.func import functional_call

from fedsim.errors import ModelError
from fedsim.keys import own_torch_generator


def check_model(model: nn.Module, inputs: Tensor, *, targets: Tensor, task: str, classes: int | None) -> None:
    """Run one batch through `model` and compare what comes out with the labels.

    The model, its buffers and torch's generator are left as they were.

    Args:
        inputs: [B, ...] as the model will see them: transformed, on the model's device.
        targets: [B], or [B, T] for next-token data.
        task: ``classification``, ``binary``, ``next-token`` or ``regression``.
        classes: K; not used for regression.

    Raises:
        ModelError: FS-MOD-006 the forward pass failed, FS-MOD-007 the output's shape or type does
            not fit the labels, FS-MOD-008 the untrained model's output is not finite.
    """
    output = forward_once(model, inputs)
    expected = expected_output(targets, task=task, classes=classes)
    where = f"model {type(model).__name__}"
    if not isinstance(output, Tensor):
        raise ModelError(
            "the model does not return one tensor",
            code="FS-MOD-007",
            where=where,
            why=f"expected {_shape(expected)}, got {type(output).__name__}",
            hint="return the logits alone; wrap the module if it returns more",
        )
    shape = tuple(output.shape)
    # A column and a vector of predictions are the same thing for regression.
    fits = shape == expected or (task == "regression" and shape == (*expected, 1))
    if not fits or not output.is_floating_point():
        raise ModelError(
            "the model's output does not fit the labels",
            code="FS-MOD-007",
            where=where,
            why=f"got {_shape(shape)} {_dtype(output)}, expected {_shape(expected)} of a "
            f"floating type for {task} with {len(targets)} examples in the batch",
            hint=_remedy(shape, expected, task=task, classes=classes),
        )
    if not bool(output.isfinite().all()):
        raise ModelError(
            "the untrained model returns values that are not finite",
            code="FS-MOD-008",
            where=where,
            why=f"{int((~output.isfinite()).sum())} of {output.numel()} values are NaN or infinite",
            hint="check the initialisation and the scale of the inputs",
        )


def expected_output(targets: Tensor, *, task: str, classes: int | None) -> tuple[int, ...]:
    """Shape of the outputs that fit a batch of targets."""
    if task == "regression":
        return tuple(targets.shape)
    return (*targets.shape, int(classes or 0))


def forward_once(model: nn.Module, inputs: Tensor) -> object:
    """The output of one forward pass that leaves no trace.

    Raises:
        ModelError: FS-MOD-006.
    """
    # Normalisation layers write into the buffers they are given: give them copies.
    buffers = {name: buffer.clone() for name, buffer in model.named_buffers()}
    devices = [inputs.device] if inputs.device.type == "cuda" else []
    try:
        with torch.no_grad(), own_torch_generator(devices):
            output: object = functional_call(model, buffers, (inputs,))
    # The user's forward can fail in any way; the reason is what it said.
    except Exception as error:
        raise ModelError(
            "the model cannot take these inputs",
            code="FS-MOD-006",
            where=f"model {type(model).__name__}",
            why=f"{type(error).__name__}: {error}\ninputs: {_shape(tuple(inputs.shape))} {_dtype(inputs)}",
            hint="the first dimension is the batch; compare the rest with the model's first layer",
        ) from error
    return output


def has_batchnorm(model: nn.Module) -> bool:
    """Whether a layer normalises over the batch, so that its examples depend on each other."""
    return any(isinstance(m, nn.modules.batchnorm._BatchNorm) for m in model.modules())


def has_dropout(model: nn.Module) -> bool:
    """Whether a layer drops values at random in training.

    Calls of ``torch.nn.functional.dropout`` do not show in a module; `stackable` finds them.
    """
    return any(_dropping(module) > 0 for module in model.modules())


def _dropping(module: nn.Module) -> float:
    if isinstance(module, nn.modules.dropout._DropoutNd):
        return module.p
    # Recurrent layers and attention carry a rate of their own.
    if isinstance(module, (nn.RNNBase, nn.MultiheadAttention)):
        return float(module.dropout)
    return 0.0


def _remedy(shape: tuple[int, ...], expected: tuple[int, ...], *, task: str, classes: int | None) -> str:
    if task == "binary" and shape in ((expected[0],), (expected[0], 1)):
        return "binary data need two outputs (logits of both classes): make the last layer 2 wide"
    if len(shape) == len(expected) and shape[:-1] == expected[:-1] and task != "regression":
        return f"make the last layer {classes} wide; a factory with a parameter `classes` is told it"
    if task == "next-token" and shape == (expected[0], expected[-1]):
        return 'return logits at every position, or load the data with target = "last"'
    if task == "classification" and len(shape) == 3 and len(expected) == 2:
        return "return logits of the last position only (last = true for the lstm of the zoo)"
    return "return one row of outputs for each example"


def _shape(shape: tuple[int, ...]) -> str:
    return f"[{', '.join(str(size) for size in shape)}]"


def _dtype(tensor: Tensor) -> str:
    return str(tensor.dtype).removeprefix("torch.")
