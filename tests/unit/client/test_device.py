"""Which device a client takes, and what it says of it."""

from __future__ import annotations

import pytest
import torch

from fedsim.client import device
from fedsim.errors import EnvironmentProblem


def test_auto_is_a_gpu_where_there_is_one(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    assert device.resolve("auto") == "cpu"
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    assert device.resolve("auto") == "cuda"


@pytest.mark.parametrize("name", ["cuda:7", "mps", "gpu", "cuda:x"])
def test_a_device_that_is_not_there_is_refused(monkeypatch: pytest.MonkeyPatch, name: str) -> None:
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
    with pytest.raises(EnvironmentProblem) as refused:
        device.resolve(name)
    assert refused.value.code == "FS-CLI-051"
    assert name in refused.value.what
    assert device.resolve("cuda:1") == "cuda:1"


def test_facts_of_the_processor_fit_this_machine() -> None:
    found = device.facts("cpu")
    assert found.device == "cpu"
    assert found.name
    assert 0 < found.memory_bytes < 1 << 50


def test_the_limit_of_a_container_bounds_the_memory(
    monkeypatch: pytest.MonkeyPatch, tmp_path: pytest.TempPathFactory
) -> None:
    from pathlib import Path

    group = Path(str(tmp_path))
    monkeypatch.setattr(device, "_CGROUP", group)
    free = device.free_memory()
    (group / "memory.max").write_text("1000000\n")
    (group / "memory.current").write_text("400000\n")
    assert device.free_memory() == 600_000
    (group / "memory.max").write_text("max\n")
    assert device.free_memory() > free // 2
