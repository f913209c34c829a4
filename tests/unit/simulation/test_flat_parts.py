"""Parts of the flat engine by themselves: batches, layouts, quicker layers, bfloat16, the allocator."""

from __future__ import annotations

import ctypes
import logging

import numpy as np
import pytest
import torch
from torch import nn
from torch.nn import functional as F

from fedsim.data.dataset import Split, make_dataset
from fedsim.data.federated import FederatedData
from fedsim.data.transforms import image
from fedsim.flat import flat_of, spec_of
from fedsim.keys import Purpose, bits, bits_of_one, stream_key, stream_keys
from fedsim.local import Direction, LocalSpec, Phase
from fedsim.simulation import allocator, onednn
from fedsim.simulation.flat_batches import Feed
from fedsim.simulation.flat_kernels import quicken
from fedsim.simulation.flat_module import FlatModule
from fedsim.simulation.flat_precision import layout_of, why_not_bfloat16
from fedsim.training.clients import ClientData, Schedule

CPU = torch.device("cpu")


def augmented() -> ClientData:
    """Clients of 11, 0 and 4 images that are cropped and flipped at random."""
    draw = torch.Generator().manual_seed(0)
    pixels = torch.randint(0, 256, (15, 1, 6, 6), generator=draw, dtype=torch.uint8)
    targets = torch.randint(0, 3, (15,), generator=draw)
    dataset = make_dataset(
        "images",
        "classification",
        train=Split(pixels, targets),
        test=None,
        transforms=image((0.5,), (0.5,), crop=1, flip=True),
        classes=3,
    )
    data = FederatedData(dataset, np.random.default_rng(0).permutation(15), np.array([0, 11, 11, 15]))
    return ClientData(data, seed=3, dtype=torch.float32, device=CPU)


def nowhere(*_: object) -> tuple[Direction, tuple[()], None]:
    raise AssertionError("nothing is trained here")


@pytest.mark.parametrize("window", [1, 1 << 20])
@pytest.mark.parametrize("client", [0, 1, 2])
@pytest.mark.parametrize(
    "spec",
    [LocalSpec(epochs=3, batch_size=4), LocalSpec(steps=5, batch_size=0), LocalSpec(steps=4, batch_size=100)],
    ids=["short batches", "all at once", "smaller than a batch"],
)
@pytest.mark.parametrize("kind", ["batches", "full", "own table"])
def test_a_feed_hands_out_the_batches_of_the_schedule(
    spec: LocalSpec, client: int, window: int, kind: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("fedsim.simulation.flat_batches._WINDOW", window)
    clients = augmented()
    phases = (Phase(nowhere), Phase(nowhere, data="full"), Phase(nowhere, spec=spec))
    number = ["batches", "full", "own table"].index(kind)
    steps = 6 if len(clients.data.rows(client)) else 0
    ids = np.array([client])
    schedule = Schedule(
        clients, ids, np.array([9]), np.array([steps]), phases=phases, number=number, spec=spec
    )
    feed = Feed(clients, client, 9, steps, phases=phases, number=number, spec=spec)
    assert len(feed) == len(schedule)
    for step, expected in enumerate(schedule):
        found = feed.batch(step)
        for name, value, other in zip(expected._fields, expected, found, strict=True):
            if isinstance(value, torch.Tensor):
                assert value.dtype == other.dtype, name  # type: ignore[union-attr]
                assert torch.equal(value, other), name  # type: ignore[arg-type]


@pytest.mark.parametrize("start", [0, (3 << 56) + (9 << 32)])
@pytest.mark.parametrize(("seed", "round_index"), [(0, 0), (2**63 + 5, 7), (1, -1)])
def test_the_stream_of_one_client_is_that_of_the_vectorised_draw(
    seed: int, round_index: int, start: int
) -> None:
    for client in (0, 123_456):
        row = bits(seed, Purpose.BATCH, round_index, np.array([client]), 20, start=start)[0]
        assert (bits_of_one(seed, Purpose.BATCH, round_index, client, 20, start=start) == row).all()
        key = stream_keys(seed, Purpose.BATCH, round_index, np.array([client]))[0]
        assert stream_key(seed, Purpose.BATCH, round_index, client) == int(key)


@pytest.mark.parametrize("layout", ["contiguous", "channels_last"])
def test_a_flat_module_is_one_buffer_seen_as_the_models_parameters(layout: str) -> None:
    torch.manual_seed(0)
    module = nn.Sequential(nn.Conv2d(2, 4, 3), nn.BatchNorm2d(4), nn.Flatten(), nn.Linear(4, 3))
    spec = spec_of(module)
    made = FlatModule(module, spec, None, None, device=CPU, layout=layout)  # type: ignore[arg-type]
    storage = made.flat.untyped_storage().data_ptr()
    assert all(p.untyped_storage().data_ptr() == storage for p in made.module.parameters())
    x = flat_of(module, spec)
    for flat in (x, None):
        made.flat.zero_()
        made.load(spec.unflatten(x), flat)
        assert torch.equal(flat_of(made.module, spec), x)
        assert torch.equal(made.minus(spec.unflatten(x), x), torch.zeros_like(x))
    channels_last = made.views[0].is_contiguous(memory_format=torch.channels_last)
    assert channels_last == (layout == "channels_last")
    assert made.ordered == (layout == "contiguous")


def test_pooling_before_the_activation_gives_the_same_numbers_and_gradients() -> None:
    torch.manual_seed(0)
    layers = [nn.Conv2d(1, 4, 3), nn.ReLU(), nn.MaxPool2d(3, padding=1, ceil_mode=True), nn.Flatten()]
    module = nn.Sequential(*layers)
    inputs = torch.randn(5, 1, 8, 8)

    def answer() -> tuple[torch.Tensor, ...]:
        outputs = module(inputs)
        return outputs, *torch.autograd.grad((outputs**2).sum(), list(module.parameters()))

    before = answer()
    quicken(module, keep_linear=False)
    assert [type(layer).__name__ for layer in module] == ["Conv2d", "MaxPool2d", "ReLU", "Flatten"]
    assert all(torch.equal(a, b) for a, b in zip(before, answer(), strict=True))


def test_layers_with_hooks_stay_where_they_are() -> None:
    module = nn.Sequential(nn.ReLU(), nn.MaxPool2d(2))
    module[0].register_forward_hook(lambda *_: None)
    quicken(module, keep_linear=False)
    assert isinstance(module[0], nn.ReLU)


@pytest.mark.skipif(not hasattr(torch.ops.mkldnn, "_linear_pointwise"), reason="torch without oneDNN")
@pytest.mark.parametrize("bias", [True, False])
def test_a_large_linear_layer_by_onednn_has_the_same_values_and_gradients(
    bias: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(onednn, "pays", lambda: True)
    torch.manual_seed(0)
    layer = nn.Linear(512, 256, bias=bias)
    module = nn.Sequential(layer)
    inputs = torch.randn(7, 512, requires_grad=True)
    wanted = [inputs, *module.parameters()]

    def answer() -> list[torch.Tensor]:
        outputs = module(inputs)
        return [outputs, *torch.autograd.grad((outputs**2).sum(), wanted)]

    before = answer()
    quicken(module, keep_linear=False)
    assert "forward" in vars(layer)
    for one, other in zip(before, answer(), strict=True):
        assert (one - other).norm() <= 1e-5 * one.norm()


def test_a_linear_layer_stays_in_float32_under_autocast_where_it_is_to() -> None:
    layer = nn.Linear(4, 3)
    quicken(nn.Sequential(layer), keep_linear=True)
    inputs = torch.randn(2, 4)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        found = layer(inputs.bfloat16())
    torch.testing.assert_close(found, F.linear(inputs.bfloat16().float(), layer.weight, layer.bias))


def test_the_layout_is_channels_last_where_there_are_convolutions() -> None:
    convolution = nn.Sequential(nn.Conv2d(1, 4, 3))
    normalised = nn.Sequential(nn.Conv2d(1, 4, 3), nn.GroupNorm(2, 4))
    images = torch.zeros(2, 1, 6, 6)
    assert layout_of("auto", nn.Linear(6, 2), images, reduced=False) == "contiguous"
    assert layout_of("auto", convolution, images, reduced=True) == "channels_last"
    assert layout_of("auto", normalised, images, reduced=False) == "channels_last"
    assert layout_of("auto", normalised, images, reduced=True) == "contiguous"
    assert layout_of("channels_last", normalised, images, reduced=True) == "channels_last"

    class Viewing(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.conv = nn.Conv2d(2, 4, 3)

        def forward(self, images: torch.Tensor) -> torch.Tensor:
            found: torch.Tensor = self.conv(images).view(len(images), -1)
            return found

    assert layout_of("auto", Viewing(), torch.zeros(2, 2, 6, 6), reduced=False) == "contiguous"


def test_a_processor_without_bfloat16_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cpu, "_is_avx512_bf16_supported", lambda: False)
    monkeypatch.setattr(torch.cpu, "_is_amx_tile_supported", lambda: False)
    assert "AVX512-BF16" in str(why_not_bfloat16(CPU))
    monkeypatch.setattr(torch.cpu, "_is_avx512_bf16_supported", lambda: True)
    assert why_not_bfloat16(CPU) is None


def test_another_c_library_is_left_alone_and_said(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setattr(allocator.platform, "libc_ver", lambda: ("", ""))
    monkeypatch.setattr(ctypes, "CDLL", lambda _: pytest.fail("called"))
    with caplog.at_level(logging.INFO):
        assert allocator.settle_allocator() is False
    assert "not glibc" in caplog.text


def test_glibc_is_told_to_keep_what_is_freed(monkeypatch: pytest.MonkeyPatch) -> None:
    class Library:
        taken: list[tuple[int, int]] = []

        def mallopt(self, option: int, value: int) -> int:
            self.taken.append((option, value))
            return 1

    monkeypatch.setattr(allocator.platform, "libc_ver", lambda: ("glibc", "2.39"))
    monkeypatch.setattr(ctypes, "CDLL", lambda _: Library())
    assert allocator.settle_allocator() is True
    assert Library.taken == [(-4, 0), (-1, 2**31 - 1), (-2, 256 << 20)]
