"""What a model must be for the fused engine: linear layers and pointwise activations, in a row.

Only exact types inside `nn.Sequential` are read, as only of those the source says what they compute.
Each activation brings its derivative as one kernel that writes where it is told.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import NamedTuple

import torch
from torch import Tensor, nn
from torch.func import functional_call

from fedsim.flat import ParamSpec
from fedsim.keys import own_torch_generator

_aten = torch.ops.aten


class Activation(NamedTuple):
    """A pointwise function.

    Args:
        forward: (z, out) writes a(z) to `out`; `out` may be z where `from_output` holds.
        backward: (g, t, out) writes g·a'(z) to `out`, which may be g; t is a(z) or z.
        from_output: the derivative is read off a(z), so that z need not be kept.
    """

    forward: Callable[[Tensor, Tensor], Tensor]
    backward: Callable[[Tensor, Tensor, Tensor], Tensor]
    from_output: bool


class Dense(NamedTuple):
    """A linear layer and what follows it.

    Args:
        weight, bias: names of its parameters, no bias is "".
        inputs, outputs: widths.
        activations: between this layer and the next.
    """

    weight: str
    bias: str
    inputs: int
    outputs: int
    activations: tuple[Activation, ...]


class Layers(NamedTuple):
    """A model read as layers: what is done to the inputs first, then the linear layers in order."""

    before: tuple[Activation, ...]
    dense: tuple[Dense, ...]


def layers_of(module: nn.Module, spec: ParamSpec) -> Layers | str:
    """The layers of a model, or in words why it has none that the fused engine knows."""
    if type(module) not in (nn.Sequential, nn.Linear):
        return f"the model is a {type(module).__name__}, not an nn.Sequential of linear layers"
    before: list[Activation] = []
    dense: list[Dense] = []
    for name, part in _parts(module):
        if _hooked(part):
            return f"{name or 'the model'} has hooks"
        if type(part) is nn.Sequential or _nothing(part):
            continue
        if type(part) is nn.Linear:
            dense.append(_dense(part, f"{name}." if name else ""))
            continue
        activation = _activation(part)
        if activation is None:
            return f"{name} is a {type(part).__name__}, neither a linear layer nor a pointwise activation"
        if dense:
            dense[-1] = dense[-1]._replace(activations=(*dense[-1].activations, activation))
        else:
            before.append(activation)
    names = [n for layer in dense for n in (layer.weight, layer.bias) if n]
    if not dense:
        return "the model has no linear layer"
    if len(set(names)) < len(names) or sorted(names) != sorted(spec.names):
        return "some parameters are shared between layers or do not train"
    widths = zip(dense[:-1], dense[1:], strict=True)
    if any(one.outputs != other.inputs for one, other in widths):
        return "the widths of the layers do not fit together"
    return Layers(tuple(before), tuple(dense))


def forward(layers: Layers, parameters: dict[str, Tensor], inputs: Tensor) -> Tensor:
    """Outputs [B, K] of one model for inputs [B, *shape]: what the engine takes the model to compute."""
    x = inputs.flatten(1)
    for activation in layers.before:
        x = activation.forward(x, torch.empty_like(x))
    for layer in layers.dense:
        x = x @ parameters[layer.weight].t()
        if layer.bias:
            x = x + parameters[layer.bias]
        for activation in layer.activations:
            x = activation.forward(x, torch.empty_like(x))
    return x


def differs(module: nn.Module, layers: Layers, inputs: Tensor) -> str | None:
    """Whether the model says something else than its layers on these examples, in words."""
    parameters = {name: p.detach() for name, p in module.named_parameters()}
    with torch.no_grad(), own_torch_generator():
        try:
            expected: object = functional_call(module, parameters, (inputs,))
            found = forward(layers, parameters, inputs)
        except (RuntimeError, TypeError) as error:
            return f"the model does not take one row per example: {str(error).splitlines()[0][:120]}"
    if not isinstance(expected, Tensor) or expected.shape != found.shape:
        return "the model's outputs are not one row per example"
    scale = float(expected.abs().max()) if expected.numel() else 0.0
    tolerance = 1e-3 if expected.dtype != torch.float64 else 1e-9
    if not torch.allclose(found, expected, rtol=tolerance, atol=tolerance * max(scale, 1e-6)):
        return "the model computes something else than its layers say"
    return None


def _parts(module: nn.Module) -> Iterator[tuple[str, nn.Module]]:
    """Modules in the order in which they run, one that runs twice twice."""
    stack = [("", module)]
    while stack:
        name, part = stack.pop()
        yield name, part
        if type(part) is nn.Sequential:
            children = [(f"{name}.{n}" if name else n, child) for n, child in part._modules.items()]
            stack.extend((n, c) for n, c in reversed(children) if c is not None)


def _hooked(part: nn.Module) -> bool:
    kinds = ("_forward_hooks", "_forward_pre_hooks", "_backward_hooks", "_backward_pre_hooks")
    return any(getattr(part, kind) for kind in kinds) or "forward" in vars(part)


def _nothing(part: nn.Module) -> bool:
    """Layers that do nothing to a batch of rows."""
    if type(part) is nn.Flatten:
        return part.start_dim == 1 and part.end_dim == -1
    if type(part) is nn.Dropout:
        return part.p == 0.0 or not part.training
    return type(part) is nn.Identity


def _dense(part: nn.Linear, prefix: str) -> Dense:
    bias = f"{prefix}bias" if part.bias is not None else ""
    return Dense(f"{prefix}weight", bias, part.in_features, part.out_features, ())


def _activation(part: nn.Module) -> Activation | None:
    if type(part) is nn.LeakyReLU:
        return _leaky(part.negative_slope)
    if type(part) is nn.GELU:
        return _gelu(part.approximate)
    known = {nn.ReLU: _RELU, nn.Tanh: _TANH, nn.Sigmoid: _SIGMOID, nn.SiLU: _SILU}
    return known.get(type(part))


_RELU = Activation(
    lambda z, out: torch.clamp_min(z, 0.0, out=out),
    lambda g, t, out: _aten.threshold_backward.grad_input(g, t, 0.0, grad_input=out),
    from_output=True,
)
_TANH = Activation(
    lambda z, out: torch.tanh(z, out=out),
    lambda g, t, out: _aten.tanh_backward.grad_input(g, t, grad_input=out),
    from_output=True,
)
_SIGMOID = Activation(
    lambda z, out: torch.sigmoid(z, out=out),
    lambda g, t, out: _aten.sigmoid_backward.grad_input(g, t, grad_input=out),
    from_output=True,
)
_SILU = Activation(
    lambda z, out: _aten.silu.out(z, out=out),
    lambda g, t, out: _aten.silu_backward.grad_input(g, t, grad_input=out),
    from_output=False,
)


def _gelu(approximate: str) -> Activation:
    return Activation(
        lambda z, out: _aten.gelu.out(z, approximate=approximate, out=out),
        lambda g, t, out: _aten.gelu_backward.grad_input(g, t, approximate=approximate, grad_input=out),
        from_output=False,
    )


def _leaky(slope: float) -> Activation:
    return Activation(
        lambda z, out: _aten.leaky_relu.out(z, slope, out=out),
        lambda g, t, out: _aten.leaky_relu_backward.grad_input(g, t, slope, False, grad_input=out),
        from_output=False,
    )
