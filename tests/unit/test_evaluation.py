"""Evaluation: the fast layout and small batches change nothing but the order of bytes."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from torch import Tensor, nn

from fedsim.buffers import no_buffers
from fedsim.data.federated import FederatedData
from fedsim.data.own import from_arrays
from fedsim.evaluation import Evaluator
from fedsim.flat import flat_of, spec_of
from fedsim.keys import seed_torch

CLIENTS = 5


class Viewing(nn.Module):
    """A network that looks at its activations with `view`, which one order of bytes alone allows."""

    def __init__(self) -> None:
        super().__init__()
        self.conv = nn.Conv2d(1, 4, 3, padding=1)
        self.out = nn.Linear(4 * 36, 3)

    def forward(self, images: Tensor) -> Tensor:
        features = self.conv(images)
        outputs: Tensor = self.out(features.view(len(images), -1))
        return outputs


def flattening() -> nn.Module:
    return nn.Sequential(nn.Conv2d(1, 4, 3, padding=1), nn.ReLU(), nn.Flatten(), nn.Linear(4 * 36, 3))


def images(examples: int = 230) -> FederatedData:
    rng = np.random.default_rng(3)
    x = rng.standard_normal((examples, 1, 6, 6)).astype(np.float32)
    owners = np.arange(examples) % CLIENTS
    return from_arrays(x, rng.integers(0, 3, examples), client_ids=owners)


def evaluator(module: nn.Module, data: FederatedData, batch_size: int = 500) -> Evaluator:
    return Evaluator(module, spec_of(module), None, None, data, batch_size=batch_size)


@pytest.mark.parametrize("make", [flattening, Viewing])
def test_every_example_is_judged_as_by_the_module_itself(make: type[nn.Module]) -> None:
    seed_torch(1)
    module, data = make(), images()
    judged = evaluator(module, data)
    split = data.dataset.train
    judged.set(flat_of(module, judged.spec), no_buffers())
    found = judged.judge(split.inputs, split.targets)
    with torch.no_grad():
        outputs = module.eval()(data.dataset.transforms.evaluate(split.inputs))
    assert (found.predicted == outputs.argmax(-1).numpy()).all()
    expected = nn.functional.cross_entropy(outputs, split.targets, reduction="none")
    np.testing.assert_allclose(found.loss, expected.double().numpy(), rtol=1e-5, atol=1e-6)


def test_convolutions_see_small_batches_in_the_order_of_their_kernels() -> None:
    judged = evaluator(flattening(), images())
    sizes: list[int] = []

    def seen(module: nn.Module, given: tuple[Tensor, ...]) -> None:
        assert given[0].is_contiguous(memory_format=torch.channels_last)
        sizes.append(len(given[0]))

    judged.module.register_forward_pre_hook(seen)
    split = judged.data.dataset.train
    judged.judge(split.inputs, split.targets)
    assert sizes == [100, 100, 30]


def test_clients_are_judged_on_their_own_examples() -> None:
    seed_torch(1)
    module, data = flattening(), images()
    judged = evaluator(module, data, batch_size=7)
    x = flat_of(module, judged.spec)
    found = judged.clients(x, no_buffers(), cap=CLIENTS, seed=0)
    split = data.dataset.train
    for client in range(CLIENTS):
        rows = torch.from_numpy(data.rows(client).copy())
        own = judged.judge(split.inputs[rows], split.targets[rows])
        assert found["examples"][client] == len(rows)
        assert found["accuracy"][client] == pytest.approx(own.correct.mean())
        assert found["loss"][client] == pytest.approx(own.loss.mean(), rel=1e-6)
