"""Labels of nodes, and the expressions by which runs select nodes.

    site in {a, b} and gpu and not mobile
    (site = a or site = b) and memory != small

``and`` binds tighter than ``or``, ``not`` tighter than both. A name alone holds where the label is there and
is not ``false``; ``name`` stands for the node's own name. Words that are not plain, and words of the
language itself, are written in quotes. An expression is read by the small parser below and nothing else:
no part of it is ever executed.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping
from typing import NamedTuple

from fedsim.errors import ConfigError
from fedsim.schema import shown

Labels = Mapping[str, str]
Test = Callable[[Labels], bool]

LONGEST_EXPRESSION = 1_000
MOST_LABELS = 64
_DEEPEST = 32
_NAME = re.compile(r"[A-Za-z0-9_][A-Za-z0-9._-]{0,62}")
_NODE_ID = re.compile(r"[0-9a-fA-F]{16}")
_OWN = "name"
_KEYWORDS = frozenset({"and", "or", "not", "in"})
_TOKEN = re.compile(
    r"""\s*(?:(?P<word>[A-Za-z0-9_][A-Za-z0-9._-]*)|(?P<quoted>"[^"]*"|'[^']*')|(?P<sign>!=|[=(){},]))"""
)


def check_name(name: str) -> str:
    """`name` unchanged, if a node may be called so.

    Raises:
        ConfigError: FS-SEC-007.
    """
    if not _NAME.fullmatch(name):
        raise _wrong(
            "a node cannot have this name",
            shown(name[:80]),
            "a name is made of letters, digits, . _ - of ASCII, at most 63 of them",
        )
    if _NODE_ID.fullmatch(name):
        raise _wrong("a node cannot have this name", name, "it looks like the identifier of another node")
    return name


def check_labels(labels: Labels) -> dict[str, str]:
    """`labels` as a dictionary, if nodes may carry them.

    Raises:
        ConfigError: FS-SEC-007.
    """
    if len(labels) > MOST_LABELS:
        raise _wrong("there are too many labels", str(len(labels)), f"a node has at most {MOST_LABELS}")
    for key, value in labels.items():
        if not _NAME.fullmatch(key) or not (value == "" or _NAME.fullmatch(value)):
            text = f"{shown(key[:80])} = {shown(value[:80])}"
            why = "names and values are made of letters, digits, . _ - of ASCII, at most 63 of them"
            raise _wrong("a label cannot be used", text, why)
        if key == _OWN:
            raise _wrong("a label cannot be used", key, "in expressions it stands for the node's own name")
    return dict(labels)


def parse(expression: str) -> Test:
    """The test of a label expression; an empty one holds for every node.

    Raises:
        ConfigError: FS-SEC-008, it does not follow the grammar, is too long or too deep.
    """
    if len(expression) > LONGEST_EXPRESSION:
        why = f"it has {len(expression):,} characters, at most {LONGEST_EXPRESSION:,} are read"
        raise ConfigError("a label expression is too long", code="FS-SEC-008", where="nodes", why=why)
    if not expression.strip():
        return lambda labels: True
    return _Parser(expression).whole()


def labels_with_name(labels: Labels, name: str) -> dict[str, str]:
    """What an expression is tested on."""
    return {**labels, _OWN: name}


class _Token(NamedTuple):
    """A piece of an expression; `kind` is word, quoted, sign or end."""

    kind: str
    text: str
    place: int


class _Parser:
    def __init__(self, expression: str) -> None:
        self._expression = expression
        self._tokens = self._split()
        self._next = 0
        self._depth = 0

    def whole(self) -> Test:
        test = self._either()
        if self._here.kind != "end":
            raise self._error("and, or, or the end")
        return test

    def _split(self) -> list[_Token]:
        tokens, place, text = [], 0, self._expression.rstrip()
        while place < len(text):
            found = _TOKEN.match(text, place)
            if found is None:
                rest = text[place:].lstrip()
                raise self._error_at(len(text) - len(rest), rest[0], "a name, a sign or a quoted text")
            kind = str(found.lastgroup)
            piece = found.group(kind)
            begin = found.start(kind)
            tokens.append(_Token(kind, piece[1:-1] if kind == "quoted" else piece, begin))
            place = found.end()
        return [*tokens, _Token("end", "", len(text))]

    @property
    def _here(self) -> _Token:
        return self._tokens[self._next]

    def _take(self, text: str) -> bool:
        """Go on if the next piece is this sign or keyword."""
        token = self._here
        if token.kind in ("word", "sign") and token.text == text:
            self._next += 1
            return True
        return False

    def _need(self, text: str) -> None:
        if not self._take(text):
            raise self._error(text)

    def _either(self) -> Test:
        tests = [self._both()]
        while self._take("or"):
            tests.append(self._both())
        return tests[0] if len(tests) == 1 else lambda labels: any(test(labels) for test in tests)

    def _both(self) -> Test:
        tests = [self._negated()]
        while self._take("and"):
            tests.append(self._negated())
        return tests[0] if len(tests) == 1 else lambda labels: all(test(labels) for test in tests)

    def _negated(self) -> Test:
        negations = 0
        while self._take("not"):
            negations += 1
        test = self._group()
        return (lambda labels: not test(labels)) if negations % 2 else test

    def _group(self) -> Test:
        if not self._take("("):
            return self._comparison()
        self._depth += 1
        if self._depth > _DEEPEST:
            raise self._error(f"at most {_DEEPEST} parentheses inside each other")
        test = self._either()
        self._need(")")
        self._depth -= 1
        return test

    def _comparison(self) -> Test:
        name = self._word("the name of a label")
        if self._take("="):
            wanted = self._word("a value")
            return lambda labels: labels.get(name) == wanted
        if self._take("!="):
            unwanted = self._word("a value")
            return lambda labels: labels.get(name) != unwanted
        if self._take("in"):
            return self._one_of(name)
        if self._take("not"):
            self._need("in")
            inside = self._one_of(name)
            return lambda labels: not inside(labels)
        return lambda labels: labels.get(name, "false") != "false"

    def _one_of(self, name: str) -> Test:
        self._need("{")
        values = {self._word("a value")}
        while self._take(","):
            values.add(self._word("a value"))
        self._need("}")
        return lambda labels: labels.get(name) in values

    def _word(self, wanted: str) -> str:
        token = self._here
        if token.kind == "quoted" or (token.kind == "word" and token.text not in _KEYWORDS):
            self._next += 1
            return token.text
        raise self._error(wanted)

    def _error(self, wanted: str) -> ConfigError:
        token = self._here
        return self._error_at(token.place, token.text if token.kind != "end" else "the end", wanted)

    def _error_at(self, place: int, found: str, wanted: str) -> ConfigError:
        return ConfigError(
            "a label expression cannot be understood",
            code="FS-SEC-008",
            where=f"nodes = {shown(self._expression)}",
            why=f"at character {place + 1}: expected {wanted}, found {shown(found)}",
            hint="such as: site in {a, b} and gpu and not mobile",
        )


def _wrong(what: str, where: str, why: str) -> ConfigError:
    return ConfigError(what, code="FS-SEC-007", where=where, why=why, hint="choose another one")
