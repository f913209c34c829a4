from __future__ import annotations

import logging
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from fedsim.data import cache, load
from fedsim.data.decoded import channel_statistics
from fedsim.data.images import cifar10, image_folder, mnist
from fedsim.errors import ConfigError, DataError

Grey = Callable[..., list[np.ndarray]]
WriteParquet = Callable[..., Path]


@pytest.fixture
def folder(tmp_path: Path, grey: Grey, write_parquet: WriteParquet) -> Path:
    place = tmp_path / "set"
    write_parquet(place / "train.parquet", grey(5), [0, 1, 2, 1, 0], names=["a", "b", "c"])
    write_parquet(place / "test.parquet", grey(3, seed=1), [2, 0, 1], names=["a", "b", "c"])
    return place


def test_pixels_and_labels_come_back_exactly(folder: Path, grey: Grey) -> None:
    data = image_folder(path=folder)
    assert data.train.inputs.dtype == torch.uint8
    assert np.array_equal(data.train.inputs.numpy(), np.stack(grey(5))[:, None])
    assert data.test is not None
    assert np.array_equal(data.test.inputs.numpy(), np.stack(grey(3, seed=1))[:, None])
    assert data.train.targets.tolist() == [0, 1, 2, 1, 0]
    assert data.classes == 3
    assert data.label_names == ("a", "b", "c")
    assert data.task == "classification"


def test_normalisation_by_the_training_images_gives_mean_0_and_deviation_1(folder: Path) -> None:
    data = image_folder(path=folder)
    seen = data.transforms.evaluate(data.train.inputs).double()
    assert float(seen.mean()) == pytest.approx(0, abs=1e-6)
    assert float(seen.std(correction=0)) == pytest.approx(1, abs=1e-6)
    unit = image_folder(path=folder, normalise="unit")
    assert torch.equal(unit.transforms.evaluate(data.train.inputs), data.train.inputs * (1 / 255))


def test_channel_statistics_agree_with_numpy() -> None:
    images = np.random.default_rng(0).integers(0, 256, (9000, 3, 4, 5), dtype=np.uint8)
    images[:, 2] = 7
    mean, std = channel_statistics(images)
    scaled = images / 255.0
    np.testing.assert_allclose(mean, scaled.mean(axis=(0, 2, 3)), rtol=1e-12)
    np.testing.assert_allclose(std[:2], scaled.std(axis=(0, 2, 3))[:2], rtol=1e-12)
    assert std[2] == 1.0


def test_the_second_load_comes_from_the_cache_and_is_the_same_data(
    folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    first = image_folder(path=folder)

    def never(*args: object, **kwargs: object) -> None:
        raise AssertionError("decoded a second time")

    monkeypatch.setattr("fedsim.data.parquet.decode", never)
    second = image_folder(path=folder)
    assert second.digest == first.digest
    assert torch.equal(second.train.inputs, first.train.inputs)
    assert second.label_names == first.label_names
    batch = first.train.inputs[:2]
    assert torch.equal(second.transforms.evaluate(batch), first.transforms.evaluate(batch))


def test_changed_content_of_the_same_size_is_decoded_again(
    folder: Path, grey: Grey, write_parquet: WriteParquet
) -> None:
    before = image_folder(path=folder)
    stat = (folder / "train.parquet").stat()
    write_parquet(folder / "train.parquet", grey(5), [1, 1, 2, 1, 0], names=["a", "b", "c"])
    os.utime(folder / "train.parquet", ns=(stat.st_atime_ns, stat.st_mtime_ns))
    assert image_folder(path=folder).train.targets.tolist() == [1, 1, 2, 1, 0]
    assert image_folder(path=folder).digest != before.digest


def test_each_way_of_decoding_has_its_own_cache_entry(folder: Path) -> None:
    plain = image_folder(path=folder)
    coloured = image_folder(path=folder, mode="RGB", size=4)
    assert coloured.input_shape == (3, 4, 4)
    assert image_folder(path=folder).input_shape == plain.input_shape == (1, 6, 6)
    assert len(list((cache.folder() / "datasets").iterdir())) == 2


@pytest.mark.parametrize("damage", ["one bit", "half", "empty", "foreign"])
def test_a_damaged_cache_entry_is_noticed_reported_and_replaced(
    folder: Path, damage: str, caplog: pytest.LogCaptureFixture
) -> None:
    first = image_folder(path=folder)
    (entry,) = (cache.folder() / "datasets").iterdir()
    content = bytearray(entry.read_bytes())
    if damage == "one bit":
        content[-1] ^= 1
    elif damage == "half":
        del content[len(content) // 2 :]
    elif damage == "empty":
        content.clear()
    else:
        cache.store(entry, {"other": torch.zeros(3)}, {"digest": "x"})
        content = bytearray(entry.read_bytes())
    entry.write_bytes(content)
    with caplog.at_level(logging.WARNING):
        again = image_folder(path=folder)
    assert again.digest == first.digest
    assert "decode-again" in caplog.text
    caplog.clear()
    assert image_folder(path=folder).digest == first.digest
    assert not caplog.text


def test_without_cache_nothing_is_written(folder: Path) -> None:
    image_folder(path=folder, cache=False)
    assert not cache.folder().exists()


@pytest.mark.parametrize(
    "names",
    [
        ("data/train-00000-of-00001.parquet", "data/test-00000-of-00001.parquet"),
        ("mnist/train-00000-of-00001.parquet", "mnist/test-00000-of-00001.parquet"),
        ("default/train/0000.parquet", "default/test/0000.parquet"),
        ("train-00000-of-00001-0a1b2c3d.parquet", "validation-00000-of-00001-0a1b2c3d.parquet"),
    ],
)
def test_the_layouts_of_the_hub_are_understood(
    names: tuple[str, str], tmp_path: Path, grey: Grey, write_parquet: WriteParquet
) -> None:
    write_parquet(tmp_path / names[0], grey(2), [0, 1])
    write_parquet(tmp_path / names[1], grey(1), [1])
    data = image_folder(path=tmp_path)
    assert data.test is not None
    assert (len(data.train), len(data.test)) == (2, 1)


def test_several_files_of_a_split_are_read_in_order(
    tmp_path: Path, grey: Grey, write_parquet: WriteParquet
) -> None:
    images = grey(5)
    write_parquet(tmp_path / "data" / "train-00001-of-00002.parquet", images[3:], [2, 1])
    write_parquet(tmp_path / "data" / "train-00000-of-00002.parquet", images[:3], [0, 1, 2])
    data = image_folder(path=tmp_path)
    assert data.test is None
    assert np.array_equal(data.train.inputs.numpy()[:, 0], np.stack(images))
    assert data.train.targets.tolist() == [0, 1, 2, 2, 1]


def test_of_several_configurations_one_must_be_chosen(
    tmp_path: Path, grey: Grey, write_parquet: WriteParquet
) -> None:
    write_parquet(tmp_path / "small" / "train-0.parquet", grey(2), [0, 1])
    write_parquet(tmp_path / "large" / "train-0.parquet", grey(4), [0, 1, 0, 1])
    with pytest.raises(DataError, match="several configurations: large, small") as caught:
        image_folder(path=tmp_path)
    assert caught.value.code == "FS-DAT-002"
    assert len(image_folder(path=tmp_path, config="large")) == 4
    with pytest.raises(DataError, match="of configuration 'huge'"):
        image_folder(path=tmp_path, config="huge")


def test_columns_are_found_without_the_hubs_description(
    tmp_path: Path, grey: Grey, write_parquet: WriteParquet
) -> None:
    write_parquet(tmp_path / "train.parquet", grey(3), [0, 3, 1], image="img", described=False)
    data = image_folder(path=tmp_path)
    assert data.classes == 4
    assert data.label_names == ()


def test_columns_of_other_names_are_found_by_type_or_by_being_named(
    tmp_path: Path, grey: Grey, write_parquet: WriteParquet
) -> None:
    extra = {"coarse": [1, 0, 1], "writer": ["eve", "adam", "eve"]}
    write_parquet(tmp_path / "train.parquet", grey(3), [0, 3, 1], image="scan", label="kind", extra=extra)
    assert image_folder(path=tmp_path).train.targets.tolist() == [0, 3, 1]
    assert image_folder(path=tmp_path, label="coarse").train.targets.tolist() == [1, 0, 1]
    owned = image_folder(path=tmp_path, client="writer")
    assert owned.owners is not None
    assert owned.owners.tolist() == [1, 0, 1]
    assert owned.owner_names == ("adam", "eve")
    again = image_folder(path=tmp_path, client="writer")
    assert again.owners is not None
    assert again.owners.tolist() == [1, 0, 1]


def test_a_missing_column_is_reported_with_those_there_are(
    tmp_path: Path, grey: Grey, write_parquet: WriteParquet
) -> None:
    write_parquet(tmp_path / "train.parquet", grey(2), [0, 1], label="kind", described=False)
    with pytest.raises(DataError, match="no column holds the label") as caught:
        image_folder(path=tmp_path)
    assert caught.value.code == "FS-DAT-004"
    assert "kind (int64)" in str(caught.value)
    with pytest.raises(DataError, match="no column 'nothing'"):
        image_folder(path=tmp_path, label="nothing")


def test_a_share_of_the_training_images_becomes_the_test_set_where_there_is_none(
    tmp_path: Path, grey: Grey, write_parquet: WriteParquet
) -> None:
    write_parquet(tmp_path / "train.parquet", grey(10), list(range(10)), extra={"who": list("abcdefghij")})
    data = image_folder(path=tmp_path, test_fraction=0.3, seed=4, client="who")
    assert data.test is not None
    assert (len(data.train), len(data.test)) == (7, 3)
    assert sorted(data.train.targets.tolist() + data.test.targets.tolist()) == list(range(10))
    assert data.owners is not None
    names = [data.owner_names[owner] for owner in data.owners]
    assert names == ["abcdefghij"[label] for label in data.train.targets]
    other = image_folder(path=tmp_path, test_fraction=0.3, seed=5)
    assert other.digest != data.digest


@pytest.mark.parametrize("damage", ["truncated", "overwritten", "empty", "text"])
def test_a_corrupt_parquet_file_is_an_error_with_file_and_remedy(folder: Path, damage: str) -> None:
    file = folder / "test.parquet"
    content = bytearray(file.read_bytes())
    if damage == "truncated":
        del content[len(content) // 2 :]
    elif damage == "overwritten":
        content[4 : len(content) // 2] = bytes(len(content) // 2 - 4)
    elif damage == "empty":
        content.clear()
    else:
        content[:] = b"this is not a parquet file, whatever its name says"
    file.write_bytes(content)
    with pytest.raises(DataError) as caught:
        image_folder(path=folder)
    assert caught.value.code == "FS-DAT-003"
    assert caught.value.where == str(file)
    assert "fetch it again" in str(caught.value)
    assert not cache.folder().exists()


def test_an_image_that_cannot_be_decoded_is_named_by_file_and_row(
    tmp_path: Path, grey: Grey, write_parquet: WriteParquet
) -> None:
    for broken in (b"no picture at all", b"\x89PNG\r\n\x1a\n" + bytes(60), b"", None):
        file = write_parquet(tmp_path / "train.parquet", [*grey(2), broken], [0, 1, 0])
        with pytest.raises(DataError) as caught:
            image_folder(path=tmp_path)
        assert caught.value.code == "FS-DAT-005"
        assert caught.value.where == f"{file}, row 2"


def test_mixed_sizes_are_refused_naming_the_first_row_that_differs_or_resized_on_request(
    tmp_path: Path, grey: Grey, write_parquet: WriteParquet
) -> None:
    write_parquet(tmp_path / "train-0.parquet", grey(2), [0, 1])
    second = write_parquet(tmp_path / "train-1.parquet", [*grey(1), *grey(2, size=8)], [0, 1, 0])
    with pytest.raises(DataError) as caught:
        image_folder(path=tmp_path)
    assert caught.value.code == "FS-DAT-006"
    assert caught.value.where == f"{second}, row 1"
    assert "8x8 pixels, grey; the images before it have 6x6 pixels, grey" in str(caught.value)
    assert image_folder(path=tmp_path, size=5).input_shape == (1, 5, 5)


def test_mixed_colour_modes_are_refused_or_converted_on_request(
    tmp_path: Path, grey: Grey, write_parquet: WriteParquet
) -> None:
    colour = np.random.default_rng(0).integers(0, 256, (6, 6, 3), dtype=np.uint8)
    write_parquet(tmp_path / "train.parquet", [*grey(1), colour], [0, 1])
    with pytest.raises(DataError) as caught:
        image_folder(path=tmp_path)
    assert caught.value.code == "FS-DAT-006"
    data = image_folder(path=tmp_path, mode="RGB")
    assert data.input_shape == (3, 6, 6)
    assert np.array_equal(data.train.inputs[1].numpy(), colour.transpose(2, 0, 1))


def test_modes_other_than_grey_and_colour_need_a_conversion(
    tmp_path: Path, write_parquet: WriteParquet
) -> None:
    with_alpha = np.zeros((4, 4, 4), dtype=np.uint8)
    write_parquet(tmp_path / "train.parquet", [with_alpha], [0])
    with pytest.raises(DataError, match="colour mode 'RGBA'") as caught:
        image_folder(path=tmp_path)
    assert caught.value.code == "FS-DAT-006"


def test_a_label_outside_the_named_classes_is_refused_with_its_row(
    tmp_path: Path, grey: Grey, write_parquet: WriteParquet
) -> None:
    write_parquet(tmp_path / "train.parquet", grey(3), [0, 1, 2], names=["a", "b"])
    with pytest.raises(DataError, match="label 2 is outside 0 … 1") as caught:
        image_folder(path=tmp_path)
    assert caught.value.code == "FS-DAT-007"
    assert caught.value.where is not None
    assert caught.value.where.endswith("train split, row 2")


def test_a_missing_label_is_refused_with_file_and_row(
    tmp_path: Path, grey: Grey, write_parquet: WriteParquet
) -> None:
    file = write_parquet(tmp_path / "train.parquet", grey(3), [0, None, 1])
    with pytest.raises(DataError) as caught:
        image_folder(path=tmp_path)
    assert caught.value.code == "FS-DAT-007"
    assert caught.value.where == f"{file}, row 1"


def write_tree(root: Path, images: list[np.ndarray], classes: list[str]) -> None:
    from PIL import Image

    for i, (pixels, name) in enumerate(zip(images, classes, strict=True)):
        place = root / name
        place.mkdir(parents=True, exist_ok=True)
        Image.fromarray(pixels).save(place / f"{i}.png")


def test_images_in_class_folders_are_read_with_classes_in_numeric_order(tmp_path: Path, grey: Grey) -> None:
    images = grey(4)
    write_tree(tmp_path / "train", images[:3], ["10", "2", "2"])
    write_tree(tmp_path / "test", images[3:], ["10"])
    data = image_folder(path=tmp_path)
    assert data.label_names == ("2", "10")
    assert data.train.targets.tolist() == [0, 0, 1]
    assert np.array_equal(data.train.inputs[2, 0].numpy(), images[0])
    assert data.test is not None
    assert data.test.targets.tolist() == [1]


def test_a_test_class_without_training_images_is_refused(tmp_path: Path, grey: Grey) -> None:
    write_tree(tmp_path / "train", grey(2), ["cat", "dog"])
    write_tree(tmp_path / "test", grey(1), ["fox"])
    with pytest.raises(DataError, match="class 'fox'") as caught:
        image_folder(path=tmp_path)
    assert caught.value.code == "FS-DAT-007"


def test_a_new_image_file_is_noticed_in_spite_of_the_cache(tmp_path: Path, grey: Grey) -> None:
    write_tree(tmp_path / "train", grey(2), ["cat", "dog"])
    assert len(image_folder(path=tmp_path)) == 2
    write_tree(tmp_path / "train", grey(3), ["cat", "dog", "dog"])
    assert len(image_folder(path=tmp_path)) == 3


def test_a_broken_image_file_is_named(tmp_path: Path, grey: Grey) -> None:
    write_tree(tmp_path / "train", grey(2), ["cat", "dog"])
    broken = tmp_path / "train" / "dog" / "9.png"
    broken.write_bytes(b"\x89PNG\r\n\x1a\n")
    with pytest.raises(DataError) as caught:
        image_folder(path=tmp_path)
    assert (caught.value.code, caught.value.where) == ("FS-DAT-005", str(broken))


def test_a_folder_in_no_known_layout_says_what_it_contains(tmp_path: Path) -> None:
    (tmp_path / "readme.txt").write_text("nothing here")
    with pytest.raises(DataError) as caught:
        mnist(path=tmp_path)
    assert caught.value.code == "FS-DAT-002"
    assert "readme.txt" in str(caught.value)


def test_parquet_files_named_after_no_split_are_reported(
    tmp_path: Path, grey: Grey, write_parquet: WriteParquet
) -> None:
    write_parquet(tmp_path / "part-0.parquet", grey(1), [0])
    with pytest.raises(DataError, match="named after a split") as caught:
        image_folder(path=tmp_path)
    assert caught.value.code == "FS-DAT-002"


def test_a_path_that_does_not_exist_names_the_key(tmp_path: Path) -> None:
    with pytest.raises(DataError) as caught:
        mnist(path=tmp_path / "nowhere")
    assert (caught.value.code, caught.value.where) == ("FS-DAT-001", "data.path")


def test_data_that_are_not_mnist_are_not_loaded_as_mnist(folder: Path) -> None:
    with pytest.raises(DataError, match="these data are not mnist") as caught:
        mnist(path=folder)
    assert caught.value.code == "FS-DAT-021"
    assert "image_folder" in str(caught.value)


@pytest.mark.parametrize(
    "wrong", [{"normalise": "none"}, {"crop": -1}, {"test_fraction": 1.0}, {"test_fraction": -0.1}]
)
def test_parameters_out_of_range_are_refused(folder: Path, wrong: dict[str, Any]) -> None:
    (folder / "test.parquet").unlink()
    with pytest.raises(ConfigError) as caught:
        image_folder(path=folder, **wrong)
    assert caught.value.code == "FS-DAT-011"


def test_load_by_name_passes_path_and_parameters(folder: Path) -> None:
    assert load("image_folder", folder, size=4).input_shape == (1, 4, 4)


def test_load_names_the_parameters_a_data_set_has() -> None:
    with pytest.raises(ConfigError, match="cannot be loaded with these parameters") as caught:
        load("mnist", sise=4)
    assert caught.value.code == "FS-DAT-011"
    assert "it takes: path, normalise, cache" in str(caught.value)


def test_cifar_is_cropped_and_flipped_in_training_only_and_can_be_left_alone(
    real_data: Path, tmp_path: Path
) -> None:
    cut = _first_rows(real_data / "cifar10", tmp_path / "cifar", 40)
    data = cifar10(path=cut)
    assert data.transforms.random
    assert data.label_names[:2] == ("airplane", "automobile")
    batch, words = data.train.inputs[:8], torch.arange(8)
    assert not torch.equal(data.transforms.train(batch, words), data.transforms.evaluate(batch))
    plain = cifar10(path=cut, crop=0, flip=False)
    assert not plain.transforms.random
    assert torch.equal(plain.transforms.train(batch, words), plain.transforms.evaluate(batch))


def _first_rows(source: Path, target: Path, count: int) -> Path:
    import pyarrow.parquet as pq

    target.mkdir()
    for split in ("train", "test"):
        pq.write_table(
            pq.read_table(source / f"{split}.parquet").slice(0, count), target / f"{split}.parquet"
        )
    return target
