"""Every model of the zoo: size, output, refusals, names of its parameters."""

from __future__ import annotations

from typing import Any, NamedTuple

import pytest
import torch
from torch import Tensor, nn
from torch.func import functional_call, grad, stack_module_state, vmap

from fedsim.errors import ModelError
from fedsim.models import has_batchnorm, has_dropout, make_model, stackable
from fedsim.registry import names


class Case(NamedTuple):
    name: str
    input_shape: tuple[int, ...]
    classes: int
    params: dict[str, Any]
    size: int  # parameters, counted by hand or given in the paper

    def __str__(self) -> str:
        return f"{self.name}{self.params or ''}"


MNIST, CIFAR, DIGITS = (1, 28, 28), (3, 32, 32), (1, 8, 8)
NARROW_RESNET = {"width": 16, "groups": 4}


def resnet_size(width: int, *, channels: int = 3, classes: int = 10) -> int:
    """Layer by layer: convolutions without bias, two numbers per normalised map."""
    total = 9 * channels * width + 2 * width
    before = width
    for after in (width, 2 * width, 4 * width, 8 * width):
        total += 9 * before * after + 3 * 9 * after * after + 4 * 2 * after
        total += before * after + 2 * after if before != after else 0
        before = after
    return total + before * classes + classes


ZOO = [
    Case("logistic", (60,), 10, {}, 610),
    Case("logistic", (5,), 1, {}, 6),
    Case("logistic_regression", MNIST, 10, {}, 7_850),
    Case("mlp", MNIST, 10, {}, 784 * 200 + 200 + 200 * 10 + 10),
    Case("mlp", MNIST, 10, {"hidden": [200, 200]}, 199_210),
    Case("mlp", (60,), 10, {"hidden": []}, 610),
    Case("cnn", MNIST, 10, {}, 1_663_370),
    Case("small_cnn", DIGITS, 10, {}, 160 + 4_640 + 1_290),
    Case("small_cnn", DIGITS, 10, {"norm": "group"}, 6_090 + 2 * 16 + 2 * 32),
    Case("small_cnn", DIGITS, 10, {"norm": "batch"}, 6_090 + 2 * 16 + 2 * 32),
    Case("small_cnn", DIGITS, 10, {"channels": [4]}, 40 + 64 * 10 + 10),
    Case("lenet5", CIFAR, 10, {}, 797_962),
    Case("lenet5_classic", MNIST, 10, {}, 61_706),
    Case("resnet18", CIFAR, 10, NARROW_RESNET, resnet_size(16)),
    Case("resnet18", (3, 16, 16), 10, {"width": 8, "norm": "batch"}, resnet_size(8)),
    Case("lstm", (20,), 90, {}, 820_522 + 8 * 256),
    Case("lstm", (20,), 30, {"hidden": 16, "last": True}, 4_590),
]


def made(case: Case, *, seed: int = 0) -> nn.Module:
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        return make_model(case.name, input_shape=case.input_shape, classes=case.classes, params=case.params)


def batch(case: Case, rows: int = 3) -> Tensor:
    generator = torch.Generator().manual_seed(1)
    if case.name == "lstm":
        return torch.randint(0, case.classes, (rows, *case.input_shape), generator=generator)
    return torch.randn(rows, *case.input_shape, generator=generator)


def test_every_registered_model_of_the_zoo_is_in_these_tests() -> None:
    from fedsim.registry import load

    built_in = {n for n in names("models") if load("models", n).__module__.startswith("fedsim.")}
    assert built_in == {case.name for case in ZOO}


@pytest.mark.parametrize("case", ZOO, ids=str)
def test_a_model_has_the_published_number_of_parameters(case: Case) -> None:
    assert sum(p.numel() for p in made(case).parameters()) == case.size


def test_the_full_resnet_has_the_published_number_of_parameters() -> None:
    with torch.device("meta"):
        model = make_model("resnet18", input_shape=CIFAR, classes=10)
    assert sum(p.numel() for p in model.parameters()) == 11_173_962 == resnet_size(64)


@pytest.mark.parametrize("case", ZOO, ids=str)
def test_the_output_is_one_row_of_logits_for_each_example(case: Case) -> None:
    positions = case.input_shape if case.name == "lstm" and not case.params.get("last") else ()
    output = made(case)(batch(case))
    assert output.shape == (3, *positions, case.classes)
    assert output.dtype == torch.float32


@pytest.mark.parametrize("case", ZOO, ids=str)
def test_the_callers_seed_decides_the_weights(case: Case) -> None:
    first, again, other = (made(case, seed=s).state_dict() for s in (1, 1, 2))
    assert all(torch.equal(first[name], again[name]) for name in first)
    assert not all(torch.equal(first[name], other[name]) for name in first)


@pytest.mark.parametrize("case", ZOO, ids=str)
@pytest.mark.filterwarnings("ignore:There is a performance drop")
def test_stacking_is_allowed_for_the_zoo(case: Case) -> None:
    assert stackable(made(case), batch(case)) == (True, "")


@pytest.mark.parametrize("case", ZOO, ids=str)
@pytest.mark.filterwarnings("ignore:There is a performance drop")
def test_stacked_gradients_of_two_clients_are_those_of_plain_autograd(case: Case) -> None:
    clients = [made(case, seed=s).double() for s in (1, 2)]
    inputs = torch.stack([batch(case), batch(case).flip(0)])
    if inputs.is_floating_point():
        inputs = inputs.double()

    def loss(output: Tensor) -> Tensor:
        return output.log_softmax(-1)[..., 0].mean() + output.square().mean()

    def stacked_loss(x: dict[str, Tensor], state: dict[str, Tensor], rows: Tensor) -> Tensor:
        copies = {name: value.clone() for name, value in state.items()}
        return loss(functional_call(clients[0], {**x, **copies}, (rows,)))

    parameters, buffers = stack_module_state(clients)
    found = vmap(grad(stacked_loss))(parameters, buffers, inputs)
    for c, client in enumerate(clients):
        names_of, values = zip(*client.named_parameters(), strict=True)
        expected = torch.autograd.grad(loss(client(inputs[c])), values)
        for name, gradient in zip(names_of, expected, strict=True):
            torch.testing.assert_close(found[name][c], gradient, rtol=1e-8, atol=1e-11)


@pytest.mark.parametrize("case", ZOO, ids=str)
def test_no_model_changes_its_input(case: Case) -> None:
    inputs = batch(case)
    before = inputs.clone()
    made(case)(inputs)
    assert torch.equal(inputs, before)


@pytest.mark.parametrize("case", ZOO, ids=str)
def test_batch_normalisation_is_there_only_where_it_was_asked_for(case: Case) -> None:
    model = made(case)
    assert has_batchnorm(model) == (case.params.get("norm") == "batch")
    assert bool(list(model.buffers())) == has_batchnorm(model)
    assert not has_dropout(model)


def test_one_example_does_not_look_at_the_others_under_group_normalisation() -> None:
    case = Case("resnet18", (3, 16, 16), 10, NARROW_RESNET, 0)
    model, inputs = made(case), batch(case)
    assert torch.allclose(model(inputs)[:1], model(inputs[:1]), atol=1e-5)


def test_the_lstm_does_not_look_ahead() -> None:
    case = Case("lstm", (20,), 30, {"hidden": 16}, 0)
    model, inputs = made(case), batch(case)
    changed = inputs.clone()
    changed[:, 10:] = (changed[:, 10:] + 1) % 30
    assert torch.equal(model(inputs)[:, :10], model(changed)[:, :10])
    assert not torch.equal(model(inputs)[:, 10:], model(changed)[:, 10:])


def test_the_last_position_of_the_lstm_is_that_of_all_positions() -> None:
    every = made(Case("lstm", (20,), 30, {"hidden": 16}, 0))
    last = made(Case("lstm", (20,), 30, {"hidden": 16, "last": True}, 0))
    inputs = batch(Case("lstm", (20,), 30, {}, 0))
    # One matrix product of another shape: the last bit may differ, by processor.
    torch.testing.assert_close(every(inputs)[:, -1], last(inputs), rtol=1e-6, atol=1e-6)


# Checkpoints name parameters: these names are part of the file format.
@pytest.mark.parametrize(
    ("case", "first", "last"),
    [
        (ZOO[0], "1.weight", "1.bias"),
        (ZOO[3], "1.weight", "3.bias"),
        (ZOO[6], "0.weight", "9.bias"),
        (ZOO[9], "blocks.0.0.weight", "head.bias"),
        (ZOO[11], "0.weight", "11.bias"),
        (ZOO[12], "0.weight", "11.bias"),
        (ZOO[13], "conv.weight", "head.bias"),
        (ZOO[15], "embedding.weight", "head.bias"),
    ],
    ids=str,
)
def test_names_in_a_checkpoint_stay_what_they_are(case: Case, first: str, last: str) -> None:
    keys = list(made(case).state_dict())
    assert keys[0] == first
    assert keys[-1] == last


def test_names_inside_the_residual_blocks_stay_what_they_are() -> None:
    keys = [k for k in made(ZOO[14]).state_dict() if k.startswith("blocks.2.")]
    statistics = ("weight", "bias", "running_mean", "running_var", "num_batches_tracked")
    assert keys == [
        "blocks.2.conv1.weight",
        *(f"blocks.2.norm1.{s}" for s in statistics),
        "blocks.2.conv2.weight",
        *(f"blocks.2.norm2.{s}" for s in statistics),
        "blocks.2.shortcut.0.weight",
        *(f"blocks.2.shortcut.1.{s}" for s in statistics),
    ]


@pytest.mark.parametrize(
    ("name", "input_shape"),
    [
        ("cnn", (784,)),
        ("cnn", (1, 3, 28)),
        ("small_cnn", (1, 3, 3)),
        ("lenet5", DIGITS),
        ("lenet5_classic", DIGITS),
        ("resnet18", (3, 4, 4)),
        ("lstm", MNIST),
    ],
)
def test_data_that_a_model_cannot_take_are_refused(name: str, input_shape: tuple[int, ...]) -> None:
    with pytest.raises(ModelError, match=name) as caught:
        make_model(name, input_shape=input_shape, classes=10)
    assert caught.value.code == "FS-MOD-010"
    assert str(list(input_shape)) in str(caught.value.why)


@pytest.mark.parametrize(
    ("name", "smallest"), [("cnn", 4), ("small_cnn", 4), ("lenet5", 16), ("lenet5_classic", 12)]
)
def test_the_smallest_images_that_are_accepted_work(name: str, smallest: int) -> None:
    shape = (1, smallest, smallest)
    assert make_model(name, input_shape=shape, classes=3)(torch.zeros(2, *shape)).shape == (2, 3)


@pytest.mark.parametrize(
    ("name", "params"),
    [
        ("mlp", {"hidden": [0]}),
        ("mlp", {"hidden": [2.5]}),
        ("small_cnn", {"channels": []}),
        ("small_cnn", {"channels": [-3]}),
        ("small_cnn", {"norm": "layer"}),
        ("small_cnn", {"norm": "group", "groups": 5}),
        ("resnet18", {"width": 16}),
        ("resnet18", {"width": 0}),
        ("resnet18", {"norm": "none"}),
    ],
)
def test_parameters_out_of_range_are_refused(name: str, params: dict[str, Any]) -> None:
    with pytest.raises(ModelError) as caught:
        make_model(name, input_shape=(3, 16, 16), classes=10, params=params)
    assert caught.value.code == "FS-MOD-011"
    assert str(caught.value.where).startswith("model.")
