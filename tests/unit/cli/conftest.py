"""The command line in a folder of its own."""

from __future__ import annotations

import sys
from pathlib import Path

import pytest

from tests.unit.cli.invoked import Program


@pytest.fixture
def fedsim(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> Program:
    """Call the program in an empty folder; returns exit code, stdout and stderr."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "path", list(sys.path))
    return Program(capsys)
