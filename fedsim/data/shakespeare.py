"""Next-character prediction on dialogue: every speaking role is a client.

McMahan et al. 2017 (section 3) and LEAF (Caldas et al. 2018) use Shakespeare this way. The source is
a text in which each speech begins with a line ``ROLE:`` and a blank line follows it. The plays are
not told apart in such a text, so a name that occurs in several (``Servant``) is one client.
"""

from __future__ import annotations

from pathlib import Path
from typing import Literal

import numpy as np
import numpy.typing as npt
import torch

from fedsim.data import transforms
from fedsim.data.dataset import Dataset, Split, make_dataset
from fedsim.errors import ConfigError, DataError

Ints = npt.NDArray[np.int64]

PRINTABLE = "\n" + "".join(chr(code) for code in range(32, 127))


def shakespeare(
    *,
    path: Path | str | None = None,
    seq_len: int = 80,
    stride: int | None = None,
    target: Literal["next", "last"] = "next",
    vocabulary: Literal["file", "printable"] = "file",
    test_fraction: float = 0.2,
) -> Dataset:
    """Windows of characters, one client per role.

    A role's speeches are joined in their order; its last `test_fraction` characters become the test
    set, so no test character is seen in training. A role whose training text is shorter than one
    window and its target (``seq_len + 1`` characters) is left out.

    Args:
        path: the text, or a folder that holds it as ``input.txt``. Nothing is fetched.
        seq_len: T, characters of a window.
        stride: characters from one window to the next; `seq_len` (no overlap) when None. LEAF uses
            1, which makes seq_len times as many examples.
        target: ``next``: [n, T], the character that follows each position; ``last``: [n], only the
            one that follows the window, as in LEAF.
        vocabulary: ``file``: the characters that occur, in code point order; ``printable``: newline
            and the 95 printable ASCII characters, known without looking at anyone's text.
        test_fraction: in [0, 1); 0 for no test set.

    Raises:
        DataError: no file (001), not readable as dialogue (013), a character outside the vocabulary
            (014).
        ConfigError: FS-DAT-011, a parameter out of range.
    """
    stride = seq_len if stride is None else stride
    _check_parameters(seq_len, stride, target=target, vocabulary=vocabulary, test_fraction=test_fraction)
    file = _find(path)
    text = _read(file)
    speeches = _by_role(text, file)
    characters = "".join(sorted(set(text))) if vocabulary == "file" else PRINTABLE
    codes = {role: _encode(speech, characters, file=file, role=role) for role, speech in speeches.items()}

    train: list[tuple[Ints, Ints]] = []
    test: list[tuple[Ints, Ints]] = []
    names: list[str] = []
    for role, sequence in codes.items():
        cut = len(sequence) - round(len(sequence) * test_fraction)
        mine = _windows(sequence[:cut], seq_len, stride=stride, target=target)
        if len(mine[0]):
            names.append(role)
            train.append(mine)
            test.append(_windows(sequence[cut:], seq_len, stride=stride, target=target))
    if not train:
        raise DataError(
            "no role speaks enough for one training example",
            code="FS-DAT-013",
            where=str(file),
            why=f"{len(codes)} roles; one example takes {seq_len + 1} characters",
            hint="lower data.seq_len",
        )
    return make_dataset(
        "shakespeare",
        "next-token" if target == "next" else "classification",
        train=_joined(train),
        test=_joined(test) if sum(len(part[0]) for part in test) else None,
        transforms=transforms.identity(),
        classes=len(characters),
        owners=np.repeat(np.arange(len(train)), [len(part[0]) for part in train]).astype(np.int64),
        owner_names=tuple(names),
        label_names=tuple(characters),
        where=str(file),
    )


def _check_parameters(
    seq_len: int, stride: int, *, target: str, vocabulary: str, test_fraction: float
) -> None:
    wrong = {
        f"seq_len = {seq_len} is not positive": seq_len < 1,
        f"stride = {stride} is not positive": stride < 1,
        f"target = {target!r} is neither 'next' nor 'last'": target not in ("next", "last"),
        f"vocabulary = {vocabulary!r} is neither 'file' nor 'printable'": (
            vocabulary not in ("file", "printable")
        ),
        f"test_fraction = {test_fraction} is not in [0, 1)": not 0.0 <= test_fraction < 1.0,
    }
    for problem, applies in wrong.items():
        if applies:
            raise ConfigError(
                problem,
                code="FS-DAT-011",
                where="data",
                hint="fedsim plugins show shakespeare lists parameters and ranges",
            )


def _find(path: Path | str | None) -> Path:
    if path is None:
        raise DataError(
            "shakespeare needs a text",
            code="FS-DAT-001",
            where="data.path",
            why="nothing is fetched for it and no path is given",
            hint="set data.path to a folder with input.txt, or to a text file of ROLE: and lines",
        )
    given = Path(path).expanduser()
    file = given / "input.txt" if given.is_dir() else given
    if not file.is_file():
        raise DataError(
            f"there is no text at {str(path)!r}",
            code="FS-DAT-001",
            where="data.path",
            why="it is a folder without input.txt" if given.is_dir() else "nothing is there",
            hint="data.path names a text file, or a folder that holds it as input.txt",
        )
    return file


def _read(file: Path) -> str:
    try:
        return file.read_text(encoding="utf-8")
    except UnicodeDecodeError as error:
        raise DataError(
            "the text is not UTF-8",
            code="FS-DAT-013",
            where=f"{file}, byte {error.start}",
            why=error.reason,
            hint="convert the file to UTF-8",
        ) from error


def _by_role(text: str, file: Path) -> dict[str, str]:
    """Role to everything it says, speeches joined by newlines, roles in order of appearance."""
    speeches: dict[str, list[str]] = {}
    for block in text.split("\n\n"):
        head, _, speech = block.strip("\n").partition("\n")
        if not head.strip():
            continue
        if not head.endswith(":"):
            line = text[: text.index(block)].count("\n") + 1
            raise DataError(
                "a speech has no role",
                code="FS-DAT-013",
                where=f"{file}, near line {line}",
                why=f"the block begins with {head[:40]!r}",
                hint="begin every speech with a line 'ROLE:' and leave a blank line after it",
            )
        speeches.setdefault(head[:-1], []).append(speech)
    return {role: "\n".join(parts) for role, parts in speeches.items()}


def _encode(speech: str, characters: str, *, file: Path, role: str) -> Ints:
    """int64 [len(speech)], positions in the vocabulary."""
    points = np.array([ord(c) for c in characters], dtype=np.int64)  # ascending
    text = np.frombuffer(speech.encode("utf-32-le"), dtype="<u4").astype(np.int64)
    codes = np.searchsorted(points, text).clip(max=len(points) - 1)
    foreign = np.flatnonzero(points[codes] != text)
    if len(foreign):
        raise DataError(
            f"character {speech[foreign[0]]!r} is not in the vocabulary",
            code="FS-DAT-014",
            where=f"{file}, role {role}",
            why=f"{len(foreign)} such characters in what this role says",
            hint="use vocabulary = 'file', or replace these characters",
        )
    return codes.astype(np.int64)


def _windows(sequence: Ints, seq_len: int, *, stride: int, target: str) -> tuple[Ints, Ints]:
    """Inputs [n, T] and targets [n, T] or [n]; n = 0 when the text is too short."""
    if len(sequence) <= seq_len:
        empty = np.zeros((0, seq_len), dtype=np.int64)
        return empty, empty if target == "next" else empty[:, 0]
    spans = np.lib.stride_tricks.sliding_window_view(sequence, seq_len + 1)[::stride]
    return spans[:, :-1], spans[:, 1:] if target == "next" else spans[:, -1]


def _joined(parts: list[tuple[Ints, Ints]]) -> Split:
    inputs = np.concatenate([part[0] for part in parts])
    targets = np.concatenate([part[1] for part in parts])
    return Split(torch.from_numpy(inputs), torch.from_numpy(targets))
