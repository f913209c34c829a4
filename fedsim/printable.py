"""Texts of untrusted origin on a terminal and in a log: every character visible, none with power.

A name may hold an escape sequence that clears the screen, a line break that forges a line, or marks that
turn the direction of writing. None of them survives as itself; the text stays recognisable.
"""

from __future__ import annotations


def printable(text: str, *, longest: int = 8_000) -> str:
    """`text` with control characters, line breaks and marks of direction written as escapes.

    Args:
        longest: what is cut off behind so many characters is replaced by ``…``.
    """
    cut = text if len(text) <= longest else text[: longest - 1] + "…"
    if cut.isprintable():
        return cut
    return "".join(c if c.isprintable() else c.encode("unicode_escape").decode("ascii") for c in cut)


def printable_lines(text: str, *, longest: int = 8_000) -> list[str]:
    """The lines of `text`, each made `printable`."""
    return [printable(line, longest=longest) for line in text.splitlines()]
