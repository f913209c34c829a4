"""Gradients taken uphill: the ascent step of sharpness-aware minimisation.

Foret et al. 2021, "Sharpness-aware minimization for efficiently improving generalization", equation 2
and Algorithm 1. Symbols: x the point, ξ the mini-batch, ρ the radius, α the share of the second gradient.

    g1 = ∇F(x; ξ)
    e  = ρ g1 / (‖g1‖ + 1e-7)        over all parameters jointly; 0 where g1 = 0
    g2 = ∇F(x + e; ξ)                on the same mini-batch
    g~ = (1 - α) g1 + α g2

Loss, metrics and the model's buffers are those of x: the second evaluation leaves no trace but g2.
"""

from __future__ import annotations

from fedsim.types import Aux, Batch, GradFn
from fedsim.vector import Vector

FLOOR = 1e-7
"""Added to the norm, in the authors' programs too: where nothing pulls, nothing is perturbed."""


def ascent(direction: Vector, rho: float) -> Vector:
    """e = ρ v / (‖v‖ + 1e-7), a step of length ρ along v."""
    return (rho / (direction.norm() + FLOOR)) * direction


class UphillGradient:
    """g~ in the place of the gradient, marked so that an engine may compute it in its own way.

    Args:
        inner: gives g1 and g2.
        rho: ρ > 0; alpha: α in (0, 1].
    """

    __slots__ = ("alpha", "inner", "rho")

    def __init__(self, inner: GradFn, *, rho: float, alpha: float) -> None:
        self.inner = inner
        self.rho = rho
        self.alpha = alpha

    def __call__(self, x: Vector, batch: Batch) -> tuple[Vector, Aux]:
        g1, aux = self.inner(x, batch)
        g2, _ = self.inner(x + ascent(g1, self.rho), batch)
        return g2 if self.alpha == 1.0 else (1.0 - self.alpha) * g1 + self.alpha * g2, aux
