"""Vector: the named tensors of a model as one element of a vector space.

Client mathematics is written on Vectors, so a line of code is a line of the paper
(``y - lr * (g - c_i + c)``). The driver chooses what lies underneath: one tensor per layer for one
client, or one contiguous stack ``[C, *shape]`` per layer for C clients. Scalars broadcast from the
left, hence ``lr`` may be 0-d (one client, or any client inside vmap) or ``[C]`` (a stack).
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping

import torch
from torch import Tensor
from torch.utils import _pytree as pytree

Scalar = float | int | Tensor


def spread(scalar: Scalar, like: Tensor) -> Scalar:
    """`scalar` in the dtype of `like`, shaped to broadcast over its trailing dimensions.

    A float64 0-d tensor would otherwise promote a float32 0-d parameter.
    """
    if not isinstance(scalar, Tensor):
        return scalar
    scalar = scalar.to(like.dtype) if scalar.dtype != torch.bool else scalar
    missing = like.ndim - scalar.ndim
    return scalar.reshape(scalar.shape + (1,) * missing) if scalar.ndim and missing else scalar


class Vector:
    """Named tensors with the operations of a vector space; registered as a pytree."""

    __slots__ = ("tensors",)

    def __init__(self, tensors: Mapping[str, Tensor]) -> None:
        self.tensors: dict[str, Tensor] = dict(tensors)

    def map(self, function: Callable[[Tensor], Tensor]) -> Vector:
        return Vector({name: function(t) for name, t in self.tensors.items()})

    def zip(self, other: Vector, function: Callable[[Tensor, Tensor], Tensor]) -> Vector:
        theirs = other.tensors
        return Vector({name: function(t, theirs[name]) for name, t in self.tensors.items()})

    def __add__(self, other: Vector) -> Vector:
        return self.zip(other, torch.add)

    def __sub__(self, other: Vector) -> Vector:
        return self.zip(other, torch.sub)

    def __neg__(self) -> Vector:
        return self.map(torch.neg)

    def __mul__(self, other: Scalar | Vector) -> Vector:
        if isinstance(other, Vector):
            return self.zip(other, torch.mul)
        return self.map(lambda t: t * spread(other, t))

    __rmul__ = __mul__

    def __truediv__(self, other: Scalar | Vector) -> Vector:
        if isinstance(other, Vector):
            return self.zip(other, torch.div)
        return self.map(lambda t: t / spread(other, t))

    def dot(self, other: Vector) -> Tensor:
        """Euclidean inner product over all parameters, 0-d."""
        products = [(t * other.tensors[name]).sum() for name, t in self.tensors.items()]
        return torch.stack(products).sum()

    def norm(self) -> Tensor:
        """Euclidean norm over all parameters, 0-d; its derivative at zero is zero."""
        square = self.dot(self)
        safe = torch.where(square > 0, square, torch.ones_like(square))
        return torch.where(square > 0, safe.sqrt(), torch.zeros_like(square))

    def zeros_like(self) -> Vector:
        return self.map(torch.zeros_like)

    def clone(self) -> Vector:
        return self.map(torch.clone)

    def detach(self) -> Vector:
        return self.map(torch.Tensor.detach)

    def __repr__(self) -> str:
        inside = ", ".join(f"{name}: {tuple(t.shape)}" for name, t in self.tensors.items())
        return f"Vector({inside})"


def where(condition: Tensor, yes: Vector, no: Vector) -> Vector:
    """`yes` where the 0-d (or leading-C) `condition` holds, else `no`."""
    return yes.zip(no, lambda a, b: torch.where(spread(condition, a), a, b))  # type: ignore[arg-type]


def _flatten(vector: Vector) -> tuple[list[Tensor], tuple[str, ...]]:
    return list(vector.tensors.values()), tuple(vector.tensors)


def _unflatten(tensors: Iterable[Tensor], names: tuple[str, ...]) -> Vector:
    return Vector(dict(zip(names, tensors, strict=True)))


pytree.register_pytree_node(
    Vector,
    _flatten,
    _unflatten,
    serialized_type_name="fedsim.Vector",
)
