"""ParamSpec: a module as one flat vector and back."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from fedsim.errors import ModelError
from fedsim.flat import buffer_specs, flat_buffers, flat_of, spec_of, write_flat
from tests.federations import MODELS


class Scaled(nn.Module):
    """A model with a scalar parameter."""

    def __init__(self) -> None:
        super().__init__()
        self.line = nn.Linear(3, 2)
        self.temperature = nn.Parameter(torch.tensor(2.0))


@pytest.mark.parametrize("name", MODELS)
def test_writing_back_what_was_read_changes_nothing(name: str) -> None:
    module = MODELS[name]()
    spec = spec_of(module)
    before = {n: p.detach().clone() for n, p in module.named_parameters()}
    flat = flat_of(module, spec)
    write_flat(module, spec, torch.zeros_like(flat))
    assert not any(p.any() for p in module.parameters())
    write_flat(module, spec, flat)
    assert all(torch.equal(p, before[n]) for n, p in module.named_parameters())
    assert spec.size == len(flat) == sum(p.numel() for p in module.parameters())


def test_the_flat_vector_is_a_copy() -> None:
    module = nn.Linear(2, 2)
    flat = flat_of(module, spec_of(module))
    flat.zero_()
    assert module.weight.any()


def test_unflatten_gives_views_and_flatten_inverts_it() -> None:
    spec = spec_of(Scaled())
    flat = torch.arange(float(spec.size))
    vector = spec.unflatten(flat)
    assert {n: tuple(t.shape) for n, t in vector.tensors.items()} == dict(
        zip(spec.names, spec.shapes, strict=True)
    )
    assert torch.equal(spec.flatten(vector), flat)
    flat[0] = -1.0
    assert spec.flatten(vector)[0] == -1.0


def test_a_stack_flattens_row_by_row_also_with_a_scalar_parameter() -> None:
    spec = spec_of(Scaled())
    rows = torch.arange(4.0 * spec.size).reshape(4, spec.size)
    assert torch.equal(spec.flatten(spec.unflatten(rows), stacked=True), rows)


def test_stack_makes_rows_that_move_apart() -> None:
    spec = spec_of(Scaled())
    flat = torch.arange(float(spec.size))
    stack = spec.stack(flat, 3)
    for tensor in stack.tensors.values():
        assert tensor.is_contiguous()
        tensor[1].add_(1)
    assert torch.equal(stack.tensors["line.weight"][0], spec.unflatten(flat).tensors["line.weight"])
    assert torch.equal(flat, torch.arange(float(spec.size)))


def test_slices_and_the_shared_mask_name_the_same_entries() -> None:
    module = nn.Sequential(nn.Linear(3, 2), nn.Linear(2, 2))
    spec = spec_of(module, personal=("1.",))
    mask = spec.shared_mask()
    for name, part in spec.slices().items():
        assert bool(mask[part].all()) == (not name.startswith("1."))
    assert spec.personal == {"1.weight", "1.bias"}


def test_frozen_parameters_are_left_out() -> None:
    module = nn.Linear(3, 2)
    module.bias.requires_grad_(False)
    assert spec_of(module).names == ("weight",)


def test_the_digest_changes_with_name_shape_and_dtype_and_not_with_the_values() -> None:
    reference = spec_of(nn.Linear(3, 2)).digest
    assert spec_of(nn.Linear(3, 2)).digest == reference
    others = [nn.Linear(2, 3), nn.Linear(3, 2).double(), nn.Sequential(nn.Linear(3, 2))]
    assert all(spec_of(other).digest != reference for other in others)


def test_models_that_are_not_one_vector_are_refused_with_what_to_do() -> None:
    mixed = nn.Sequential(nn.Linear(2, 2), nn.Linear(2, 2).double())
    for module, personal, code in (
        (nn.ReLU(), (), "FS-MOD-030"),
        (mixed, (), "FS-MOD-031"),
        (nn.Linear(2, 2), ("head",), "FS-MOD-032"),
    ):
        with pytest.raises(ModelError) as caught:
            spec_of(module, personal=personal)
        assert caught.value.code == code
        assert caught.value.hint


def test_buffers_are_told_apart_by_kind_and_those_not_saved_are_left_out() -> None:
    module = nn.BatchNorm1d(4)
    module.register_buffer("scratch", torch.zeros(3), persistent=False)
    floating, integers = buffer_specs(module)
    assert floating is not None
    assert integers is not None
    assert floating.names == ("running_mean", "running_var")
    assert integers.names == ("num_batches_tracked",)
    values = flat_buffers(module, floating)
    assert values is not None
    assert torch.equal(values, torch.tensor([0.0] * 4 + [1.0] * 4))
    assert buffer_specs(nn.Linear(2, 2)) == (None, None)
    assert flat_buffers(module, None) is None
