"""Calling the command line inside the test's own process."""

from __future__ import annotations

import json
from typing import Any, NamedTuple

import pytest

from fedsim.cli import call


class Called(NamedTuple):
    """What one command line did."""

    code: int
    out: str
    err: str

    @property
    def document(self) -> dict[str, Any]:
        """The one JSON document on stdout."""
        found: dict[str, Any] = json.loads(self.out)
        return found


class Program:
    """The program ``fedsim`` for a test."""

    def __init__(self, capture: pytest.CaptureFixture[str]) -> None:
        self._capture = capture

    def __call__(self, *words: str) -> Called:
        self._capture.readouterr()
        code = call(words)
        out, err = self._capture.readouterr()
        return Called(code, out, err)

    def ended(self, *words: str, code: int = 0) -> tuple[str, str]:
        """stdout and stderr of a command line that ends with this exit code."""
        called = self(*words)
        assert called.code == code, f"exit {called.code}\n{called.out}\n{called.err}"
        assert "Traceback" not in called.err
        return called.out, called.err
