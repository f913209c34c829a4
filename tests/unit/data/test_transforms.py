from __future__ import annotations

import pickle

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from fedsim.data import transforms
from fedsim.data.transforms import crop_and_flip, image


def keys(*shape: int, seed: int = 0) -> torch.Tensor:
    generator = torch.Generator().manual_seed(seed)
    low, high = torch.iinfo(torch.int64).min, torch.iinfo(torch.int64).max
    return torch.randint(low, high, shape, generator=generator)


def pictures(*shape: int, seed: int = 0) -> torch.Tensor:
    generator = torch.Generator().manual_seed(seed)
    return torch.randint(0, 256, shape, generator=generator, dtype=torch.uint8)


def one_at_a_time(picture: np.ndarray, down: int, right: int, mirrored: bool) -> np.ndarray:
    """The obvious way: mirror, then move over a black background."""
    channels, height, width = picture.shape
    source = picture[:, :, ::-1] if mirrored else picture
    out = np.zeros_like(picture)
    for y in range(height):
        for x in range(width):
            # A mirrored image is moved the other way, as the window was cut before mirroring.
            sy, sx = y + down, x + (-right if mirrored else right)
            if 0 <= sy < height and 0 <= sx < width:
                out[:, y, x] = source[:, sy, sx]
    return out


def test_normalise_is_the_textbook_formula_per_channel() -> None:
    mean, std = (0.4914, 0.4822, 0.4465), (0.2470, 0.2435, 0.2616)
    raw = pictures(5, 3, 4, 4)
    expected = (raw.double() / 255 - torch.tensor(mean).double()[:, None, None]) / torch.tensor(std).double()[
        :, None, None
    ]
    got = image(mean, std).evaluate(raw)
    assert got.dtype == torch.float32
    torch.testing.assert_close(got.double(), expected, rtol=0, atol=1e-6)


def test_without_crop_and_flip_training_equals_evaluation_and_keys_are_not_needed() -> None:
    pipeline = image([0.5], [0.25])
    raw = pictures(2, 3, 1, 4, 4)
    assert not pipeline.random
    assert torch.equal(pipeline.train(raw, keys(2, 3)), pipeline.evaluate(raw))


def test_the_stored_batch_is_never_changed() -> None:
    pipeline = image([0.5], [0.25], crop=2, flip=True)
    for raw in (pictures(4, 1, 5, 5), pictures(4, 1, 5, 5).float()):
        before = raw.clone()
        pipeline.train(raw, keys(4))
        pipeline.evaluate(raw)
        assert torch.equal(raw, before)


@settings(deadline=None, max_examples=40)
@given(
    seed=st.integers(0, 10**6),
    crop=st.integers(0, 3),
    flip=st.booleans(),
    channels=st.sampled_from([1, 3]),
    height=st.integers(2, 6),
    width=st.integers(2, 6),
)
def test_every_result_is_one_shift_of_the_image_or_of_its_mirror_image(
    seed: int, crop: int, flip: bool, channels: int, height: int, width: int
) -> None:
    raw = pictures(4, channels, height, width, seed=seed)
    moved = crop_and_flip(raw, keys(4, seed=seed), crop=crop, flip=flip)
    for before, after in zip(raw.numpy(), moved.numpy(), strict=True):
        candidates = [
            one_at_a_time(before, down, right, mirrored)
            for down in range(-crop, crop + 1)
            for right in range(-crop, crop + 1)
            for mirrored in ((False, True) if flip else (False,))
        ]
        assert any(np.array_equal(after, candidate) for candidate in candidates)


def test_a_block_of_clients_equals_its_clients_one_by_one_and_example_by_example() -> None:
    raw, words = pictures(3, 4, 3, 8, 8), keys(3, 4)
    pipeline = image([0.5] * 3, [0.25] * 3, crop=2, flip=True)
    together = pipeline.train(raw, words)
    assert together.shape == raw.shape
    for client in range(3):
        assert torch.equal(pipeline.train(raw[client], words[client]), together[client])
        for i in range(4):
            alone = pipeline.train(raw[client, i : i + 1], words[client, i : i + 1])
            assert torch.equal(alone[0], together[client, i])


def test_unsigned_and_signed_keys_with_the_same_bits_choose_alike() -> None:
    raw, words = pictures(16, 1, 6, 6), keys(16)
    unsigned = torch.from_numpy(words.numpy().view(np.uint64))
    assert torch.equal(
        crop_and_flip(raw, words, crop=2, flip=True), crop_and_flip(raw, unsigned, crop=2, flip=True)
    )


@pytest.mark.parametrize("words", [torch.arange(40_000), keys(40_000), torch.arange(40_000) << 40])
def test_offsets_and_mirroring_are_uniform_and_independent_even_for_consecutive_keys(
    words: torch.Tensor,
) -> None:
    # A single white pixel that can be mirrored tells where it went: 5 x 5 places, both mirrorings.
    raw = torch.zeros(1, 1, 8, 9, dtype=torch.uint8)
    raw[0, 0, 4, 2] = 255
    moved = crop_and_flip(raw.expand(len(words), -1, -1, -1), words, crop=1, flip=True)
    places = moved.flatten(1).argmax(1)
    counts = torch.bincount(places, minlength=72)
    seen = counts[counts > 0].double()
    assert len(seen) == 3 * 3 * 2
    expected = len(words) / len(seen)
    chi_square = float(((seen - expected) ** 2 / expected).sum())
    assert chi_square < 45  # 17 degrees of freedom: exceeded with probability 2e-4


def test_zero_crop_without_flip_changes_nothing() -> None:
    raw = pictures(3, 1, 5, 5)
    assert torch.equal(crop_and_flip(raw, keys(3), crop=0, flip=False), raw)


def test_pixels_from_outside_are_black_before_normalisation() -> None:
    white = torch.full((64, 1, 4, 4), 255, dtype=torch.uint8)
    out = image([0.5], [0.25], crop=3).train(white, keys(64))
    assert set(out.unique().tolist()) == {-2.0, 2.0}


def test_characters_and_features_pass_unchanged() -> None:
    pipeline = transforms.identity()
    text = torch.arange(6).reshape(2, 3)
    assert pipeline.train(text, torch.zeros(2, dtype=torch.int64)) is text
    assert pipeline.evaluate(text) is text
    assert not pipeline.random


def test_transforms_can_be_sent_to_another_process() -> None:
    for pipeline in (transforms.identity(), image([0.1], [0.2]), image([0.1], [0.2], crop=1)):
        copy = pickle.loads(pickle.dumps(pipeline))
        raw = pictures(2, 1, 3, 3)
        assert torch.equal(copy.train(raw, keys(2)), pipeline.train(raw, keys(2)))
