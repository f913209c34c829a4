"""Names of runs and of their files: what a person typed, made safe for a file system."""

from __future__ import annotations

import re
import secrets
import unicodedata
from datetime import datetime

LONGEST = 60


def slug(name: str) -> str:
    """`name` as part of a file name: letters, digits, ``.``, ``_`` and ``-`` of ASCII, at most 60.

    Accents are taken off, everything else becomes ``-``; no slash, control character or leading dot
    survives, so that no name leads out of its folder or hides in it. Nothing left is ``run``.
    """
    ascii_name = unicodedata.normalize("NFKD", name).encode("ascii", "ignore").decode("ascii")
    dashed = re.sub(r"[^A-Za-z0-9._-]+", "-", ascii_name)
    dashed = re.sub(r"\.{2,}", ".", dashed)
    dashed = re.sub(r"-{2,}", "-", dashed)
    return dashed.strip(".-_")[:LONGEST].rstrip(".-_") or "run"


def folder_name(name: str, started: datetime) -> str:
    """``2025-01-31T14-05_digits-robust_7f3a``: when, what, and four digits to tell twins apart."""
    return f"{started:%Y-%m-%dT%H-%M}_{slug(name)}_{secrets.token_hex(2)}"


def round_file(round_index: int) -> str:
    """Name of a round's checkpoint, without ending: ``round-00005``."""
    return f"round-{round_index:05d}"


def check_file_name(name: str) -> str:
    """`name` unchanged.

    Raises:
        ValueError: it is no plain file name.
    """
    if not re.fullmatch(r"[A-Za-z0-9_][A-Za-z0-9._-]*", name):
        raise ValueError(f"{name!r} is not a plain file name")
    return name
