from __future__ import annotations

import re
from pathlib import Path

import pytest

from fedsim import registry

PAGE = Path(__file__).parents[3] / "docs" / "data.md"


def test_the_python_examples_of_the_page_run(capsys: pytest.CaptureFixture[str]) -> None:
    blocks = re.findall(r"```python\n(.*?)```", PAGE.read_text(encoding="utf-8"), flags=re.S)
    assert len(blocks) == 2
    for block in blocks:
        exec(compile(block, str(PAGE), "exec"), {})
    printed = capsys.readouterr().out
    assert printed.startswith("20 ")
    assert "('north', 'south', 'west')" in printed


@pytest.mark.parametrize("kind", ["datasets", "partitioners"])
def test_the_page_lists_every_registered_name(kind: str) -> None:
    listed = set(re.findall(r"^\| `(\w+)`", PAGE.read_text(encoding="utf-8"), flags=re.M))
    own = {
        name for name in registry.names(kind) if registry.load(kind, name).__module__.startswith("fedsim.")
    }
    assert own <= listed
    assert len(own) >= 9
