"""What holds for every test: one thread, no cache of the user's, no network, repeatable examples.

Modules shared by tests lie directly in this folder: ``from tests.federations import …``.
"""

from __future__ import annotations

import os

# Before anything loads gRPC: its handlers at a fork end the children that tests start with limits of
# their own, where a coordinator has run in this process before.
os.environ["GRPC_ENABLE_FORK_SUPPORT"] = "0"

# Before anything imports torch, which reads it once.
os.environ.setdefault("OMP_NUM_THREADS", "1")
os.environ["MPLBACKEND"] = "Agg"

import socket
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from hypothesis import settings

ROOT = Path(__file__).resolve().parents[1]

# No deadline: a busy machine is not a failure. In CI the examples are the same every time.
settings.register_profile("fedsim", deadline=None, print_blob=True)
settings.register_profile("ci", settings.get_profile("fedsim"), derandomize=True, database=None)
settings.load_profile("ci" if os.environ.get("CI") else "fedsim")


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Skip what needs a CUDA device where there is none."""
    marked = [item for item in items if item.get_closest_marker("gpu")]
    if not marked:
        return
    import torch

    if not torch.cuda.is_available():
        for item in marked:
            item.add_marker(pytest.mark.skip(reason="needs a CUDA device"))


@pytest.fixture(scope="session", autouse=True)
def clean_environment(tmp_path_factory: pytest.TempPathFactory) -> Iterator[None]:
    """A cache for these tests alone, and none of the settings of whoever runs them."""
    with pytest.MonkeyPatch.context() as patch:
        for name in list(os.environ):
            if name.startswith("FEDSIM_") and not name.startswith("FEDSIM_TEST_"):
                patch.delenv(name)
        patch.setenv("FEDSIM_CACHE", str(tmp_path_factory.mktemp("cache")))
        yield


@pytest.fixture(scope="session", autouse=True)
def loopback_only() -> Iterator[None]:
    """Refuse connections that would leave the machine."""
    connect = socket.socket.connect

    def guarded(self: socket.socket, address: Any) -> None:
        if self.family in (socket.AF_INET, socket.AF_INET6):
            host = str(address[0])
            if host not in ("localhost", "::1") and not host.startswith("127."):
                raise AssertionError(f"a test tried to reach {host}: tests use the loopback only")
        connect(self, address)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(socket.socket, "connect", guarded)
        yield


@pytest.fixture(scope="session")
def repository() -> Path:
    """The root of the source tree."""
    return ROOT


@pytest.fixture(scope="session")
def shared_data() -> Path:
    """The folder with the real data sets; tests that need it are skipped where it is absent."""
    named = os.environ.get("FEDSIM_TEST_DATA")
    folder = Path(named) if named else ROOT.parent / "shared" / "data"
    if not folder.is_dir():
        pytest.skip(f"no real data in {folder}: set FEDSIM_TEST_DATA to a folder with mnist/, cifar10/, …")
    return folder
