"""Pieces of an HTML page, every text escaped."""

from __future__ import annotations

import html
import re
from collections.abc import Iterable, Mapping, Sequence

STYLE = """
:root { color-scheme: light dark;
  --paper: #ffffff; --ground: #f3f4f6; --ink: #1c1f23; --muted: #5b6470; --grid: #d9dce1;
  --blue: #0072b2; --vermillion: #d55e00; --green: #007a5a; --purple: #a8508a; --amber: #b57a00;
  --sky: #56b4e9; }
@media (prefers-color-scheme: dark) { :root {
  --paper: #1b1f24; --ground: #12151a; --ink: #e8eaed; --muted: #a3abb5; --grid: #3a414a;
  --blue: #56b4e9; --vermillion: #f08a4b; --green: #3fc79a; --purple: #dd9cc0; --amber: #e6b04a;
  --sky: #3d8fc0; } }
* { box-sizing: border-box; }
body { margin: 0 auto; padding: 1.2rem; max-width: 76rem; background: var(--ground); color: var(--ink);
  font: 1rem/1.5 system-ui, sans-serif; overflow-wrap: anywhere; }
h1 { font-size: 1.5rem; line-height: 1.25; margin: 0 0 .3rem; }
h2 { font-size: 1.15rem; margin: 2rem 0 .6rem; }
h3 { font-size: 1rem; margin: 0 0 .4rem; }
p { margin: .3rem 0; }
.quiet { color: var(--muted); font-size: .9rem; }
.mark { display: inline-block; padding: .05rem .6rem; border: 2px solid; border-radius: 1rem;
  font-weight: 600; font-size: .9rem; }
.good { color: var(--green); } .bad { color: var(--vermillion); } .fair { color: var(--blue); }
.tiles { display: grid; gap: .7rem; grid-template-columns: repeat(auto-fit, minmax(9.5rem, 1fr));
  margin: 1rem 0; padding: 0; list-style: none; }
.tiles li, .card { background: var(--paper); border: 1px solid var(--grid); border-radius: .6rem;
  padding: .7rem .9rem; }
.tiles b { display: block; font-size: 1.35rem; line-height: 1.2; }
.cards { display: grid; gap: .9rem; grid-template-columns: repeat(auto-fit, minmax(min(100%, 23rem), 1fr)); }
.card { margin: 0; min-width: 0; }
.wide { grid-column: 1 / -1; }
.scroll { overflow-x: auto; }
.card svg { display: block; width: 100%; height: auto; max-height: 24rem; }
.wide svg { min-width: 34rem; max-height: 27rem; }
table { border-collapse: collapse; width: 100%; font-size: .9rem; font-variant-numeric: tabular-nums; }
th, td { text-align: left; vertical-align: top; padding: .25rem .8rem .25rem 0;
  border-bottom: 1px solid var(--grid); }
th { font-weight: 600; white-space: nowrap; }
td { min-width: 3.5rem; }
.num { text-align: right; }
table.pairs th { font-weight: 400; color: var(--muted); width: 12rem; white-space: normal; }
details { margin-top: .5rem; }
summary { cursor: pointer; color: var(--muted); font-size: .9rem; }
pre { background: var(--paper); border: 1px solid var(--grid); border-radius: .6rem; padding: .8rem;
  overflow-x: auto; font-size: .85rem; margin: 0; overflow-wrap: normal; }
:focus-visible { outline: 3px solid var(--blue); outline-offset: 2px; }
@media print { body { background: none; max-width: none; } .card { break-inside: avoid; } }
"""


def text(value: object) -> str:
    """Any text as it can stand in HTML, inside or outside quotes; control characters become ``?``."""
    plain = re.sub(r"[\x00-\x08\x0b-\x1f\x7f-\x9f\ud800-\udfff\u202a-\u202e\u2066-\u2069]", "?", str(value))
    return html.escape(plain, quote=True)


def document(title: str, body: str) -> str:
    """A whole page. Its policy forbids every request and every script, should one slip in."""
    policy = "default-src 'none'; style-src 'unsafe-inline'; img-src data:"
    return (
        '<!DOCTYPE html>\n<html lang="en"><head><meta charset="utf-8">\n'
        f'<meta http-equiv="Content-Security-Policy" content="{policy}">\n'
        '<meta name="viewport" content="width=device-width, initial-scale=1">\n'
        f"<title>{text(title)}</title>\n<style>{STYLE}</style></head>\n<body>\n{body}\n</body></html>\n"
    )


def table(header: Sequence[str], rows: Iterable[Sequence[object]], *, numbers: Sequence[int] = ()) -> str:
    """A table; `numbers` are the columns to align on the right."""
    right = [' class="num"' if column in numbers else "" for column in range(len(header))]
    head = "".join(f'<th scope="col"{r}>{text(name)}</th>' for name, r in zip(header, right, strict=True))
    body = "\n".join(
        "<tr>" + "".join(f"<td{r}>{text(v)}</td>" for v, r in zip(row, right, strict=True)) + "</tr>"
        for row in rows
    )
    return f'<div class="scroll"><table><thead><tr>{head}</tr></thead>\n<tbody>{body}</tbody></table></div>'


def pairs(entries: Mapping[str, object]) -> str:
    """Names and values, one pair a line."""
    rows = "\n".join(
        f'<tr><th scope="row">{text(name)}</th><td>{text(value)}</td></tr>' for name, value in entries.items()
    )
    return f'<div class="scroll"><table class="pairs"><tbody>{rows}</tbody></table></div>'


def tiles(entries: Sequence[tuple[str, str, str]]) -> str:
    """Large values with a name above and a remark below: (name, value, remark)."""
    cells = "".join(
        f'<li><span class="quiet">{text(name)}</span><b>{text(value)}</b>'
        f'<span class="quiet">{text(remark)}</span></li>'
        for name, value, remark in entries
    )
    return f'<ul class="tiles">{cells}</ul>'


def folded(summary: str, content: str) -> str:
    """Content that opens on request."""
    return f"<details><summary>{text(summary)}</summary>{content}</details>"


def card(title: str, content: str, *, caption: str = "", wide: bool = False) -> str:
    """A picture with its title and a sentence on how to read it."""
    size = " wide" if wide else ""
    below = f'<p class="quiet">{text(caption)}</p>' if caption else ""
    return (
        f'<section class="card{size}"><h3>{text(title)}</h3>'
        f'<div class="scroll">{content}</div>{below}</section>'
    )
