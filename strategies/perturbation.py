"""What strategies of sharpness-aware steps share: their gradient (`fedsim.uphill`) and its parameters."""

from __future__ import annotations

from fedsim.types import GradFn
from fedsim.uphill import UphillGradient, ascent

__all__ = ["ascent", "check_radius", "check_share", "perturbed"]


def perturbed(grad_fn: GradFn, *, rho: float, alpha: float = 1.0) -> GradFn:
    """`grad_fn` with g~ for the gradient, at the price of two evaluations.

    Where ρ or α is 0 there is nothing to evaluate twice: `grad_fn` itself.
    """
    return grad_fn if rho == 0.0 or alpha == 0.0 else UphillGradient(grad_fn, rho=rho, alpha=alpha)


def check_radius(rho: float) -> None:
    """Refuse a ρ that is no radius."""
    if not 0.0 <= rho < float("inf"):
        raise ValueError(f"rho must be at least 0 and finite, got {rho}")


def check_share(alpha: float) -> None:
    """Refuse an α that is no share."""
    if not 0.0 <= alpha <= 1.0:
        raise ValueError(f"alpha must lie in [0, 1], got {alpha}")
