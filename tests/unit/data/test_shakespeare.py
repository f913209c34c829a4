from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from fedsim.data import Dataset, load
from fedsim.data.shakespeare import PRINTABLE, shakespeare
from fedsim.errors import ConfigError, DataError

PLAY = """ANN:
abcdefghij
klmnopqrst

BOB:
no

ANN:
uvwxyz

CARL SMITH:
0123456789012345678901234
"""


@pytest.fixture
def play(tmp_path: Path) -> Path:
    (tmp_path / "input.txt").write_text(PLAY)
    return tmp_path


def read(data: Dataset, codes: torch.Tensor) -> str:
    return "".join(data.label_names[int(code)] for code in codes)


def test_each_role_is_a_client_and_too_short_roles_are_left_out(play: Path) -> None:
    data = shakespeare(path=play, seq_len=5, test_fraction=0.0)
    assert data.owner_names == ("ANN", "CARL SMITH")
    assert data.owners is not None
    assert np.bincount(data.owners).tolist() == [5, 4]
    assert data.task == "next-token"
    assert data.test is None


def test_windows_and_their_next_characters_written_out(play: Path) -> None:
    data = shakespeare(path=play, seq_len=5, test_fraction=0.0)
    pairs = [
        (read(data, x), read(data, y)) for x, y in zip(data.train.inputs, data.train.targets, strict=True)
    ]
    assert pairs[:5] == [
        ("abcde", "bcdef"),
        ("fghij", "ghij\n"),
        ("\nklmn", "klmno"),
        ("opqrs", "pqrst"),
        ("t\nuvw", "\nuvwx"),
    ]
    assert pairs[5:] == [
        ("01234", "12345"),
        ("56789", "67890"),
        ("01234", "12345"),
        ("56789", "67890"),
    ]


def test_the_last_part_of_each_role_is_the_test_set_and_shares_no_character_with_training(
    play: Path,
) -> None:
    data = shakespeare(path=play, seq_len=3, stride=1, test_fraction=0.4)
    assert data.test is not None
    # CARL SMITH says 25 characters: 15 for training (12 windows), 10 for the test (7 windows).
    carl = data.train.inputs[torch.from_numpy(data.owners == 1)]
    assert len(carl) == 12
    assert read(data, carl[-1]) + read(data, data.train.targets[-1])[-1] == "1234"
    assert read(data, data.test.inputs[-7]) == "567"


def test_target_last_is_the_classification_of_one_character(play: Path) -> None:
    data = shakespeare(path=play, seq_len=5, target="last", test_fraction=0.0)
    assert data.task == "classification"
    assert data.train.targets.shape == (9,)
    assert read(data, data.train.targets[:2]) == "f\n"


def test_stride_1_makes_every_character_after_the_first_window_a_target(play: Path) -> None:
    data = shakespeare(path=play, seq_len=5, stride=1, target="last", test_fraction=0.0)
    assert data.owners is not None
    assert np.bincount(data.owners).tolist() == [28 - 5, 25 - 5]


def test_the_vocabulary_is_that_of_the_file_or_printable_ascii(play: Path) -> None:
    occurring = shakespeare(path=play, seq_len=5)
    assert "".join(occurring.label_names) == "".join(sorted(set(PLAY)))
    fixed = shakespeare(path=play, seq_len=5, vocabulary="printable")
    assert fixed.classes == 96
    assert read(fixed, fixed.train.inputs[0]) == "abcde"
    assert len(set(PRINTABLE)) == 96


def test_a_character_outside_the_fixed_vocabulary_is_named_with_its_role(tmp_path: Path) -> None:
    (tmp_path / "input.txt").write_text("ANN:\nna\u00efve enough\n", encoding="utf-8")
    with pytest.raises(DataError, match="character 'ï'") as caught:
        shakespeare(path=tmp_path, seq_len=3, vocabulary="printable")
    assert caught.value.code == "FS-DAT-014"
    assert "role ANN" in str(caught.value)
    data = shakespeare(path=tmp_path, seq_len=3, test_fraction=0.0)
    assert read(data, data.train.inputs[0]) == "na\u00ef"


def test_windows_line_endings_make_no_difference(play: Path, tmp_path: Path) -> None:
    other = tmp_path / "dos.txt"
    other.write_bytes(PLAY.replace("\n", "\r\n").encode())
    assert shakespeare(path=other, seq_len=5).digest == shakespeare(path=play, seq_len=5).digest


@pytest.mark.parametrize(
    ("text", "code", "words"),
    [
        ("ANN:\nhello there\n\nno colon here\nand more\n", "FS-DAT-013", "near line 4"),
        ("ANN:\nhi\n", "FS-DAT-013", "no role speaks enough"),
        ("", "FS-DAT-013", "0 roles"),
    ],
)
def test_a_text_that_is_not_such_a_dialogue_is_refused(
    text: str, code: str, words: str, tmp_path: Path
) -> None:
    (tmp_path / "input.txt").write_text(text)
    with pytest.raises(DataError) as caught:
        shakespeare(path=tmp_path, seq_len=5)
    assert caught.value.code == code
    assert words in str(caught.value)


def test_a_text_in_another_encoding_is_refused_with_the_byte(tmp_path: Path) -> None:
    (tmp_path / "input.txt").write_bytes(b"ANN:\nna\xefve\n")
    with pytest.raises(DataError, match="not UTF-8") as caught:
        shakespeare(path=tmp_path)
    assert "byte 7" in str(caught.value)


def test_no_path_or_a_wrong_one_names_the_key(tmp_path: Path) -> None:
    for path in (None, tmp_path, tmp_path / "nothing.txt"):
        with pytest.raises(DataError) as caught:
            shakespeare(path=path)
        assert (caught.value.code, caught.value.where) == ("FS-DAT-001", "data.path")


@pytest.mark.parametrize(
    "wrong",
    [
        {"seq_len": 0},
        {"stride": 0},
        {"target": "both"},
        {"vocabulary": "leaf"},
        {"test_fraction": 1.0},
    ],
)
def test_parameters_out_of_range_are_refused(play: Path, wrong: dict[str, Any]) -> None:
    with pytest.raises(ConfigError) as caught:
        shakespeare(path=play, **wrong)
    assert caught.value.code == "FS-DAT-011"


def test_the_real_text_has_its_known_roles_and_alphabet(real_data: Path) -> None:
    data = load("shakespeare", real_data / "shakespeare")
    assert data.classes == 65
    assert data.input_shape == (80,)
    assert "GLOUCESTER" in data.owner_names
    assert data.test is not None
    assert torch.equal(data.train.inputs[0, 1:], data.train.targets[0, :-1])
    first = read(data, data.train.inputs[0])
    assert first.startswith("Before we proceed any further, hear me speak.")
    assert len(data.owner_names) == 247
    assert (len(data.train), len(data.test)) == (10127, 2437)
