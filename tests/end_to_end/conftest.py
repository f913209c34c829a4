"""One deployment of real processes serves all tests that need one: starting it costs more than using it."""

from __future__ import annotations

from collections.abc import Iterator

import pytest

from tests.deployed import Deployment, deployment


@pytest.fixture(scope="session")
def fleet(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Deployment]:
    """Coordinator and clients; call `Deployment.ready` first in every test."""
    with deployment(tmp_path_factory.mktemp("fleet")) as found:
        yield found
