"""Gradients of a model: masks, losses, buffers, and vmap over clients."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor, nn
from torch.func import vmap

from fedsim.flat import flat_of, spec_of
from fedsim.grads import LOSSES, cross_entropy, masked_mean, model_grad, squared_error
from fedsim.types import Batch
from fedsim.vector import Vector
from tests.federations import MODELS, batch_norm, mlp, random_data


def a_batch(name: str = "mlp", rows: int = 5, *, real: int | None = None) -> Batch:
    data = random_data(name).dataset.train
    inputs = data.inputs[:rows]
    inputs = inputs.double() if inputs.is_floating_point() else inputs
    mask = (torch.arange(rows) < (rows if real is None else real)).double()
    zero = torch.tensor(0.0, dtype=torch.float64)
    return Batch(
        inputs, data.targets[:rows], mask, zero, zero.long(), zero.long(), zero.bool(), zero.bool(), zero
    )


def parameters(module: nn.Module) -> Vector:
    layout = spec_of(module)
    return layout.unflatten(flat_of(module, layout))


@pytest.mark.parametrize("name", ["mlp", "conv", "lstm"])
def test_the_gradient_is_that_of_autograd(name: str) -> None:
    torch.manual_seed(0)
    module = MODELS[name]().double()
    batch = a_batch(name)
    gradient, aux = model_grad(module, cross_entropy)(parameters(module), batch)
    loss = nn.functional.cross_entropy(module(batch.inputs), batch.targets)
    loss.backward()
    torch.testing.assert_close(aux.loss, loss.detach(), rtol=0, atol=1e-14)
    for parameter_name, parameter in module.named_parameters():
        torch.testing.assert_close(gradient.tensors[parameter_name], parameter.grad, rtol=0, atol=1e-13)


def test_padding_changes_neither_loss_nor_gradient() -> None:
    torch.manual_seed(0)
    module = mlp().double()
    gradient = model_grad(module, cross_entropy)
    short, padded = a_batch(rows=3), a_batch(rows=5, real=3)
    g, aux = gradient(parameters(module), short)
    h, other = gradient(parameters(module), padded)
    torch.testing.assert_close(aux.loss, other.loss, rtol=0, atol=1e-15)
    for name, t in g.tensors.items():
        torch.testing.assert_close(t, h.tensors[name], rtol=0, atol=1e-15)


def test_a_batch_of_padding_alone_gives_zero_and_not_nan() -> None:
    torch.manual_seed(0)
    module = mlp().double()
    g, aux = model_grad(module, cross_entropy)(parameters(module), a_batch(real=0))
    assert float(aux.loss) == 0.0
    assert not any(t.any() for t in g.tensors.values())
    assert float(masked_mean(torch.ones(3), torch.zeros(3))) == 0.0


def test_vmap_over_clients_gives_each_its_own_gradient() -> None:
    torch.manual_seed(0)
    module = mlp().double()
    gradient = model_grad(module, cross_entropy)
    layout = spec_of(module)
    rows = torch.randn(4, layout.size, dtype=torch.float64)
    batch = a_batch()
    stacked, aux = vmap(lambda x: gradient(x, batch))(layout.unflatten(rows))
    for i, row in enumerate(rows):
        alone, own = gradient(layout.unflatten(row), batch)
        torch.testing.assert_close(
            layout.flatten(stacked, stacked=True)[i], layout.flatten(alone), rtol=0, atol=1e-13
        )
        torch.testing.assert_close(aux.loss[i], own.loss, rtol=0, atol=1e-13)


def test_sequence_losses_are_means_over_time_per_example() -> None:
    logits, targets = torch.randn(2, 4, 5), torch.randint(0, 5, (2, 4))
    expected = [nn.functional.cross_entropy(logits[i], targets[i]) for i in range(2)]
    torch.testing.assert_close(cross_entropy(logits, targets), torch.stack(expected))


def test_squared_error_is_half_the_sum_over_outputs_in_every_shape() -> None:
    targets = torch.tensor([1.0, 2.0])
    assert torch.equal(squared_error(torch.tensor([2.0, 4.0]), targets), torch.tensor([0.5, 2.0]))
    assert torch.equal(squared_error(torch.tensor([[2.0], [4.0]]), targets), torch.tensor([0.5, 2.0]))
    wide = squared_error(torch.tensor([[1.0, 3.0]]), torch.zeros(1, 2))
    assert torch.equal(wide, torch.tensor([5.0]))


def test_every_task_has_a_loss_per_example() -> None:
    assert set(LOSSES) == {"classification", "binary", "next-token", "regression"}
    logits = torch.randn(7, 2)
    assert LOSSES["binary"](logits, torch.zeros(7, dtype=torch.int64)).shape == (7,)
    assert LOSSES["regression"](torch.randn(7, 1), torch.zeros(7)).shape == (7,)


def test_normalisation_statistics_come_back_and_the_given_ones_stay() -> None:
    torch.manual_seed(0)
    module = batch_norm().double().train()
    given = {n: b.clone() for n, b in module.named_buffers()}
    before = {n: b.clone() for n, b in given.items()}
    batch = a_batch()._replace(buffers=given)
    _, aux = model_grad(module, cross_entropy)(parameters(module), batch)
    hidden = module[0](batch.inputs) if isinstance(module, nn.Sequential) else Tensor()
    torch.testing.assert_close(aux.buffers["1.running_mean"], 0.1 * hidden.detach().mean(0))
    assert int(aux.buffers["1.num_batches_tracked"]) == 1
    for name, value in before.items():
        assert torch.equal(given[name], value)
        assert torch.equal(dict(module.named_buffers())[name], value)
