"""Texts of others on a terminal and in a log."""

from __future__ import annotations

import pytest

from fedsim.printable import printable, printable_lines


@pytest.mark.parametrize(
    ("text", "shown"),
    [
        ("plain text, é and 漢字", "plain text, é and 漢字"),
        ("\x1b[2Jgone", "\\x1b[2Jgone"),
        ("a\r\nforged line", "a\\r\\nforged line"),
        ("\x9b31m", "\\x9b31m"),
        ("\u202egnp.exe", "\\u202egnp.exe"),
        ("nul\x00", "nul\\x00"),
        ("\udc80", "\\udc80"),
    ],
)
def test_what_has_power_over_a_terminal_is_written_out(text: str, shown: str) -> None:
    assert printable(text) == shown
    assert printable(text).isprintable()


def test_a_long_text_is_cut_and_lines_are_kept_apart() -> None:
    assert printable("x" * 50, longest=10) == "x" * 9 + "…"
    assert printable_lines("a\n\x1bb") == ["a", "\\x1bb"]
