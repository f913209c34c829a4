"""Vector: arithmetic as on paper, for one client and for a stack, and its place in torch.func."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor
from torch.func import grad, vmap
from torch.utils import _pytree as pytree

from fedsim.vector import Vector, where


def vector(seed: int, *, lead: tuple[int, ...] = ()) -> Vector:
    draw = torch.Generator().manual_seed(seed)
    shapes = {"weight": (2, 3), "bias": (3,), "scale": ()}
    return Vector(
        {name: torch.randn(lead + s, generator=draw, dtype=torch.float64) for name, s in shapes.items()}
    )


def flat(v: Vector) -> Tensor:
    return torch.cat([t.flatten() for t in v.tensors.values()])


@given(st.integers(0, 50), st.integers(51, 99), st.floats(-10, 10))
def test_operations_are_those_of_the_concatenated_vector(a: int, b: int, scalar: float) -> None:
    x, y = vector(a), vector(b)
    assert torch.equal(flat(x + y), flat(x) + flat(y))
    assert torch.equal(flat(x - y), flat(x) - flat(y))
    assert torch.equal(flat(-x), -flat(x))
    assert torch.equal(flat(x * y), flat(x) * flat(y))
    assert torch.equal(flat(x / y), flat(x) / flat(y))
    assert torch.equal(flat(scalar * x), scalar * flat(x))
    assert torch.equal(flat(x * scalar), flat(scalar * x))
    torch.testing.assert_close(x.dot(y), flat(x) @ flat(y))
    torch.testing.assert_close(x.norm(), flat(x).norm())
    assert not flat(x.zeros_like()).any()


def test_a_rate_per_client_scales_each_row_of_a_stack() -> None:
    x, rates = vector(0, lead=(4,)), torch.tensor([0.0, 1.0, -2.0, 0.5], dtype=torch.float64)
    scaled, divided = x * rates, x / (rates + 3)
    for name, rows in x.tensors.items():
        for i, rate in enumerate(rates):
            assert torch.equal(scaled.tensors[name][i], rows[i] * rate)
            assert torch.equal(divided.tensors[name][i], rows[i] / (rate + 3))


def test_a_double_scalar_does_not_promote_single_precision_not_even_a_scalar_parameter() -> None:
    x = vector(0).map(lambda t: t.float())
    rate = torch.tensor(0.1, dtype=torch.float64)
    for result in (x * rate, rate * x, x / rate):
        assert {t.dtype for t in result.tensors.values()} == {torch.float32}


def test_the_norm_has_derivative_zero_at_the_origin() -> None:
    def length(t: Tensor) -> Tensor:
        return Vector({"x": t}).norm()

    assert torch.equal(grad(length)(torch.zeros(3)), torch.zeros(3))
    point = torch.tensor([3.0, 0.0, 4.0])
    torch.testing.assert_close(grad(length)(point), point / 5)


def test_it_is_a_pytree_and_vmap_goes_through_it() -> None:
    stack = vector(0, lead=(5,))
    norms = vmap(lambda v: v.norm())(stack)
    for i in range(5):
        torch.testing.assert_close(norms[i], stack.map(lambda t, i=i: t[i]).norm())
    leaves, structure = pytree.tree_flatten(stack)
    back = pytree.tree_unflatten(leaves, structure)
    assert list(back.tensors) == ["weight", "bias", "scale"]
    assert all(torch.equal(back.tensors[n], t) for n, t in stack.tensors.items())


def test_where_chooses_whole_vectors_for_one_client_and_row_by_row_for_a_stack() -> None:
    yes, no = vector(0), vector(1)
    assert torch.equal(flat(where(torch.tensor(True), yes, no)), flat(yes))
    assert torch.equal(flat(where(torch.tensor(False), yes, no)), flat(no))
    stack, other = vector(0, lead=(3,)), vector(1, lead=(3,))
    chosen = where(torch.tensor([True, False, True]), stack, other)
    for name, rows in chosen.tensors.items():
        assert torch.equal(rows[0], stack.tensors[name][0])
        assert torch.equal(rows[1], other.tensors[name][1])


def test_names_that_differ_are_refused() -> None:
    with pytest.raises(KeyError):
        vector(0) + Vector({"other": torch.zeros(3)})


def test_a_clone_shares_no_memory_and_detach_cuts_the_graph() -> None:
    source = Vector({"x": torch.ones(2, requires_grad=True)})
    assert not source.detach().tensors["x"].requires_grad
    copy = source.detach().clone()
    copy.tensors["x"].add_(1)
    assert torch.equal(source.tensors["x"], torch.ones(2))
