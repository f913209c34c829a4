"""The tables of ``server.toml``: keys, types, defaults, and what each key means."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Literal

from pydantic import BeforeValidator, Field

from fedsim.config_sections import Section
from fedsim.connections import parse_address
from fedsim.units import Seconds, parse_bytes

KIB, MIB, GIB = 1024, 1024**2, 1024**3

Bytes = Annotated[int, BeforeValidator(lambda v: parse_bytes(v) if isinstance(v, str) else v)]
"""A number of bytes that may be written with a unit."""


def _an_address(text: str) -> str:
    return str(parse_address(text))


Listen = Annotated[str, BeforeValidator(lambda v: _an_address(v) if isinstance(v, str) else v)]


class ServerSection(Section):
    """Where the coordinator keeps its state, where it listens, and how it proves who it is."""

    state: Path = Path("fedsim-state")
    """Folder of database, objects and runs; on a local disk."""
    listen: Listen = "127.0.0.1:8470"
    """Address for clients and operators (gRPC)."""
    http: Listen = "127.0.0.1:8471"
    """Address for /metrics, /livez and /readyz."""
    http_token: Path | None = None
    """File whose content /metrics asks for as bearer token; needed where `http` is no loopback address."""
    cert: Path | None = None
    """Certificate of the coordinator, PEM; read again when the file changes."""
    cert_key: Path | None = None
    """Its private key."""
    client_ca: Path | None = None
    """Authority of client certificates; with it, clients without one are refused (mTLS)."""
    insecure: bool = False
    """Plain text; on loopback alone."""
    insecure_beyond_loopback: bool = False
    """Plain text elsewhere too: whoever reads the network reads models and tickets."""
    allow_anonymous: bool = False
    """Unknown keys are let in as clients without a token; on loopback alone."""
    manual_approval: bool = False
    """Whoever enrols, with a token or without, waits until an admin approves the key."""
    log_format: Literal["auto", "json", "text"] = "auto"
    """One JSON object per line, or text; auto writes text on a terminal."""
    log_level: Literal["debug", "info", "warning", "error"] = "info"
    """Least severe lines that are written."""


class LimitsSection(Section):
    """How much the coordinator takes on."""

    chunk_bytes: Annotated[Bytes, Field(ge=64 * KIB, le=3 * MIB)] = MIB
    """Payload of one message of a stream."""
    object_bytes: Annotated[Bytes, Field(ge=MIB)] = 8 * GIB
    """Largest model or update."""
    inline_bytes: Annotated[Bytes, Field(ge=0, le=3 * MIB)] = MIB
    """Objects up to this size travel inside the messages Offer and Submit."""
    concurrent_rpcs: Annotated[int, Field(ge=8)] = 2_000
    """Calls at a time, without those that wait for work."""
    parked_polls: Annotated[int, Field(ge=1)] = 10_000
    """Clients that may wait for work at a time."""
    uploads_per_node: Annotated[int, Field(ge=1)] = 2
    """Uploads of one client at a time."""
    uploads: Annotated[int, Field(ge=1)] = 64
    """Uploads of all clients at a time."""
    min_free_bytes: Annotated[Bytes, Field(ge=0)] = 10 * GIB
    """With less free on the disk, uploads wait and /readyz says no."""


class LeasesSection(Section):
    """How long a client may be silent."""

    seconds: Annotated[Seconds, Field(ge=1.0, le=86_400.0)] = 90.0
    """A task returns to the coordinator after so long without a heartbeat."""
    heartbeat_seconds: Annotated[Seconds, Field(ge=0.2, le=3_600.0)] = 20.0
    """How often a client says that it is there."""
    grace_seconds: Annotated[Seconds, Field(ge=0.0, le=86_400.0)] = 60.0
    """An answer so late still counts while its round is open."""
    max_task_seconds: Annotated[Seconds, Field(ge=1.0)] = 6 * 3_600.0
    """Hard wall of one task, however many heartbeats arrive."""


class DatabaseSection(Section):
    """Where the ledger lies."""

    url: Annotated[str | None, Field(repr=False)] = None
    """SQLAlchemy URL; none is SQLite in the state folder."""
