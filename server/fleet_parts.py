"""What the service for nodes is put together from."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from concurrent.futures import Executor
from dataclasses import dataclass
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from fedsim.identity import Key
    from fedsim.server.auth import Auth
    from fedsim.server.objects import Objects
    from fedsim.server.runs import Runs
    from fedsim.server.settings import ServerSettings
    from fedsim.server.telemetry import Telemetry
    from fedsim.server.uploads import Uploads


@dataclass(frozen=True, slots=True)
class FleetParts:
    """What the service works with.

    Args:
        key: of the server.
        incarnation: grows when a backup is restored.
        work: threads that compute; disk: threads that read and write.
        poll_seconds: a call for work is parked at most that long.
        idle_seconds: a stream without a byte for so long is cut.
        seen: told about once a second which nodes asked for work, and on what device each computes.
    """

    auth: Auth
    runs: Runs
    uploads: Uploads
    objects: Objects
    key: Key
    settings: ServerSettings
    telemetry: Telemetry
    work: Executor
    disk: Executor
    incarnation: int = 0
    poll_seconds: float = 25.0
    idle_seconds: float = 60.0
    seen: Callable[[Mapping[str, str]], None] = lambda devices: None
