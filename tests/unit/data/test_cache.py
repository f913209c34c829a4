from __future__ import annotations

import os
import resource
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from fedsim.data import cache
from fedsim.errors import EnvironmentProblem


def test_the_folder_is_the_variable_then_xdg_then_the_home_folder(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.setenv("FEDSIM_CACHE", str(tmp_path / "named"))
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "shared"))
    monkeypatch.setenv("HOME", str(tmp_path / "home"))
    assert cache.folder() == tmp_path / "named"
    monkeypatch.delenv("FEDSIM_CACHE")
    assert cache.folder() == tmp_path / "shared" / "fedsim"
    monkeypatch.delenv("XDG_CACHE_HOME")
    assert cache.folder() == tmp_path / "home" / ".cache" / "fedsim"
    assert not list(tmp_path.iterdir())


def test_what_is_stored_is_fetched_with_its_metadata() -> None:
    place = cache.entry("set", cache.key("a"))
    tensors = {
        "images": torch.arange(24, dtype=torch.uint8).reshape(2, 3, 2, 2),
        "labels": torch.tensor([3, -1]),
    }
    cache.store(place, tensors, {"digest": "42"})
    found = cache.fetch(place)
    assert found is not None
    assert found[1] == {"digest": "42"}
    assert all(torch.equal(found[0][name], tensors[name]) for name in tensors)
    assert [file.name for file in place.parent.iterdir()] == [place.name]


def test_writing_into_a_fetched_tensor_does_not_reach_the_file() -> None:
    place = cache.entry("set", cache.key("a"))
    cache.store(place, {"x": torch.zeros(4)}, {})
    first = cache.fetch(place)
    assert first is not None
    first[0]["x"].fill_(7)
    second = cache.fetch(place)
    assert second is not None
    assert second[0]["x"].tolist() == [0, 0, 0, 0]


def test_an_absent_entry_is_none() -> None:
    assert cache.fetch(cache.entry("set", "0" * 32)) is None


def test_an_unreadable_entry_counts_as_absent_and_is_reported(
    caplog: pytest.LogCaptureFixture,
) -> None:
    place = cache.entry("set", cache.key("a"))
    cache.store(place, {"x": torch.zeros(100)}, {})
    place.write_bytes(place.read_bytes()[:200])
    assert cache.fetch(place) is None
    assert str(place) in caplog.text


def test_keys_differ_with_every_part_and_names_stay_inside_the_folder() -> None:
    assert cache.key("a", "b") != cache.key("ab") != cache.key("a", "c")
    place = cache.entry("../../etc/some set", cache.key("a"))
    assert place.parent == cache.folder() / "datasets"


def test_a_folder_that_cannot_be_made_is_one_error_that_names_the_remedies(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "file").write_text("in the way")
    monkeypatch.setenv("FEDSIM_CACHE", str(tmp_path / "file"))
    with pytest.raises(EnvironmentProblem) as caught:
        cache.store(cache.entry("set", cache.key("a")), {"x": torch.zeros(1)}, {})
    assert caught.value.code == "FS-DAT-030"
    assert "FEDSIM_CACHE" in str(caught.value)
    assert "data.cache = false" in str(caught.value)


def test_a_full_disk_leaves_nothing_behind(tmp_path: Path) -> None:
    script = """
import torch
from fedsim.data import cache
from fedsim.errors import EnvironmentProblem
try:
    cache.store(cache.entry("set", cache.key("a")), {"x": torch.zeros(1_000_000)}, {})
except EnvironmentProblem as error:
    print(error.code)
"""
    limited = subprocess.run(
        [sys.executable, "-c", script],
        env={**os.environ, "FEDSIM_CACHE": str(tmp_path / "full")},
        preexec_fn=lambda: resource.setrlimit(resource.RLIMIT_FSIZE, (100_000, 100_000)),
        capture_output=True,
        text=True,
        check=False,
    )
    assert limited.stdout == "FS-DAT-030\n", limited.stderr
    assert list((tmp_path / "full" / "datasets").iterdir()) == []
