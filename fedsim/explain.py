"""The page of each error code: what it means and what to do.

One source, ``error_pages.toml``; ``docs/errors.md`` is written from it by
``fedsim explain --markdown > docs/errors.md``.
"""

from __future__ import annotations

import difflib
import textwrap
import tomllib
from functools import cache
from importlib import resources
from typing import NamedTuple

from fedsim.errors import ConfigError

AREAS = {
    "CFG": ("Configuration and command line", 2),
    "REG": ("Plugins", 2),
    "DAT": ("Data", 2),
    "MOD": ("Models", 2),
    "RUN": ("Runs whose outcome is failure", 1),
    "SWP": ("Sweeps", 2),
    "SRV": ("The coordinator", 2),
    "LED": ("The coordinator's ledger and files", 6),
    "SEC": ("Keys, certificates and permissions", 3),
    "CLI": ("The client on a device", 2),
    "WIR": ("What crosses the network", 1),
    "INT": ("Interrupted runs", 5),
    "ENV": ("The machine: disk, memory, permissions, extras", 6),
    "BUG": ("Mistakes of fedsim itself", 70),
}
"""Middle part of a code -> what it is about and the exit code that goes with it."""


class Page(NamedTuple):
    """One error code.

    Args:
        code: such as ``FS-CFG-004``.
        title: in a few words.
        means: what happened; remedy: what to do.
        exit_code: of the program.
    """

    code: str
    title: str
    means: str
    remedy: str
    exit_code: int

    def lines(self) -> list[str]:
        """The page for a terminal of 80 columns."""
        wrapped = [*textwrap.wrap(self.means, 78), "", *textwrap.wrap(f"What to do: {self.remedy}", 78)]
        return [f"{self.code}: {self.title} (exit code {self.exit_code})", "", *wrapped]


@cache
def pages() -> tuple[Page, ...]:
    """Every page, in the order of `AREAS` and then of the numbers."""
    text = (resources.files("fedsim") / "error_pages.toml").read_text(encoding="utf-8")
    found = []
    for code, page in tomllib.loads(text).items():
        exit_code = page.get("exit_code", AREAS[_area(code)][1])
        found.append(Page(code, page["title"], page["means"], page["remedy"], exit_code))
    order = list(AREAS)
    return tuple(sorted(found, key=lambda p: (order.index(_area(p.code)), p.code)))


def page(code: str) -> Page:
    """The page of one code; ``cfg-4`` and ``FS-CFG-004`` are the same.

    Raises:
        ConfigError: FS-CFG-021, there is no such code.
    """
    wanted = _normal(code)
    known = {p.code: p for p in pages()}
    if wanted not in known:
        near = difflib.get_close_matches(wanted, known, n=3)
        raise ConfigError(
            f"there is no error code {code!r}",
            code="FS-CFG-021",
            hint=f"did you mean {' or '.join(near)}?" if near else "fedsim explain lists every code",
        )
    return known[wanted]


def as_markdown() -> str:
    """All pages as ``docs/errors.md``."""
    parts = [
        "# Error codes",
        "",
        "Every error names a code; `fedsim explain CODE` prints its entry of this list. The exit code of the",
        "program goes with the kind of error.",
    ]
    area = ""
    for p in pages():
        if _area(p.code) != area:
            area = _area(p.code)
            title, exit_code = AREAS[area]
            parts += ["", f"## {title} (`FS-{area}`, exit code {exit_code})"]
        exception = "" if p.exit_code == AREAS[area][1] else f" Exit code {p.exit_code}."
        parts += [
            "",
            f"### {p.code}: {p.title}",
            "",
            f"{p.means}{exception}",
            "",
            f"**What to do:** {p.remedy}",
        ]
    return "\n".join(parts) + "\n"


def _area(code: str) -> str:
    return code.split("-")[1]


def _normal(code: str) -> str:
    parts = code.strip().upper().removeprefix("FS-").split("-")
    return f"FS-{parts[0]}-{parts[1].zfill(3)}" if len(parts) == 2 else code.strip().upper()
